"""bfloat16: the upper 16 bits of a float32 (1 sign, 8 exponent, 7 mantissa bits).

Every bf16 value is a float32 value, so widening never loses anything. Narrowing rounds to nearest, ties to even; it is
exact when, and only when, the lower 16 bits of the float32 are zero. `narrow_exact` is the conversion that refuses to
round: it tells how many values would change instead of changing them silently.
"""

import struct

import torch
from torch import Tensor

CHUNK_ELEMENTS = (
    1 << 24
)  # 64 MiB of float32 at a time: temporaries stay small beside the largest tensors of K2 (2.3 GB)


def narrow_exact(weight: Tensor) -> tuple[Tensor, int]:
    """Any floating tensor -> (its values in bf16, how many of them are not exact there; NaN counts as not exact)."""
    if weight.dtype == torch.bfloat16:
        return weight, 0
    narrow = weight.to(torch.bfloat16)
    misfits = 0
    for wide, near in zip(
        weight.reshape(-1).split(CHUNK_ELEMENTS), narrow.reshape(-1).split(CHUNK_ELEMENTS), strict=True
    ):
        misfits += int((near.to(wide.dtype) != wide).sum()) if wide.numel() else 0
    return narrow, misfits


def round_reference(value: float) -> float:
    """The bf16 value nearest to a float32 value (ties to even), by the bits. NaN and infinities come back unchanged."""
    if value != value or value in (float("inf"), float("-inf")):
        return value
    bits = struct.unpack("<I", struct.pack("<f", value))[0]
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return struct.unpack("<f", struct.pack("<I", bits))[0]


def narrow_exact_reference(weight: Tensor) -> tuple[Tensor, int]:
    """Twin of `narrow_exact`, one Python number at a time."""
    values = weight.reshape(-1).tolist()
    rounded = [round_reference(struct.unpack("<f", struct.pack("<f", v))[0]) for v in values]
    misfits = sum(r != v for r, v in zip(rounded, values, strict=True))
    return torch.tensor(rounded, dtype=torch.float32).to(torch.bfloat16).reshape(weight.shape), misfits
