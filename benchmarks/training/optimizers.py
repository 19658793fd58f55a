"""Does MuonClip need fewer tokens than AdamW? Final held-out loss, learning rates tuned for each, three seeds.

AdamW trains on 2.5 million tokens; MuonClip on 70 % of them, with a complete schedule of its own over that length. Each
has a grid of learning rates whose best must lie inside; the same rate serves its embedding, head and norms. Everything
else is the same: weights and batches by seed, warmup, decay, weight decay, clip.

    python benchmarks/training/optimizers.py [--processes 2] [--summary]

Appends to benchmarks/results/optimizers.jsonl, a line per run; runs that are there are not repeated.
"""

import argparse
import json
import math
import statistics
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from typing import Any

import torch
from small import LENGTH, RESULTS, ROWS, about, held_out_losses, run, shape, trainer

from karakoram.train.config import BalanceConfig, BatchConfig, GuardConfig, OptimizerConfig, ScheduleConfig, TrainConfig

TOKENS = 2_500_000
SEEDS = (0, 1, 2)
GRIDS = {"adamw": (1e-3, 2e-3, 4e-3), "muonclip": (2.5e-3, 5e-3, 1e-2)}
SHARES = {"adamw": (1.0,), "muonclip": (0.7,)}
FILE = RESULTS / "optimizers.jsonl"


def configuration(name: Any, rate: float, share: float, seed: int) -> TrainConfig:
    """Warmup over 50 steps, flat to 40 %, cosine down to a hundredth."""
    tokens = int(TOKENS * share)
    return TrainConfig(
        shape(), steps=math.ceil(tokens / (ROWS * LENGTH)), seed=seed,
        optimizer=OptimizerConfig(name=name, learning_rate=rate),
        schedule=ScheduleConfig(warmup_steps=50, decay_from=0.4, floor=0.01),
        batch=BatchConfig(tokens_per_step=ROWS * LENGTH), balance=BalanceConfig(rule="quantile"),
        guard=GuardConfig(after_steps=10**6),
    )  # fmt: skip


def one(name: str, rate: float, share: float, seed: int) -> dict[str, Any]:
    """One run on one thread."""
    torch.set_num_threads(1)
    made = trainer(configuration(name, rate, share, seed), seed)
    lines, seconds = run(made)
    losses = held_out_losses(made)
    return {
        "optimizer": name, "learning_rate": rate, "share": share, "seed": seed, "steps": len(lines),
        "tokens": made.tokens, "held_out_loss": statistics.fmean(losses), "train_loss": _tail(lines, "loss"),
        "seconds": seconds, "max_logit_peak": max(line["max_logit"] for line in lines),
        "max_vio_global": lines[-1]["max_vio_global"], **about(),
    }  # fmt: skip


def _tail(lines: list[dict[str, Any]], key: str) -> float:
    return statistics.fmean(line[key] for line in lines[-len(lines) // 20 :])


def known() -> list[dict[str, Any]]:
    """The runs that are in the file."""
    return [json.loads(line) for line in FILE.read_text().splitlines()] if FILE.exists() else []


def summary(runs: list[dict[str, Any]]) -> None:
    """Means over seeds, and the difference at each optimizer's best rate in standard errors."""
    best: dict[tuple[str, float], tuple[float, float, float, float]] = {}
    for name, rates in GRIDS.items():
        for share in SHARES[name]:
            for rate in rates:
                of = [r for r in runs if (r["optimizer"], r["share"], r["learning_rate"]) == (name, share, rate)]
                if len(of) < 2:
                    continue
                losses = [r["held_out_loss"] for r in of]
                mean, s = statistics.fmean(losses), statistics.stdev(losses)
                seconds = statistics.median(r["seconds"] for r in of)
                told = f"{name:9} {share:.0%} of the tokens, rate {rate:g}"
                print(f"{told}: {mean:.4f} ± {s:.4f} ({len(of)} seeds), {seconds:.0f} s")
                if (name, share) not in best or mean < best[name, share][0]:
                    best[name, share] = (mean, s, rate, seconds)
    for share in SHARES["muonclip"]:
        if ("muonclip", share) in best and ("adamw", 1.0) in best:
            (a, sa, _, ta), (m, sm, _, tm) = best["adamw", 1.0], best["muonclip", share]
            error = math.sqrt((sa**2 + sm**2) / len(SEEDS))
            told = f"MuonClip on {share:.0%}: {m - a:+.4f} nats against AdamW on all"
            print(f"{told}, {(a - m) / error:.1f} standard errors; wall clock {tm / ta:.2f} ×")


def main() -> None:
    """Run what is missing, then sum up."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--summary", action="store_true", help="run nothing")
    options = parser.parse_args()
    done = {(r["optimizer"], r["learning_rate"], r["share"], r["seed"]) for r in known()}
    wanted = [
        (name, rate, share, seed)
        for seed in SEEDS
        for name, rates in GRIDS.items()
        for share in SHARES[name]
        for rate in rates
    ]
    if not options.summary:
        FILE.parent.mkdir(exist_ok=True)
        with ProcessPoolExecutor(options.processes, get_context("spawn")) as pool:
            running = [pool.submit(one, *each) for each in wanted if each not in done]
            for finished in as_completed(running):
                line = finished.result()
                with FILE.open("a") as file:
                    file.write(json.dumps(line) + "\n")
                print(json.dumps(line), flush=True)
    summary(known())


if __name__ == "__main__":
    main()
