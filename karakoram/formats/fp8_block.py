"""fp8 in blocks of 128 x 128: the linear layers of K2-Base, K2-Instruct and K2-Instruct-0905 (and DeepSeek-V3).

A weight [out, in] is stored as two tensors:
  weight            float8_e4m3fn [out, in]
  weight_scale_inv  float32 [ceil(out/128), ceil(in/128)]; despite its name it is multiplied, not divided by
The last block of a row or column may be ragged: kv_a_proj_with_mqa has 576 rows, so its fifth row of blocks has 64.
The weight is the float32 product of both, rounded once to the dtype asked for (DeepSeek-V3 `inference/kernel.py`).

The way back is exact or refused. A finite e4m3 number is c = n * 2^j with odd n <= 15, so a block of values w fits if
one scale m * 2^e leaves every w / (m * 2^e) on that grid. `exact_scales` takes m = the greatest common divisor of the
odd parts of the block's values (a larger m leaves smaller n) and the smallest e that keeps the largest value within
448; no block whose values are exact products is missed. `quantize_exact` then verifies every value, sign of zero
included.
"""

import torch
from torch import Tensor

from karakoram.errors import FormatError

BLOCK = 128
LARGEST = 448.0  # largest finite e4m3fn: 1.75 * 2^8
LOWEST_BIT = -9  # e4m3fn subnormals are multiples of 2^-9
CHUNK_ELEMENTS = 1 << 21  # the search keeps about ten int64 temporaries of this many elements: 160 MiB


