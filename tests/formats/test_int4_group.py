"""int4 in groups of 32: bit-identical to compressed-tensors, and the exact way back."""

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import dequantize as ct_dequantize
from hypothesis import given, settings
from hypothesis import strategies as st

from karakoram.errors import FormatError
from karakoram.formats import int4_group

ARGS = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=32)


def codes(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(-8, 8, (rows, columns), dtype=torch.int8, generator=torch.Generator().manual_seed(seed))


def scales(rows: int, groups: int, seed: int = 1) -> torch.Tensor:
    draw = torch.randn(rows, groups, generator=torch.Generator().manual_seed(seed))
    return (draw.exp() * 0.01).to(torch.bfloat16)


@pytest.mark.parametrize("columns", [32, 64, 96, 256, 8, 12, 5])
def test_pack_and_unpack_are_those_of_compressed_tensors(columns: int) -> None:
    q = codes(17, columns)
    packed = int4_group.pack(q)
    assert torch.equal(packed, pack_to_int32(q, 4))
    assert torch.equal(packed, int4_group.pack_reference(q))
    assert torch.equal(int4_group.unpack(packed, columns), q)
    assert torch.equal(int4_group.unpack(packed, columns), unpack_from_int32(packed, 4, q.shape))
    assert torch.equal(int4_group.unpack_reference(packed, columns), q)


def test_published_words() -> None:
    q = torch.arange(-8, 8, dtype=torch.int8).reshape(1, 16)
    assert [word & 0xFFFFFFFF for word in int4_group.pack(q)[0].tolist()] == [0x76543210, 0xFEDCBA98]


@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_dequantize_is_that_of_compressed_tensors(scale_dtype: torch.dtype) -> None:
    q, scale = codes(40, 192), scales(40, 6).to(scale_dtype)
    mine = int4_group.dequantize(int4_group.pack(q), scale, scale_dtype)
    theirs = ct_dequantize(q, scale, None, ARGS)
    assert theirs.dtype == mine.dtype
    assert torch.equal(mine.view(torch.uint8), theirs.view(torch.uint8))


def test_dequantize_has_its_twin_and_wide_dtypes_hold_the_bf16_value() -> None:
    packed, scale = int4_group.pack(codes(9, 64)), scales(9, 2)
    weight = int4_group.dequantize(packed, scale)
    assert torch.equal(weight, int4_group.dequantize_reference(packed, scale))
    assert torch.equal(int4_group.dequantize(packed, scale, torch.float32), weight.float())


def test_stacks_of_experts() -> None:
    q, scale = torch.stack([codes(6, 64, s) for s in range(3)]), torch.stack([scales(6, 2, s) for s in range(3)])
    stacked = int4_group.dequantize(int4_group.pack(q), scale)
    for e in range(3):
        assert torch.equal(stacked[e], int4_group.dequantize(int4_group.pack(q[e]), scale[e]))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.floats(-38, 36), st.integers(0, 8))
def test_exact_scales_invert_dequantize(seed: int, log10_scale: float, largest: int) -> None:
    q = codes(8, 64, seed).clamp(-largest, min(largest, 7))
    scale = (scales(8, 2, seed).double() * 10**log10_scale).to(torch.bfloat16)
    weight = int4_group.dequantize(int4_group.pack(q), scale)
    if not weight.isfinite().all():
        return
    found, found_scale, misfits = int4_group.exact_scales(weight)
    assert misfits == 0
    assert torch.equal(int4_group.dequantize(int4_group.pack(found), found_scale), weight)


def test_rounding_to_a_grid_takes_the_nearest_code() -> None:
    q, scale = codes(5, 64), scales(5, 2)
    assert torch.equal(int4_group.round_to_grid(int4_group.from_grid(q, scale), scale), q)
    weight = torch.randn(5, 64) * 0.05
    found = int4_group.round_to_grid(weight, scale)
    every = torch.arange(-8, 8.0).view(16, 1, 1) * scale.float().repeat_interleave(32, dim=-1)
    assert torch.equal(found.long(), (every - weight).abs().argmin(dim=0) - 8)
    scale[2] = 0
    assert not int4_group.round_to_grid(weight, scale)[2].any()


def test_every_bf16_mantissa_is_inverted() -> None:
    """All 128 significands at one exponent: where bf16(k*s) rounds, the neighbours of max|w|/k must be tried too."""
    scale = (torch.arange(128, 256) * 2.0**-15).to(torch.bfloat16).repeat_interleave(64).unsqueeze(1)
    weight = int4_group.dequantize(int4_group.pack(codes(len(scale), 32)), scale)
    found, found_scale, misfits = int4_group.exact_scales(weight)
    assert misfits == 0
    assert torch.equal(int4_group.dequantize(int4_group.pack(found), found_scale), weight)


def test_negative_scale_and_signed_zeros() -> None:
    q = codes(4, 32)
    q[:, 0] = -8
    weight = int4_group.dequantize(int4_group.pack(q), -scales(4, 1))
    found, found_scale, misfits = int4_group.exact_scales(weight)
    assert misfits == 0
    assert torch.equal(int4_group.dequantize(int4_group.pack(found), found_scale), weight)


def test_what_lies_on_no_grid_is_counted_as_the_twin_counts() -> None:
    weight = int4_group.dequantize(int4_group.pack(codes(6, 96)), scales(6, 3))
    weight[1, 40] += weight[1, 32:64].abs().amax() / 20
    weight[4, 3] = float("nan")
    assert int4_group.exact_scales(weight)[2] == 2
    weight[4, 3] = weight[4, :32].nan_to_num().abs().amax() * 3.3
    mine, twin = int4_group.exact_scales(weight), int4_group.exact_scales_reference(weight)
    assert mine[2] == twin[2] >= 1
    assert torch.equal(
        int4_group.dequantize(int4_group.pack(mine[0]), mine[1]),
        int4_group.dequantize(int4_group.pack(twin[0]), twin[1]),
    )
    assert int4_group.exact_scales(torch.randn(4, 64).to(torch.bfloat16))[2] == 8


def test_wrong_shapes_and_dtypes_are_refused() -> None:
    for call in (
        lambda: int4_group.pack(torch.zeros(2, 8)),
        lambda: int4_group.pack(torch.full((2, 8), 9, dtype=torch.int8)),
        lambda: int4_group.unpack(torch.zeros(2, 4, dtype=torch.int32), 64),
        lambda: int4_group.dequantize(torch.zeros(2, 4, dtype=torch.int32), torch.zeros(3, 1)),
        lambda: int4_group.exact_scales(torch.zeros(2, 40, dtype=torch.bfloat16)),
    ):
        with pytest.raises(FormatError):
            call()
