"""Matrix products on a CPU by the library that is faster here.

torch hands float32 products to MKL, which on AMD's processors takes its AVX2 paths: 100 GFLOP/s on one Zen 5 core.
oneDNN, which torch carries too, reaches 180 to 215 with AVX-512 on an expert's shapes ([512, 256] × [256, 256], forward
and both backward products; CPU time of one thread). Its float32 door is the operator that torch.compile calls; where a
build lacks it, or the processor is another, MKL stays. bfloat16 goes to oneDNN anyway.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from karakoram.env import processor


def products(a_bRX: Tensor, b_bXY: Tensor, out_bRY: Tensor, comes_again: bool) -> None:
    """a · b into `out`, one by one, in their dtype; a and b may be transposed. The number of threads changes no bit.

    comes_again  this shape is one of few: oneDNN prepares a kernel for each (about 1 ms), MKL does not
    """
    linear = _onednn_linear() if comes_again and runs_onednn_float32(a_bRX) else None
    if linear is None:
        torch.bmm(a_bRX, b_bXY, out=out_bRY)
        return
    for a_RX, b_XY, out_RY in zip(a_bRX, b_bXY, out_bRY):
        out_RY.copy_(linear(a_RX, b_XY.t(), None, "none", [], ""))


def product(a_RX: Tensor, b_XY: Tensor) -> Tensor:
    """a · b in their dtype, for shapes that come again; either may be transposed."""
    linear = _onednn_linear() if runs_onednn_float32(a_RX) else None
    return a_RX @ b_XY if linear is None else linear(a_RX, b_XY.t(), None, "none", [], "")


def linear(x: Tensor, weight_YX: Tensor) -> Tensor:
    """x · weightᵀ [..., X] -> [..., Y] by `product`, backward too; without a gradient torch's own, for any shape."""
    if not torch.is_grad_enabled():
        return F.linear(x, weight_YX)
    return _Linear.apply(x, weight_YX)  # pyright: ignore[reportReturnType]


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_YX: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight_YX)
        return product(x.flatten(0, -2), weight_YX.t()).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight_YX = ctx.saved_tensors
        grad_NY = grads[0].flatten(0, -2)
        grad_x = product(grad_NY, weight_YX).view_as(x) if ctx.needs_input_grad[0] else None
        return grad_x, product(grad_NY.t(), x.flatten(0, -2)) if ctx.needs_input_grad[1] else None


def runs_onednn_float32(x: Tensor) -> bool:
    """Whether float32 products of `x` go to oneDNN, one by one: it has no door for batches."""
    return x.dtype == torch.float32 and x.device.type == "cpu" and _onednn_linear() is not None


@cache
def _onednn_linear() -> Callable[..., Tensor] | None:
    """x, weight, bias, and what to do with the result -> x · weightᵀ."""
    here = processor()
    if "AMD" not in here.model or "avx512f" not in here.features or not torch.backends.mkldnn.is_available():
        return None
    try:
        return torch.ops.mkldnn._linear_pointwise.default
    except AttributeError:
        return None
