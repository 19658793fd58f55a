"""int4, groups of 32, symmetric: the routed experts of K2-Thinking, K2.5 and K2.6 (4.5 bits per weight).

A weight [out, in] is stored as three tensors, the layout that compressed-tensors calls `pack-quantized`:
  weight_packed  int32 [out, in/8]   eight 4-bit codes along the input, the first in the lowest bits; code = q + 8
  weight_scale   bf16  [out, in/32]  one scale for 32 neighbours along the input
  weight_shape   int32 [2]           [out, in]
The weight is q * scale with q in -8..7, rounded to the scale's dtype: compressed-tensors multiplies in that dtype, so
with bf16 scales the product is rounded to bf16 first and only then widened. The bf16 weight is the meaning of the three
tensors, not an approximation of it.

The way back (`exact_scales`) inverts that rounding. Some element of a group has the largest magnitude, and its code has
the magnitude k = 1..8; so the scale is one of the few bf16 numbers s with bf16(k*s) = max|w|, all within one step of
max|w| / k. Each candidate is tried on all 32 values and taken only if every one comes back; what none reproduces is
reported, never rounded. -0 counts as 0: the codes have no negative zero.
Source: compressed-tensors 0.20, `compressors/pack_quantized`; scale search: our own.
"""

import torch
from torch import Tensor

from karakoram.errors import FormatError
from karakoram.formats.bf16 import round_reference

GROUP = 32
CODES_PER_WORD = 8
CHUNK_ELEMENTS = 1 << 22  # the search keeps about eight float32 temporaries of this many elements: 128 MiB


def pack(q: Tensor) -> Tensor:
    """int8 [..., out, in] with values -8..7 -> int32 [..., out, ceil(in/8)]; a last word is filled with zero bits."""
    if q.dtype != torch.int8:
        raise FormatError(f"int4 codes arrive as {q.dtype}, not as torch.int8.", "Cast the codes -8..7 to torch.int8.")
    if q.numel() and (int(q.min()) < -8 or int(q.max()) > 7):
        raise FormatError(f"int4 codes from {int(q.min())} to {int(q.max())} do not fit.", "Codes are -8..7.")
    codes = (q + 8).view(torch.uint8)
    missing = -q.shape[-1] % CODES_PER_WORD
    if missing:
        codes = torch.nn.functional.pad(codes, (0, missing))
    two_per_byte = codes[..., 0::2] | (codes[..., 1::2] << 4)
    return two_per_byte.contiguous().view(torch.int32)


