"""The directory of a run: one trainer at a time, and one set of settings from its first step to its last.

    OUT/run.json   the settings that the run was started with; a resumed run must be given the same
    OUT/.lock      held while somebody trains here (an advisory lock: it ends with its process, however that ends)

Two trainers in one directory would remove each other's checkpoints, and a run resumed with another seed or schedule
would still end in a model that looks whole: both are refused before anything is written.
"""

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from karakoram.errors import TrainingError
from karakoram.train.checkpoints.find import newest
from karakoram.train.config import TrainConfig

SETTINGS_FILE = "run.json"
LOCK_FILE = ".lock"
_MAY_DIFFER = ("checkpoints", "held_out_steps")  # change no number that is trained


def settings_of(config: TrainConfig, **others: Any) -> dict[str, Any]:
    """What `open_run` compares: every field of the configuration, and what a recipe adds, as JSON values."""
    fields = {name: value for name, value in asdict(config).items() if name not in _MAY_DIFFER}
    return json.loads(json.dumps(fields | {"model": config.model.to_dict()} | others))


@contextmanager
def open_run(out: Path, settings: Mapping[str, Any], resume: bool) -> Iterator[None]:
    """Hold the directory `out`, made if need be, for one run with these settings.

    Raises TrainingError where another process trains in it; where it holds a checkpoint and `resume` is false; where
    `resume` is true and there is none, or the run was started with other settings (each is named). A run that was
    written without settings takes these.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise TrainingError(f"{out} is a file.", "Name a directory (--out DIR).") from error
    with _lock(out):
        _check(out, settings, resume)
        if not resume or not recorded_settings(out):
            _write(out / SETTINGS_FILE, settings)
        yield


def _check(out: Path, settings: Mapping[str, Any], resume: bool) -> None:
    checkpoint = newest(out)
    if not resume:
        if checkpoint is not None:
            raise TrainingError(
                f"{out} already holds a run, up to {checkpoint.name}.",
                "Go on with it by --resume, or begin another in another directory (--out DIR).",
            )
        return
    if checkpoint is None:
        raise TrainingError(f"There is no checkpoint to resume in {out}.", "Leave out --resume to begin anew.")
    started_with = recorded_settings(out)
    if started_with and (changes := _changes(started_with, settings)):
        raise TrainingError(
            f"The run in {out} was started with other settings: {'; '.join(changes)}.",
            "Give the settings that it was started with, or begin another run in another directory (--out DIR).",
        )


def recorded_settings(out: Path) -> dict[str, Any]:
    """The settings that the run in `out` was started with; empty where none are written down."""
    path = out / SETTINGS_FILE
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text())
        if not isinstance(found, dict):
            raise ValueError(f"it holds a {type(found).__name__}, no settings")
    except ValueError as error:
        raise TrainingError(
            f"{path} cannot be read: {error}.", f"Remove {path} and resume without its check."
        ) from error
    return found


def _changes(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    changes: list[str] = []
    for name in sorted({*before, *now}):
        old, new = before.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            changes += _changes(old, new, f"{prefix}{name}.")
        elif old != new:
            changes.append(f"{prefix}{name} was {json.dumps(old)}, now {json.dumps(new)}")
    return changes


def _write(path: Path, settings: Mapping[str, Any]) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(settings, indent=1) + "\n")
    os.replace(partial, path)


@contextmanager
def _lock(out: Path) -> Iterator[None]:
    with (out / LOCK_FILE).open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            holder = file.read(20).strip() or "unknown"
            raise TrainingError(
                f"Another training run is going on in {out} (process {holder}).",
                "Wait for it or stop it, or train in another directory (--out DIR).",
            ) from error
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
