"""Round to nearest: the plainest way onto the int4 group-32 grid.

A group's scale is its largest magnitude over 7, rounded to bfloat16, so that no weight is clipped; codes are the
nearest of -7…7. No calibration: right as the target of INT4-aware training, where the weights themselves learn to fit.

A group that lies on a grid already must not be rounded a second time: its scale need not be absmax/7 (a largest code of
-8, or of less than 7), and a second rounding would move it. `keep_or_round` finds the scale of such a group by the
search of `formats/int4_group.py` and keeps its numbers; float32 weights lie on a grid where they are bfloat16 numbers
that do. Where two scales explain the same 32 numbers (all codes even, say), the numbers are kept and the scale is the
one that puts the largest code at 7. The search tries 27 scales; nearly every group of ordinary weights is spared it by
a necessary condition: 16 codes of a symmetric grid have 9 magnitudes.
"""

import torch
from torch import Tensor

from karakoram.formats.int4_group import GROUP, exact_scales

LARGEST_CODE = 7
MAGNITUDES = 9  # |q| is 0…8


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


def keep_or_round(weight: Tensor) -> tuple[Tensor, Tensor, int]:
    """Finite floats [out, in] -> (codes int8 [out, in], scales bfloat16 [out, in/32], how many groups were on a grid).

    Those groups keep every number, bf16(code * scale); the others are rounded as `round_to_nearest` does.
    """
    codes, scales = round_to_nearest(weight)
    groups_NG = weight.reshape(-1, GROUP)
    near_NG = groups_NG.bfloat16()
    candidates = torch.nonzero((near_NG == groups_NG).all(1) & _few_magnitudes(near_NG)).flatten()
    values = near_NG[candidates]
    found_codes, found_scales, _ = exact_scales(values)
    fits = (found_scales[:, 0] != 0) | (values == 0).all(1)  # a group on no grid comes back with scale 0
    kept = candidates[fits]
    codes.view(-1, GROUP)[kept] = found_codes[fits]
    scales.view(-1)[kept] = found_scales[fits, 0]
    return codes, scales, len(kept)


def _few_magnitudes(groups_NG: Tensor) -> Tensor:
    """bfloat16 [N, 32] -> bool [N]: whether a group has at most 9 magnitudes; their bits sort as integers."""
    sorted_NG = groups_NG.abs().view(torch.int16).sort(dim=1).values
    return (sorted_NG[:, 1:] != sorted_NG[:, :-1]).sum(1) < MAGNITUDES
