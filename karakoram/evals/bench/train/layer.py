"""`k2 bench train --layer`: one layer of experts, forward and backward, beside both of transformers' ways.

Hidden 256, 64 experts of 128 of which 4 run, router and shared expert included, 4,096 tokens, in float32 and bfloat16.
Every candidate draws the same router and the same inputs: as many tokens go to each expert. A ratio is to the better of
a way as a person gets it and with the allocator settings of `k2 train`.

    matmul_share   of our rows: FLOPs of the layer's products, three forwards', over the time, of what one large product
                   in the same dtype reaches between the rounds
"""

from importlib.util import find_spec
from typing import Any

from karakoram.evals.bench.report import Say, bracketed, silent
from karakoram.evals.bench.threads import REFERENCE
from karakoram.evals.bench.train.order import LAYER_SHAPE, LENGTH, OURS, ROWS, THEIRS, Order, config_of
from karakoram.evals.bench.train.process import Measured, in_turn
from karakoram.evals.bench.train.step import ABSENT, TrainRow, commit, ratios, row_of
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
    orders = [Order("layer", OURS, "", dtype, True, compiled, threads, rows, length, shape) for dtype in DTYPES]
    if installed := find_spec(THEIRS):
        orders += [
            Order("layer", THEIRS, way, dtype, keeps, False, threads, rows, length, shape)
            for dtype in DTYPES for way in WAYS for keeps in (False, True)
        ]  # fmt: skip
    found = dict[str, Any]()

    def measure(_: str, notes: list[str]) -> list[TrainRow]:
        measured = in_turn(orders, CALLS_PER_STEP * steps, rounds, WARM_UP_STEPS, notes, say)
        found["ratios"] = {dtype: _ratios(dtype, measured) for dtype in DTYPES}
        notes.append(_in_words(found["ratios"]) if installed else f"No baseline: {ABSENT}.")
        return [_row(each) for each in measured]

    report = bracketed(REFERENCE, threads, measure, say)
    return report | found | {
        "baseline_reason": None if installed else ABSENT, "batch": [rows, length], "rounds": rounds,
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


def _ratios(dtype: str, measured: list[Measured]) -> dict[str, Any]:
    """Way -> ratio of medians, and round by round, to the faster allocator setting."""
    ours = next(m for m in measured if m.order.who == OURS and m.dtype == dtype)
    told = dict[str, Any]()
    for way in WAYS:
        theirs = [m for m in measured if m.order.who == THEIRS and (m.order.implementation, m.dtype) == (way, dtype)]
        if theirs:
            best = min(theirs, key=lambda m: m.median_s)
            told[way] = {"ratio": best.median_s / ours.median_s, "by_round": ratios(ours, best), "baseline": best.name}
    return told


def _in_words(told: dict[str, Any]) -> str:
    parts = [
        f"{dtype}: " + ", ".join(f"{found['ratio']:.2f} × {way}" for way, found in by_way.items())
        for dtype, by_way in told.items()
    ]
    return f"Forward and backward, {'; '.join(parts)}."