def scale_shape(out_features: int, in_features: int) -> tuple[int, int]:
    """Shape of `weight_scale_inv` for a weight [out, in]."""
    return -(-out_features // BLOCK), -(-in_features // BLOCK)


def dequantize(weight: Tensor, scale_inv: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """e4m3 [..., out, in], float32 [..., ceil(out/128), ceil(in/128)] -> dtype [..., out, in]."""
    _check(weight, scale_inv)
    out_features, in_features = weight.shape[-2:]
    result = torch.empty(weight.shape, dtype=dtype)
    for first in range(0, out_features, _rows(in_features)):
        rows = slice(first, first + _rows(in_features))
        part = weight[..., rows, :]
        result[..., rows, :] = part.to(torch.float32).mul_(_spread(scale_inv, first, part)).to(dtype)
    return result


def quantize_exact(weight: Tensor, scale_inv: Tensor) -> tuple[Tensor, int]:
    """bf16 or float32 [out, in] -> (e4m3 [out, in], how many values do not come back bit by bit from `dequantize`)."""
    result = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    _check(result, scale_inv)
    misfits = 0
    for first in range(0, weight.shape[0], _rows(weight.shape[1])):
        rows = slice(first, first + _rows(weight.shape[1]))
        part = weight[rows].to(torch.float32)
        scale = _spread(scale_inv, first, part)
        code = (part / scale).to(torch.float8_e4m3fn)
        misfits += int((code.to(torch.float32).mul_(scale).view(torch.int32) != part.view(torch.int32)).sum())
        result[rows] = code
    return result, misfits


def exact_scales(weight: Tensor) -> Tensor:
    """bf16 or float32 [out, in] -> float32 scales under which every block that can be exact is; 1 for the others."""
    out_features, in_features = weight.shape
    scale = torch.ones(scale_shape(out_features, in_features), dtype=torch.float32)
    for first in range(0, out_features, _rows(in_features)):
        part = weight[first : first + _rows(in_features)].to(torch.float32)
        height, width = scale_shape(*part.shape)
        part = torch.nn.functional.pad(part, (0, width * BLOCK - in_features, 0, height * BLOCK - part.shape[0]))
        blocks = part.view(height, BLOCK, width, BLOCK).transpose(1, 2).reshape(height, width, -1)
        scale[first // BLOCK : first // BLOCK + height] = _block_scales(blocks)
    return scale


def _block_scales(values: Tensor) -> Tensor:
    """float32 [..., elements of a block] -> float32 [...]: gcd of the odd parts times a power of two, or 1."""
    clean = torch.where(values.isfinite(), values, 0.0)
    mantissa, exponent = torch.frexp(clean.to(torch.float64))
    whole = (mantissa.abs() * (1 << 24)).to(torch.int64)  # 24 bits hold every float32 significand
    low_bit = whole & -whole
    odd = torch.where(whole > 0, whole // low_bit.clamp(min=1), 0)
    bit = exponent.to(torch.int64) - 24 + (torch.frexp(low_bit.to(torch.float64))[1].to(torch.int64) - 1)
    lowest = torch.where(whole > 0, bit, 1 << 20).amin(dim=-1)
    common = odd
    while common.shape[-1] > 1:
        half = common.shape[-1] // 2
        common = torch.gcd(common[..., :half], common[..., half : 2 * half])
    common = common[..., 0].clamp(min=1).to(torch.float64)
    largest = clean.abs().amax(dim=-1).to(torch.float64)
    fraction, power = torch.frexp(largest / (LARGEST * common))
    power = torch.where(fraction == 0.5, power - 1, power).to(torch.int64)
    exact = (largest > 0) & (power <= lowest - LOWEST_BIT)
    found = torch.ldexp(common, power).to(torch.float32)
    return torch.where(exact & (found > 0) & found.isfinite(), found, 1.0)


def _check(weight: Tensor, scale_inv: Tensor) -> None:
    wanted = scale_shape(*weight.shape[-2:]) if weight.ndim >= 2 else ()
    if weight.dtype != torch.float8_e4m3fn or scale_inv.dtype != torch.float32 or scale_inv.shape[-2:] != wanted:
        raise FormatError(
            f"weight {weight.dtype} {list(weight.shape)} and weight_scale_inv {scale_inv.dtype} {list(scale_inv.shape)}"
            f" are not fp8 in {BLOCK}x{BLOCK} blocks.",
            f"Expected torch.float8_e4m3fn and torch.float32 {list(wanted)}.",
        )


def _rows(in_features: int) -> int:
    """How many rows to take at a time: a multiple of the block."""
    return max(1, CHUNK_ELEMENTS // (BLOCK * max(1, in_features))) * BLOCK


def _spread(scale_inv: Tensor, first_row: int, part: Tensor) -> Tensor:
    """The scale of every element of `part`, the rows from `first_row` (a multiple of 128) on."""
    height, width = part.shape[-2:]
    chosen = scale_inv[..., first_row // BLOCK : -(-(first_row + height) // BLOCK), :]
    wide = chosen.repeat_interleave(BLOCK, dim=-1)[..., :width]
    return wide.repeat_interleave(BLOCK, dim=-2)[..., :height, :]


def e4m3_reference(byte: int) -> float:
    """The value of one e4m3fn byte by its bits: 1 sign, 4 exponent (bias 7), 3 mantissa; 0x7F and 0xFF are NaN."""
    sign, exponent, mantissa = -1.0 if byte & 0x80 else 1.0, (byte >> 3) & 0xF, byte & 0x7
    if exponent == 0xF and mantissa == 0x7:
        return float("nan")
    return sign * (mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10))


def dequantize_reference(weight: Tensor, scale_inv: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Twin of `dequantize` for a weight [out, in], one Python number at a time."""
    codes, scales = weight.view(torch.uint8).tolist(), scale_inv.tolist()
    products = [
        [e4m3_reference(code) * scales[i // BLOCK][j // BLOCK] for j, code in enumerate(row)]
        for i, row in enumerate(codes)
    ]
    return torch.tensor(products, dtype=torch.float64).to(torch.float32).to(dtype)


def quantize_exact_reference(weight: Tensor, scale_inv: Tensor) -> tuple[Tensor, int]:
    """Twin of `quantize_exact`: looks each value up in the list of all 254 finite products of its block."""
    rows, misfits = [], 0
    finite = [code for code in range(256) if code & 0x7F != 0x7F]
    for i, row in enumerate(weight.float()):
        codes = []
        for j, value in enumerate(row):
            scale = scale_inv[i // BLOCK, j // BLOCK]
            products = torch.tensor([e4m3_reference(code) for code in finite], dtype=torch.float32) * scale
            match = torch.nonzero(products.view(torch.int32) == value.view(torch.int32)).flatten()
            misfits += not len(match)
            codes.append(finite[int(match[0])] if len(match) else 0)
        rows.append(codes)
    return torch.tensor(rows, dtype=torch.uint8).view(torch.float8_e4m3fn), misfits
