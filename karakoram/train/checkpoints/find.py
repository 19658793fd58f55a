"""Where the checkpoints of a run lie, and which of them are complete."""

import re
import shutil
from contextlib import suppress
from pathlib import Path

from karakoram.errors import TrainingError

STATE_FILE = "state.json"
TENSORS_DIR = "model"
_NAME = re.compile(r"step-(\d{1,18})")
_PARTIAL = ".partial"
_ASIDE = ".replaced"


def checkpoints_dir(out: Path) -> Path:
    """Where a run in `out` keeps them."""
    return out / "checkpoints"


def path_of(out: Path, step: int) -> Path:
    """The checkpoint of a step: names sort as steps do up to 10^8."""
    return checkpoints_dir(out) / f"step-{step:08d}"


def step_of(path: Path) -> int:
    """The step that a checkpoint's name says. Raises TrainingError for another name."""
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise TrainingError(f"{path} is no checkpoint of a run.", "Their names are step- and a number.")
    return int(match[1])


def complete(out: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found = [path for path in checkpoints_dir(out).glob("step-*") if _NAME.fullmatch(path.name)]
    return sorted((path for path in found if (path / STATE_FILE).is_file()), key=step_of)


def newest(out: Path) -> Path | None:
    """The latest complete checkpoint of a run."""
    return next(reversed(complete(out)), None)


def partial_of(path: Path) -> Path:
    """The hidden name under which a checkpoint is written."""
    return path.with_name(f".{path.name}{_PARTIAL}")


def aside_of(path: Path) -> Path:
    """The hidden name of a checkpoint that another of the same step replaces."""
    return path.with_name(f".{path.name}{_ASIDE}")


def remove_leftovers(out: Path) -> None:
    """Clear what a killed save left; a checkpoint that was moved aside and not yet replaced comes back."""
    for aside in checkpoints_dir(out).glob(f".step-*{_ASIDE}"):
        path = aside.with_name(aside.name[1 : -len(_ASIDE)])
        if path.exists():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            aside.rename(path)
    for partial in checkpoints_dir(out).glob(f".step-*{_PARTIAL}"):
        shutil.rmtree(partial, ignore_errors=True)


def forget_old(out: Path, keep: int) -> None:
    """Remove all but the newest `keep` complete checkpoints, each under a hidden name: no half of it is ever seen."""
    for path in complete(out)[:-keep]:
        hidden = partial_of(path)  # if this is cut short, the next start removes it
        with suppress(OSError):  # one too many does no harm
            path.rename(hidden)
        shutil.rmtree(hidden, ignore_errors=True)
