"""A benchmark between two measurements of memory: one dictionary, the same envelope for every benchmark.

    machine        what it ran on: processor, memory, torch
    isa, threads   what the kernels ran on; "reference" is plain torch
    memory_before, memory_after   GB/s of the best reader; shares are of the larger of the two
    memory         every reader's GB/s before and after, and how much was read
    rows           what was measured, one dictionary a row
    notes          conventions, and what was cut short here
    problems       one line each; empty if the numbers can be trusted

Every name is part of the interface: other programs read them.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from karakoram import env
from karakoram.evals.bench import memory
from karakoram.evals.bench.threads import running

Say = Callable[[str], None]  # progress: what is being measured now


class Row(Protocol):
    """One measurement; shares of the read bandwidth are known only at the end."""

    @property
    def problem(self) -> str | None:
        """One line if this row breaks a promise."""
        ...

    def to_dict(self, read_gb_per_s: float) -> dict[str, Any]:
        """JSON-ready."""
        ...


def silent(_: str) -> None:
    """Progress for nobody."""


def machine() -> dict[str, Any]:
    """Processor, cores that may be used, vector features, memory in bytes, and torch."""
    cpu = env.processor()
    return {
        "model": cpu.model,
        "architecture": cpu.architecture,
        "cores": cpu.cores,
        "features": [name for name in env.CPU_FEATURES if name in cpu.features],
        "memory_bytes": env.memory().total_bytes,
        "torch": torch.__version__,
    }


def bracketed(
    isa: str | None, threads: int, rows: Callable[[str, list[str]], Sequence[Row]], say: Say = silent
) -> dict[str, Any]:
    """Measure memory, the rows, and memory again, all on `threads`.

    `rows(isa, notes)` measures, on the instruction set of that name, and may add notes. Raises InputError for threads
    or an instruction set that are not there, before anything is measured.
    """
    with running(isa, threads) as name:
        notes = [memory.CONVENTION]
        say("memory, before")
        buffer = memory.buffer_to_read()
        if buffer.numel() < memory.BUFFER_BYTES:
            notes.append(f"Memory is short: read over {buffer.numel():,} bytes instead of {memory.BUFFER_BYTES:,}.")
        before, buffer_bytes = memory.measure(threads, buffer), buffer.numel()
        del buffer  # rows may have a budget of memory, in which it would be counted
        measured = rows(name, notes)
        say("memory, after")
        after = memory.measure(threads, memory.buffer_to_read())
    limit = max(before.gb_per_s, after.gb_per_s)
    problems = [memory.drift_problem(before.gb_per_s, after.gb_per_s), *(row.problem for row in measured)]
    return {
        "machine": machine(),
        "isa": name,
        "threads": threads,
        "memory_before": before.gb_per_s,
        "memory_after": after.gb_per_s,
        "memory": {"before": before.readers, "after": after.readers, "buffer_bytes": buffer_bytes},
        "rows": [row.to_dict(limit) for row in measured],
        "notes": notes,
        "problems": [problem for problem in problems if problem],
    }


def memory_bench(threads: int, matmuls: Sequence[tuple[int, int, int]] = (), say: Say = silent) -> dict[str, Any]:
    """The report on the machine alone: rows are torch's bf16 products at 1024³ and at every (M, K, N) given."""

    def rows(_: str, __: list[str]) -> list[memory.Matmul]:
        found = []
        for m, k, n in ((1024, 1024, 1024), *matmuls):
            say(f"torch bf16 matmul {m} × {k} × {n}")
            found.append(memory.matmul(m, k, n, threads))
        return found

    return bracketed(None, threads, rows, say)
