"""Masters, and what they are published as: bfloat16, and for the experts the int4 grid."""

import pytest
import torch

from karakoram.formats.int4_group import GROUP, exact_scales
from karakoram.model.transformer import Transformer
from karakoram.quantize.round_to_nearest import on_grid, round_to_nearest
from karakoram.train.initialize import initialize
from karakoram.train.masters import Masters
from tests.train import tiny


@pytest.fixture
def masters() -> Masters:
    made = Masters(initialize(Transformer(tiny.model_config()), 0))
    for weight in made.weights.values():
        weight += torch.randn_like(weight) * 1e-3  # no longer numbers that bfloat16 holds
    return made


def test_published_is_the_nearest_bfloat16(masters: Masters) -> None:
    masters.publish()
    for name, parameter in masters.model.named_parameters():
        assert torch.equal(parameter, masters.weights[name].bfloat16()), name


def test_int4_experts_lie_on_the_grid_and_the_rest_does_not_change(masters: Masters) -> None:
    before = {name: w.clone() for name, w in masters.weights.items()}
    masters.int4_experts = True
    masters.publish()
    experts = 0
    for name, parameter in masters.model.named_parameters():
        assert torch.equal(masters.weights[name], before[name]), "masters are never rounded"
        if ".experts." in name:
            experts += 1
            assert exact_scales(parameter.detach().flatten(0, 1))[2] == 0, f"{name} has groups off the grid"
            assert not torch.equal(parameter, before[name].bfloat16())
        else:
            assert torch.equal(parameter, before[name].bfloat16()), name
    assert experts == 3


def test_float32_models_get_the_same_grid(masters: Masters) -> None:
    wide = Masters(Transformer(tiny.model_config(), dtype=torch.float32))
    wide.weights = masters.weights
    wide.int4_experts = masters.int4_experts = True
    wide.publish()
    masters.publish()
    for (name, a), b in zip(wide.model.named_parameters(), masters.model.parameters()):
        if ".experts." in name:
            assert torch.equal(a, b.float()), name


def test_gradients_are_of_the_published_weights(masters: Masters) -> None:
    assert masters.gradients() == {}
    masters.model.hidden(torch.zeros(1, 4, dtype=torch.int64)).sum().backward()
    gradients = masters.gradients()
    assert set(gradients) == set(masters.weights) - {"lm_head.weight"}
    assert all(gradient.dtype == torch.bfloat16 for gradient in gradients.values())


@pytest.mark.parametrize("size", [1e-6, 1e-2, 1.0, 300.0])
def test_round_to_nearest_never_clips(size: float) -> None:
    weight = torch.randn(6, 8 * GROUP) * size
    weight[0, :GROUP] = size  # all of one magnitude
    codes, scales = round_to_nearest(weight)
    assert codes.dtype == torch.int8
    assert scales.shape == (6, 8)
    assert int(codes.abs().max()) == 7
    steps = scales.float().repeat_interleave(GROUP, -1)
    # half a step everywhere, also at the largest of a group: nothing was cut off
    assert ((weight - codes * steps).abs() <= steps * (0.5 + 1e-5)).all()


def test_the_grid_survives_its_own_rounding() -> None:
    grid = on_grid(torch.randn(12, 2 * GROUP))
    assert grid.dtype == torch.bfloat16
    codes, scales, misfits = exact_scales(grid)
    assert misfits == 0
    assert torch.equal((codes.unflatten(-1, (-1, GROUP)) * scales[..., None]).flatten(-2), grid)


def test_a_group_of_zeros_stays_zero() -> None:
    weight = torch.randn(2, 2 * GROUP)
    weight[0, :GROUP] = 0
    codes, scales = round_to_nearest(weight)
    assert scales[0, 0] == 0
    assert not codes[0, :GROUP].any()
    assert torch.equal(on_grid(weight)[0, :GROUP], torch.zeros(GROUP, dtype=torch.bfloat16))
    assert on_grid(weight).isfinite().all()
