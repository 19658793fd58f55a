"""fp8 in 128 x 128 blocks: values, ragged edges, and the exact way back."""

import pytest
import torch

from karakoram.errors import FormatError
from karakoram.formats import bf16, fp8_block

ALL_BYTES = torch.arange(256, dtype=torch.uint8)


def finite_codes(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    raw = torch.randint(0, 256, (rows, columns), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    raw[(raw & 0x7F) == 0x7F] = 0x30
    return raw.view(torch.float8_e4m3fn)


def test_every_byte_has_the_value_of_its_bits() -> None:
    values = ALL_BYTES.view(torch.float8_e4m3fn).float().tolist()
    for byte, value in enumerate(values):
        expected = fp8_block.e4m3_reference(byte)
        assert value == expected or (value != value and expected != expected)


@pytest.mark.parametrize("shape", [(128, 128), (576, 200), (1, 1), (130, 129), (64, 384)])
def test_dequantize_with_ragged_last_blocks(shape: tuple[int, int]) -> None:
    scale = torch.rand(fp8_block.scale_shape(*shape), generator=torch.Generator().manual_seed(3)) + 0.01
    weight = finite_codes(*shape)
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(
            fp8_block.dequantize(weight, scale, dtype), fp8_block.dequantize_reference(weight, scale, dtype)
        )


def test_scale_shapes_of_k2() -> None:
    assert fp8_block.scale_shape(576, 7168) == (5, 56)
    assert fp8_block.scale_shape(16384, 512) == (128, 4)


def test_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, scale = finite_codes(700, 300), torch.rand(6, 3) + 0.1
    whole = fp8_block.dequantize(weight, scale, torch.float32)
    exact = fp8_block.exact_scales(whole)
    monkeypatch.setattr(fp8_block, "CHUNK_ELEMENTS", 128 * 300)
    assert torch.equal(fp8_block.dequantize(weight, scale, torch.float32), whole)
    assert torch.equal(fp8_block.exact_scales(whole), exact)


@pytest.mark.parametrize("significand", [1, 3, 5, 7, 9, 11, 13, 15])
def test_scales_of_four_bits_come_back_from_bf16(significand: int) -> None:
    """4 bits times 4 bits fit into the 8 of bf16, so the whole loop must be exact, signs of zero included."""
    weight = finite_codes(300, 200, seed=significand)
    powers = torch.randint(-30, 5, fp8_block.scale_shape(300, 200), generator=torch.Generator().manual_seed(1))
    scale = float(significand) * torch.exp2(powers.float())
    dense, rounded = bf16.narrow_exact(fp8_block.dequantize(weight, scale, torch.float32))
    assert rounded == 0
    code, misfits = fp8_block.quantize_exact(dense, fp8_block.exact_scales(dense))
    assert misfits == 0
    back = fp8_block.dequantize(code, fp8_block.exact_scales(dense))
    assert torch.equal(back.view(torch.int16), dense.view(torch.int16))


def test_values_off_the_grid_are_counted() -> None:
    dense = torch.randn(130, 140, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    assert fp8_block.quantize_exact(dense, fp8_block.exact_scales(dense))[1] > 1000
    ones = torch.ones(4, 4)
    ones[0, 0] = float("nan")
    assert fp8_block.quantize_exact(ones, fp8_block.exact_scales(ones))[1] == 1
    zeros = torch.zeros(3, 3)
    assert fp8_block.quantize_exact(zeros, fp8_block.exact_scales(zeros))[1] == 0


def test_quantize_exact_has_its_twin() -> None:
    weight, scale = finite_codes(6, 9), torch.tensor([[0.0123]])
    dense = fp8_block.dequantize(weight, scale, torch.float32)
    dense[2, 3] = 1.234567
    code, misfits = fp8_block.quantize_exact(dense, scale)
    twin, twin_misfits = fp8_block.quantize_exact_reference(dense, scale)
    assert misfits == twin_misfits == 1
    code.view(torch.uint8)[2, 3] = 0
    assert torch.equal(code.view(torch.uint8), twin.view(torch.uint8))


def test_wrong_shapes_and_dtypes_are_refused() -> None:
    with pytest.raises(FormatError, match="128x128"):
        fp8_block.dequantize(finite_codes(200, 10), torch.ones(1, 1))
    with pytest.raises(FormatError, match="128x128"):
        fp8_block.dequantize(torch.zeros(4, 4), torch.ones(1, 1))
    with pytest.raises(FormatError, match="128x128"):
        fp8_block.dequantize(finite_codes(4, 4), torch.ones(1, 1, dtype=torch.bfloat16))


def test_bf16_rounding_has_its_twin() -> None:
    values = torch.randn(500, generator=torch.Generator().manual_seed(0)) * torch.logspace(-40, 38, 500)
    values[:3] = torch.tensor([1.0, 0.5, 1 + 2.0**-8])
    narrow, misfits = bf16.narrow_exact(values)
    twin, twin_misfits = bf16.narrow_exact_reference(values)
    assert torch.equal(narrow, twin)
    assert misfits == twin_misfits > 400
    assert bf16.narrow_exact(narrow.float())[1] == 0
    assert bf16.narrow_exact(torch.tensor([float("nan")]))[1] == 1
