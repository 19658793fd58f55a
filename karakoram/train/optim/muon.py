"""Muon: momentum, then the nearest orthogonal matrix, for every two-dimensional weight.

    M ← μM + G;  O = orthogonalize(μM + G);  W ← W − η · (0.2 · √max(A, B) · O + λW)

The factor 0.2·√max(A, B) gives the update the RMS of an AdamW step, so both share one learning rate and one weight
decay ("Muon is Scalable for LLM Training", arXiv 2502.16982, §2.2). A matrix is a parameter as it stands; a stack of
experts is that many matrices. Matrices of one shape are orthogonalised together, in batched bfloat16 products: a step
costs a few large kernels whatever the number of experts.

Legend: n matrices of A rows and B columns.
"""

from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor

MOMENTUM = 0.95
UPDATE_RMS = 0.2
# quintic Newton-Schulz, Keller Jordan's coefficients: singular values land in [0.7, 1.2] after five steps
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5


class Muon:
    """State: one float32 momentum buffer per weight. Weights are [A, B] or stacks [n, A, B], edited in place."""

    def __init__(self, weights: Mapping[str, Tensor], weight_decay: float = 0.1, momentum: float = MOMENTUM) -> None:
        self.weights, self.weight_decay, self.momentum = dict(weights), weight_decay, momentum
        self.buffers = {name: torch.zeros_like(w) for name, w in self.weights.items()}
        self._same_shape: dict[tuple[int, int], list[str]] = defaultdict(list)
        for name, weight in self.weights.items():
            rows, columns = weight.shape[-2:]
            self._same_shape[min(rows, columns), max(rows, columns)].append(name)

    @torch.no_grad()
    def step(self, gradients: Mapping[str, Tensor], learning_rate: float, scale: float = 1.0) -> None:
        """One update from gradients (any float dtype) multiplied by `scale`; weights without a gradient keep still."""
        for names in self._same_shape.values():
            names = [name for name in names if name in gradients]
            if names:
                self._step_together(names, gradients, learning_rate, scale)

    def _step_together(self, names: list[str], gradients: Mapping[str, Tensor], rate: float, scale: float) -> None:
        wide = []
        for name in names:
            gradient = gradients[name].float() * scale
            buffer = self.buffers[name].mul_(self.momentum).add_(gradient)
            wide.append(_lying(gradient.add_(buffer, alpha=self.momentum)).flatten(0, -3))
        directions = orthogonalize(torch.cat(wide))
        factor = UPDATE_RMS * max(directions.shape[-2:]) ** 0.5
        for name, direction in zip(names, directions.split([len(w) for w in wide]), strict=True):
            weight = self.weights[name]
            weight.mul_(1 - rate * self.weight_decay)
            if weight.shape[-2] > weight.shape[-1]:
                direction = direction.mT
            weight.add_(direction.reshape(weight.shape), alpha=-rate * factor)

    def state(self) -> dict[str, Tensor]:
        """Momentum buffers by weight name."""
        return self.buffers

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over saved buffers; names and shapes must match."""
        for name, buffer in self.buffers.items():
            buffer.copy_(state[name])


def orthogonalize(stack_nAB: Tensor, iterations: int = ITERATIONS) -> Tensor:
    """Each matrix [A ≤ B] -> roughly U·Vᵀ of its singular value decomposition: bfloat16 [n, A, B] (Newton-Schulz)."""
    a, b, c = COEFFICIENTS
    norms = stack_nAB.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7)
    x = (stack_nAB / norms).bfloat16()
    for _ in range(iterations):
        gram = x @ x.mT
        mix = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, mix, x, beta=a)
    return x


def _lying(weight: Tensor) -> Tensor:
    """As a stack of matrices no taller than wide: [..., A, B] -> [n, A, B]."""
    stack = weight[None] if weight.ndim == 2 else weight
    return stack.mT if stack.shape[-2] > stack.shape[-1] else stack
