"""Which experts the next layer will want, guessed from what this layer's router sees.

Residual streams change slowly: the next layer's router, applied to the hidden state of this one, names 59 to 77 % of
what it will choose in truth (docs/expert-store.md has what was measured here). The state is at hand as this layer's
normed input; what it would be under the next layer's norm differs by the ratio of the two weights.

Not all guesses are equal: the first in rank is nearly always right, the last seldom, and those that are not in memory
yet are wrong more often than the others. So for every rank it is counted how often an expert that was missing was then
wanted, whether it had been read or not; only ranks that are right often enough are read. Where none is, nothing is
read: guessing is off by itself, and comes back by itself.

Legend: N tokens, D hidden, E experts, K experts per token.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from karakoram.model.packed.modules import PackedRouter

WORTHWHILE = 0.65  # share of right guesses below which a rank is not read
RANKS = 8  # that are told apart; a batch's longer lists are cut into so many parts
FADING = 0.98  # of what was counted, per layer that was guessed for
SELDOM = 0.15  # reads of a guess, below which it is not worth its 0.2 ms
PRIOR = 4.0  # guesses of each rank, before any was made, at the share above


@dataclass
class Guess:
    """For MoE layer `index`: experts, likeliest first, the rank of each, and which of them were missing."""

    index: int
    experts: np.ndarray
    ranks: np.ndarray
    single: bool
    missing: np.ndarray | None = None


class Foresight:
    """Guesses for each layer from the one before. `routers` and `norms` (float [D]) are those of the MoE layers.

    named, found    how many experts were guessed (in memory or not), and were then wanted: the recall
    """

    def __init__(self, routers: Sequence[PackedRouter], norms: Sequence[Tensor]) -> None:
        self._routers = list(routers)
        here, ahead = norms[:-1], norms[1:]
        self._ratios = [_ratio(one.float(), other.float()) for one, other in zip(here, ahead, strict=True)]
        chosen = self._routers[0].config.num_experts_per_tok
        self._single_ranks = np.minimum(np.arange(chosen), RANKS - 1)
        # by whether one token runs or several: those that were missing, and of these the right ones
        self._tried = {single: np.full(RANKS, PRIOR) for single in (True, False)}
        self._right = {single: np.full(RANKS, PRIOR * (WORTHWHILE + 0.05)) for single in (True, False)}
        self._reads, self._turn = 1.0, 0  # reads of a guess, lately
        self.named = self.found = 0

    @torch.inference_mode()
    def guess(self, index: int, x_ND: Tensor) -> Guess | None:
        """What MoE layer `index` + 1 may choose for these normed inputs of layer `index`; None for the last layer,
        and where guesses rest."""
        if index + 1 >= len(self._routers) or self._rests():
            return None
        router = self._routers[index + 1]
        ids_NK = router(x_ND * self._ratios[index])[0].numpy()  # in the order of rank, as the kernels give them
        if len(ids_NK) == 1:
            return Guess(index + 1, ids_NK[0], self._single_ranks, True)
        wanted_E = np.bincount(ids_NK.ravel())  # by how many tokens
        order = np.argsort(-wanted_E, kind="stable")[: int((wanted_E > 0).sum())]
        return Guess(index + 1, order, np.arange(len(order)) * RANKS // len(order), False)

    def saw(self, reads: int) -> None:
        """How many reads came of a guess."""
        self._reads += (1 - FADING) * (reads - self._reads)

    def _rests(self) -> bool:
        """Where nearly all is in memory, guesses find nothing to read: then only every eighth is made."""
        self._turn = (self._turn + 1) % 8
        return self._reads < SELDOM and self._turn != 0

    def worthwhile(self, guess: Guess) -> np.ndarray:
        """Of the guess's experts, those whose rank is right often enough: bool."""
        shares = self._right[guess.single] / self._tried[guess.single]
        return shares[guess.ranks] >= WORTHWHILE

    def learn(self, guess: Guess, wanted: np.ndarray) -> None:
        """What the layer wanted in truth."""
        truly = set(wanted.tolist())
        right = np.fromiter((expert in truly for expert in guess.experts.tolist()), bool, len(guess.experts))
        self.named += len(right)
        self.found += int(right.sum())
        if guess.missing is None or not guess.missing.any():
            return
        ranks = guess.ranks[guess.missing]
        for counts, weights in ((self._tried, None), (self._right, right[guess.missing].astype(float))):
            counts[guess.single] *= FADING
            counts[guess.single] += np.bincount(ranks, weights, minlength=RANKS)


def _ratio(here_D: Tensor, ahead_D: Tensor) -> Tensor:
    ratio_D = ahead_D / here_D
    return torch.where(ratio_D.isfinite(), ratio_D, torch.zeros_like(ratio_D)).bfloat16()
