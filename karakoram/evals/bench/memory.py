"""The two limits of a machine, as reached here and now: bytes read per second, and bf16 products per second.

Reading: several readers go over one buffer far larger than any cache, in turn; the best pass of the best reader counts,
for whatever else runs on the machine only takes away. One reader is the library's own sum with the widest loads,
whatever instruction set is being measured; the others are torch's. A copy counts the bytes it reads, not those it
writes.

Products: torch's bf16 matmul on weights of both layouts, [N, K] and [K, N]; the median of the faster layout counts. The
weights are the same in every call: those that fit into a cache are found there, which favours torch.
"""

import ctypes
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from karakoram import env
from karakoram.errors import InputError
from karakoram.evals.bench.clock import median_seconds
from karakoram.evals.bench.threads import torch_threads
from karakoram.kernels import ops
from karakoram.kernels.cpu.library import Library, describe

BUFFER_BYTES = 2 << 30
LEAST_BUFFER_BYTES = 64 << 20  # a smaller one measures a cache
MOST_MEMORY = 0.8  # of what is available, for what a benchmark allocates
PASSES, PASSES_S = 6, 3.0  # at least so many, for at least so long: what else runs comes and goes
MOST_DRIFT = 0.10  # between the measurements before and after a benchmark
MATMUL_BUDGET_S = 1.0
CONVENTION = (
    "GB/s: 10^9 bytes read per second, best pass of the best reader; memcpy counts what it reads,"
    " not what it writes. TFLOPS: 2·M·K·N, median, the faster of two weight layouts, the same weights in every call."
)


@dataclass(frozen=True)
class ReadSpeed:
    """GB/s of every reader over a buffer of so many bytes."""

    readers: dict[str, float]
    buffer_bytes: int

    @property
    def gb_per_s(self) -> float:
        """The best reader's."""
        return max(self.readers.values())


@dataclass(frozen=True)
class Matmul:
    """torch's bf16 product [M, K] · [K, N]."""

    m: int
    k: int
    n: int
    seconds: float
    calls: int

    problem = None  # as a row of a report: nothing here can be wrong

    @property
    def tflops(self) -> float:
        """10^12 floating-point operations per second, a multiply and an add counted as two."""
        return 2 * self.m * self.k * self.n / self.seconds / 1e12

    def to_dict(self, read_gb_per_s: float) -> dict[str, Any]:
        """JSON-ready."""
        shape = {"m": self.m, "k": self.k, "n": self.n}
        return {**shape, "ms_median": 1e3 * self.seconds, "tflops": self.tflops, "calls": self.calls}


def require(wanted_bytes: int, what: str, fix: str) -> None:
    """Raises InputError, with `fix`, if so many bytes are more than `MOST_MEMORY` of what is available."""
    available = env.memory().available_bytes
    if available is not None and wanted_bytes > MOST_MEMORY * available:
        raise InputError(f"{what} take {wanted_bytes / 1e9:.1f} GB, of {available / 1e9:.1f} GB available.", fix)


# ------------------------------------------------------------------------------------------------ reading


def buffer_to_read() -> Tensor:
    """uint8 [`BUFFER_BYTES`], every page touched; a quarter of the available memory where that is less.

    Raises InputError where memory is too short to measure anything but a cache.
    """
    available = env.memory().available_bytes
    size = BUFFER_BYTES if available is None else min(BUFFER_BYTES, available // 4 >> 20 << 20)
    if size < min(BUFFER_BYTES, LEAST_BUFFER_BYTES):
        raise InputError(
            f"Only {(available or 0) / 1e6:.0f} MB of memory are available.", "Free some: this measures a cache."
        )
    return torch.full((size,), 0x3F, dtype=torch.uint8)  # as float32 0.747: no denormal slows a reader


def measure(threads: int, buffer: Tensor | None = None) -> ReadSpeed:
    """How fast `threads` threads read `buffer` (uint8, a multiple of 16 bytes; `buffer_to_read()` by default)."""
    buffer = buffer_to_read() if buffer is None else buffer
    seconds: dict[str, float] = {}
    library = ops.chosen()
    readers = _torch_readers(buffer)
    if library is not None:
        readers["k2_read"] = (buffer.numel(), lambda: _sum_bytes(library, buffer))
    began, passes = time.perf_counter(), 0
    while passes < PASSES or time.perf_counter() - began < PASSES_S:
        passes += 1
        for name, (_, read) in readers.items():
            took = _seconds_of(read, threads, own=name == "k2_read")
            seconds[name] = min(took, seconds.get(name, took))
    speeds = {name: size / seconds[name] / 1e9 for name, (size, _) in readers.items()}
    return ReadSpeed(speeds, buffer.numel())


def _torch_readers(buffer: Tensor) -> dict[str, tuple[int, Callable[[], object]]]:
    """name: (bytes it reads, the reader)."""
    size = buffer.numel()
    words, numbers = buffer.view(torch.int64), buffer.view(torch.float32)
    from_half, to_half = buffer[: size // 2], buffer[size // 2 :]
    return {
        "memcpy": (size // 2, lambda: to_half.copy_(from_half)),
        "torch_sum": (size, words.sum),
        "torch_dot": (size, lambda: torch.dot(numbers, numbers)),
    }


def _sum_bytes(library: Library, buffer: Tensor) -> int:
    total = ctypes.c_uint64()
    library.call("k2_read", describe(buffer), ctypes.byref(total))
    return total.value


def _seconds_of(read: Callable[[], object], threads: int, own: bool) -> float:
    """One pass; the library's own reader runs on the best instruction set."""

    def timed() -> float:
        began = time.perf_counter()
        read()
        return time.perf_counter() - began

    if own:
        with ops.using("auto", threads):
            return timed()
    with torch_threads(threads):
        return timed()


def drift_problem(before_gb_per_s: float, after_gb_per_s: float) -> str | None:
    """One line if the two differ by more than `MOST_DRIFT` of the larger: shares of such a machine mean nothing."""
    drift = 1 - min(before_gb_per_s, after_gb_per_s) / max(before_gb_per_s, after_gb_per_s)
    if drift <= MOST_DRIFT:
        return None
    return (
        f"Memory read {before_gb_per_s:.1f} GB/s before and {after_gb_per_s:.1f} GB/s after, {drift:.0%} apart:"
        f" something else is running. Measure again on an idle machine (at most {MOST_DRIFT:.0%})."
    )


# ------------------------------------------------------------------------------------------------ products


def matmul(m: int, k: int, n: int, threads: int, budget_s: float = MATMUL_BUDGET_S) -> Matmul:
    """torch's bf16 product of [m, k] and weights of [n, k] or [k, n], whichever is faster.

    Raises InputError where memory is too short.
    """
    require(6 * (m + n) * k + 2 * m * n, f"Matrices of {m} × {k} and {k} × {n}", "Measure a smaller product.")
    x = torch.randn(m, k).bfloat16()
    weights = torch.randn(n * k).bfloat16()
    by_output, by_input = weights.view(n, k), weights.view(k, n)
    with torch_threads(threads):
        layouts = (lambda _: F.linear(x, by_output), lambda _: x @ by_input)
        timing = min((median_seconds(call, budget_s / 2) for call in layouts), key=lambda found: found.seconds)
    return Matmul(m, k, n, timing.seconds, timing.calls)
