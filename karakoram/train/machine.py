"""The machine under a run: memory that is kept, the dtype it multiplies faster, its limit, and its signals."""

import ctypes
import os
import signal
import sys
import threading
import time
from typing import Any

import torch

# glibc gives blocks over 128 KiB back to the kernel when they are freed, and gets them again page by page, zeroed:
# activations of 4 to 40 MB then cost three times their use. These two settings of mallopt(3) keep them.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def keep_freed_memory() -> None:
    """Let the allocator reuse large blocks instead of returning them; nothing happens outside glibc."""
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 1 << 30)
        mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)


def faster_dtype(rows: int = 2048, inputs: int = 256, outputs: int = 128) -> torch.dtype:
    """bfloat16 or float32: whichever multiplies an expert's rows faster here, backward products too (best of 12)."""
    return min((torch.bfloat16, torch.float32), key=lambda dtype: _seconds(dtype, rows, inputs, outputs))


def _seconds(dtype: torch.dtype, rows: int, inputs: int, outputs: int) -> float:
    x, weight, y = (torch.ones(shape, dtype=dtype) for shape in ((rows, inputs), (outputs, inputs), (rows, outputs)))
    times = []
    for _ in range(12):
        began = time.perf_counter()
        _ = x @ weight.t(), y @ weight, y.t() @ x
        times.append(time.perf_counter() - began)
    return min(times)  # what else runs on the machine only adds


def matmul_flops_per_s(dtype: torch.dtype, device: torch.device, size: int = 1024) -> float:
    """What one large square product reaches here, best of five: the limit that MFU is a share of."""
    a, b = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
    times = []
    for _ in range(5):
        began = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
    return 2 * size**3 / min(times)


class StopOnSignal:
    """While active, Ctrl-C or SIGTERM asks to stop after the step (half a step would spoil the masters).

    A second Ctrl-C stops at once. Python lets only the main thread handle signals; in another one nothing changes.
    tell  say on standard error that the signal was heard: the first step compiles, for a minute perhaps
    """

    asked = False

    def __init__(self, tell: bool = False) -> None:
        self.tell = tell

    def __enter__(self) -> "StopOnSignal":
        self._before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, _: object) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.tell and not self.asked:  # a plain write: the signal may have come in the middle of a buffered one
            os.write(2, b"\nStopping after this step; Ctrl-C again stops at once and saves nothing.\n")
        self.asked = True
