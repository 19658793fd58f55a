"""AdamW for what is not a matrix to orthogonalise: embedding, head and norm gains.

torch's own, on the float32 masters, with Moonlight's settings (arXiv 2502.16982, §2.4): betas 0.9 and 0.95, weight
decay 0.1 on the norm gains too.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

BETAS = (0.9, 0.95)


class AdamW:
    """The same calls as `Muon`: weights by name, edited in place by `step`."""

    def __init__(self, weights: Mapping[str, Tensor], weight_decay: float = 0.1) -> None:
        self.weights = dict(weights)
        self._optimizer = torch.optim.AdamW(self.weights.values(), lr=0.0, betas=BETAS, weight_decay=weight_decay)

    def step(self, gradients: Mapping[str, Tensor], learning_rate: float, scale: float = 1.0) -> None:
        """One update from gradients (any float dtype) multiplied by `scale`."""
        for name, weight in self.weights.items():
            weight.grad = gradients[name].float() * scale if name in gradients else None
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._optimizer.step()
        for weight in self.weights.values():
            weight.grad = None

    def state(self) -> dict[str, Tensor]:
        """Both moments and the step count of every weight, by "<weight>/<field>"."""
        state = self._optimizer.state
        return {f"{name}/{key}": value for name, weight in self.weights.items() for key, value in state[weight].items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state` gave."""
        for name, weight in self.weights.items():
            fields = {
                key.rsplit("/", 1)[1]: value.clone() for key, value in state.items() if key.rsplit("/", 1)[0] == name
            }
            self._optimizer.state[weight] = fields
