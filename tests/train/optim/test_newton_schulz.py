"""Newton-Schulz against a float64 transcription, torch's own, the measured table, and inputs that break naive ones."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.optim._muon import _zeropower_via_newtonschulz

from karakoram.errors import TrainingError
from karakoram.train.optim.newton_schulz import SETS, Spectrum, faster_dtype, orthogonalize

ROOT = Path(__file__).parents[3]
SHAPES = [(6, 24, 72), (3, 72, 24), (2, 40, 40), (1, 1, 8), (4, 128, 256), (2, 256, 64)]
DTYPES = [torch.float32, torch.bfloat16]


def _matrix(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _transcription(matrix: Tensor, steps: tuple[tuple[float, float, float], ...], shrink: float = 1.0) -> Tensor:
    """Of one matrix, by the formula, in float64."""
    x = matrix.double()
    x = x.mT if x.shape[0] > x.shape[1] else x
    x = x / (x.square().sum().sqrt() * shrink)
    for a, b, c in steps:
        gram = x @ x.mT
        x = a * x + b * (gram @ x) + c * (gram @ gram @ x)
    return x.mT if matrix.shape[0] > matrix.shape[1] else x


@pytest.mark.parametrize("name", list(SETS))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float32_is_the_formula_to_a_millionth(shape: tuple[int, ...], name: str) -> None:
    stack = _matrix(shape)
    result = orthogonalize(stack, name, torch.float32)
    assert result.dtype == torch.float32 and result.shape == stack.shape
    for matrix, made in zip(stack, result, strict=True):
        expected = _transcription(matrix, SETS[name].steps, SETS[name].shrink)
        # Polar Express multiplies what is small by 8 in its first step, roundings of 6e-8 too: 1.5e-6 seen, 3.5e-6 for
        # one row, where all of it is the rounding of the norm.
        bound = 5e-6 if name.startswith("polar") else 1e-6
        assert (made.double() - expected).norm() <= bound * expected.norm()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bfloat16_is_torchs_bit_for_bit(shape: tuple[int, ...]) -> None:
    stack = _matrix(shape) * 0.03
    expected = [_zeropower_via_newtonschulz(matrix, SETS["jordan"].steps[0], 5, 1e-7) for matrix in stack]
    assert torch.equal(orthogonalize(stack), torch.stack(expected))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", list(SETS))
def test_zero_stays_zero_beside_others(name: str, dtype: torch.dtype) -> None:
    stack = _matrix((3, 16, 24))
    stack[1] = 0
    result = orthogonalize(stack, name, dtype)
    assert torch.equal(result[1], torch.zeros_like(result[1]))
    assert torch.equal(result[[0, 2]], orthogonalize(stack[[0, 2]], name, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("exponent", [-115, -67, -20, 20, 100])
def test_a_power_of_two_changes_no_bit(exponent: int, dtype: torch.dtype) -> None:
    """2^-67 is 1e-20, whose square float32 cannot hold."""
    stack = _matrix((2, 24, 40)).clamp(0.01, 4)  # all numbers of the scaled matrix normal
    assert torch.equal(orthogonalize(stack * 2.0**exponent, dtype=dtype), orthogonalize(stack, dtype=dtype))


@pytest.mark.parametrize("scale", [1e-20, 1e-38, 1e37])
def test_scale_does_not_matter(scale: float) -> None:
    stack = _matrix((2, 24, 40))
    # a decimal scale rounds the matrix anew: 6e-8, some of it denormal at 1e-38
    assert torch.allclose(
        orthogonalize(stack * scale, dtype=torch.float32), orthogonalize(stack, dtype=torch.float32), atol=1e-5
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", list(SETS))
def test_lost_rank_stays_finite(name: str, dtype: torch.dtype) -> None:
    """Rank 1 and rank 8 of 32: the norm is a singular value, which may pass 1 by bfloat16's roundings."""
    for rank in (1, 8):
        stack = _matrix((4, 32, rank)) @ _matrix((4, rank, 48), 1)
        values = torch.linalg.svdvals(orthogonalize(stack, name, dtype).float())
        assert values.isfinite().all() and values.max() < 1.3
        assert values[:, :rank].min() > 0.3
        if dtype == torch.float32 and len(SETS[name].steps) == 5:
            assert values[:, rank:].max() < 1e-2, "what is not there is not made up"


def _table() -> dict[tuple[str, str, str], dict[str, float]]:
    lines = (ROOT / "benchmarks/results/newton_schulz_spectra.jsonl").read_text().splitlines()
    return {(one["set"], one["dtype"], one["spectrum"]): one for one in map(json.loads, lines)}


# k2_training's table, measured elsewhere: RMS of Gaussian 512 × 512, 512 × 2048, and σ_i ∝ i^-1.5
PUBLISHED = {
    "jordan": (0.940, 0.954, 0.402), "you": (0.996, 1.000, 0.413), "polar_express_5": (0.998, 1.013, 0.510),
    "polar_express_8": (0.998, 1.000, 0.854), "deepseek_8_2": (1.000, 1.000, 1.000),
}  # fmt: skip


@pytest.mark.parametrize("name", list(SETS))
def test_constants_are_the_measured_ones(name: str) -> None:
    table = _table()
    for spectrum, constant in SETS[name].rms.items():
        assert constant == pytest.approx(table[name, "float32", spectrum]["rms"], abs=5e-5)
    for spectrum, published in zip(("gaussian", "gaussian_wide", "power_law"), PUBLISHED[name], strict=True):
        # other draws, and Polar Express with the norm 2 % larger
        assert table[name, "float32", spectrum]["rms"] == pytest.approx(published, abs=0.005)
        assert table[name, "bfloat16", spectrum]["rms"] == pytest.approx(published, abs=0.02)


@pytest.mark.parametrize("spectrum", ["gaussian", "power_law"])
def test_calibrated_sets_have_one_rms(spectrum: Spectrum) -> None:
    stack = _matrix((1, 512, 512))
    if spectrum == "power_law":
        left, _, right = torch.linalg.svd(stack[0])
        stack = (left * torch.arange(1, 513) ** -1.5 @ right)[None]
    for name in SETS:
        made = orthogonalize(stack, name, torch.float32, spectrum)
        assert float(made.square().mean().sqrt()) * 512**0.5 == pytest.approx(1, abs=0.005), "one draw of several"


def test_leading_dimensions_are_kept() -> None:
    stack = _matrix((2, 3, 12, 8))
    assert torch.equal(orthogonalize(stack)[1, 2], orthogonalize(stack[1, 2][None])[0])
    assert torch.equal(orthogonalize(stack[0, 0]), orthogonalize(stack)[0, 0])
    assert orthogonalize(stack[:0]).shape == (0, 3, 12, 8)


def test_the_input_stays_as_it_is() -> None:
    for dtype in (*DTYPES, torch.float64):
        stack = _matrix((2, 8, 12)).to(dtype)
        before = stack.clone()
        orthogonalize(stack, dtype=dtype)
        assert torch.equal(stack, before)


def test_an_unknown_set_is_refused() -> None:
    with pytest.raises(TrainingError, match="no set of coefficients 'newton'") as refused:
        orthogonalize(_matrix((1, 4, 4)), "newton")
    assert "jordan" in str(refused.value)


def test_the_probe_answers() -> None:
    assert faster_dtype(1, 16, 16) in DTYPES
