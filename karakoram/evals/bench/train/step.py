"""`k2 bench train`: tokens per second of whole training steps, beside transformers with fused AdamW.

Ours is the step of `k2 train` with MuonClip, in the dtype that it would choose here. The baseline is the best of
transformers' DeepseekV3 in three ways, each as a person gets it and with the allocator settings of `k2 train`: the one
to which ours has the smallest ratio. Each runs in turn with ours, so that other load hits both; medians count, and the
ratio of each round is told beside them.

    optimizer_share   of the step's time: all but forward and backward: gradient norm, MuonClip, balance, publishing
    matmul_share      FLOPs of the model's products (three forwards') and of Newton-Schulz over the time, of what one
                      large product in the same dtype reaches between the rounds
    mfu               the same without Newton-Schulz: what others call MFU
"""

import os
import statistics
import subprocess
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from karakoram.evals.bench import memory
from karakoram.evals.bench.report import Say, bracketed, silent
from karakoram.evals.bench.threads import REFERENCE
from karakoram.evals.bench.train.order import LENGTH, OURS, ROWS, STEP_SHAPE, THEIRS, Order, config_of
from karakoram.evals.bench.train.process import Measured, Pair, alone, in_pairs
from karakoram.model.cost import parameters
from karakoram.model.cost.training import muon_flops, training_flops

WARM_UP_STEPS = 3  # compiling, and kernels that oneDNN prepares for each new shape
WAYS = (("eager", "float32"), ("grouped_mm", "float32"), ("grouped_mm", "bfloat16"))
PAIR_BYTES = 6_500_000_000  # two processes at their largest: 2.0 GB seen for ours, 2.9 to 4.0 GB for theirs
ABSENT = f"{THEIRS} is not installed here: pip install {THEIRS}"
NONE_RUNS = f"no way of {THEIRS} runs here, see the notes"


@dataclass(frozen=True)
class TrainRow:
    """One candidate as a row of the report."""

    row: dict[str, Any]
    problem: str | None

    def to_dict(self, read_gb_per_s: float) -> dict[str, Any]:
        """JSON-ready; the bandwidth of memory says nothing here."""
        return self.row


def train_bench(
    steps: int,
    rounds: int,
    threads: int,
    say: Say = silent,
    shape: dict[str, Any] = STEP_SHAPE,
    rows: int = ROWS,
    length: int = LENGTH,
    compiled: bool = True,
) -> dict[str, Any]:
    """The report: `rounds` times `steps` steps of each. Raises InputError where memory is too short."""
    ours = Order("step", OURS, compiled=compiled, threads=threads, rows=rows, length=length, shape=shape)
    others = [
        Order("step", THEIRS, way, dtype, keeps, False, threads, rows, length, shape)
        for way, dtype in WAYS for keeps in (False, True) if find_spec(THEIRS)
    ]  # fmt: skip
    if shape is STEP_SHAPE:
        memory.require(PAIR_BYTES, "Two models in training", "Close other programs.")
    found = dict[str, Any]()

    def measure(_: str, notes: list[str]) -> list[TrainRow]:
        pairs = in_pairs(ours, others, steps, rounds, WARM_UP_STEPS, notes, say) if others else []
        if pairs:
            best = min(pairs, key=lambda pair: pair.ratio)
            found.update(_of_ours(best.ours), **_of_baseline(best))
            measured = [best.ours, *(pair.theirs for pair in pairs)]
        else:
            measured = [alone(ours, steps, rounds, WARM_UP_STEPS, say)]
            found.update(_of_ours(measured[0]), **_no_baseline(NONE_RUNS if others else ABSENT))
        notes.append(_in_words(found, steps, rounds))
        return [row_of(each) for each in measured]

    report = bracketed(REFERENCE, threads, measure, say)
    return report | found | {"batch": [rows, length], "rounds": rounds, "steps": steps, "commit": commit()}


def row_of(measured: Measured) -> TrainRow:
    """A row; losses that are no numbers are a problem."""
    broken = None if measured.finite else f"{measured.name}: a loss was no finite number, its speed means nothing."
    return TrainRow(measured.to_dict(), broken)


def _of_ours(ours: Measured) -> dict[str, Any]:
    order = ours.order
    config, tokens, step_s = config_of(order.shape), order.rows * order.length, ours.median_s
    model_flops, peak = tokens * training_flops(config, order.length), ours.matmul_flops_per_s
    return {
        "tokens_per_s": tokens / step_s, "dtype": ours.dtype, "optimizer_share": _optimizer_share(ours),
        "matmul_share": (model_flops + muon_flops(config)) / step_s / peak, "mfu": model_flops / step_s / peak,
        "matmul_flops_per_s": peak, "flops_per_step": {"model": model_flops, "newton_schulz": muon_flops(config)},
        "loss_finite": ours.finite, "parameters": parameters(config).total,
    }  # fmt: skip


def _of_baseline(best: Pair) -> dict[str, Any]:
    theirs = best.theirs
    return {
        "baseline_tokens_per_s": theirs.order.rows * theirs.order.length / theirs.median_s, "baseline": theirs.name,
        "baseline_reason": None, "ratio": best.ratio, "ratio_by_round": best.by_round,
    }  # fmt: skip


def _no_baseline(reason: str) -> dict[str, Any]:
    names = ("baseline_tokens_per_s", "baseline", "ratio", "ratio_by_round")
    return {**dict.fromkeys(names), "baseline_reason": reason}


def _optimizer_share(ours: Measured) -> float:
    shares = [
        1 - backward / step
        for found in ours.rounds
        for step, backward in zip(found["seconds"], found["backward_seconds"], strict=True)
    ]
    return statistics.median(shares)


def _in_words(told: dict[str, Any], steps: int, rounds: int) -> str:
    head = f"Medians of {rounds} rounds of {steps} steps. Optimizer {told['optimizer_share']:.0%} of the step;"
    head += f" products reach {told['matmul_share']:.0%} of one large {told['dtype']} product (MFU {told['mfu']:.0%})."
    if told["ratio"] is None:
        return f"{head} No baseline: {told['baseline_reason']}."
    low, high = min(told["ratio_by_round"]), max(told["ratio_by_round"])
    return f"{head} {told['ratio']:.2f} × {told['baseline']}, by round {low:.2f} to {high:.2f}."


def commit() -> str | None:
    """Of the checkout that this package lies in; None where it is installed, or git is not there."""
    place = Path(__file__).resolve().parent
    if not any((folder / ".git").exists() for folder in place.parents):
        return None
    command, quiet = ["git", "describe", "--always", "--dirty"], {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
    try:
        done = subprocess.run(command, cwd=place, env=quiet, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
