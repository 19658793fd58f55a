"""Rotary positions: interleaved pairs, with YaRN's per-pair frequencies.

K2 rotates pairs `(x0, x1), (x2, x3), …` by `position * inv_freq[i]` (not halves). YaRN is static: the same frequencies
at all lengths. Pairs that turn more than `beta_fast` times within the original context keep their frequency, pairs that
turn less than `beta_slow` times are slowed down by `factor`, and a linear ramp lies between. K2 sets `beta_fast` to 1,
which makes the ramp a step at pair 20; K2.5 sets 32. The softmax scale grows by mscale² (DeepSeek-V3
`modeling_deepseek.py`; YaRN, arXiv 2309.00071, §3.2 and §3.4).

Legend: B batch, T tokens, H heads, R rope dimensions, P = R / 2 pairs.
"""

import math

import torch
from torch import Tensor

from karakoram.config import ModelConfig, RopeScaling


def inverse_frequencies(config: ModelConfig) -> Tensor:
    """Angle per position of every pair: float32 [P], on the CPU."""
    dim = config.qk_rope_head_dim
    exponents_P = torch.arange(0, dim, 2, dtype=torch.float32) / dim
    extrapolated_P = 1.0 / config.rope_theta**exponents_P
    scaling = config.rope_scaling
    if scaling is None:
        return extrapolated_P
    low, high = _ramp_bounds(dim, config.rope_theta, scaling)
    ramp_P = ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    return (extrapolated_P / scaling.factor) * ramp_P + extrapolated_P * (1 - ramp_P)


def _ramp_bounds(dim: int, theta: float, scaling: RopeScaling) -> tuple[float, float]:
    def pair_that_turns(times: float) -> float:
        return dim * math.log(scaling.original_max_position_embeddings / (times * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_that_turns(scaling.beta_fast)), 0)
    high = min(math.ceil(pair_that_turns(scaling.beta_slow)), dim - 1)
    return low, high if high != low else high + 0.001  # no division by zero: a step, as the reference has it


def yarn_mscale(factor: float, mscale: float) -> float:
    """YaRN's attention temperature: 0.1 · mscale · ln(factor) + 1, and 1 where nothing is stretched."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 and mscale else 1.0


def softmax_scale(config: ModelConfig) -> float:
    """What attention scores are multiplied by: head_dim^-0.5, times mscale² under YaRN with `mscale_all_dim`."""
    scale = (config.qk_nope_head_dim + config.qk_rope_head_dim) ** -0.5
    if config.rope_scaling is not None and config.rope_scaling.mscale_all_dim:
        scale *= yarn_mscale(config.rope_scaling.factor, config.rope_scaling.mscale_all_dim) ** 2
    return scale


def rotation_scale(config: ModelConfig) -> float:
    """What cos and sin are multiplied by under YaRN: 1 for every published K2 model (both mscales are equal)."""
    scaling = config.rope_scaling
    if scaling is None:
        return 1.0
    if not (scaling.mscale and scaling.mscale_all_dim):
        return yarn_mscale(scaling.factor, 1.0)
    return yarn_mscale(scaling.factor, scaling.mscale) / yarn_mscale(scaling.factor, scaling.mscale_all_dim)


def rotations(inv_freq_P: Tensor, positions_BT: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Cosines and sines of all angles: two float32 [B, T, P]."""
    angles_BTP = positions_BT[..., None].float() * inv_freq_P
    return angles_BTP.cos() * scale, angles_BTP.sin() * scale


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs `(x[2i], x[2i+1])` of [..., R] by angles [..., P]; computed in float32, returned in x's dtype."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).to(x.dtype)
