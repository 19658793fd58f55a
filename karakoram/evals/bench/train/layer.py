"""`k2 bench train --layer`: one layer of experts, forward and backward, beside both of transformers' ways.

Hidden 256, 64 experts of 128 of which 4 run, router and shared expert included, 4,096 tokens, in float32 and bfloat16.
Every candidate draws the same router and the same inputs: as many tokens go to each expert. Each of theirs runs in turn
with ours, as a person gets it and with the allocator settings of `k2 train`; a way's ratio is the smaller of the two.

    matmul_share   of our rows: FLOPs of the layer's products, three forwards', over the time, of what one large product
                   in the same dtype reaches between the rounds
"""

from importlib.util import find_spec
from typing import Any

from karakoram.evals.bench.report import Say, bracketed, silent
from karakoram.evals.bench.threads import REFERENCE
from karakoram.evals.bench.train.order import LAYER_SHAPE, LENGTH, OURS, ROWS, THEIRS, Order, config_of
from karakoram.evals.bench.train.process import Measured, Pair, alone, in_pairs
from karakoram.evals.bench.train.step import ABSENT, TrainRow, commit, row_of
from karakoram.model.cost.training import layer_flops

DTYPES = ("float32", "bfloat16")
WAYS = ("eager", "grouped_mm")
WARM_UP_STEPS = 5
CALLS_PER_STEP = 4  # a pass is a tenth of a training step: as many seconds in a round


def layer_bench(
    steps: int,
    rounds: int,
    threads: int,
    say: Say = silent,
    shape: dict[str, Any] = LAYER_SHAPE,
    rows: int = ROWS,
    length: int = LENGTH,
    compiled: bool = True,
) -> dict[str, Any]:
    """The report: `rounds` times 4 · `steps` passes of each."""
    reason = None if find_spec(THEIRS) else ABSENT
    found = dict[str, Any]()

    def measure(_: str, notes: list[str]) -> list[TrainRow]:
        measured, calls = list[Measured](), CALLS_PER_STEP * steps
        for dtype in DTYPES:
            ours = Order("layer", OURS, "", dtype, True, compiled, threads, rows, length, shape)
            others = [
                Order("layer", THEIRS, way, dtype, keeps, False, threads, rows, length, shape)
                for way in WAYS for keeps in (False, True) if reason is None
            ]  # fmt: skip
            pairs = in_pairs(ours, others, calls, rounds, WARM_UP_STEPS, notes, say) if others else []
            found[dtype] = _ratios(pairs)
            ours_again = [pair.ours for pair in pairs] or [alone(ours, calls, rounds, WARM_UP_STEPS, say)]
            measured += [min(ours_again, key=lambda m: m.median_s), *(pair.theirs for pair in pairs)]
        notes.append(f"No baseline: {reason}." if reason else _in_words(found))
        return [_row(each) for each in measured]

    report = bracketed(REFERENCE, threads, measure, say)
    return report | {
        "ratios": found, "baseline_reason": reason, "batch": [rows, length], "rounds": rounds,
        "calls": CALLS_PER_STEP * steps, "commit": commit(),
    }  # fmt: skip


def _row(measured: Measured) -> TrainRow:
    made, order = row_of(measured), measured.order
    if order.who != OURS:
        return made
    parts = layer_flops(config_of(order.shape), True, 1.0)
    flops = sum(parts[name] for name in ("router", "routed experts", "shared experts") if name in parts)
    share = 3 * flops * order.rows * order.length / measured.median_s / measured.matmul_flops_per_s
    return TrainRow(made.row | {"matmul_share": share}, made.problem)


def _ratios(pairs: list[Pair]) -> dict[str, Any]:
    """Way -> ratio of medians, and round by round, to the faster allocator setting."""
    told = dict[str, Any]()
    for way in WAYS:
        if of_way := [pair for pair in pairs if pair.theirs.order.implementation == way]:
            best = min(of_way, key=lambda pair: pair.ratio)
            told[way] = {"ratio": best.ratio, "by_round": best.by_round, "baseline": best.theirs.name}
    return told


def _in_words(told: dict[str, Any]) -> str:
    parts = [
        f"{dtype}: " + ", ".join(f"{found['ratio']:.2f} × {way}" for way, found in by_way.items())
        for dtype, by_way in told.items()
    ]
    return f"Forward and backward, {'; '.join(parts)}."
