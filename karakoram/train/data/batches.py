"""Batches of similar length from a cache of tokenised documents.

A row is one document from its beginning, as at inference: nothing is packed behind anything else, so no mask is needed.
Documents are shuffled, sorted by length within pools, and cut into batches of about the same number of tokens; then the
pool's batches are shuffled, but for the very first pool's, which come from short to long. Padding comes to a few
percent. A batch is a pure function of the seed and its number, so a resumed run goes on with exactly the batch that
would have come next.
"""

from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from karakoram.errors import TrainingError
from karakoram.train.data.pack import open_token_cache

POOL = 8192  # documents sorted together: large enough for rows of equal length, small enough to keep the mixture
ROUND_TO = 16  # lengths are padded to multiples of this, so that few shapes of batch occur


class Batch(NamedTuple):
    """Inputs and targets int64 [B, T] (a target is the next token), weights float32 [B, T] (0 on padding).

    documents  int32 [B, T]: which document of its row a token belongs to, where rows hold several; a token attends to
               its own only, and positions restart at 0 in each
    """

    token_ids: Tensor
    targets: Tensor
    weights: Tensor
    documents: Tensor | None = None

    def map(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        """The batch with every tensor changed alike: moved, or fewer rows of it."""
        documents = None if self.documents is None else change(self.documents)
        return Batch(change(self.token_ids), change(self.targets), change(self.weights), documents)


class Batches:
    """`batches[n]` for any n ≥ 0; after the last document a new epoch begins in another order.

    Raises TrainingError for a cache that is unfinished or empty.
    """

    def __init__(self, cache: Path, tokens_per_batch: int, pad_id: int, seed: int) -> None:
        self.ids, self.tenths, self.offsets = open_token_cache(cache)
        if len(self.offsets) < 2:
            raise TrainingError(f"The token cache {cache} holds no document.", "Remove it and build it again.")
        self.tokens_per_batch, self.pad_id, self.seed = tokens_per_batch, pad_id, seed
        self._epoch, self._rows = 0, self._epoch_rows(0)
        self._before = 0  # batches of the epochs before `_epoch`

    @cached_property
    def documents(self) -> int:
        """How many documents the cache holds."""
        return len(self.offsets) - 1

    def batch(self, number: int, rank: int = 0, world: int = 1) -> Batch:
        """Every `world`-th row of batch `number`, from row `rank` on."""
        return self[number].map(lambda rows: rows[rank::world])

    def __getitem__(self, number: int) -> Batch:
        if number < 0:
            raise IndexError(f"Batch {number}: batches are numbered from 0.")
        if number < self._before:
            self._epoch, self._rows, self._before = 0, self._epoch_rows(0), 0
        while number - self._before >= len(self._rows):
            self._before += len(self._rows)
            self._epoch += 1
            self._rows = self._epoch_rows(self._epoch)
        return self._batch(self._rows[number - self._before])

    def _epoch_rows(self, epoch: int) -> list[np.ndarray]:
        generator = np.random.default_rng((self.seed, epoch))
        order = generator.permutation(self.documents)
        lengths = np.diff(self.offsets)
        batches: list[np.ndarray] = []
        for start in range(0, len(order), POOL):
            pool = order[start : start + POOL]
            cut = list(self._cut(pool[np.argsort(lengths[pool], kind="stable")], lengths))
            # copying is learned sooner where there is little to search: docs/log.md
            first = epoch == 0 and start == 0
            batches += cut if first else [cut[i] for i in generator.permutation(len(cut))]
        return batches

    def _cut(self, rows: np.ndarray, lengths: np.ndarray) -> Iterator[np.ndarray]:
        """Split rows of rising length so that rows x longest stays within the batch."""
        start = 0
        for stop in range(1, len(rows) + 1):
            last = stop == len(rows)
            if last or (stop + 1 - start) * _padded(int(lengths[rows[stop]])) > self.tokens_per_batch:
                yield rows[start:stop]
                start = stop

    def _batch(self, rows: np.ndarray) -> Batch:
        width = _padded(int(max(self.offsets[r + 1] - self.offsets[r] for r in rows)))
        ids = np.full((len(rows), width + 1), self.pad_id, dtype=np.int64)
        tenths = np.zeros((len(rows), width + 1), dtype=np.float32)
        for i, r in enumerate(rows):
            start, stop = self.offsets[r], self.offsets[r + 1]
            ids[i, : stop - start] = self.ids[start:stop]
            tenths[i, : stop - start] = self.tenths[start:stop]
        token_ids = torch.from_numpy(ids)
        return Batch(token_ids[:, :-1], token_ids[:, 1:], torch.from_numpy(tenths[:, 1:] / 10))


def _padded(length: int) -> int:
    return -(-max(length - 1, 1) // ROUND_TO) * ROUND_TO
