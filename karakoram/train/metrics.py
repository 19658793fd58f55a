"""What a run says of itself: a line of JSON per step in metrics.jsonl, and a progress bar."""

import json
import os
import time
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn


class Metrics:
    """Use as a context manager; `step` after every step.

    elapsed_before_s, steps_before are those of the parts before a resumed one. Lines of later steps are dropped: a
    killed run had gone on after its last checkpoint, and goes over those steps again.
    """

    def __init__(self, path: Path, elapsed_before_s: float, quiet: bool = False, steps_before: int = 0) -> None:
        _keep_up_to(path, steps_before)
        self._file = path.open("a", buffering=1)
        self._start = time.monotonic() - elapsed_before_s
        self._progress = Progress(
            TextColumn("step {task.fields[step]:,}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("loss {task.fields[loss]:.4f} · {task.fields[speed]:,.0f} tokens/s ·"),
            TimeRemainingColumn(),
            TextColumn("left"),
            disable=quiet,
            speed_estimate_period=120.0,
        )
        self._bar = self._progress.add_task("train", total=1.0, step=steps_before, loss=float("nan"), speed=0.0)
        self._smooth: float | None = None

    def __enter__(self) -> "Metrics":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()
        self._file.close()

    @property
    def elapsed_s(self) -> float:
        """Seconds of training so far, earlier parts included."""
        return time.monotonic() - self._start

    def step(self, progress: float, line: dict[str, Any]) -> None:
        """Record one step; `line` has at least step, loss, tokens_per_s."""
        self._file.write(json.dumps({k: round(v, 6) if isinstance(v, float) else v for k, v in line.items()}) + "\n")
        loss = line["loss"]
        self._smooth = loss if self._smooth is None else 0.98 * self._smooth + 0.02 * loss
        self._progress.update(
            self._bar, completed=progress, step=line["step"], loss=self._smooth, speed=line["tokens_per_s"]
        )


def _keep_up_to(path: Path, steps: int) -> None:
    if not path.is_file():
        return
    partial = path.with_name(f".{path.name}.partial")
    with path.open() as before, partial.open("w") as after:
        after.writelines(line for line in before if 0 < _step_of(line) <= steps)
    os.replace(partial, path)


def _step_of(line: str) -> int:
    """The step of a line; 0 for one that was cut off."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return 0
