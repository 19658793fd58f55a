"""Splits: views that cover a parameter once, and a step on them equals a step on the matrices kept apart."""

import pytest
import torch
from torch import Tensor

from karakoram.errors import TrainingError
from karakoram.train.optim.muon import Muon
from karakoram.train.optim.splits import Heads, Split, fused, per_head, per_head_parts, splits_of, whole
from tests.train import tiny

CONFIG = tiny.model_config()  # 4 heads, nope, rope and value 16 each
SELF = "model.layers.0.self_attn."
Q, KV = f"{SELF}q_b_proj.weight", f"{SELF}kv_b_proj.weight"
FUSED = "model.layers.1.mlp.experts.gate_up_proj"


@pytest.mark.parametrize("split", [whole, fused(2), per_head(4), per_head_parts(4, (16, 16))])
def test_views_cover_the_parameter_once(split: Split) -> None:
    weight = torch.zeros(128, 24)
    for view in split(weight):
        view += 1
    assert torch.equal(weight, torch.ones_like(weight))


@pytest.mark.parametrize(
    ("heads", "shapes"),
    [
        ("whole", {FUSED: [(4, 2, 32, 64)]}),
        ("head", {FUSED: [(4, 2, 32, 64)], Q: [(4, 32, 32)], KV: [(4, 32, 32)]}),
        ("part", {FUSED: [(4, 2, 32, 64)], Q: [(4, 32, 32)], KV: [(4, 16, 32), (4, 16, 32)]}),
    ],
)
def test_what_is_cut_by_names(heads: Heads, shapes: dict[str, list[tuple[int, ...]]]) -> None:
    weights = {
        Q: torch.zeros(4 * 32, 32), KV: torch.zeros(4 * 32, 32), FUSED: torch.zeros(4, 2 * 32, 64),
        f"{SELF}kv_a_proj_with_mqa.weight": torch.zeros(48, 64), f"{SELF}o_proj.weight": torch.zeros(64, 64),
        "model.layers.1.mlp.experts.gate_proj": torch.zeros(4, 32, 64),
        "model.layers.1.mlp.gate.weight": torch.ones(4, 64),
    }  # fmt: skip
    splits = splits_of(weights, CONFIG, heads)
    assert {name: [tuple(view.shape) for view in split(weights[name])] for name, split in splits.items()} == shapes


def test_the_plain_query_is_cut_too() -> None:
    plain = f"{SELF}q_proj.weight"
    assert list(splits_of([plain, f"{SELF}q_a_proj.weight"], CONFIG, "head")) == [plain]


def test_an_unknown_way_is_refused() -> None:
    with pytest.raises(TrainingError, match="'rows'"):
        splits_of([Q], CONFIG, "rows")  # pyright: ignore[reportArgumentType]


def _random(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same numbers as the matrices that they are: gate and up, queries of a head, keys and values of a head."""
    gate, up = tensors[FUSED].chunk(2, 1)
    keys, values = tensors[KV].view(4, 32, 32).chunk(2, 1)
    return {"gate": gate, "up": up, "queries": tensors[Q].view(4, 32, 32), "keys": keys, "values": values}


def test_a_step_on_splits_is_the_step_on_the_matrices() -> None:
    shapes = {FUSED: (4, 64, 64), Q: (128, 32), KV: (128, 32)}
    weights = _random(shapes, 0)
    cut = Muon({n: w.clone() for n, w in weights.items()}, splits=splits_of(shapes, CONFIG, "part"))
    apart = Muon({name: part.clone() for name, part in _apart(weights).items()})
    for seed in (1, 2):
        gradients = _random(shapes, seed)
        cut.step(gradients, 0.02)
        apart.step(_apart(gradients), 0.02)
    for name, part in _apart(cut.weights).items():
        assert torch.equal(part, apart.weights[name]), name
    whole_step = Muon({n: w.clone() for n, w in weights.items()})
    whole_step.step(_random(shapes, 1), 0.02)
    assert not torch.equal(whole_step.weights[Q], cut.weights[Q])


def test_each_head_gets_its_own_budget() -> None:
    """A head whose gradient is a thousand times smaller moves as far as the others: what K3 cuts heads for."""
    weight = torch.zeros(128, 32)
    muon = Muon({Q: weight}, 0.0, splits=splits_of([Q], CONFIG, "head"))
    gradient = _random({Q: (128, 32)}, 0)[Q]
    gradient[:32] *= 1e-3
    muon.step({Q: gradient}, 1.0)
    rms = weight.view(4, -1).square().mean(1).sqrt()
    assert rms.min() > 0.16 and rms.max() < 0.2  # of 0.2, as in test_muon
    assert muon.update_rms(Q) == pytest.approx(float(weight.square().mean().sqrt()), rel=1e-5)
