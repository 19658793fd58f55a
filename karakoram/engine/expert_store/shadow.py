"""A two-bit copy of every expert in memory, for those that would come too late.

Of each code the upper two bits are kept, and all scales: 5/9 of the bytes, expanded in 0.1 ms for an expert of
Moonlight, 1.3 ms for one of K2. A layer waits for its reads so long; what is not there then is computed from its
shadow. Reads that have begun go on, for the next token; those that have not are given up, or the next layer would wait
for them. An answer that was touched by shadows is not exact, and depends on the disk's speed:
so this is off unless asked for, and which tokens were touched is counted, for all and for each sequence.

Legend: N tokens of a pass, K experts per token.
"""

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
from torch import Tensor

from karakoram.checkpoint.experts import ExpertSource, aligned_bytes
from karakoram.engine.expert_store.readers import Readers
from karakoram.errors import InputError
from karakoram.kernels import ops
from karakoram.kernels.packed import BLOCK_BYTES, SHADOW_BLOCK_BYTES

_TOGETHER = 16  # records that are read at once while it is filled


def shadow_bytes(source: ExpertSource) -> int:
    """Of all experts together. Raises InputError for experts that are not int4."""
    if source.kind != "int4":
        raise InputError(f"Experts in {source.kind} have no shadow.", "Leave --shadow out.")
    return len(source.layers) * source.experts * _each(source)


def _each(source: ExpertSource) -> int:
    return source.record_bytes // BLOCK_BYTES["int4"] * SHADOW_BLOCK_BYTES


class Shadow:
    """All shadows, and whom they touched. Computed with after `after_s` seconds of waiting in a layer.

    experts  how many were computed from their shadow; tokens: how many tokens that touched, each once
    """

    def __init__(self, source: ExpertSource, after_s: float) -> None:
        shadow_bytes(source)
        self.after_s, self.experts, self.tokens = after_s, 0, 0
        self._source = source
        self._codes = aligned_bytes(len(source.layers) * source.experts, _each(source))
        self._record = aligned_bytes(source.record_bytes)
        self._rows: set[int] = set()  # of the pass that runs
        self._touched = Counter[int]()  # tokens, by sequence

    def fill(self, readers: Readers, say: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Read every expert once. Raises CheckpointError for one that cannot be read."""
        s, total = self._source, len(self._codes)
        slots = aligned_bytes(_TOGETHER, s.slot_bytes)
        for first in range(0, total, _TOGETHER):
            keys = range(first, min(first + _TOGETHER, total))
            wanted = [
                (s.layers[key // s.experts], key % s.experts, slot) for key, slot in zip(keys, slots, strict=False)
            ]
            left = dict(zip(readers.submit(wanted, urgent=True), keys, strict=True))
            while left:
                for read in readers.wait(list(left)):
                    if read.error is not None:
                        raise read.error
                    self._codes[left.pop(read)] = ops.shadow_make(read.slot[: s.record_bytes])
            say(keys[-1] + 1, total)

    def compute(self, steps: ops.MoeSteps, keys: Sequence[int], ids_NK: Tensor) -> None:
        """These experts' partials, approximately."""
        for key in keys:
            ops.shadow_expand(self._codes[key], self._record)
            steps.experts([key % self._source.experts], [self._record])
            self._rows.update((ids_NK == key % self._source.experts).any(-1).nonzero().flatten().tolist())
        self.experts += len(keys)

    def begin_pass(self) -> None:
        """Forget what a pass touched that ended in an error."""
        self._rows.clear()

    def end_pass(self, rows_N: np.ndarray | None) -> None:
        """Book the tokens that were touched; rows_N says whose they are, where anybody told."""
        self.tokens += len(self._rows)
        if rows_N is not None:
            self._touched.update(int(rows_N[row]) for row in self._rows if row < len(rows_N))
        self._rows.clear()

    def touched(self, sequence: int) -> int:
        """How many of a sequence's tokens; it is over, and forgotten."""
        return self._touched.pop(sequence, 0)
