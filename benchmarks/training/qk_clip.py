"""Does QK-Clip hold attention logits at its threshold, and does it cost loss?

**again**  The same batch forwarded again after a step at learning rate 0, in float32, with τ = 0.6 × its largest logit:
           the logits of a clipped head are τ to rounding. Each layer is clipped by itself (its inputs are then those
           of before), and all at once: there a later layer reads what the clipped ones below it changed.
**run**    500 steps of MuonClip without a threshold give the natural peak; the same run with τ = 0.6 × this peak: the
           mean of the steps' largest logits over the last fifth, the peak, and the held-out loss, for three seeds.
           The largest logit of a step is seen before the clip that answers it, so that it may lie above τ.

The run without a threshold is the one with quantile balancing of `balance.py`: it is taken from its results.

    python benchmarks/training/qk_clip.py [--steps 500] [--summary]

Appends to benchmarks/results/qk_clip.jsonl; runs that are there are not repeated.
"""

import argparse
import math
import statistics
from typing import Any

import balance
import torch
from small import RESULTS, about, trainer

from karakoram.config import ModelConfig
from karakoram.train.optim.qk_clip import qk_clip
from karakoram.train.trainer import Trainer

SHARE = 0.6  # τ of the natural peak
AGAIN_STEPS = (50, 100, 150)
FILE = RESULTS / "qk_clip.jsonl"


def again(seed: int = 0) -> dict[str, Any]:
    """Largest logits over τ when a batch is seen a second time, at a few moments of a float32 run."""
    torch.set_num_threads(1)
    config = balance.configuration("none", seed, 2 * AGAIN_STEPS[-1])
    made = trainer(config, seed, torch.float32)
    moments = []
    while made.step < AGAIN_STEPS[-1]:
        made.train_step(made.next_batch())
        if made.step in AGAIN_STEPS:
            moments.append({"step": made.step} | _moment(made, config.model))
    return {"what": "again", "seed": seed, "dtype": "float32", "moments": moments, **about()}


def _moment(made: Trainer, config: ModelConfig) -> dict[str, Any]:
    """Clip at learning rate 0 and look again; the masters are as before when it returns."""
    batch, kept = made.next_batch(), {name: weight.clone() for name, weight in made.masters.weights.items()}
    seen = _logits(made, batch)
    threshold = SHARE * max(float(largest_H.max()) for largest_H in seen.values())
    hot = {layer: largest_H for layer, largest_H in seen.items() if float(largest_H.max()) > threshold}
    alone = {}
    for layer, largest_H in hot.items():
        qk_clip(made.masters.weights, {layer: largest_H}, config, threshold)
        alone[layer] = float(_logits(made, batch)[layer].max()) / threshold
        _restore(made, kept)
    clipped = qk_clip(made.masters.weights, seen, config, threshold)
    together = {layer: float(h.max()) / threshold for layer, h in _logits(made, batch).items() if layer in hot}
    twice = _logits(made, batch)
    qk_clip(made.masters.weights, twice, config, threshold)
    after_two = max(float(largest_H.max()) for largest_H in _logits(made, batch).values()) / threshold
    _restore(made, kept)
    return {
        "threshold": threshold, "clipped_heads": clipped, "layer_alone_over_threshold": alone,
        "all_at_once_over_threshold": together, "after_a_second_clip_over_threshold": after_two,
    }  # fmt: skip


def _logits(made: Trainer, batch: Any) -> dict[int, torch.Tensor]:
    """layer -> the largest logit of each head, of the masters as they are."""
    made.masters.publish()
    made.backward(batch)
    made.masters.forget_gradients()
    return dict(made.watch.max_logits)


def _restore(made: Trainer, kept: dict[str, torch.Tensor]) -> None:
    for name, weight in kept.items():
        made.masters.weights[name].copy_(weight)
    made.masters.publish()


def clipped_run(seed: int, steps: int) -> dict[str, Any]:
    """The run of `balance.free` with a threshold."""
    threshold = SHARE * balance.free(seed, steps)["max_logit_peak"]
    return {"what": "run", **balance.one("quantile", seed, steps, threshold)}


def summary(runs: list[dict[str, Any]], steps: int) -> None:
    """What was seen again, then a row per seed, then the paired difference of losses."""
    for line in (r for r in runs if r["what"] == "again"):
        for m in line["moments"]:
            alone, together = m["layer_alone_over_threshold"], m["all_at_once_over_threshold"]
            print(
                f"step {m['step']}: τ {m['threshold']:.3f}, {m['clipped_heads']} heads clipped; seen again, over τ:"
                f" layer by layer 1 {max(alone.values()) - 1:+.1e}, all at once 1 {max(together.values()) - 1:+.1e},"
                f" after a second clip 1 {m['after_a_second_clip_over_threshold'] - 1:+.1e}"
            )
    print("| seed | natural peak | τ | mean of the last fifth | peak | head-steps clipped | loss | loss with τ = ∞ |")
    print("|---|---|---|---|---|---|---|---|")
    pairs = []
    for r in (r for r in runs if r["what"] == "run" and r["steps"] == steps):
        without = balance.free(r["seed"], steps)
        pairs.append((r["held_out_loss"], without["held_out_loss"]))
        print(
            f"| {r['seed']} | {without['max_logit_peak']:.2f} | {r['qk_clip_threshold']:.2f} |"
            f" {r['max_logit_tail']:.2f} | {r['max_logit_peak']:.2f} | {r['clipped_heads'] / r['head_steps']:.1%} |"
            f" {pairs[-1][0]:.4f} | {pairs[-1][1]:.4f} |"
        )
    if len(pairs) > 1:
        differences = [a - b for a, b in pairs]
        error = statistics.stdev(differences) / math.sqrt(len(pairs))
        print(
            f"with τ − without: {statistics.fmean(differences):+.4f} ± {error:.4f} (standard error, paired);"
            f" seeds without τ: s = {statistics.stdev(b for _, b in pairs):.4f}"
        )


def main() -> None:
    """Run what is missing, then sum up."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=balance.STEPS)
    parser.add_argument("--summary", action="store_true", help="run nothing")
    options = parser.parse_args()
    done = {(r["what"], r["seed"]) for r in balance.known(FILE) if r.get("steps", options.steps) == options.steps}
    if not options.summary:
        if ("again", 0) not in done:
            balance.keep(again(), FILE)
        for seed in balance.SEEDS:
            if ("run", seed) not in done:
                balance.keep(clipped_run(seed, options.steps), FILE)
    summary(balance.known(FILE), options.steps)


if __name__ == "__main__":
    main()
