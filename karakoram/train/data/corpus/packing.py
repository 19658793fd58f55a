"""Which samples share a row of `sequence_tokens` tokens.

`best_fit` (the default): samples by falling length, each into the fullest row that still has room (best-fit
decreasing; as training data by Ding et al., "Fewer Truncations Improve Language Modeling", arXiv 2404.10830); only
samples longer than a row are cut. `in_order`: shuffled samples one behind another, cut where a row ends; no padding but
in the last row.

A plan is made once and is the same in every epoch, where its rows come in another order: so any row of any epoch is
found without packing those before it. Best fit works on the histogram of lengths (Krell et al., arXiv 2107.02027): rows
of equal composition are one group, and the time depends on the lengths that occur, hardly on the number of samples.

Every token stands in exactly one row, once. The target of a token is the next token of its sample, also where that
stands in another row; behind the last token there is none.
"""

from bisect import bisect_left, insort
from collections import defaultdict
from dataclasses import dataclass
from typing import Literal

import numpy as np

from karakoram.errors import TrainingError

Packing = Literal["best_fit", "in_order"]
Composition = tuple[tuple[int, int], ...]
"""(length, how many of it), longest first."""
_SHUFFLE = 1  # the first number of every seed says what is drawn: see mixture.py


@dataclass(frozen=True)
class Plan:
    """Row r is pieces offsets_R[r] to offsets_R[r + 1]; piece p is tokens [start, start + length) of a sample."""

    sequence_tokens: int
    sample_P: np.ndarray
    start_P: np.ndarray
    length_P: np.ndarray
    offsets_R: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets_R) - 1

    @property
    def filled(self) -> float:
        """Share of the rows' places that hold a token."""
        return int(self.length_P.sum()) / max(1, len(self) * self.sequence_tokens)

    def row(self, number: int) -> list[tuple[int, int, int]]:
        """(sample, start, length) of the pieces of a row."""
        here = slice(int(self.offsets_R[number]), int(self.offsets_R[number + 1]))
        return list(zip(self.sample_P[here].tolist(), self.start_P[here].tolist(), self.length_P[here].tolist()))


def pack(lengths: np.ndarray, sequence_tokens: int, seed: int, packing: Packing = "best_fit") -> Plan:
    """The plan for samples of these lengths; the seed decides which samples of one length meet.

    Raises TrainingError for an unknown way of packing and for rows without room.
    """
    if sequence_tokens < 1:
        raise TrainingError(f"A row of {sequence_tokens} tokens has no room.", "Give sequence_tokens of at least 1.")
    shuffled = np.random.default_rng([_SHUFFLE, seed]).permutation(len(lengths))
    if packing == "in_order":
        return _in_order(lengths, sequence_tokens, shuffled)
    if packing == "best_fit":
        return _best_fit(lengths, sequence_tokens, shuffled)
    raise TrainingError(f"Unknown packing {packing!r}.", "Use 'best_fit' or 'in_order'.")


def _in_order(lengths: np.ndarray, T: int, shuffled: np.ndarray) -> Plan:
    ends = np.cumsum(lengths[shuffled])
    sample_starts = ends - lengths[shuffled]
    total = int(ends[-1]) if len(ends) else 0
    cuts = np.union1d(sample_starts, np.arange(0, total, T))
    which = np.searchsorted(sample_starts, cuts, side="right") - 1
    piece_lengths = np.diff(np.append(cuts, total))
    offsets = np.searchsorted(cuts, np.arange(0, total + T, T)[: -(-total // T) + 1])
    return Plan(T, shuffled[which], cuts - sample_starts[which], piece_lengths, offsets)


def _best_fit(lengths: np.ndarray, T: int, shuffled: np.ndarray) -> Plan:
    sample_P, start_P, length_P = _cut(lengths, T, shuffled)
    by_length = np.argsort(length_P, kind="stable")
    counts = np.bincount(length_P, minlength=T + 1)
    next_of = np.cumsum(counts) - counts  # where the pieces of a length begin in `by_length`
    chosen = [np.zeros(0, np.int64)]
    sizes = [np.zeros(0, np.int64)]
    for rows, composition in _compositions(counts, T):
        columns = []
        for length, many in composition:
            begin = next_of[length]
            next_of[length] += rows * many
            columns.append(by_length[begin : begin + rows * many].reshape(rows, many))
        block = np.concatenate(columns, axis=1)
        chosen.append(block.reshape(-1))
        sizes.append(np.full(rows, block.shape[1]))
    order = np.concatenate(chosen)
    offsets = np.concatenate([[0], np.cumsum(np.concatenate(sizes))]).astype(np.int64)
    return Plan(T, sample_P[order], start_P[order], length_P[order], offsets)


def _cut(lengths: np.ndarray, T: int, shuffled: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Samples as pieces of at most a row, in shuffled order: sample, start, length."""
    pieces = -(-lengths[shuffled] // T)
    sample_P = np.repeat(shuffled, pieces)
    start_P = (np.arange(len(sample_P)) - np.repeat(np.cumsum(pieces) - pieces, pieces)) * T
    return sample_P, start_P, np.minimum(T, lengths[sample_P] - start_P)


def _compositions(counts: np.ndarray, T: int) -> list[tuple[int, Composition]]:
    """Best-fit decreasing over a histogram: how many rows there are of which composition.

    A row that takes one piece of a length is the fullest with room for the next one of that length, if it has room at
    all; so it takes as many as fit before another row is looked for, and rows of one kind are served together.
    """
    full: list[tuple[int, Composition]] = []
    open_rows: defaultdict[int, list[tuple[int, Composition]]] = defaultdict(list)  # by the room that is left
    rooms: list[int] = []  # keys of `open_rows`, rising

    def put(room: int, rows: int, composition: Composition) -> None:
        if not rows:
            return
        if room == 0:
            full.append((rows, composition))
            return
        if room not in open_rows:
            insort(rooms, room)
        open_rows[room].append((rows, composition))

    for length in np.flatnonzero(counts)[::-1].tolist():
        left = int(counts[length])
        while left:
            at = bisect_left(rooms, length)
            if at == len(rooms):
                room, rows, composition = T, left, ()
            else:
                room = rooms[at]
                rows, composition = open_rows[room].pop()
                if not open_rows[room]:
                    del open_rows[room], rooms[at]
            many = min(room // length, left)
            served = min(rows, left // many)
            put(room - many * length, served, (*composition, (length, many)))
            if composition:
                put(room, rows - served, composition)
            left -= served * many
    return full + [group for room in rooms for group in open_rows[room]]
