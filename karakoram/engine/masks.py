"""Masks of constrained sequences: they depend on the tokens so far alone, so they are filled while the pass runs."""

from __future__ import annotations

from collections.abc import Sequence as Ids

import numpy as np

from karakoram.engine.runner import Piece
from karakoram.engine.sequence import Sequence
from karakoram.errors import KarakoramError

Masks = dict[Sequence, "np.ndarray | KarakoramError | None"]


def constrained(pieces: Ids[Piece]) -> list[Sequence]:
    """The sequences that will draw a token under a constraint."""
    ends = ((piece.sequence, piece.sequence.computed + piece.count) for piece in pieces)
    return [one for one, end in ends if one.request.constraint is not None and end >= len(one.tokens)]


def fill(sequences: Ids[Sequence], vocab_size: int) -> Masks:
    """Their masks; an error in the place of one that cannot be had."""
    masks: Masks = {}
    for sequence in sequences:
        constraint = sequence.request.constraint
        assert constraint is not None
        row = np.zeros(-(-vocab_size // 32), np.uint32)
        try:
            masks[sequence] = row if constraint.fill(row, sequence.left) else None
        except Exception as error:  # noqa: BLE001  a broken constraint ends its own request
            masks[sequence] = KarakoramError(f"The constraint failed: {error}")
    return masks
