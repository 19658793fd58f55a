"""Keeping what lies on a grid and rounding the rest, against one Python number at a time."""

import struct

import pytest
import torch

from karakoram.formats import int4_group
from karakoram.quantize.round_to_nearest import keep_or_round, round_to_nearest

BOTH_STORAGES = pytest.mark.parametrize("storage", [torch.bfloat16, torch.float32])


def random_grid(rows: int, groups: int, low: int = -8, high: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes with every magnitude likely in each group, so that one scale alone explains it; every fifth group is 0."""
    draw = torch.Generator().manual_seed(3)
    codes = torch.randint(low, high + 1, (rows, groups, 32), generator=draw, dtype=torch.int8)
    codes[..., 0] = 1  # |q| = 1 shows the scale itself
    codes[..., 1] = low
    scales = torch.randn(rows, groups, generator=draw).exp().mul(0.01).bfloat16()
    zero = torch.arange(rows * groups).view(rows, groups) % 5 == 0
    codes[zero], scales[zero] = 0, 0.0
    return codes.flatten(-2), scales


def float32(value: float) -> float:
    return struct.unpack("<f", struct.pack("<f", value))[0]


def bf16(value: float) -> float:
    """To nearest, ties to even, on the bits of a float32."""
    bits = struct.unpack("<I", struct.pack("<f", value))[0]
    lower, upper = bits & 0xFFFF, bits >> 16
    upper += lower > 0x8000 or (lower == 0x8000 and upper & 1)
    return struct.unpack("<f", struct.pack("<I", upper << 16))[0]


def rounded_by_hand(group: list[float]) -> tuple[list[int], float]:
    scale = bf16(float32(max(abs(value) for value in group) / 7))
    if scale == 0:
        return [0] * len(group), 0.0
    return [max(-8, min(7, round(float32(value / scale)))) for value in group], scale


@BOTH_STORAGES
@pytest.mark.parametrize(("low", "high"), [(-8, 7), (-7, 7), (-5, 4), (-1, 1)])
def test_what_lies_on_a_grid_keeps_codes_scales_and_values(storage: torch.dtype, low: int, high: int) -> None:
    codes, scales = random_grid(40, 6, low, high)
    weight = int4_group.from_grid(codes, scales)
    found_codes, found_scales, kept = keep_or_round(weight.to(storage))
    assert kept == 240
    if high == 7:  # a quantizer that uses its range; a grid of a few codes may be explained by a finer one
        assert torch.equal(found_codes, codes)
        assert torch.equal(found_scales, scales)
    assert torch.equal(int4_group.from_grid(found_codes, found_scales), weight)


@BOTH_STORAGES
def test_numbers_survive_where_two_scales_explain_them(storage: torch.dtype) -> None:
    codes, scales = random_grid(40, 6, -3, 3)
    weight = int4_group.from_grid(codes * 2, scales)
    found_codes, found_scales, kept = keep_or_round(weight.to(storage))
    assert kept == 240
    assert torch.equal(int4_group.from_grid(found_codes, found_scales), weight)


@BOTH_STORAGES
def test_the_rest_is_rounded_to_absmax_over_7(storage: torch.dtype) -> None:
    """Equal to the last bit: both sides divide and round in float32 and bf16."""
    weight = (torch.randn(16, 128, generator=torch.Generator().manual_seed(4)) * 0.02).to(storage)
    weight[3, 32:64] = 0
    codes, scales, kept = keep_or_round(weight)
    assert kept == 1
    for row in range(16):
        for group in range(4):
            part = slice(32 * group, 32 * group + 32)
            wanted, scale = rounded_by_hand(weight[row, part].tolist())
            assert codes[row, part].tolist() == wanted
            assert scales[row, group].item() == scale


@BOTH_STORAGES
def test_each_group_is_judged_alone(storage: torch.dtype) -> None:
    codes, scales = random_grid(8, 4)
    weight = int4_group.from_grid(codes, scales).to(storage)
    off = torch.arange(32).view(8, 4) % 2 == 1
    groups = weight.view(8, 4, 32)
    groups[off] = (torch.randn(int(off.sum()), 32, generator=torch.Generator().manual_seed(6)) * 0.1).to(storage)
    found_codes, found_scales, kept = keep_or_round(weight)
    assert kept == 16
    plain_codes, plain_scales = round_to_nearest(weight)
    assert torch.equal(found_scales, torch.where(off, plain_scales, scales))
    wide = off.repeat_interleave(32, dim=1)
    assert torch.equal(found_codes, torch.where(wide, plain_codes, codes))


def test_a_float32_next_to_the_grid_is_not_on_it() -> None:
    codes, scales = random_grid(1, 1)
    codes[0, :16], codes[0, 16:], scales[0, 0] = torch.arange(-8, 8), torch.arange(-8, 8), 0.01
    weight = int4_group.from_grid(codes, scales).float()
    assert keep_or_round(weight)[2] == 1
    weight[0, 9] = torch.nextafter(weight[0, 9], torch.tensor(1.0))
    found_codes, found_scales, kept = keep_or_round(weight)
    assert kept == 0
    assert (found_codes[0].tolist(), found_scales.item()) == rounded_by_hand(weight[0].tolist())
