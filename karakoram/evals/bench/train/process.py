"""Candidates in processes of their own, run in turn: what else happens on the machine then happens to all of them.

A process each, because the allocator's settings and the threads' team are a process's; all are warmed up first, and
only one runs at a time. One of transformers' that cannot run here is told in the notes and left out.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from karakoram.errors import KarakoramError
from karakoram.evals.bench.report import Say
from karakoram.evals.bench.train.order import OURS, Order

_DOOR = "from karakoram.evals.bench.train.child import main; main()"


class Ended(Exception):
    """A candidate's process has ended; what it said last."""


class Process:
    """One candidate's process, which waits for numbers of steps. End it with `close`."""

    def __init__(self, order: Order) -> None:
        self.order = order
        self._said = tempfile.TemporaryFile()
        environment = {
            **os.environ, "OMP_NUM_THREADS": str(order.threads), "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error",
        }  # fmt: skip
        self._process = subprocess.Popen(
            [sys.executable, "-c", _DOOR], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said,
            text=True, env=environment,
        )  # fmt: skip
        self._tell(order.to_json())

    def run(self, steps: int) -> dict[str, Any]:
        """So many steps; blocks until they are done. Raises Ended."""
        self._tell(str(steps))
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._said.seek(0)
            told = self._said.read().decode(errors="replace").strip().splitlines()
            raise Ended(told[-1] if told else f"exit code {self._process.returncode}")
        return json.loads(line)

    def close(self) -> None:
        """End it; nothing of it is left."""
        self._process.kill()
        self._process.communicate()
        self._said.close()

    def _tell(self, line: str) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"{line}\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # its end is told by what it does not answer


@dataclass
class Measured:
    """One candidate's steps, round by round."""

    order: Order
    rounds: list[dict[str, Any]] = field(default_factory=list)

    @property
    def name(self) -> str:
        """With the dtype that was chosen."""
        return f"{OURS} {self.dtype}" if self.order.who == OURS else self.order.name

    @property
    def dtype(self) -> str:
        """That it computed in."""
        return self.rounds[0]["dtype"]

    @property
    def seconds(self) -> list[float]:
        """Of every step."""
        return [value for found in self.rounds for value in found["seconds"]]

    @property
    def median_s(self) -> float:
        """Of a step."""
        return statistics.median(self.seconds)

    @property
    def finite(self) -> bool:
        """Whether every loss was a number."""
        return all(found["finite"] for found in self.rounds)

    @property
    def matmul_flops_per_s(self) -> float:
        """The best that a large product reached between its steps."""
        return max(found["matmul_flops_per_s"] for found in self.rounds)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: a row."""
        tokens, seconds = self.order.rows * self.order.length, sorted(self.seconds)
        return {
            "what": self.name, "tokens_per_s": tokens / self.median_s, "slowest_tokens_per_s": tokens / seconds[-1],
            "fastest_tokens_per_s": tokens / seconds[0], "ms_median": 1e3 * self.median_s, "calls": len(seconds),
            "peak_bytes": self.rounds[-1]["peak_bytes"], "ms": [round(1e3 * s, 3) for s in self.seconds],
        }  # fmt: skip


@contextmanager
def _started(orders: Sequence[Order]) -> Iterator[list[Process]]:
    """A process for each; they are ended whatever happens."""
    processes = list[Process]()
    try:
        for order in orders:
            processes.append(Process(order))
        yield processes
    finally:
        for process in processes:
            process.close()


def in_turn(
    orders: Sequence[Order], steps: int, rounds: int, warm_up: int, notes: list[str], say: Say
) -> list[Measured]:
    """Warm all up, then `rounds` times `steps` steps of each. Raises KarakoramError where one of ours ends early."""
    found = list[tuple[Process, Measured]]()
    with _started(orders) as processes:
        for process in processes:
            say(f"warming up: {process.order.name}")
            if _run(process, warm_up, notes) is not None:
                found.append((process, Measured(process.order)))
        for turn in range(rounds):
            say(f"round {turn + 1} of {rounds}")
            for process, measured in list(found):
                told = _run(process, steps, notes)
                if told is None:
                    found.remove((process, measured))
                else:
                    measured.rounds.append(told)
    return [measured for _, measured in found]


def _run(process: Process, steps: int, notes: list[str]) -> dict[str, Any] | None:
    try:
        return process.run(steps)
    except Ended as ended:
        if process.order.who == OURS:
            raise KarakoramError(
                f"Training of the benchmark's model has ended early: {ended}",
                "Leave fewer programs beside it if memory is short; `k2 doctor` shows what is there.",
            ) from None
        notes.append(f"{process.order.name} does not run here: {ended}")
        return None
