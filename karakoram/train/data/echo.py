"""A warm-up that teaches copying: random tokens, said three times over.

Everything that nano does (a tool's name into the call, a value into an argument, a result into the answer) rests on
finding what followed the same tokens earlier. Attention heads that do so ("induction heads", Olsson et al., arXiv
2209.11895) form late in dialogs, where most tokens can be guessed from phrasing; on repeated random tokens nothing else
helps. The first telling weighs nothing: it cannot be predicted.

Not proven: dialogs that followed it did not begin to copy earlier than dialogs without it (docs/log.md).
"""

from typing import Protocol

import numpy as np
import torch

from karakoram.train.data.batches import Batch

SHORTEST, LONGEST, TELLINGS = 8, 48, 3
# Copying is learned token by token: on 128 ids the loss moves after 60 steps of 3,072 tokens, on 4,992 not within 140.
FIRST_IDS, PURE_BATCHES = 128, 100
# Over all ids it is still not learned by then (loss 8.8 after 50 batches), and only disturbs.
ALL_IDS, MIXED_UNTIL, MIXED_SHARE = 4992, 351, 0.2


class BatchSource(Protocol):
    """Batches by number."""

    def __getitem__(self, number: int) -> Batch: ...


class WithEcho:
    """`batches`, after 100 batches of echo over a few ids, and mixed with echo over all ids up to batch 351."""

    def __init__(self, batches: BatchSource, tokens_per_batch: int, seed: int) -> None:
        self.batches, self.tokens_per_batch, self.seed = batches, tokens_per_batch, seed
        mixed = np.random.default_rng((seed, 1)).random(MIXED_UNTIL) < MIXED_SHARE
        mixed[:PURE_BATCHES] = True
        self._is_echo = mixed
        self._echoes_before = np.concatenate(([0], np.cumsum(mixed)))

    def __getitem__(self, number: int) -> Batch:
        if number < MIXED_UNTIL and self._is_echo[number]:
            ids_below = FIRST_IDS if number < PURE_BATCHES else ALL_IDS
            return echo(self.tokens_per_batch, ids_below, (self.seed, 2, number))
        return self.batches[number - int(self._echoes_before[min(number, MIXED_UNTIL)])]


def echo(tokens_per_batch: int, ids_below: int, seed: tuple[int, ...]) -> Batch:
    """Rows of one length, each a phrase of random ids below `ids_below` repeated; weight 0 on the first telling."""
    generator = np.random.default_rng(seed)
    length = int(generator.integers(SHORTEST, LONGEST + 1))
    width = TELLINGS * length
    phrases = generator.integers(0, ids_below, size=(max(tokens_per_batch // width, 1), length))
    ids = torch.from_numpy(np.tile(phrases, (1, TELLINGS)))
    weights = torch.ones(ids.shape[0], width - 1)
    weights[:, : length - 1] = 0
    return Batch(ids[:, :-1], ids[:, 1:], weights)
