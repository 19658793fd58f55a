"""A run's files, read as they are found: torn, repeated, with NaN, from an older trainer, or still being written.

Nothing here trusts a file: lines are read one by one and bounded, only known names are kept, numbers are checked, and
what cannot be read is counted and told. A step that comes again (the run was resumed from before it) counts as it came
last, and everything after it that had been recorded is forgotten: those steps were undone.
"""

import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from karakoram.errors import InputError
from karakoram.train.report.series import Column

METRICS_FILE, EVENTS_FILE, SETTINGS_FILE = "metrics.jsonl", "events.jsonl", "run.json"

SCALARS = frozenset(
    "loss held_out_loss rate_share learning_rate gradient_norm clip_norm_share tokens tokens_per_s mfu elapsed_s"
    " max_logit clipped_heads clip_fraction max_vio max_vio_global dead_experts".split()
)
BY_NAME = frozenset({"max_logit_by_layer", "update_rms", "load_entropy"})

_MOST_LINE_BYTES = 1 << 24  # K2's loads, 60 layers x 384 experts, take 0.2 MB
_MOST_EVENT_BYTES = 1 << 16
_MOST_SETTINGS_BYTES = 1 << 24
_MOST_NAMES = 1024  # layers of one quantity, as many as a configuration may have
_MOST_EXPERTS = 16_384
_MOST_STEP = 2**53  # beyond it a float, which the axis is drawn with, skips integers
_KEPT_LOADS = 200  # windows; beyond them every other one is forgotten
_KEPT_EVENTS = 20_000

Loads = dict[int, list[float]]  # by layer: tokens of each expert


