"""Candidates in processes of their own, run in turn: what else happens on the machine then happens to both of a pair.

A process each, because the allocator's settings and the threads' team are a process's. Ours stays; those that it is
compared with come one after the other, each warmed up and then in turn with ours: two models in memory at a time. One
of transformers' that cannot run here is told in the notes and left out.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import closing
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
        self._said = tempfile.TemporaryFile()  # noqa: SIM115  # closed by `close`; a pipe would fill up and block it
        own = {"OMP_NUM_THREADS": str(order.threads), "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
        self._process = subprocess.Popen(
            [sys.executable, "-c", _DOOR], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said,
            text=True, env={**os.environ, **own},
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


@dataclass(frozen=True)
class Pair:
    """Ours and one other, in the same rounds."""

    ours: Measured
    theirs: Measured

    @property
    def ratio(self) -> float:
        """How many times faster ours was, by medians."""
        return self.theirs.median_s / self.ours.median_s

    @property
    def by_round(self) -> list[float]:
        """The same of each round."""
        return [
            statistics.median(b["seconds"]) / statistics.median(a["seconds"])
            for a, b in zip(self.ours.rounds, self.theirs.rounds, strict=True)
        ]


def alone(order: Order, steps: int, rounds: int, warm_up: int, say: Say) -> Measured:
    """Ours without anything beside it."""
    with closing(_warm(order, warm_up, say)) as ours:
        return Measured(order, [_ours(ours, steps) for _ in range(rounds)])


def in_pairs(
    ours: Order, others: Sequence[Order], steps: int, rounds: int, warm_up: int, notes: list[str], say: Say
) -> list[Pair]:
    """`rounds` times `steps` steps of ours and of each other in turn. Raises KarakoramError where ours ends early."""
    found = list[Pair]()
    with closing(_warm(ours, warm_up, say)) as process:
        for other in others:
            say(f"in turn with {other.name}")
            with closing(Process(other)) as beside:
                try:
                    beside.run(warm_up)
                    turns = [(_ours(process, steps), beside.run(steps)) for _ in range(rounds)]
                except Ended as ended:
                    notes.append(f"{other.name} does not run here: {ended}")
                    continue
            found.append(Pair(Measured(ours, [a for a, _ in turns]), Measured(other, [b for _, b in turns])))
    return found


def _warm(order: Order, steps: int, say: Say) -> Process:
    say(f"warming up: {order.name}")
    process = Process(order)
    try:
        _ours(process, steps)
    except BaseException:
        process.close()
        raise
    return process


def _ours(process: Process, steps: int) -> dict[str, Any]:
    try:
        return process.run(steps)
    except Ended as ended:
        raise KarakoramError(
            f"Training of the benchmark's model has ended early: {ended}",
            "Leave fewer programs beside it if memory is short; `k2 doctor` shows what is there.",
        ) from None
