"""Weighted cross-entropy through the head, a slice of rows at a time.

Logits of a whole batch in float32 are the largest tensor of a training step (8,192 rows × 4,096 ids: 134 MB, walked
through six times). Here a slice's logits are made, turned into loss and gradient, multiplied back, and forgotten, all
while they are in the cache: the backward pass only scales what the forward already knows.

Legend: N rows, D hidden, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS = 1024  # 1,024 × 4,096 float32 logits are 17 MB: within the last-level cache; fewer rows starve the products


def head_loss(x_ND: Tensor, head_VD: Tensor, targets_N: Tensor, weights_N: Tensor, slice_loss: "SliceLoss") -> Tensor:
    """Σ weight · −log p(target), a scalar; differentiable in x and head.

    `slice_loss` is `loss_and_gradient` or a compiled twin of it.
    """
    return _HeadLoss.apply(x_ND, head_VD, targets_N, weights_N, slice_loss)  # pyright: ignore[reportReturnType]


SliceLoss = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def loss_and_gradient(logits_NV: Tensor, targets_N: Tensor, weights_N: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (any float dtype) -> summed weighted loss, float32, and its gradient in the logits' dtype [N, V]."""
    wide_NV = logits_NV.float()
    log_p_NV = wide_NV - wide_NV.logsumexp(-1, keepdim=True)
    loss = -(log_p_NV.gather(-1, targets_N[:, None])[:, 0] * weights_N).sum()
    columns_V = torch.arange(logits_NV.shape[-1], device=logits_NV.device)
    hit_NV = (columns_V == targets_N[:, None]).float()
    return loss, ((log_p_NV.exp() - hit_NV) * weights_N[:, None]).to(logits_NV.dtype)


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_ND: Tensor, head_VD: Tensor, targets_N: Tensor, weights_N: Tensor, slice_loss: SliceLoss
    ) -> Tensor:
        grad_x, grad_head = torch.empty_like(x_ND), torch.zeros_like(head_VD, dtype=torch.float32)
        total = torch.zeros((), dtype=torch.float32, device=x_ND.device)
        for start in range(0, len(x_ND), ROWS):
            rows = slice(start, start + ROWS)
            loss, grad_NV = slice_loss(F.linear(x_ND[rows], head_VD), targets_N[rows], weights_N[rows])
            total += loss
            torch.mm(grad_NV, head_VD, out=grad_x[rows])
            grad_head += grad_NV.mT @ x_ND[rows]
        ctx.save_for_backward(grad_x, grad_head.to(head_VD.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        grad_x, grad_head = ctx.saved_tensors
        return grad_x * grads[0], grad_head * grads[0], None, None, None
