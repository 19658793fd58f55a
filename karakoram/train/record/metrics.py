"""What a run says of itself: a line of JSON per step, what happened besides, a progress bar, and other people's sinks.

OUT/metrics.jsonl   one line per step
OUT/events.jsonl    batches that were skipped, rollbacks, resumes: {"step": …, "event": …, …}; nothing is taken back
"""

import json
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, TextIO

from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn


class Sink(Protocol):
    """Where numbers go besides the files: see `sinks.py`."""

    def log(self, step: int, scalars: dict[str, float]) -> None:
        """The numbers of a step, by slash-separated names."""
        ...

    def close(self) -> None:
        """No more will come."""
        ...


class Metrics:
    """Use as a context manager; `step` after every step.

    elapsed_before_s, steps_before, progress_before are those of the parts before a resumed one. Lines of later steps
    are dropped: a killed run had gone on after its last checkpoint, and goes over those steps again.
    """

    def __init__(
        self,
        out: Path,
        elapsed_before_s: float,
        quiet: bool = False,
        steps_before: int = 0,
        sinks: Sequence[Sink] = (),
        progress_before: float = 0.0,
    ) -> None:
        self.out, self.sinks = out, sinks
        self._file = (out / "metrics.jsonl").open("a", buffering=1)
        self._events = _appending(out / "events.jsonl")
        self.back_to(steps_before)
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
        begun: Any = progress_before  # what was done before is no speed: the time left is told by this part
        self._bar = self._progress.add_task(
            "train", total=1.0, completed=begun, step=steps_before, loss=math.nan, speed=0.0
        )
        self._smooth: float | None = None

    def __enter__(self) -> "Metrics":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()
        self._file.close()
        self._events.close()
        for sink in self.sinks:
            sink.close()

    @property
    def elapsed_s(self) -> float:
        """Seconds of training so far, earlier parts included."""
        return time.monotonic() - self._start

    def step(self, progress: float, line: dict[str, Any]) -> None:
        """Record one step; `line` has at least step, loss, tokens_per_s."""
        self._file.write(json.dumps(_rounded(line)) + "\n")
        loss = line["loss"]
        if math.isfinite(loss):
            self._smooth = loss if self._smooth is None else 0.98 * self._smooth + 0.02 * loss
        self._progress.update(
            self._bar,
            completed=progress,
            step=line["step"],
            speed=line["tokens_per_s"],
            loss=math.nan if self._smooth is None else self._smooth,
        )
        for sink in self.sinks:
            sink.log(line["step"], _scalars(line))

    def event(self, step: int, event: str, say: bool = True, **details: Any) -> None:
        """Record what happened; `say` shows it above the progress bar, too."""
        self._events.write(json.dumps({"step": step, "event": event} | _rounded(details)) + "\n")
        if say:
            told = ", ".join(f"{name} {value}" for name, value in details.items())
            self._progress.console.print(f"step {step:,}: {event}{': ' + told if told else ''}", highlight=False)

    def back_to(self, steps: int) -> None:
        """Drop the lines of later steps: the run goes over them again."""
        path = self.out / "metrics.jsonl"
        kept = [line for line in path.read_text().splitlines() if _step(line) <= steps]
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text("".join(f"{line}\n" for line in kept))
        os.replace(partial, path)
        self._file.close()
        self._file = path.open("a", buffering=1)


def _appending(path: Path) -> TextIO:
    """Open to write behind what is there; a torn last line, of a run that was killed, is ended first."""
    file = path.open("a+", buffering=1)
    file.seek(max(0, file.tell() - 1))
    if file.read() not in ("", "\n"):
        file.write("\n")
    return file


def _step(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")  # the torn last line of a run that was killed


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.7g}") if math.isfinite(value) else str(value)
    if isinstance(value, dict):
        return {str(name): _rounded(inner) for name, inner in value.items()}
    return value


def _scalars(line: dict[str, Any], prefix: str = "") -> dict[str, float]:
    found: dict[str, float] = {}
    for name, value in line.items():
        if isinstance(value, dict):
            found |= _scalars(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[f"{prefix}{name}"] = float(value)
    return found
