"""Balance without auxiliary loss: the router's selection bias moves a little each step against the experts' loads.

    b_i ← b_i + u · (sign(e_i) − mean_j sign(e_j)),   e_i = mean load − load_i

Moonlight's form of DeepSeek's rule: subtracting the mean keeps Σb fixed (arXiv 2502.16982, §2.4; arXiv 2408.15664).
"""

from collections.abc import Mapping

import torch
from torch import Tensor


@torch.no_grad()
def balance(biases: Mapping[int, Tensor], loads: Mapping[int, Tensor], rate: float) -> float:
    """Move each layer's bias [E] in place by its loads [E]; returns the worst MaxVio = max load / mean load − 1."""
    worst = 0.0
    for layer, load_E in loads.items():
        error_E = load_E.float().mean() - load_E.float()
        sign_E = error_E.sign()
        biases[layer].add_(rate * (sign_E - sign_E.mean()))
        worst = max(worst, float(load_E.max() / load_E.float().mean()) - 1)
    return worst
