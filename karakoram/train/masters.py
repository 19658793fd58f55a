"""Master weights: float32 truths behind the bfloat16 (or float32) parameters that the model computes with.

An optimizer step edits the masters; `publish` writes them into the model. A bfloat16 weight cannot take the step
itself: at learning rates of 1e-3 most updates are below half a unit in its last place.

INT4-aware training lives in `publish`: from then on routed experts are published as the nearest point of the int4
group-32 grid. Forward and backward see what will be stored, the gradient goes to the master unchanged (the
straight-through estimator), and the finished checkpoint lies on the grid bit for bit (K2-Thinking model card: INT4 for
the routed experts, trained in).
"""

import torch
from torch import Tensor

from karakoram.model.transformer import Transformer
from karakoram.quantize.round_to_nearest import on_grid


class Masters:
    """Float32 copies of all parameters by name; `weights[name]` is edited in place, then `publish` is called."""

    def __init__(self, model: Transformer) -> None:
        self.model = model
        self.weights = {name: p.detach().to(torch.float32, copy=True) for name, p in model.named_parameters()}
        self.int4_experts = False

    @torch.no_grad()
    def publish(self) -> None:
        """Write every master into the model's parameter of the same name."""
        for name, parameter in self.model.named_parameters():
            master = self.weights[name]
            parameter.copy_(on_grid(master) if self.int4_experts and ".experts." in name else master)

    def gradients(self) -> dict[str, Tensor]:
        """The parameters' gradients by name, as they are (the model's dtype)."""
        return {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}
