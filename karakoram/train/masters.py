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

from karakoram.distributed.layout import local
from karakoram.model.transformer import Transformer
from karakoram.quantize.round_to_nearest import on_grid


class Masters:
    """Float32 copies of all trained parameters by name; `weights[name]` is edited in place, then `publish` is called.

    Parameters that ask for no gradient (a base under LoRA) have none. Where a parameter is spread over ranks, its
    master is this rank's part.
    """

    def __init__(self, model: Transformer) -> None:
        self.model = model
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.weights = {n: local(p.detach()).to(torch.float32, copy=True) for n, p in self.parameters.items()}
        self.int4_experts = False
        self._sums: dict[str, Tensor] | None = None

    @torch.no_grad()
    def publish(self) -> None:
        """Write every master into the model's parameter of the same name."""
        for name, parameter in self.parameters.items():
            master = self.weights[name]
            local(parameter).copy_(on_grid(master) if self.int4_experts and ".experts." in name else master)

    @torch.no_grad()
    def accumulate(self) -> None:
        """Add the parameters' gradients to float32 sums and forget them: between micro-batches."""
        gradients = self._own_gradients()
        if self._sums is None:
            self._sums = {name: gradient.to(torch.float32, copy=True) for name, gradient in gradients.items()}
        else:
            for name, gradient in gradients.items():
                self._sums[name].add_(gradient)
        self.model.zero_grad(set_to_none=True)

    def gradients(self) -> dict[str, Tensor]:
        """Gradients by name: as they are (the model's dtype), or with what was accumulated before them, float32."""
        if self._sums is None:
            return self._own_gradients()
        self.accumulate()
        sums, self._sums = self._sums, None
        return sums

    def forget_gradients(self) -> None:
        """Drop what is there: a step begins, or is not taken."""
        self._sums = None
        self.model.zero_grad(set_to_none=True)

    def _own_gradients(self) -> dict[str, Tensor]:
        return {name: local(p.grad) for name, p in self.parameters.items() if p.grad is not None}
