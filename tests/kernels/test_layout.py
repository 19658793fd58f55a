"""Packed weights: C++ and its torch twin write the same bytes, nothing is lost, and they are no larger than before."""

import pickle
from copy import deepcopy
from dataclasses import replace

import pytest
import torch

from karakoram.errors import FormatError
from karakoram.formats import fp8_block
from karakoram.kernels import ops, packed
from karakoram.kernels.cpu.library import DTYPES, PANELS, Library, describe, describe_packed
from karakoram.kernels.packed import PackedExperts, PackedMatrix
from tests.kernels import drawn

SHAPES = [(1, 32), (1, 64), (5, 96), (16, 32), (16, 64), (17, 160), (33, 64), (48, 1408), (100, 352)]
K2_AND_MOONLIGHT = [(2048, 7168), (7168, 2048), (1408, 2048), (2048, 1408)]
ATTENTION = [(1536, 7168), (576, 7168), (24576, 1536), (16384, 512), (7168, 8192), (576, 2048), (3072, 2048)]
ODD = [(1, 1), (3, 7), (16, 64), (17, 65), (130, 131), (129, 200), (300, 256)]


@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
def test_int4_is_its_twins_bytes_and_comes_back(lib: Library, outputs: int, inputs: int) -> None:
    codes, scale = drawn.int4_parts(outputs, inputs)
    matrix = ops.pack_int4(codes, scale)
    assert torch.equal(matrix.data, packed.pack_int4(codes, scale))
    mine, my_scale = torch.zeros_like(codes), torch.zeros_like(scale)
    lib.call(
        "k2_unpack_int4", describe_packed(matrix.data, "int4", outputs, inputs), describe(mine), describe(my_scale)
    )
    for back, back_scale in ((mine, my_scale), packed.unpack_int4(matrix)):
        assert torch.equal(back, codes)
        assert torch.equal(back_scale, scale)


