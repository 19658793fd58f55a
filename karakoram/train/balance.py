"""Balance without auxiliary loss: the router's selection bias moves after each step, against the experts' loads.

**sign**      b_i ← b_i + u · (sign(e_i) − mean_j sign(e_j)),  e_i = mean load − load_i: Moonlight's form of DeepSeek's
              rule; subtracting the mean keeps Σb fixed (arXiv 2502.16982, §2.4; arXiv 2408.15664).
**quantile**  b_j = −quantile of (score_j − edge) at 1 − K/E, then centred; the edge is the token's (K+1)-th best biased
              score, so that with this bias each expert would have been chosen by a share K/E of the tokens (Kimi K3
              report, arXiv 2607.24653). Nothing to tune, and as fast as the batch is large.

MaxVio = max load / mean load − 1 (arXiv 2408.15664, §4). Of a single batch it is noise mostly; the number that papers
quote, and `Loads` keeps, is of the loads summed over many batches.

Legend: E experts, Q bins.
"""

from collections import deque
from collections.abc import Mapping

import torch
from torch import Tensor

from karakoram.model.watch import MARGIN_BINS, MARGIN_RANGE


@torch.no_grad()
def sign_step(biases: Mapping[int, Tensor], loads: Mapping[int, Tensor], rate: float) -> None:
    """Move each layer's bias [E] in place by its loads [E]."""
    for layer, load_E in loads.items():
        sign_E = (load_E.float().mean() - load_E.float()).sign()
        biases[layer].add_(rate * (sign_E - sign_E.mean()))


@torch.no_grad()
def quantile_step(biases: Mapping[int, Tensor], margin_counts: Mapping[int, Tensor], experts_per_token: int) -> None:
    """Set each layer's bias [E] from its histogram of margins [E, Q]."""
    for layer, counts_EQ in margin_counts.items():
        bias_E = -quantile(counts_EQ, 1 - experts_per_token / len(counts_EQ))
        biases[layer].copy_(bias_E - bias_E.mean())


def quantile(counts_EQ: Tensor, share: float) -> Tensor:
    """The value below which `share` of each row's counts lie, in the units of the margins: float32 [E]."""
    sums_EQ = counts_EQ.double().cumsum(1)
    wanted_E1 = share * sums_EQ[:, -1:]
    bin_E1 = torch.searchsorted(sums_EQ, wanted_E1).clamp_(max=counts_EQ.shape[1] - 1)
    inside_E1 = counts_EQ.double().gather(1, bin_E1)
    before_E1 = sums_EQ.gather(1, bin_E1) - inside_E1
    place_E1 = bin_E1 + ((wanted_E1 - before_E1) / inside_E1.clamp_min(1)).clamp(0, 1)
    return (place_E1[:, 0] * (2 * MARGIN_RANGE / MARGIN_BINS) - MARGIN_RANGE).float()


def max_vio(load_E: Tensor) -> float:
    """max load / mean load − 1 of one layer."""
    load_E = load_E.float()
    return float(load_E.max() / load_E.mean().clamp_min(1e-9)) - 1


class Loads:
    """Experts' loads over the last `window` batches."""

    def __init__(self, window: int) -> None:
        self.batches: deque[dict[int, Tensor]] = deque(maxlen=window)
        self.total: dict[int, Tensor] = {}

    def add(self, loads: Mapping[int, Tensor]) -> None:
        """One batch's loads, layer -> int64 [E]."""
        gone = self.batches[0] if len(self.batches) == self.batches.maxlen else {}
        for layer, load_E in loads.items():
            before = self.total.get(layer, torch.zeros_like(load_E))
            self.total[layer] = before + load_E - gone.get(layer, 0)
        self.batches.append(dict(loads))

    @property
    def max_vio(self) -> float:
        """Of the summed loads, in the worst layer; 0 without a mixture of experts."""
        return max((max_vio(load_E) for load_E in self.total.values()), default=0.0)

    @property
    def dead(self) -> int:
        """Experts that no token of the window was sent to, over all layers."""
        return sum(int((load_E == 0).sum()) for load_E in self.total.values())

    @property
    def entropy(self) -> dict[int, float]:
        """Each layer's entropy of the load, as a share of log E: 1 is even."""
        return {layer: _entropy(load_E) for layer, load_E in self.total.items()}


def _entropy(load_E: Tensor) -> float:
    p_E = load_E.double() / load_E.sum().clamp_min(1)
    return float(torch.special.entr(p_E).sum() / torch.tensor(float(len(p_E))).log())
