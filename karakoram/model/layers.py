"""The two pieces every layer is made of: RMSNorm and SwiGLU.

RMSNorm computes in float32, rounds to the input's dtype, and only then multiplies by the weight, as DeepSeek-V3's
released code does: in bfloat16 the order shows. `SwiGLU` is `down(silu(gate(x)) * up(x))`, without biases; it serves
the dense layers and the shared experts.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """x · rsqrt(mean(x²) + eps) over the last dimension, times a weight [dim]."""

    def __init__(self, dim: int, eps: float, device: torch.device | str | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """[..., dim] -> [..., dim], same dtype."""
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


class SwiGLU(nn.Module):
    """A feed-forward of width `inner`: [..., dim] -> [..., dim]."""

    def __init__(self, dim: int, inner: int, device: torch.device | str | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate_proj = linear(dim, inner, device, dtype)
        self.up_proj = linear(dim, inner, device, dtype)
        self.down_proj = linear(inner, dim, device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """down(silu(gate(x)) · up(x))."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def linear(inputs: int, outputs: int, device: torch.device | str | None, dtype: torch.dtype) -> nn.Linear:
    """A projection without bias; all of K2's are."""
    return nn.Linear(inputs, outputs, bias=False, device=device, dtype=dtype)
