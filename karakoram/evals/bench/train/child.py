"""The process of one candidate: it makes what the order asks for, then runs as many steps as it is told to.

In, a line each: the order, then numbers of steps; the end of the input ends it. Out: a line of JSON for each.
"""

import gc
import json
import math
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TextIO

import torch

from karakoram.evals.bench.train import ours, theirs
from karakoram.evals.bench.train.order import OURS, Order
from karakoram.train.machine import keep_freed_memory, matmul_flops_per_s


def main() -> None:
    """Answer on the standard output, which is kept from whatever else prints there."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    serve(sys.stdin, answers)


def serve(asked: Iterable[str], answers: TextIO) -> None:
    """Follow the first line's order for as many steps as each later line says."""
    lines = iter(asked)
    order = Order(**json.loads(next(lines)))
    torch.set_num_threads(order.threads)
    if order.keeps_memory:
        keep_freed_memory()
    dtype = ours.dtype_of(order)
    side = ours if order.who == OURS else theirs
    call = (side.step if order.what == "step" else side.layer)(order, dtype)
    number = 0
    for line in lines:
        found = _steps(call, number, int(line))
        number += int(line)
        if order.who == OURS:
            found["matmul_flops_per_s"] = max(matmul_flops_per_s(dtype, torch.device("cpu"), n) for n in (1024, 2048))
        found |= {"dtype": str(dtype).removeprefix("torch."), "peak_bytes": _peak_bytes()}
        print(json.dumps(found), file=answers, flush=True)


def _steps(call: ours.Call, first: int, count: int) -> dict[str, Any]:
    """Seconds of each step, of its forward and backward where they are known, and whether all losses are finite."""
    seconds, backward_s, finite = list[float](), list[float](), True
    gc.collect()  # else one candidate's steps pay for the garbage of its own start
    for number in range(first, first + count):
        began = time.perf_counter()
        told = call(number)
        seconds.append(time.perf_counter() - began)
        backward_s.append(told.get("backward_s", math.nan))
        finite = finite and math.isfinite(told["loss"]) and not told.get("skipped", False)
    known = not any(map(math.isnan, backward_s))
    return {"seconds": seconds, "backward_seconds": backward_s if known else None, "finite": finite}


def _peak_bytes() -> int | None:
    """The most memory that this process held; getrusage would count what the process was forked from, too."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), None)
