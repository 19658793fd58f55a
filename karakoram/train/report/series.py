"""Numbers by step. A run may have millions of steps, a page a few hundred pixels, and a spike a single step.

So whoever makes fewer points of many keeps the smallest and the largest of every bucket: means would hide what one
looks for. Legend: N points.
"""

import math
from array import array
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

KEPT_POINTS = 65_536  # of a column in memory: 1 MB; beyond it, pairs of points become their smallest and largest

LARGEST, LEAST = 1e30, 1e-30  # what a picture can have beside ordinary numbers without an overflow in its arithmetic

Numbers = NDArray[np.float64]


class Column:
    """One quantity of a run: steps ascending, values of a size that can be drawn; the steps of the others are kept."""

    def __init__(self) -> None:
        self.steps, self.values = array("q"), array("d")
        self.broken_steps = array("q")

    def add(self, step: int, value: float) -> None:
        """The steps must ascend: see `back_to`."""
        if not abs(value) <= LARGEST:
            if len(self.broken_steps) < KEPT_POINTS:
                self.broken_steps.append(step)
            return
        self.steps.append(step)
        self.values.append(value)
        if len(self.steps) > KEPT_POINTS:
            steps_N, values_N = thin(self.points[0], self.points[1], KEPT_POINTS // 2)
            self.steps, self.values = array("q", steps_N.astype(np.int64)), array("d", values_N)

    def back_to(self, step: int) -> None:
        """Forget this step and all later ones: a run that was resumed goes over them again."""
        for steps in (self.steps, self.broken_steps):
            while steps and steps[-1] >= step:
                steps.pop()
        del self.values[len(self.steps) :]

    @property
    def points(self) -> tuple[Numbers, Numbers]:
        """Steps and values, float64 [N]."""
        return np.array(self.steps, dtype=np.float64), np.array(self.values, dtype=np.float64)

    @property
    def newest(self) -> float:
        """The last finite value; NaN without one."""
        return self.values[-1] if self.values else math.nan


def thin(steps_N: Numbers, values_N: Numbers, points: int) -> tuple[Numbers, Numbers]:
    """At most `points` of N: the smallest and the largest value of each bucket, where they were; the ends stay."""
    if len(values_N) <= points:
        return steps_N, values_N
    edges = np.linspace(0, len(values_N), max(1, points // 2 - 1) + 1).astype(np.int64)
    kept = {0, len(values_N) - 1}
    for start, end in zip(edges, edges[1:]):
        bucket = values_N[start:end]
        kept |= {int(start + bucket.argmin()), int(start + bucket.argmax())}
    places = np.array(sorted(kept))
    return steps_N[places], values_N[places]


def smooth(values_N: Numbers, span: int) -> Numbers:
    """A mean whose weights fall by 1/span a value to both sides: it does not lag behind, and the ends are no colder."""
    after, before = _one_sided(values_N, span), _one_sided(values_N[::-1], span)[:, ::-1]
    total_N, weight_N = after + before - np.stack([values_N, np.ones_like(values_N)])
    return total_N / weight_N


def _one_sided(values_N: Numbers, span: int) -> Numbers:
    """Sums of the values up to each, every step back counting by 1 - 1/span less, and of their weights: [2, N]."""
    keep, total, weight = 1 - 1 / max(1, span), 0.0, 0.0
    sums_2N = np.empty((2, len(values_N)))
    for place, value in enumerate(values_N.tolist()):
        total, weight = keep * total + value, keep * weight + 1
        sums_2N[:, place] = total, weight
    return sums_2N


def limits(lines: Sequence[Numbers], few: int = 50) -> tuple[float, float] | None:
    """Where to cut an axis, or None for nowhere: a spike far above 98 % of the values must not flatten the rest.

    Only where it would leave them less than a quarter of the height, and there are more than `few` values.
    """
    values_N = np.concatenate([line for line in lines if len(line)] or [np.empty(0)])
    if len(values_N) <= few:
        return None
    lowest, most, highest = float(values_N.min()), float(np.quantile(values_N, 0.98)), float(values_N.max())
    if most <= lowest or highest - lowest <= 4 * (most - lowest):
        return None
    margin = 0.1 * (most - lowest)
    return lowest - margin, most + 3 * margin
