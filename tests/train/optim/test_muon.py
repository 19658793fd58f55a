"""Muon against a plain reference in float64, matrix by matrix, and against torch's own for two-dimensional weights."""

import math

import pytest
import torch
from torch import Tensor

from karakoram.train.optim.muon import Muon, orthogonalize

# All shapes of one group (the smaller and the larger side agree), so that they are orthogonalised in one batch.
SHAPES = {"wide": (24, 72), "tall": (72, 24), "stack": (3, 24, 72), "tall_stack": (2, 72, 24), "other": (40, 56)}

# Newton-Schulz runs in bfloat16: five iterations of products rounded to 8 bits. On Gaussian matrices of these shapes
# that moves the result by 1 to 2 % (Frobenius); a wrong coefficient, factor or transpose moves it by more than 20 %.
BF16_TOLERANCE = 0.03


def _newton_schulz(matrix: Tensor) -> Tensor:
    """The same quintic iteration, one matrix, in float64."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix.double()
    tall = x.shape[0] > x.shape[1]
    x = x.mT if tall else x
    x = x / x.norm()
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


def _reference_update(momentum: Tensor, gradient: Tensor) -> Tensor:
    """0.2 · √max(A, B) · NS(μM + G) for one matrix; `momentum` already holds this step's gradient."""
    return 0.2 * math.sqrt(max(gradient.shape)) * _newton_schulz(gradient.double() + 0.95 * momentum)


def _reference_step(weight: Tensor, momentum: Tensor, gradient: Tensor, rate: float, decay: float) -> Tensor:
    momentum.mul_(0.95).add_(gradient.double())
    if weight.ndim == 2:
        update = _reference_update(momentum, gradient)
    else:
        update = torch.stack([_reference_update(m, g) for m, g in zip(momentum, gradient)])
    return weight * (1 - rate * decay) - rate * update


def _random(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def _relative(difference: Tensor, of: Tensor) -> float:
    return float(difference.norm() / of.norm())


def test_three_steps_equal_the_reference() -> None:
    rate, decay = 0.02, 0.1
    weights = _random(0)
    muon = Muon({name: w.clone() for name, w in weights.items()}, decay)
    expected = {name: w.double() for name, w in weights.items()}
    momenta = {name: torch.zeros_like(w) for name, w in expected.items()}
    for step in range(1, 4):
        gradients = _random(step)
        muon.step(gradients, rate)
        for name, gradient in gradients.items():
            expected[name] = _reference_step(expected[name], momenta[name], gradient, rate, decay)
    for name, weight in weights.items():
        moved = expected[name] - weight.double()
        assert _relative(muon.weights[name].double() - expected[name], moved) < BF16_TOLERANCE, name
        assert torch.allclose(muon.buffers[name].double(), momenta[name], rtol=1e-6, atol=1e-6)  # float32 sums


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no torch.optim.Muon (2.9 or newer has)")
def test_torch_muon_takes_the_same_steps() -> None:
    rate, decay = 0.02, 0.1
    names = [name for name, shape in SHAPES.items() if len(shape) == 2]  # torch's takes no stacks
    weights = _random(0)
    muon = Muon({name: weights[name].clone() for name in names}, decay)
    theirs = [weights[name].clone().requires_grad_() for name in names]
    optimizer = torch.optim.Muon(theirs, lr=rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
    for step in range(1, 4):
        gradients = _random(step)
        muon.step({name: gradients[name] for name in names}, rate)
        for parameter, name in zip(theirs, names):
            parameter.grad = gradients[name].clone()
        optimizer.step()
    for parameter, name in zip(theirs, names):
        moved = parameter.detach() - weights[name]
        assert _relative(muon.weights[name] - parameter.detach(), moved) < BF16_TOLERANCE, name


@pytest.mark.parametrize("shape", [(1, 32, 64), (4, 32, 128), (2, 64, 256)])
def test_singular_values_come_near_one(shape: tuple[int, int, int]) -> None:
    values = torch.linalg.svdvals(orthogonalize(torch.randn(shape)).float())
    assert values.min() > 0.6
    assert values.max() < 1.3


def test_directions_are_kept() -> None:
    """U·Vᵀ of a matrix with known singular vectors, up to the singular values that Newton-Schulz leaves."""
    u, _ = torch.linalg.qr(torch.randn(16, 16))
    v, _ = torch.linalg.qr(torch.randn(48, 16))
    matrix = u @ torch.diag(torch.linspace(0.5, 2.0, 16)) @ v.mT
    core = u.mT @ orthogonalize(matrix[None])[0].float() @ v
    assert core.diagonal().min() > 0.6
    assert (core - core.diagonal().diag()).abs().max() < 0.05  # bfloat16 entries of size 1/4, summed over 16 by 48


@pytest.mark.parametrize("name", list(SHAPES))
def test_update_has_the_rms_of_adamw(name: str) -> None:
    muon = Muon({name: torch.zeros(SHAPES[name])}, weight_decay=0.0)
    muon.step({name: _random(1)[name]}, learning_rate=1.0)
    # 0.2 if all singular values became 1; five quintic steps leave them in [0.68, 1.2], 0.83 to 0.95 of 0.2 in the mean
    assert 0.16 < float(muon.weights[name].square().mean().sqrt()) < 0.2


def test_weight_decay_is_decoupled() -> None:
    weights = _random(0)
    muon = Muon({name: w.clone() for name, w in weights.items()}, weight_decay=0.5)
    muon.step({name: torch.zeros_like(w) for name, w in weights.items()}, learning_rate=0.1)
    for name, weight in weights.items():
        assert torch.equal(muon.weights[name], weight * (1 - 0.1 * 0.5)), "no gradient: the decay alone"


def test_without_a_gradient_nothing_moves() -> None:
    weights = _random(0)
    muon = Muon({name: w.clone() for name, w in weights.items()})
    muon.step({"wide": _random(1)["wide"]}, 0.1)
    assert not torch.equal(muon.weights["wide"], weights["wide"])
    assert all(torch.equal(muon.weights[name], w) for name, w in weights.items() if name != "wide")


def test_scale_multiplies_the_gradient() -> None:
    """Half a gradient is exact in float32, so both ways agree to the last bit; bfloat16 gradients are widened first."""
    gradients = {name: g.bfloat16() for name, g in _random(1).items()}
    first, second = Muon(_random(0)), Muon(_random(0))
    first.step(gradients, 0.01, scale=0.5)
    second.step({name: g.float() / 2 for name, g in gradients.items()}, 0.01)
    assert all(torch.equal(first.weights[name], second.weights[name]) for name in SHAPES)
    assert all(torch.equal(first.buffers[name], second.buffers[name]) for name in SHAPES)


def test_state_round_trip() -> None:
    first = Muon(_random(0))
    first.step(_random(1), 0.01)
    second = Muon({name: w.clone() for name, w in first.weights.items()})
    second.load({name: buffer.clone() for name, buffer in first.state().items()})
    for muon in (first, second):
        muon.step(_random(2), 0.01)
    assert all(torch.equal(first.weights[name], second.weights[name]) for name in SHAPES)
