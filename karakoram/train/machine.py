"""What a CPU must be told before training on it: threads, memory that is kept, and the dtype it multiplies faster."""

import ctypes
import sys
import time

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
