"""Does the router's bias keep the experts' loads even? Quantile balancing, the sign rule at two rates, and no rule.

MuonClip on the small model at one learning rate, three seeds; nothing differs but the rule. MaxVio is max load / mean
load − 1 of the loads summed over the last fifth of the batches, in the worst layer; of a single batch it is mostly
noise. The sign rule moves a bias by at most its rate a step, so that a short run tells of the rate as much as of the
rule: 1e-3 is Moonlight's, for a run of 10^5 steps.

    python benchmarks/training/balance.py [--steps 500] [--summary]

Appends to benchmarks/results/balance.jsonl, a line per run; runs that are there are not repeated.
"""

import argparse
import json
import math
import statistics
from pathlib import Path
from typing import Any

import torch
from small import LENGTH, RESULTS, ROWS, about, held_out_losses, run, shape, trainer

from karakoram.train.config import BalanceConfig, BatchConfig, GuardConfig, OptimizerConfig, ScheduleConfig, TrainConfig

LEARNING_RATE = 5e-3
STEPS = 500
SEEDS = (0, 1, 2)
RULES: dict[str, tuple[Any, float]] = {  # name -> rule, rate
    "quantile": ("quantile", 0.0),
    "sign 1e-2": ("sign", 1e-2),
    "sign 1e-3": ("sign", 1e-3),
    "none": ("none", 0.0),
}
FILE = RESULTS / "balance.jsonl"


def configuration(rule: str, seed: int, steps: int, threshold: float = math.inf) -> TrainConfig:
    """Warmup over 50 steps, flat to 60 %, cosine to nothing; `threshold` is QK-Clip's."""
    named, rate = RULES[rule]
    return TrainConfig(
        shape(), steps=steps, seed=seed,
        optimizer=OptimizerConfig(learning_rate=LEARNING_RATE, qk_clip_threshold=threshold),
        schedule=ScheduleConfig(warmup_steps=50), batch=BatchConfig(tokens_per_step=ROWS * LENGTH),
        balance=BalanceConfig(rule=named, rate=rate, window=steps // 5), guard=GuardConfig(after_steps=10**6),
    )  # fmt: skip


def one(rule: str, seed: int, steps: int, threshold: float = math.inf) -> dict[str, Any]:
    """One run on one thread: loads and logits of its last fifth, and the held-out loss."""
    torch.set_num_threads(1)
    made = trainer(configuration(rule, seed, steps, threshold), seed)
    lines, seconds = run(made)
    tail = lines[-(steps // 5) :]
    heads = 4 * made.config.model.num_hidden_layers
    return {
        "rule": rule, "seed": seed, "steps": steps, "tokens": made.tokens, "learning_rate": LEARNING_RATE,
        "held_out_loss": statistics.fmean(held_out_losses(made)),
        "train_loss": statistics.fmean(line["loss"] for line in tail),
        "max_vio_global": tail[-1]["max_vio_global"], "dead_experts": tail[-1]["dead_experts"],
        "max_vio_of_a_batch": statistics.fmean(line["max_vio"] for line in tail),
        "loads": {str(layer): load_E.tolist() for layer, load_E in made.loads.total.items()},
        "largest_bias": max(float(bias.abs().max()) for bias in made.biases.values()),
        "qk_clip_threshold": threshold if math.isfinite(threshold) else None,
        "max_logit_peak": max(line["max_logit"] for line in lines),
        "max_logit_tail": statistics.fmean(line["max_logit"] for line in tail),
        "max_logit_by_20_steps": [max(n["max_logit"] for n in lines[i : i + 20]) for i in range(0, steps, 20)],
        "clipped_heads": sum(line["clipped_heads"] for line in lines), "head_steps": heads * steps,
        "seconds": seconds, **about(),
    }  # fmt: skip


def known(file: Path = FILE) -> list[dict[str, Any]]:
    """The runs that are in a file."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def keep(line: dict[str, Any], file: Path = FILE) -> None:
    """Append a run, and show it."""
    file.parent.mkdir(exist_ok=True)
    with file.open("a") as opened:
        opened.write(json.dumps(line) + "\n")
    print(json.dumps({name: value for name, value in line.items() if not isinstance(value, dict | list)}), flush=True)


def free(seed: int, steps: int) -> dict[str, Any]:
    """The run with quantile balancing, from the file or made now."""
    found = [line for line in known() if (line["rule"], line["seed"], line["steps"]) == ("quantile", seed, steps)]
    if not found:
        found = [one("quantile", seed, steps)]
        keep(found[0])
    return found[0]


def summary(runs: list[dict[str, Any]], steps: int) -> None:
    """A row per rule: mean and range over seeds."""
    print("| rule | seeds | MaxVio, mean (most) | of a batch | dead | largest bias | held-out loss, mean ± s |")
    print("|---|---|---|---|---|---|---|")
    for rule in RULES:
        of = [r for r in runs if (r["rule"], r["steps"]) == (rule, steps)]
        if not of:
            continue
        vio, losses = [r["max_vio_global"] for r in of], [r["held_out_loss"] for r in of]
        spread = f" ± {statistics.stdev(losses):.4f}" if len(of) > 1 else ""
        print(
            f"| {rule} | {len(of)} | {statistics.fmean(vio):.3f} ({max(vio):.3f}) |"
            f" {statistics.fmean(r['max_vio_of_a_batch'] for r in of):.2f} | {max(r['dead_experts'] for r in of)} |"
            f" {max(r['largest_bias'] for r in of):.3f} | {statistics.fmean(losses):.4f}{spread} |"
        )


def main() -> None:
    """Run what is missing, seed by seed, then sum up."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--summary", action="store_true", help="run nothing")
    options = parser.parse_args()
    done = {(r["rule"], r["seed"]) for r in known() if r["steps"] == options.steps}
    for seed in () if options.summary else SEEDS:
        for rule in RULES:
            if (rule, seed) not in done:
                keep(one(rule, seed, options.steps))
    summary(known(), options.steps)


if __name__ == "__main__":
    main()