def test_int4_keeps_every_word_and_every_finite_scale(lib: Library) -> None:
    codes = torch.randint(-(2**31), 2**31, (64, 32)).to(torch.int32)
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    finite = bits[bits.isfinite()]
    for scale in finite.split(512):
        back, back_scale = packed.unpack_int4(ops.pack_int4(codes[: len(scale) // 8], scale.view(-1, 8)))
        assert torch.equal(back, codes[: len(scale) // 8])
        assert torch.equal(back_scale.view(torch.int16), scale.view(-1, 8).view(torch.int16))


@pytest.mark.parametrize(("outputs", "inputs"), ODD)
def test_bf16_is_its_twins_bytes_and_comes_back(lib: Library, outputs: int, inputs: int) -> None:
    weight = torch.randint(-(2**15), 2**15, (outputs, inputs)).to(torch.int16).view(torch.bfloat16)  # NaN too
    matrix = ops.pack_bf16(weight)
    assert torch.equal(matrix.data, packed.pack_pairs(weight).view(torch.uint8))
    assert torch.equal(matrix.dense().view(torch.int16), weight.view(torch.int16))


@pytest.mark.parametrize(("outputs", "inputs"), ODD)
def test_fp8_is_its_twins_bytes_and_means_the_same(lib: Library, outputs: int, inputs: int) -> None:
    codes = torch.randint(0, 256, (outputs, inputs)).to(torch.uint8)  # NaN too
    weight, scale = codes.view(torch.float8_e4m3fn), drawn.fp8_parts(outputs, inputs)[1]
    matrix = ops.pack_fp8(weight, scale)
    assert torch.equal(matrix.data, torch.cat((packed.pack_pairs(codes), scale.flatten().view(torch.uint8))))
    meant = fp8_block.dequantize(weight, scale)
    assert torch.equal(matrix.dense().nan_to_num(nan=1e30), meant.nan_to_num(nan=1e30))


@pytest.mark.parametrize("kind", drawn.KINDS)
def test_the_reference_packs_the_same_bytes(lib: Library, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(5)
    fast = drawn.matrix(kind, 150, 160)
    monkeypatch.setattr(ops, "chosen", lambda implementation=None: None)
    torch.manual_seed(5)
    assert torch.equal(drawn.matrix(kind, 150, 160).data, fast.data)


def test_rows_may_lie_apart(lib: Library) -> None:
    codes, scale = drawn.int4_parts(20, 64)
    weight, fp8_scale = drawn.fp8_parts(20, 64)
    apart = [torch.nn.functional.pad(t.view(torch.uint8), (0, 24)).view(t.dtype) for t in (codes, scale, weight)]
    codes_apart, scale_apart, weight_apart = (t[:, :w] for t, w in zip(apart, (8, 2, 64)))
    assert not codes_apart.is_contiguous()
    assert torch.equal(ops.pack_int4(codes_apart, scale_apart).data, ops.pack_int4(codes, scale).data)
    assert torch.equal(ops.pack_fp8(weight_apart, fp8_scale).data, ops.pack_fp8(weight, fp8_scale).data)


def test_into_given_room_and_nowhere_else(lib: Library) -> None:
    codes, scale = drawn.int4_parts(20, 64)
    size = packed.packed_bytes("int4", 20, 64)
    room = torch.full((size + 128,), 77, dtype=torch.uint8)
    ops.pack_int4(codes, scale, out=room[64 : 64 + size])
    assert torch.equal(room[64 : 64 + size], packed.pack_int4(codes, scale))
    assert bool((room[:64] == 77).all()) and bool((room[64 + size :] == 77).all())


@pytest.mark.parametrize(("outputs", "inputs"), K2_AND_MOONLIGHT)
def test_int4_takes_no_more_than_the_checkpoint(outputs: int, inputs: int) -> None:
    checkpoint = outputs * inputs // 2 + outputs * inputs // 32 * 2
    assert packed.packed_bytes("int4", outputs, inputs) <= 1.001 * checkpoint


@pytest.mark.parametrize(("outputs", "inputs"), K2_AND_MOONLIGHT + ATTENTION)
def test_bf16_and_fp8_take_no_more_than_the_checkpoint(outputs: int, inputs: int) -> None:
    scales = 4 * fp8_block.scale_shape(outputs, inputs)[0] * fp8_block.scale_shape(outputs, inputs)[1]
    assert packed.packed_bytes("bf16", outputs, inputs) <= 1.001 * 2 * outputs * inputs
    assert packed.packed_bytes("fp8", outputs, inputs) <= 1.001 * (outputs * inputs + scales)


def test_both_sides_count_the_same_bytes(lib: Library) -> None:
    count = lib.c.k2_packed_bytes
    for outputs, inputs in SHAPES + ODD + K2_AND_MOONLIGHT:
        for kind in drawn.KINDS:
            assert count(PANELS[kind], outputs, inputs) == packed.packed_bytes(kind, outputs, inputs)
    assert {count(code, 16, 64) for code in DTYPES.values()} == {-1}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("implementation", ["cpu", "reference"])
def test_a_scale_that_is_no_number_is_refused(
    lib: Library, implementation: str, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    if implementation == "reference":
        monkeypatch.setattr(ops, "chosen", lambda implementation=None: None)
    codes, scale = drawn.int4_parts(20, 96)
    scale[19, 2] = value
    with pytest.raises(FormatError, match="int4 weight is infinite or not a number"):
        ops.pack_int4(codes, scale)
    with pytest.raises(FormatError, match="infinite or not a number"):
        packed.pack_int4(codes, scale)
    weight, scale = drawn.fp8_parts(130, 64)
    scale[1, 0] = value
    with pytest.raises(FormatError, match="fp8 weight is infinite or not a number"):
        ops.pack_fp8(weight, scale)


def test_a_matrix_of_too_few_bytes_is_refused() -> None:
    for data in (torch.zeros(575, dtype=torch.uint8), torch.zeros(576), torch.zeros(1152, dtype=torch.uint8)[::2]):
        with pytest.raises(FormatError, match="no packed int4 matrix"):
            PackedMatrix(data, "int4", 16, 64)


def test_a_copy_is_described_anew(lib: Library) -> None:
    """What the library was told of a matrix names its place in memory, which a copy does not share."""
    x, weight = drawn.rows(3, 64), drawn.matrix("int4", 20, 64)
    expected = ops.linear(x, weight)
    copies = [deepcopy(weight), pickle.loads(pickle.dumps(weight)), replace(weight, data=weight.data.clone())]
    weight.data.zero_()
    for copy in copies:
        assert torch.equal(ops.linear(x, copy), expected)


def test_records_of_another_size_are_refused(lib: Library) -> None:
    whole = drawn.experts(3, 64, 96).records
    for records in (whole[:, :-1], whole.view(torch.int8), whole[0]):
        with pytest.raises(FormatError, match="records"):
            PackedExperts(records, 64, 96)
