"""Where a run's numbers go besides its own files: TensorBoard, Weights & Biases.

Both come with the extra `sinks` and are imported when asked for. Training is worth more than its pictures: a sink that
fails warns once and hears no more, and the run goes on. metrics.jsonl has every number anyway.

    OUT/tensorboard/    event files: `tensorboard --logdir OUT`
    OUT/wandb.json      the run's id there, so that a resumed run goes on in the same one
    OUT/wandb/          what its client writes; all of it with WANDB_MODE=offline, `wandb sync` sends it later

Who is asked for the account: WANDB_API_KEY or `wandb login`, read by its client alone. The key is never passed on, and
is blotted out should a warning contain it.
"""

import json
import math
import os
import re
import secrets
import warnings
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from karakoram.errors import InputError
from karakoram.train.record.metrics import Sink

SINKS = ("tensorboard", "wandb")
_ID_FILE = "wandb.json"


def open_sinks(
    names: Sequence[str],
    out: Path,
    settings: Mapping[str, Any] | None = None,
    step: int = 0,
    project: str = "karakoram",
) -> list[Sink]:
    """The sinks of these names, each of which fails alone; `step` is the one that a resumed run goes on from.

    settings  JSON values, shown beside the numbers
    Raises InputError for an unknown name, and where what it needs is not installed.
    """
    unknown = [name for name in names if name not in SINKS]
    if unknown:
        raise InputError(f"There is no sink {unknown[0]!r}.", f"Sinks: {', '.join(SINKS)}.")
    opened: list[Sink] = []
    for name in dict.fromkeys(names):
        module = _required("torch.utils.tensorboard" if name == "tensorboard" else "wandb", name)
        sink = Guarded(name)
        if name == "tensorboard":
            sink.open(TensorBoard, module, out, step)
        else:
            sink.open(WeightsAndBiases, module, out, settings or {}, project)
        opened.append(sink)
    return opened


def _required(module: str, name: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise InputError(
            f"The sink {name} needs a package that is not installed.", "pip install 'karakoram[sinks]'"
        ) from error


class Guarded:
    """A sink that warns once when it fails, or is still given numbers once closed, and is silent from then on."""

    def __init__(self, name: str, sink: Sink | None = None) -> None:
        self.name, self.sink, self.closed = name, sink, False

    def open(self, make: Any, *arguments: Any) -> None:
        """Take `make(*arguments)` as the sink, if that works."""
        try:
            self.sink = make(*arguments)
        except Exception as error:  # noqa: BLE001  no network, no account, a full disk: none of it is worth the run
            self._give_up(error)

    def log(self, step: int, scalars: dict[str, float]) -> None:
        """As `Sink.log`; never raises."""
        if self.sink is None:
            if self.closed:  # by the stage before: its steps would run into this one's
                self.closed = False
                self._warn("it was closed before them; metrics.jsonl has them")
            return
        try:
            self.sink.log(step, scalars)
        except Exception as error:  # noqa: BLE001  see `open`
            self._give_up(error)

    def close(self) -> None:
        """As `Sink.close`; never raises."""
        sink, self.sink = self.sink, None
        if sink is None:
            return
        try:
            sink.close()
            self.closed = True
        except Exception as error:  # noqa: BLE001  see `open`
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self.sink = None
        self._warn(without_key(f"{type(error).__name__}: {error}")[:500])

    def _warn(self, why: str) -> None:
        warnings.warn(f"{self.name} gets no more numbers of this run, which goes on: {why}", RuntimeWarning, 4)


class TensorBoard:
    """Event files in OUT/tensorboard; what was logged there of `step` and later, before a resume, is purged."""

    def __init__(self, module: Any, out: Path, step: int) -> None:
        self.writer = module.SummaryWriter(str(out / "tensorboard"), purge_step=step + 1 if step else None)

    def log(self, step: int, scalars: dict[str, float]) -> None:
        """Every number is a curve of its own; slashes make groups."""
        for name, value in scalars.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class WeightsAndBiases:
    """One run there for one run here, resumed ones included. Numbers that are not finite are left out."""

    def __init__(self, module: Any, out: Path, settings: Mapping[str, Any], project: str) -> None:
        self.run = module.init(
            project=project, name=out.resolve().name, dir=str(out), id=_id(out), resume="allow",
            config=json.loads(json.dumps(dict(settings))),
        )  # fmt: skip
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")

    def log(self, step: int, scalars: dict[str, float]) -> None:
        """The step is a number beside the others: its own count may never go back, as a resumed run's steps do."""
        finite = {name: value for name, value in scalars.items() if math.isfinite(value)}
        self.run.log({**finite, "step": step})

    def close(self) -> None:
        self.run.finish()


def _id(out: Path) -> str:
    """The id of this run, drawn once and kept; a damaged file means a new one."""
    path = out / _ID_FILE
    try:
        found = json.loads(path.read_text())["id"]
        if re.fullmatch(r"[A-Za-z0-9_-]{1,64}", found):
            return found
    except (OSError, ValueError, KeyError, TypeError):
        pass
    drawn = secrets.token_hex(4)
    path.write_text(json.dumps({"id": drawn}) + "\n")
    return drawn


def without_key(text: str) -> str:
    """`text` with the account's key, and whatever looks like one, blotted out."""
    key = os.environ.get("WANDB_API_KEY", "").strip()
    if key:
        text = text.replace(key, "…")
    return re.sub(r"\b(?:[0-9a-f]{40,}|wandb_v\d+_\w{16,})\b", "…", text)
