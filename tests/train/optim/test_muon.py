"""Muon against a plain reference in float64, matrix by matrix, and against torch's own for two-dimensional weights."""

import math

import pytest
import torch
from torch import Tensor

from karakoram.errors import TrainingError
from karakoram.train.optim.muon import Muon, from_torch_muon, muon_update, updated
from karakoram.train.optim.newton_schulz import Spectrum, orthogonalize

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
    muon = Muon({name: w.clone() for name, w in weights.items()}, decay, mean=False)
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


@pytest.mark.parametrize("mean", [False, True])
def test_float32_steps_are_the_reference_to_a_millionth(mean: bool) -> None:
    rate, decay = 0.02, 0.1
    weights = _random(0)
    muon = Muon({name: w.clone() for name, w in weights.items()}, decay, mean=mean, dtype=torch.float32)
    momenta = {name: torch.zeros_like(w, dtype=torch.float64) for name, w in weights.items()}
    for step in range(1, 4):
        gradients = _random(step)
        before = {name: w.double() for name, w in muon.weights.items()}
        directions = muon.directions(SHAPES, gradients)
        for name, gradient in gradients.items():
            expected = _reference_step(before[name], momenta[name], gradient, rate, decay)
            update = (before[name] * (1 - rate * decay) - expected) / rate
            # a matrix of a stack is a matrix: the worst of them counts
            off = (directions[name].double() - update).flatten(-2).norm(dim=-1)
            assert (off <= 1e-6 * update.flatten(-2).norm(dim=-1)).all(), name
        muon.apply(directions, rate)
        for name, weight in muon.weights.items():
            update = rate * directions[name].double()
            # the weight itself rounds to 2^-24 of its size, a hundredth of which the update is
            expected = before[name] * (1 - rate * decay) - update
            assert torch.allclose(weight.double(), expected, rtol=2e-7, atol=1e-7), name


