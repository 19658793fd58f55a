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
        self._optimizer = None
        if self.weights:
            self._optimizer = torch.optim.AdamW(
                self.weights.values(), lr=0.0, betas=BETAS, weight_decay=weight_decay, fused=True
            )
            # moments from the beginning, where torch makes them at the first step: a checkpoint has a place for them
            for weight in self.weights.values():
                self._optimizer.state[weight] = {
                    "step": torch.zeros((), dtype=torch.float32, device=weight.device),
                    "exp_avg": torch.zeros_like(weight),
                    "exp_avg_sq": torch.zeros_like(weight),
                }

    def step(self, gradients: Mapping[str, Tensor], learning_rate: float, scale: float = 1.0) -> None:
        """One update from gradients (any float dtype) multiplied by `scale`; weights without one keep still."""
        if self._optimizer is None:
            return
        for name, weight in self.weights.items():
            weight.grad = gradients[name].float() * scale if name in gradients else None
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._optimizer.step()
        for weight in self.weights.values():
            weight.grad = None

    def state(self) -> dict[str, Tensor]:
        """Both moments and the step count of every weight, by "<weight>/<field>": the tensors that `step` edits."""
        if self._optimizer is None:
            return {}
        state = self._optimizer.state
        return {f"{name}/{key}": value for name, weight in self.weights.items() for key, value in state[weight].items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state` gave."""
        for name, tensor in self.state().items():
            tensor.copy_(state[name])

    @torch.no_grad()
    def update_rms(self, name: str) -> float:
        """RMS of the last update of a weight over the learning rate, decay left out."""
        assert self._optimizer is not None
        moments = self._optimizer.state[self.weights[name]]
        step = float(moments["step"])
        if step == 0 or not moments["exp_avg"].numel():  # a rank may hold no row
            return 0.0
        mean = moments["exp_avg"] / (1 - BETAS[0] ** step)
        return float((mean / ((moments["exp_avg_sq"] / (1 - BETAS[1] ** step)).sqrt() + 1e-8)).square().mean().sqrt())
