"""Which experts the next layer will want, guessed from what this layer's router sees.

Residual streams change slowly: the next layer's router, applied to the hidden state of this one, names 59 to 77 % of
what it will choose in truth (docs/expert-store.md has what was measured here). The state is at hand as this layer's
normed input; what it would be under the next layer's norm differs by the ratio of the two weights.

A guess costs disk time where it is wrong, and saves it where it is right and early. Both are measured, and guessing
stops while it costs more than it saves.

Legend: N tokens, D hidden, E experts, K experts per token.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from karakoram.kernels import ops
from karakoram.model.packed.modules import PackedRouter

FADING = 0.995  # of what was measured, per layer that was guessed for: about two hundred of them count
EVIDENCE_S = 0.02  # of disk time, before it is judged
PAUSE_LAYERS = 2048  # guessed for by nobody, before it is tried again


class Foresight:
    """Guesses for each layer from the one before. `routers` and `norms` (float [D]) are those of the MoE layers.

    saved_s, cost_s   disk time that right guesses had behind them when they were wanted; that wrong ones took
    """

    def __init__(self, routers: Sequence[PackedRouter], norms: Sequence[Tensor], pausable: bool = True) -> None:
        self._routers = list(routers)
        here, ahead = norms[:-1], norms[1:]
        self._ratios = [_ratio(one.float(), other.float()) for one, other in zip(here, ahead, strict=True)]
        self._pausable = pausable
        self._paused = 0
        self._saved_s = self._cost_s = 0.0
        self.saved_s = self.cost_s = 0.0
        self.pauses = 0

    @torch.inference_mode()
    def guess(self, index: int, x_ND: Tensor) -> np.ndarray | None:
        """Expert ids that MoE layer `index` + 1 may choose for these normed inputs of layer `index`, likeliest first.

        None for the last layer, and while guessing does not pay.
        """
        if index + 1 >= len(self._routers) or self._pauses():
            return None
        router = self._routers[index + 1]
        ahead_ND = (x_ND.float() * self._ratios[index]).bfloat16()
        scores_NE = ops.linear(ahead_ND, router.matrix, torch.float32).sigmoid_() + router.e_score_correction_bias
        ids_NK = scores_NE.topk(router.config.num_experts_per_tok, -1).indices.numpy()
        if len(ids_NK) == 1:
            return ids_NK[0]
        wanted_E = np.bincount(ids_NK.ravel(), minlength=scores_NE.shape[1])  # by how many tokens
        order = np.argsort(-wanted_E, kind="stable")
        return order[: int((wanted_E > 0).sum())]

    def right(self, ahead_s: float) -> None:
        """A guess was wanted; its read had been under way for so long."""
        self._saved_s += ahead_s
        self.saved_s += ahead_s

    def wrong(self, read_s: float) -> None:
        """A guess was not wanted; its read took so long until it ended or was stopped."""
        self._cost_s += read_s
        self.cost_s += read_s

    def _pauses(self) -> bool:
        if self._paused:
            self._paused -= 1
            return True
        self._saved_s *= FADING
        self._cost_s *= FADING
        if self._pausable and self._cost_s > max(self._saved_s, EVIDENCE_S):
            self._saved_s = self._cost_s = 0.0
            self._paused = PAUSE_LAYERS
            self.pauses += 1
            return True
        return False


def _ratio(here_D: Tensor, ahead_D: Tensor) -> Tensor:
    ratio_D = ahead_D / here_D
    return torch.where(ratio_D.isfinite(), ratio_D, torch.zeros_like(ratio_D))