def _torch_muon(weights: dict[str, Tensor], rate: float, decay: float) -> tuple[torch.optim.Muon, list[Tensor]]:
    """torch's, which takes no stacks, over every matrix by itself; and its parameters."""
    matrices = [m for w in weights.values() for m in (w if w.ndim == 3 else w[None])]
    parameters = [m.clone().requires_grad_() for m in matrices]
    return torch.optim.Muon(parameters, lr=rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw"), parameters


def _torch_steps(optimizer: torch.optim.Muon, parameters: list[Tensor], seeds: range) -> None:
    for seed in seeds:
        matrices = [m for g in _random(seed).values() for m in (g if g.ndim == 3 else g[None])]
        for parameter, gradient in zip(parameters, matrices, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()


def _unstacked(weights: dict[str, Tensor]) -> list[Tensor]:
    return [m for w in weights.values() for m in (w if w.ndim == 3 else w[None])]


NAMES: list[str | tuple[str, int]] = [
    "wide", "tall", ("stack", 0), ("stack", 1), ("stack", 2), ("tall_stack", 0), ("tall_stack", 1), "other"
]  # fmt: skip


def test_with_the_mean_torch_muons_bits() -> None:
    """Not one bit of five steps differs, which is stricter than a unit in the last place of the update."""
    weights = _random(0)
    muon = Muon({name: w.clone() for name, w in weights.items()}, 0.1, mean=True)
    optimizer, parameters = _torch_muon(weights, 0.02, 0.1)
    _torch_steps(optimizer, parameters, range(1, 6))
    for seed in range(1, 6):
        muon.step(_random(seed), 0.02)
    for parameter, ours in zip(parameters, _unstacked(muon.weights), strict=True):
        assert torch.equal(parameter.detach(), ours)
    for name, buffer in from_torch_muon(optimizer.state_dict(), NAMES, mean=True).items():
        assert torch.equal(buffer, muon.buffers[name])


def test_with_the_sum_torch_muons_steps() -> None:
    weights = _random(0)
    muon = Muon({name: w.clone() for name, w in weights.items()}, 0.1)
    optimizer, parameters = _torch_muon(weights, 0.02, 0.1)
    _torch_steps(optimizer, parameters, range(1, 4))
    for seed in range(1, 4):
        muon.step(_random(seed), 0.02)
    for parameter, ours, first in zip(parameters, _unstacked(muon.weights), _unstacked(weights), strict=True):
        assert _relative(ours - parameter.detach(), parameter.detach() - first) < BF16_TOLERANCE


@pytest.mark.parametrize("mean", [False, True])
def test_torch_muons_state_goes_on_here(mean: bool) -> None:
    weights = _random(0)
    optimizer, parameters = _torch_muon(weights, 0.02, 0.1)
    _torch_steps(optimizer, parameters, range(1, 4))
    state = from_torch_muon(optimizer.state_dict(), NAMES, mean)
    ours = Muon(_like(weights, parameters), 0.1, mean=mean, dtype=torch.bfloat16)
    ours.load(state)
    moved = Muon({name: w.clone() for name, w in weights.items()}, 0.1, mean=mean)
    for seed in range(1, 4):
        moved.step(_random(seed), 0.02)
    for name, buffer in moved.buffers.items():
        # each of three updates rounds to 2^-24 of the largest number
        assert torch.allclose(state[name], buffer, rtol=1e-6, atol=1e-6), name
    before = [w.clone() for w in _unstacked(ours.weights)]
    _torch_steps(optimizer, parameters, range(4, 5))
    ours.step(_random(4), 0.02)
    for parameter, here, first in zip(parameters, _unstacked(ours.weights), before, strict=True):
        if mean:
            assert torch.equal(parameter.detach(), here)
        assert _relative(here - parameter.detach(), parameter.detach() - first) < BF16_TOLERANCE


def _like(weights: dict[str, Tensor], parameters: list[Tensor]) -> dict[str, Tensor]:
    """torch's unstacked parameters in our shapes."""
    matrices = iter(parameters)
    return {
        name: torch.stack([next(matrices).detach() for _ in range(w.numel() // w.shape[-2:].numel())]).view_as(w)
        for name, w in weights.items()
    }


def test_torch_state_that_does_not_fit_is_refused() -> None:
    optimizer, parameters = _torch_muon(_random(0), 0.02, 0.1)
    with pytest.raises(TrainingError, match="has 0 buffers"):
        from_torch_muon(optimizer.state_dict(), NAMES)
    _torch_steps(optimizer, parameters, range(1, 2))
    with pytest.raises(TrainingError, match="for 2 names"):
        from_torch_muon(optimizer.state_dict(), ["wide", "tall"])
    gap = [("stack", 7) if name == ("stack", 2) else name for name in NAMES]
    with pytest.raises(TrainingError, match=r"matrices \[0, 1, 7\] only"):
        from_torch_muon(optimizer.state_dict(), gap)


def test_state_that_does_not_fit_is_refused_and_nothing_taken() -> None:
    muon = Muon(_random(0))
    state = {name: torch.ones_like(buffer) for name, buffer in muon.buffers.items()}
    with pytest.raises(TrainingError, match=r"momentum of other should be .* missing"):
        muon.load({name: buffer for name, buffer in state.items() if name != "other"})
    with pytest.raises(TrainingError, match="momentum of stack"):
        muon.load(state | {"stack": torch.ones(2, 24, 72)})
    assert all(not buffer.any() for buffer in muon.buffers.values())


def test_halves_of_a_step_and_functions_are_the_step() -> None:
    """On a part of the weights, too: who owns some of them asks for those."""
    weights = _random(0)
    step, halves = (Muon({name: w.clone() for name, w in weights.items()}) for _ in range(2))
    buffers = {name: torch.zeros_like(w) for name, w in weights.items()}
    for seed in (1, 2):
        gradients = _random(seed)
        before = {name: w.clone() for name, w in step.weights.items()}
        step.step(gradients, 0.02)
        first = halves.directions(["wide", "stack"], gradients)
        rest = halves.directions([name for name in SHAPES if name not in first], gradients)
        halves.apply(first | rest, 0.02)
        for name, weight in step.weights.items():
            direction, buffers[name] = muon_update(gradients[name], buffers[name])
            # the factor multiplies the direction, or the rate: one rounding to 2^-24 here or there
            assert torch.allclose(weight, halves.weights[name], rtol=1e-6, atol=1e-7)
            assert torch.allclose(weight, updated(before[name], direction, 0.02, 0.1), rtol=1e-6, atol=1e-7)
            assert torch.equal(step.buffers[name], halves.buffers[name])
            assert torch.equal(step.buffers[name], buffers[name])


def test_without_nesterov_the_momentum_itself() -> None:
    weights = _random(0)
    muon = Muon({name: torch.zeros_like(w) for name, w in weights.items()}, 0.0, nesterov=False)
    for seed in (1, 2):
        before = {name: w.clone() for name, w in muon.weights.items()}
        muon.step(_random(seed), 1.0)
    for name, weight in muon.weights.items():
        expected = orthogonalize(muon.buffers[name]).float() * 0.2 * 72**0.5 if name != "other" else None
        if expected is not None:
            assert torch.allclose(before[name] - weight, expected, atol=1e-5)


def test_update_rms_is_measured() -> None:
    weights = _random(0)
    muon = Muon(weights, 0.0)
    assert muon.update_rms("stack") == 0
    before = {name: w.clone() for name, w in weights.items()}
    muon.step(_random(1), 0.01)
    for name, weight in weights.items():
        moved = float((weight - before[name]).square().mean().sqrt())
        assert muon.update_rms(name) == pytest.approx(moved / 0.01, rel=1e-3)


def test_another_set_and_calibration_change_the_size() -> None:
    gradient = _random(1)["wide"]
    rms: dict[tuple[str, Spectrum | None], float] = {}
    chosen: list[tuple[str, Spectrum | None]] = [
        ("jordan", None),
        ("jordan", "gaussian"),
        ("polar_express_8", "gaussian"),
    ]
    for name, calibrate in chosen:
        muon = Muon({"wide": torch.zeros(24, 72)}, 0.0, coefficients=name, calibrate=calibrate)
        muon.step({"wide": gradient}, 1.0)
        rms[name, calibrate] = muon.update_rms("wide")
    assert rms["jordan", "gaussian"] == pytest.approx(rms["jordan", None] / 0.9396, rel=0.004)  # a bfloat16 product
    assert rms["polar_express_8", "gaussian"] == pytest.approx(0.2, rel=0.01)
    with pytest.raises(TrainingError, match="no set of coefficients"):
        Muon({}, coefficients="none")


def test_to_takes_state_along() -> None:
    muon = Muon(_random(0)).to("meta")
    assert all(t.device.type == "meta" for t in (*muon.weights.values(), *muon.buffers.values()))


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
