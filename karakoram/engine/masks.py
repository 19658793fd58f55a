"""Masks of constrained sequences: they depend on the tokens so far alone, so they are filled while the pass runs."""

from __future__ import annotations

import time
from collections.abc import Sequence as Ids

import numpy as np

from karakoram.engine.runner import Piece
from karakoram.engine.sequence import Sequence
from karakoram.errors import KarakoramError

THREAD_S = 100e-6  # what a thread costs: waking it, and taking turns with it

Masks = dict[Sequence, "np.ndarray | KarakoramError | None"]


def constrained(pieces: Ids[Piece]) -> list[Sequence]:
    """The sequences that will draw a token under a constraint."""
    ends = ((piece.sequence, piece.sequence.computed + piece.count) for piece in pieces)
    return [one for one, end in ends if one.request.constraint is not None and end >= len(one.tokens)]


def fill(sequences: Ids[Sequence], vocab_size: int) -> Masks:
    """Their masks; an error in the place of one that cannot be had."""
    masks: Masks = {}
    began = time.perf_counter()
    for sequence in sequences:
        constraint = sequence.request.constraint
        assert constraint is not None
        row = np.zeros(-(-vocab_size // 32), np.uint32)
        try:
            masks[sequence] = row if constraint.fill(row, sequence.left) else None
        except Exception as error:  # noqa: BLE001  a broken constraint ends its own request
            masks[sequence] = KarakoramError(f"The constraint failed: {error}")
    _cost.saw((time.perf_counter() - began) / max(len(sequences), 1))
    return masks


def is_quick(sequences: Ids[Sequence]) -> bool:
    """Whether filling these takes less time than waking another thread for it, by what earlier ones took."""
    return len(sequences) * _cost.each_s <= THREAD_S


class _Cost:
    """Seconds of one mask, on a moving average; the first ones compile and are slow."""

    each_s = 20e-6

    def saw(self, each_s: float) -> None:
        """One more."""
        self.each_s += 0.05 * (min(each_s, 1e-3) - self.each_s)


_cost = _Cost()
