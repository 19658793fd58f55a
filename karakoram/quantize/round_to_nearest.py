"""Round to nearest: the plainest way onto the int4 group-32 grid.

A group's scale is its largest magnitude over 7, rounded to bfloat16, so that no weight is clipped; codes are the
nearest of -7…7. No calibration: right as the target of INT4-aware training, where the weights themselves learn to fit.
"""

import torch
from torch import Tensor

from karakoram.formats.int4_group import GROUP

LARGEST_CODE = 7


def round_to_nearest(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Float [..., out, in] -> codes int8 [..., out, in] and scales bfloat16 [..., out, in/32]; `in` divisible by 32."""
    groups = weight.float().unflatten(-1, (-1, GROUP))
    scales = (groups.abs().amax(-1) / LARGEST_CODE).bfloat16()
    # a group of zeros has scale 0: any divisor gives code 0
    divisors = torch.where(scales == 0, 1.0, scales.float())
    codes = (groups / divisors[..., None]).round_().clamp_(-8, LARGEST_CODE)
    return codes.to(torch.int8).flatten(-2), scales


def on_grid(weight: Tensor) -> Tensor:
    """The bfloat16 numbers that dequantizing `round_to_nearest(weight)` gives: same shape."""
    codes, scales = round_to_nearest(weight)
    return (codes.unflatten(-1, (-1, GROUP)).bfloat16() * scales[..., None]).flatten(-2)
