"""Grouped matrix product: rows sorted by expert, each run of rows times its own expert's matrix.

On a CPU a loop over experts of ordinary products beats padding all runs to the longest (which wastes the imbalance) and beats
torch's eager grouped product, and its backward writes straight into one gradient stack.

Legend: M rows, X in, Y out, E experts.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def grouped_linear(x_MX: Tensor, weight_EYX: Tensor, rows_per_expert: Sequence[int]) -> Tensor:
    """Rows [M, X], in runs of `rows_per_expert` -> [M, Y]; run e is multiplied by weight[e].T."""
    return _GroupedLinear.apply(x_MX, weight_EYX, rows_per_expert)  # pyright: ignore[reportReturnType]


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_MX: Tensor, weight_EYX: Tensor, rows: Sequence[int]) -> Tensor:
        ctx.save_for_backward(x_MX, weight_EYX)
        ctx.rows = rows
        y_MY = x_MX.new_empty(x_MX.shape[0], weight_EYX.shape[1])
        for expert, start, stop in _runs(rows):
            torch.mm(x_MX[start:stop], weight_EYX[expert].t(), out=y_MY[start:stop])
        return y_MY

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        (grad_MY,) = grads
        x_MX, weight_EYX = ctx.saved_tensors
        grad_MY = grad_MY.contiguous()
        grad_x_MX, grad_w_EYX = torch.empty_like(x_MX), torch.zeros_like(weight_EYX)
        for expert, start, stop in _runs(ctx.rows):
            torch.mm(grad_MY[start:stop], weight_EYX[expert], out=grad_x_MX[start:stop])
            torch.mm(grad_MY[start:stop].t(), x_MX[start:stop], out=grad_w_EYX[expert])
        return grad_x_MX, grad_w_EYX, None


def _runs(rows: Sequence[int]) -> list[tuple[int, int, int]]:
    runs, start = [], 0
    for expert, count in enumerate(rows):
        if count:
            runs.append((expert, start, start + count))
        start += count
    return runs
