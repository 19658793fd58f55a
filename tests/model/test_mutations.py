"""The parity check can fail: each wrong variant of the mathematics is farther from transformers than the tolerance.

Two mistakes need sharper weights than the other tests have. An epsilon shows where the latents are small, so their
projections are divided by 32. Zero instead of minus infinity for the experts of other groups shows where the biased
scores are negative, so all biases are lowered by 2, which changes nothing in a correct router.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from karakoram import load_model
from karakoram.config import ModelConfig
from karakoram.model import attention, rope, router, transformer
from karakoram.model.attention import LatentAttention
from karakoram.model.layers import RMSNorm
from karakoram.model.moe import MixtureOfExperts
from tests.model import reference
from tests.model.reference import TOLERANCE, Case

IDS_BT = reference.token_ids(2)


class Saved(NamedTuple):
    """A checkpoint and what transformers computes from it."""

    directory: Path
    logits: Tensor


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    model = reference.build(Case(n_group=4, shared=2))
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_a_proj.weight /= 32
            layer.self_attn.kv_a_proj_with_mqa.weight[: model.config.kv_lora_rank] /= 32
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer -= 2
    directory = tmp_path_factory.mktemp("model")
    model.save_pretrained(directory)
    return Saved(directory, reference.logits(model, IDS_BT))


def delta(saved: Saved) -> float:
    """What the parity check compares."""
    return reference.distance(reference.logits(load_model(saved.directory, dtype="float32"), IDS_BT), saved.logits)


Patch = Callable[[pytest.MonkeyPatch], None]
MUTATIONS: dict[str, Patch] = {}


def mutation(patch: Patch) -> Patch:
    MUTATIONS[patch.__name__] = patch
    return patch


@mutation
def latent_norms_with_the_epsilon_of_the_config(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "LATENT_NORM_EPS", reference.SHAPE["rms_norm_eps"])


@mutation
def other_norms_with_the_epsilon_of_the_latents(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformer, "RMSNorm", lambda dim, eps, *rest: RMSNorm(dim, 1e-6, *rest))


@mutation
def no_mscale_in_the_softmax_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rope, "yarn_mscale", lambda factor, mscale: 1.0)


@mutation
def mscale_not_squared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "softmax_scale", lambda config: rope.softmax_scale(config) / rope.yarn_mscale(32, 1))


@mutation
def mscale_on_the_rotation_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformer, "rotation_scale", lambda config: rope.yarn_mscale(32, 1))


def _with_rope(monkeypatch: pytest.MonkeyPatch, change: Callable[[ModelConfig], ModelConfig]) -> None:
    right = rope.inverse_frequencies
    monkeypatch.setattr(transformer, "inverse_frequencies", lambda config: right(change(config)))


@mutation
def beta_fast_32_instead_of_1(monkeypatch: pytest.MonkeyPatch) -> None:
    def change(config: ModelConfig) -> ModelConfig:
        assert config.rope_scaling
        return dataclasses.replace(config, rope_scaling=dataclasses.replace(config.rope_scaling, beta_fast=32.0))

    _with_rope(monkeypatch, change)


@mutation
def frequencies_not_stretched(monkeypatch: pytest.MonkeyPatch) -> None:
    _with_rope(monkeypatch, lambda config: dataclasses.replace(config, rope_scaling=None))


@mutation
def rope_on_halves_instead_of_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return torch.cat((first * cos - second * sin, first * sin + second * cos), -1)

    monkeypatch.setattr(attention, "rotate", rotate)


@mutation
def rope_key_normed_with_the_latent(monkeypatch: pytest.MonkeyPatch) -> None:
    def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return rope.rotate(F.rms_norm(x, x.shape[-1:], eps=1e-6) if x.ndim == 3 else x, cos, sin)

    monkeypatch.setattr(attention, "rotate", rotate)


@mutation
def latent_not_normed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = LatentAttention.project

    def project(self: LatentAttention, x_BTD: Tensor, rotation: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        q_nope, q_rope, _, k_rope = right(self, x_BTD, rotation)
        latent = self.kv_a_proj_with_mqa(x_BTD)[..., : self.config.kv_lora_rank]
        return q_nope, q_rope, latent * self.kv_a_layernorm.weight, k_rope

    monkeypatch.setattr(LatentAttention, "project", project)


def _with_config(monkeypatch: pytest.MonkeyPatch, function: str, **changes: Any) -> None:
    right = getattr(router, function)
    monkeypatch.setattr(router, function, lambda scores, config: right(scores, dataclasses.replace(config, **changes)))


@mutation
def bias_in_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(self: router.Router, x_ND: Tensor) -> tuple[Tensor, Tensor]:
        biased_NE = torch.sigmoid(F.linear(x_ND, self.weight)) + self.e_score_correction_bias
        ids_NK = router.choose(biased_NE, self.config)
        return ids_NK, router.weigh(biased_NE.gather(-1, ids_NK), self.config)

    monkeypatch.setattr(router.Router, "forward", forward)


@mutation
def bias_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(self: router.Router, x_ND: Tensor) -> tuple[Tensor, Tensor]:
        scores_NE = torch.sigmoid(F.linear(x_ND, self.weight))
        ids_NK = router.choose(scores_NE, self.config)
        return ids_NK, router.weigh(scores_NE.gather(-1, ids_NK), self.config)

    monkeypatch.setattr(router.Router, "forward", forward)


@mutation
def softmax_scores_instead_of_sigmoid(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(self: router.Router, x_ND: Tensor) -> tuple[Tensor, Tensor]:
        scores_NE = F.linear(x_ND, self.weight).softmax(-1)
        ids_NK = router.choose(scores_NE + self.e_score_correction_bias, self.config)
        return ids_NK, router.weigh(scores_NE.gather(-1, ids_NK), self.config)

    monkeypatch.setattr(router.Router, "forward", forward)


@mutation
def weights_not_normalised(monkeypatch: pytest.MonkeyPatch) -> None:
    _with_config(monkeypatch, "weigh", norm_topk_prob=False)


@mutation
def routing_not_scaled(monkeypatch: pytest.MonkeyPatch) -> None:
    _with_config(monkeypatch, "weigh", routed_scaling_factor=1.0)


@mutation
def groups_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    _with_config(monkeypatch, "choose", n_group=1, topk_group=1)


def _group_rule(monkeypatch: pytest.MonkeyPatch, best: int, elsewhere: float) -> None:
    def choose(biased_NE: Tensor, config: ModelConfig) -> Tensor:
        grouped = biased_NE.unflatten(-1, (config.n_group, -1))
        rank_NG = grouped.topk(best, dim=-1).values.sum(-1)
        chosen_NG = torch.zeros_like(rank_NG, dtype=torch.bool)
        chosen_NG.scatter_(-1, rank_NG.topk(config.topk_group, dim=-1).indices, True)
        masked_NE = grouped.masked_fill(~chosen_NG[..., None], elsewhere).flatten(-2)
        return masked_NE.topk(config.num_experts_per_tok).indices

    monkeypatch.setattr(router, "choose", choose)


@mutation
def groups_ranked_by_their_best_expert_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    _group_rule(monkeypatch, 1, float("-inf"))


@mutation
def experts_of_other_groups_set_to_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    _group_rule(monkeypatch, 2, 0.0)


@mutation
def shared_experts_scaled_like_the_routed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = MixtureOfExperts.forward

    def forward(self: MixtureOfExperts, x: Tensor, *rest: Any) -> Tensor:
        assert self.shared_experts is not None
        return right(self, x, *rest) + 1.827 * self.shared_experts(x)

    monkeypatch.setattr(MixtureOfExperts, "forward", forward)


def test_without_a_mutation_the_check_passes(
    saved: Saved, monkeypatch: pytest.MonkeyPatch, measured: Callable[[str, float], None]
) -> None:
    measured("forward, float32, no mutation", delta(saved))
    assert delta(saved) <= TOLERANCE
    _group_rule(monkeypatch, 2, float("-inf"))  # the mutations' own copy of the rule is right where they do not bend it
    assert delta(saved) <= TOLERANCE


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_wrong_variant_fails(
    name: str, saved: Saved, monkeypatch: pytest.MonkeyPatch, mutants: Callable[[str, float], None]
) -> None:
    MUTATIONS[name](monkeypatch)
    distance = delta(saved)
    mutants(name, distance)
    assert distance > TOLERANCE