def unpack(packed: Tensor, in_features: int) -> Tensor:
    """int32 [..., out, ceil(in/8)] -> int8 [..., out, in] with values -8..7."""
    words = -(-in_features // CODES_PER_WORD)
    if packed.dtype != torch.int32 or packed.shape[-1] != words:
        raise FormatError(
            f"weight_packed is {packed.dtype} {list(packed.shape)}, which is no weight with {in_features} inputs.",
            f"Expected torch.int32 [..., {words}].",
        )
    two_per_byte = packed.contiguous().view(torch.uint8)
    codes = torch.stack((two_per_byte & 0xF, two_per_byte >> 4), dim=-1).flatten(-2)
    return codes.view(torch.int8)[..., :in_features].sub_(8).contiguous()


def dequantize(packed: Tensor, scale: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """int32 [..., out, in/8], scale [..., out, in/32] -> dtype [..., out, in], rounded to the scale's dtype before."""
    in_features = scale.shape[-1] * GROUP
    if scale.shape[:-1] != packed.shape[:-1]:
        raise FormatError(
            f"weight_packed {list(packed.shape)} and weight_scale {list(scale.shape)} do not fit together.",
            "Both must come from the same weight.",
        )
    return from_grid(unpack(packed, in_features), scale).to(dtype)


def from_grid(q: Tensor, scale: Tensor) -> Tensor:
    """Codes int8 [..., out, in], scale [..., out, in/32] -> q * scale, rounded to and returned in the scale's dtype."""
    return (q.unflatten(-1, (-1, GROUP)).to(scale.dtype) * scale.unsqueeze(-1)).flatten(-2)


def round_to_grid(weight: Tensor, scale: Tensor) -> Tensor:
    """Floats [..., out, in], scale [..., out, in/32] -> nearest codes int8 [..., out, in]; 0 where the scale is 0."""
    ratio = weight.to(torch.float32).unflatten(-1, (-1, GROUP)) / scale.to(torch.float32).unsqueeze(-1)
    return ratio.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0).round_().clamp_(-8, 7).to(torch.int8).flatten(-2)


def exact_scales(weight: Tensor) -> tuple[Tensor, Tensor, int]:
    """bf16 [out, in] -> (codes int8 [out, in], scale bf16 [out, in/32], how many groups lie on no int4 grid).

    Where the last number is 0, `dequantize(pack(codes), scale)` equals the weight, value by value.
    """
    if weight.dtype != torch.bfloat16 or weight.ndim != 2 or weight.shape[-1] % GROUP:
        raise FormatError(
            f"a weight {weight.dtype} {list(weight.shape)} cannot be int4 in groups of {GROUP}.",
            f"It must be bf16 [out, in] with in divisible by {GROUP}.",
        )
    codes = torch.empty(weight.shape, dtype=torch.int8)
    scale = torch.empty(weight.shape[0], weight.shape[1] // GROUP, dtype=torch.bfloat16)
    misfits = 0
    rows = max(1, CHUNK_ELEMENTS // max(1, weight.shape[1]))
    for start in range(0, weight.shape[0], rows):
        part = slice(start, start + rows)
        q_NG, scale_N, fits_N = _search(weight[part].reshape(-1, GROUP))
        codes[part] = q_NG.view(-1, weight.shape[1])
        scale[part] = scale_N.view(-1, scale.shape[1])
        misfits += int((~fits_N).sum())
    return codes, scale, misfits


def _candidates(amax_N: Tensor) -> list[Tensor]:
    """All scales that can explain the largest magnitude of each group: bf16 [N] each, the likeliest first.

    7 and 8 come first because quantizers use the whole range; neighbours follow because bf16(k*s) maps up to two
    neighbouring scales to one value (k = 3, 5, 6, 7). A negative scale with k = 8 covers a maximum of +8|s|.
    """
    nearest = {k: (amax_N.float() / k).to(torch.bfloat16) for k in range(1, 9)}
    bits = {k: s.view(torch.int16) for k, s in nearest.items()}
    order = [(k, step) for ks in ((7, 8), (6, 5, 4, 3, 2, 1)) for step in (0, 1, -1) for k in ks]
    positive = [(bits[k] + step).clamp_(min=0).view(torch.bfloat16) for k, step in order]
    return [*positive, *(-(bits[8] + step).clamp_(min=0).view(torch.bfloat16) for step in (0, 1, -1))]


def _search(weight_NG: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """bf16 [N, 32] -> codes int8 [N, 32], scale bf16 [N], fits bool [N]; misfits keep code 0 and scale 0."""
    codes = torch.zeros(weight_NG.shape, dtype=torch.int8)
    scale = torch.zeros(weight_NG.shape[0], dtype=torch.bfloat16)
    fits = (weight_NG == 0).all(dim=1)  # a group of zeros: codes 0, scale 0
    open_groups = torch.nonzero(~fits & weight_NG.isfinite().all(dim=1)).flatten()
    values = weight_NG[open_groups]
    candidates = torch.stack(_candidates(values.abs().amax(dim=1))) if len(open_groups) else torch.empty(0, 0)
    for number in range(len(candidates)):
        if not len(open_groups):
            break
        s = candidates[number].unsqueeze(-1)
        q = (values.float() / s.float()).round_().nan_to_num_(nan=99.0).clamp_(-99, 99)
        good = ((q.to(torch.bfloat16) * s == values) & (q >= -8) & (q <= 7)).all(dim=1)
        found = open_groups[good]
        codes[found] = q[good].to(torch.int8)
        scale[found] = s[good, 0]
        fits[found] = True
        open_groups, values, candidates = open_groups[~good], values[~good], candidates[:, ~good]
    return codes, scale, fits


def pack_reference(q: Tensor) -> Tensor:
    """Twin of `pack`, one Python integer at a time."""
    rows = q.reshape(-1, q.shape[-1]).tolist()
    words = [
        [sum((code + 8) << (4 * place) for place, code in enumerate(row[at : at + 8])) for at in range(0, len(row), 8)]
        for row in rows
    ]
    signed = [[word - (1 << 32) if word >= 1 << 31 else word for word in row] for row in words]
    return torch.tensor(signed, dtype=torch.int32).reshape(*q.shape[:-1], -1)


def unpack_reference(packed: Tensor, in_features: int) -> Tensor:
    """Twin of `unpack`, one Python integer at a time."""
    rows = packed.reshape(-1, packed.shape[-1]).tolist()
    codes = [[((row[i // 8] >> (4 * (i % 8))) & 0xF) - 8 for i in range(in_features)] for row in rows]
    return torch.tensor(codes, dtype=torch.int8).reshape(*packed.shape[:-1], in_features)


def dequantize_reference(packed: Tensor, scale: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Twin of `dequantize` for bf16 scales, one Python number at a time."""
    q_rows = unpack_reference(packed, scale.shape[-1] * GROUP).reshape(-1, scale.shape[-1] * GROUP).tolist()
    s_rows = scale.float().reshape(-1, scale.shape[-1]).tolist()
    weight = [
        [round_reference(q * s_row[i // GROUP]) for i, q in enumerate(q_row)]
        for q_row, s_row in zip(q_rows, s_rows, strict=True)
    ]
    return torch.tensor(weight, dtype=torch.float32).reshape(*packed.shape[:-1], -1).to(dtype)


def exact_scales_reference(weight: Tensor) -> tuple[Tensor, Tensor, int]:
    """Twin of `exact_scales`: tries every finite bf16 scale near every max|w| / k, group by group."""
    codes, scales, misfits = [], [], 0
    for group in weight.float().reshape(-1, GROUP).tolist():
        found = _fit_group_reference(group)
        misfits += found is None
        codes.append(found[0] if found else [0] * GROUP)
        scales.append(found[1] if found else 0.0)
    return (
        torch.tensor(codes, dtype=torch.int8).reshape(weight.shape),
        torch.tensor(scales).to(torch.bfloat16).reshape(weight.shape[0], -1),
        misfits,
    )


def _fit_group_reference(group: list[float]) -> tuple[list[int], float] | None:
    largest = max(abs(value) for value in group)
    if largest == 0:
        return [0] * GROUP, 0.0
    for k in (7, 8, 6, 5, 4, 3, 2, 1, -8):
        middle = round_reference(largest / k)
        for nudge in (0, 1, -1, 2, -2):
            s = round_reference(middle * (1 + nudge / 256))
            if s == 0:
                continue
            q = [round(value / s) for value in group]
            if all(-8 <= c <= 7 and round_reference(c * s) == value for c, value in zip(q, group, strict=True)):
                return q, s
    return None