@dataclass
class Run:
    """One run. `columns` are named as in metrics.jsonl, nested ones NAME/INNER; `loads` are (step, loads), ascending.

    notes  what a reader should be told about the files
    """

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    columns: dict[str, Column] = field(default_factory=dict)
    loads: list[tuple[int, Loads]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    skipped_steps: list[int] = field(default_factory=list)
    last_step: int = 0
    repeated_steps: int = 0
    notes: list[str] = field(default_factory=list)

    def inner(self, name: str) -> dict[str, Column]:
        """The columns NAME/INNER by INNER, layers by number."""
        found = {key[len(name) + 1 :]: column for key, column in self.columns.items() if key.startswith(f"{name}/")}
        return dict(sorted(found.items(), key=lambda item: (not item[0].isdigit(), item[0].zfill(6))))

    def newest(self, name: str) -> float:
        """The last finite value of a column; NaN without one."""
        return self.columns[name].newest if name in self.columns else math.nan

    def setting(self, *names: str) -> Any:
        """The first of these dotted names that run.json has."""
        for name in names:
            found: Any = self.settings
            for part in name.split("."):
                found = found.get(part) if isinstance(found, dict) else None
            if found is not None:
                return found
        return None


def find_runs(directory: Path) -> list[Path]:
    """The runs of a directory: itself, and the parts one folder below it, the one that was written to last at the end.

    Raises InputError where there is none.
    """
    if not directory.is_dir():
        raise InputError(f"{directory} is not a directory.", "Name the directory that k2 train wrote, as runs/nano.")
    below = sorted(path for path in directory.iterdir() if path.is_dir() and not path.name.startswith("."))
    found = [path for path in (directory, *below) if _is_run(path)]
    if not found:
        raise InputError(
            f"{directory} holds no run: there is no {METRICS_FILE} in it or in a folder of it.",
            "Name the directory that k2 train wrote, as runs/nano.",
        )
    return sorted(found, key=lambda path: (_written_ns(path), path != directory, path.name))


def _is_run(path: Path) -> bool:
    settings = path / SETTINGS_FILE
    return (path / METRICS_FILE).is_file() or settings.is_file()


def _written_ns(path: Path) -> int:
    file = path / METRICS_FILE
    return file.stat().st_mtime_ns if file.is_file() else 0


def read_run(directory: Path, name: str = "") -> Run:
    """What `directory` says of its run; `Run.notes` tells what could not be read."""
    run = Run(name or directory.name or str(directory))
    run.settings = _settings(directory / SETTINGS_FILE, run.notes)
    for line in _lines(directory / METRICS_FILE, _MOST_LINE_BYTES, run.notes):
        _add(run, line)
    for line in _lines(directory / EVENTS_FILE, _MOST_EVENT_BYTES, run.notes):
        if len(run.events) < _KEPT_EVENTS and isinstance(line.get("event"), str):
            run.events.append(line)
    if run.repeated_steps:
        run.notes.append(f"The run was resumed from earlier steps: {run.repeated_steps:,} steps were gone over again.")
    broken = {step for column in run.columns.values() for step in column.broken_steps}
    if broken:
        first = ", ".join(f"{step:,}" for step in sorted(broken)[:5])
        more = ", …" if len(broken) > 5 else ""
        many = f"{len(broken):,} steps" if len(broken) > 1 else "one step"
        run.notes.append(f"Values at {many} ({first}{more}) are no finite numbers; the curves leave them out.")
    return run


def _settings(path: Path, notes: list[str]) -> dict[str, Any]:
    if not path.is_file():
        notes.append(f"There is no {path.name}: the settings are not known.")
        return {}
    try:
        if os.path.getsize(path) > _MOST_SETTINGS_BYTES:
            raise ValueError(f"it has more than {_MOST_SETTINGS_BYTES:,} bytes")
        found = json.loads(path.read_bytes())
        if not isinstance(found, dict):
            raise ValueError("it is no JSON object")
    except (ValueError, RecursionError) as error:
        notes.append(f"{path.name} cannot be read: {str(error)[:200]}.")
        return {}
    return found


def _lines(path: Path, most_bytes: int, notes: list[str]) -> Iterator[dict[str, Any]]:
    """The JSON objects of a file, one a line, that have a step; a torn last line is no mistake: it is being written."""
    if not path.is_file():
        return
    unread, inside = 0, False  # inside: a line that is too long goes on
    with path.open("rb") as file:
        while raw := file.readline(most_bytes):
            torn, began_before = not raw.endswith(b"\n"), inside
            inside = torn and len(raw) == most_bytes
            if began_before:
                continue
            try:
                line = json.loads(raw)
            except (ValueError, RecursionError):
                line = None
            if isinstance(line, dict) and _is_step(line.get("step")):
                yield line
            elif raw.strip() and (inside or not torn):
                unread += 1
    if unread:
        many = f"{unread:,} lines" if unread > 1 else "A line"
        notes.append(f"{many} of {path.name} cannot be read; the rest is shown.")


def _is_step(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _MOST_STEP


def _add(run: Run, line: dict[str, Any]) -> None:
    step = line["step"]
    if step <= run.last_step and any(column.steps or column.broken_steps for column in run.columns.values()):
        _forget(run, step)
    run.last_step = step
    if line.get("skipped") is True:
        run.skipped_steps.append(step)
    for name, value in line.items():
        if name in SCALARS:
            _put(run, name, step, value)
        elif name in BY_NAME and isinstance(value, dict) and len(value) <= _MOST_NAMES:
            for inner, number in value.items():
                _put(run, f"{name}/{inner[:40]}", step, number)
        elif name == "loads":
            loads = _loads(value)
            if loads:
                run.loads.append((step, loads))
    if len(run.loads) > _KEPT_LOADS:
        run.loads = run.loads[:1] + run.loads[1:-1][1::2] + run.loads[-1:]


def _forget(run: Run, step: int) -> None:
    run.repeated_steps += run.last_step - step + 1
    for column in run.columns.values():
        column.back_to(step)
    run.loads = [(at, loads) for at, loads in run.loads if at < step]
    run.skipped_steps = [at for at in run.skipped_steps if at < step]


def _put(run: Run, name: str, step: int, value: Any) -> None:
    number = number_of(value)
    if number is None:
        return
    if name not in run.columns:
        if len(run.columns) >= len(SCALARS) + 2 * _MOST_NAMES:
            return
        run.columns[name] = Column()
    run.columns[name].add(step, number)


def number_of(value: Any) -> float | None:
    """A JSON value as a float; "nan", "inf" and "-inf" are how the trainer writes what JSON has no word for."""
    if isinstance(value, str) and value in ("nan", "inf", "-inf"):
        return float(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _loads(value: Any) -> Loads:
    """Layers by number; empty if anything in it is no load."""
    if not isinstance(value, dict) or not 0 < len(value) <= _MOST_NAMES:
        return {}
    found: Loads = {}
    for layer, counts in value.items():
        if not (
            layer.isdecimal() and len(layer) <= 4 and isinstance(counts, list) and 0 < len(counts) <= _MOST_EXPERTS
        ):
            return {}
        numbers = [number_of(count) for count in counts]
        if not all(number is not None and 0 <= number < _MOST_STEP for number in numbers):
            return {}
        found[int(layer)] = [float(number or 0.0) for number in numbers]
    return dict(sorted(found.items()))
