"""How long is a Muon step over experts? Ours on the stack against torch.optim.Muon on the experts one by one.

torch.optim.Muon takes no stacks, so that its user unstacks them. A step is momentum, Newton-Schulz and update, of 64
experts of 128 × 256 and of 64 × 256, float32 weights and gradients. Both are given the same numbers and, with `mean`,
make the same bits. They alternate, so that other load on the machine hits both: one step each, which then finds little
of its 24 MB in the caches, or `--together` steps. 5 ms between two turns: torch's threads look for work for 2.7 ms
after each of theirs, on a core that whoever comes next is to use.

    python benchmarks/optimizer_step.py [--rounds 50] [--together 1] [--threads 1 2]
                                        [--out benchmarks/results/optimizer_step.jsonl]

One line of JSON per shape and number of threads: medians and least of both in ms, the ratio of the medians, the median
of the rounds' ratios, the share of the step that Newton-Schulz takes, its arithmetic per second (all products as they
are written; ours leaves out mirrored halves), and that of one large bfloat16 product: the limit. `load` is the
machine's before: above 0 is somebody else's, and 2 threads then tell little, since torch's wait for one another in
every product. Of one thread, `cpu_ms` counts no waiting for others.
"""

import argparse
import json
import os
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from karakoram.env import processor
from karakoram.train.machine import keep_freed_memory, matmul_flops_per_s
from karakoram.train.optim.muon import Muon
from karakoram.train.optim.newton_schulz import orthogonalize

SHAPES = ((64, 128, 256), (64, 64, 256))
ITERATIONS = 5
QUIET_S = 0.005


def measure(shape: tuple[int, int, int], rounds: int, together: int) -> dict[str, Any]:
    """Both optimizers over `rounds` turns of `together` steps each."""
    stack, gradient = torch.randn(shape), torch.randn(shape)
    experts = [expert.clone().requires_grad_() for expert in stack]
    for expert, part in zip(experts, gradient, strict=True):
        expert.grad = part.clone()
    theirs = torch.optim.Muon(experts, lr=1e-3, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    ours = Muon({"experts": stack}, mean=True)
    seconds = alternating(
        {
            "torch": theirs.step,
            "ours": lambda: ours.step({"experts": gradient}, 1e-3),
            "newton_schulz": lambda: orthogonalize(gradient),
        },
        rounds,
        together,
    )
    cpu = {name: statistics.median(one.cpu for one in each) for name, each in seconds.items()}
    wall = {name: [one.wall for one in each] for name, each in seconds.items()}
    same = all(torch.equal(expert.detach(), one) for expert, one in zip(experts, stack, strict=True))
    ms = {f"{name}_ms": round(1e3 * statistics.median(times), 3) for name, times in wall.items()}
    least = {f"{name}_least_ms": round(1e3 * min(times), 3) for name, times in wall.items()}
    n, A, B = shape
    flops = ITERATIONS * n * (4 * A * A * B + 2 * A**3)
    return {
        "shape": shape, **ms, **least, "bit_equal": same,
        "ratio": round(ms["torch_ms"] / ms["ours_ms"], 2),
        "ratio_of_rounds": round(statistics.median(a / b for a, b in zip(wall["torch"], wall["ours"], strict=True)), 2),
        "ratio_of_least": round(least["torch_least_ms"] / least["ours_least_ms"], 2),
        "cpu_ms": {name: round(1e3 * one, 3) for name, one in cpu.items()},
        "ratio_of_cpu": round(cpu["torch"] / cpu["ours"], 2),
        "newton_schulz_share": round(cpu["newton_schulz"] / cpu["ours"], 2),
        "newton_schulz_gflops_per_s": round(flops / min(wall["newton_schulz"]) / 1e9),
        "matmul_gflops_per_s": round(matmul_flops_per_s(torch.bfloat16, torch.device("cpu")) / 1e9),
    }  # fmt: skip


class Seconds(NamedTuple):
    """Of one call: on the wall, and of all threads of this process."""

    wall: float
    cpu: float


def alternating(calls: dict[str, Callable[[], Tensor | None]], rounds: int, together: int) -> dict[str, list[Seconds]]:
    """Times of every call by name; three rounds before do not count, the same number for all."""
    times: dict[str, list[Seconds]] = {name: [] for name in calls}
    for _ in range(rounds + 3):
        for name, call in calls.items():
            time.sleep(QUIET_S)
            for _ in range(together):
                began, began_cpu = time.perf_counter(), time.process_time()
                call()
                times[name].append(Seconds(time.perf_counter() - began, time.process_time() - began_cpu))
    return {name: each[3 * together :] for name, each in times.items()}


def main() -> None:
    """Measure, print, append."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--together", type=int, default=1, help="steps of a turn")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, os.cpu_count() or 1])
    parser.add_argument("--out", type=Path, help="a file of JSON lines to append to")
    options = parser.parse_args()
    keep_freed_memory()
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent, capture_output=True, text=True, check=False,
    ).stdout.strip()  # fmt: skip
    for threads in options.threads:
        torch.set_num_threads(threads)
        for shape in SHAPES:
            torch.manual_seed(0)
            load = round(os.getloadavg()[0], 1)
            line = json.dumps({
                "benchmark": "optimizer_step", "commit": commit or None, "cpu": processor().model, "threads": threads,
                "torch": torch.__version__, "load": load, "rounds": options.rounds, "together": options.together,
                **measure(shape, options.rounds, options.together),
            })  # fmt: skip
            print(line, flush=True)
            if options.out is not None:
                options.out.parent.mkdir(parents=True, exist_ok=True)
                with options.out.open("a") as file:
                    file.write(line + "\n")


if __name__ == "__main__":
    main()
