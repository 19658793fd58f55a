"""What is handed to the model, and its small parts: an expert bank from outside, a watch, norms, fresh weights."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RMSNorm

from karakoram.config import ModelConfig
from karakoram.model import moe
from karakoram.model.layers import RMSNorm
from karakoram.model.transformer import Transformer
from karakoram.model.watch import Watch
from karakoram.train.initialize import initialize
from tests.model import reference
from tests.model.reference import Case


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Transformer:
    return reference.opened(reference.build(Case(n_group=4)), tmp_path_factory.mktemp("model"))


class PlainBank:
    """Every expert for itself, the last one first, in its own copies of the weights."""

    def __init__(self, model: Transformer) -> None:
        self.experts = {
            index: {name: stack.clone() for name, stack in layer.mlp.experts.named_parameters()}
            for index, layer in enumerate(model.model.layers)
            if isinstance(layer.mlp, moe.MixtureOfExperts)
        }
        self.seen: list[int] = []

    def __call__(self, layer: int, x_ND: Tensor, ids_NK: Tensor, weights_NK: Tensor) -> Tensor:
        self.seen.append(layer)
        stacks = self.experts[layer]
        partial_NKD = torch.zeros(*ids_NK.shape, x_ND.shape[1])
        for expert in reversed(range(stacks["gate_proj"].shape[0])):
            chosen_NK = ids_NK == expert
            x = x_ND[chosen_NK.nonzero()[:, 0]]
            inner = F.silu(x @ stacks["gate_proj"][expert].T) * (x @ stacks["up_proj"][expert].T)
            partial_NKD[chosen_NK] = inner @ stacks["down_proj"][expert].T
        return (partial_NKD * weights_NK[..., None]).sum(1)


def test_experts_may_live_elsewhere(model: Transformer) -> None:
    """Same sums in the same order of slots: only the kernels' own order of summing may differ (5e-6 allowed)."""
    ids_BT = reference.token_ids(2)
    bank = PlainBank(model)
    expected = reference.logits(model, ids_BT)
    with torch.no_grad():
        assert reference.distance(model(ids_BT, experts=bank), expected) <= 5e-6
        assert bank.seen == [1, 2, 3]  # layer 0 is dense
        step = model(ids_BT[:, :1], model.new_cache(2, 4), experts=bank)
    assert reference.distance(step, expected[:, :1]) <= 5e-6


def test_a_model_never_looks_at_its_own_experts_then(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(self: nn.Module, *arguments: Tensor) -> Tensor:
        raise AssertionError("local experts ran")

    monkeypatch.setattr(moe.LocalExperts, "forward", forward)
    with torch.no_grad():
        out = model(reference.token_ids(1, 8), experts=lambda layer, x_ND, ids_NK, weights_NK: torch.zeros_like(x_ND))
    assert torch.isfinite(out).all()


def largest_logits(model: Transformer, ids_BT: Tensor) -> dict[int, Tensor]:
    """By the definition: all scores of all heads, those of the future left out."""
    largest: dict[int, Tensor] = {}

    def hook(attend: nn.Module, arguments: tuple) -> None:
        x_BTD, rotation = arguments[:2]
        q_nope, q_rope, latent, k_rope = attend.project(x_BTD, rotation)
        c = model.config
        k_nope = attend.kv_b_proj(latent).unflatten(-1, (c.num_attention_heads, -1))[..., : c.qk_nope_head_dim]
        scores_BHTS = torch.einsum("bthn,bshn->bhts", q_nope, k_nope) + torch.einsum("bthr,bsr->bhts", q_rope, k_rope)
        T = scores_BHTS.shape[-1]
        future_TS = torch.ones(T, T, dtype=torch.bool).triu(1)
        largest[attend.layer] = (scores_BHTS * attend.scale).masked_fill(future_TS, float("-inf")).amax((0, 2, 3))

    handles = [layer.self_attn.register_forward_pre_hook(hook) for layer in model.model.layers]
    with torch.no_grad():
        model(ids_BT)
    for handle in handles:
        handle.remove()
    return largest


def test_a_watch_sees_the_largest_logits(model: Transformer) -> None:
    """Exact where the bound passes the threshold; below it a bound that is no less than the truth."""
    ids_BT = reference.token_ids(2)
    truth = largest_logits(model, ids_BT)
    middle = 1.001 * float(torch.cat(list(truth.values())).median())  # near one, but equal to none
    exact = bounds = 0
    for threshold in (0.0, middle, 1e9):
        watch = Watch(threshold)
        with torch.no_grad():
            watched = model(ids_BT, watch=watch)
        assert torch.equal(watched, reference.logits(model, ids_BT))
        assert watch.max_logits.keys() == truth.keys() == {0, 1, 2, 3}
        for layer, true_H in truth.items():
            seen_H = watch.max_logits[layer]
            close_H = (seen_H - true_H).abs() <= 1e-5 * true_H.abs()
            assert bool((close_H | ((seen_H >= true_H) & (seen_H <= threshold))).all())
            # clipping decides by `> threshold`: the same as by the truth
            assert torch.equal(seen_H > threshold, true_H > threshold)
            exact, bounds = exact + int(close_H.sum()), bounds + int((~close_H).sum())
    assert exact > 0 and bounds > 0


def test_a_watch_counts_and_remembers_over_passes(model: Transformer) -> None:
    watch, ids_BT = Watch(0.0), reference.token_ids(2)
    with torch.no_grad():
        model(ids_BT, watch=watch)
        once = {layer: load_E.clone() for layer, load_E in watch.loads.items()}
        largest = {layer: most_H.clone() for layer, most_H in watch.max_logits.items()}
        model(ids_BT[:, :50], watch=watch)  # nothing here can exceed what the longer pass has seen
    assert once.keys() == {1, 2, 3}
    assert all(int(load_E.sum()) == ids_BT.numel() * 4 and len(load_E) == 16 for load_E in once.values())
    assert all(int(load_E.sum()) == (ids_BT.numel() + 100) * 4 for load_E in watch.loads.values())
    assert all(torch.allclose(watch.max_logits[layer], most_H) for layer, most_H in largest.items())
    watch.reset()
    assert watch.loads == {} == watch.max_logits


def test_norm_rounds_before_its_weight_as_transformers_does() -> None:
    """In bf16, bit for bit; multiplying first, in float32, gives other bits."""
    x = torch.randn(64, 96).bfloat16()
    ours, theirs = RMSNorm(96, 1e-5, "cpu", torch.bfloat16), DeepseekV3RMSNorm(96, 1e-5).bfloat16()
    weight = (1 + 0.3 * torch.randn(96)).bfloat16()
    with torch.no_grad():
        ours.weight.copy_(weight)
        theirs.weight.copy_(weight)
        assert torch.equal(ours(x), theirs(x))
        other_order = F.rms_norm(x.float(), (96,), weight.float(), 1e-5).bfloat16()
        assert not torch.equal(ours(x), other_order)


def test_fresh_weights() -> None:
    config = ModelConfig.from_dict({"model_type": "deepseek_v3", **reference.SHAPE, **Case().changes})
    first, again, other = (initialize(Transformer(config, "cpu", torch.float32), seed) for seed in (3, 3, 4))
    state = first.state_dict()
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in state.items())
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)
    assert bool((state["model.layers.1.self_attn.kv_a_layernorm.weight"] == 1).all())
    assert not state["model.layers.1.mlp.gate.e_score_correction_bias"].any()
    assert state["model.embed_tokens.weight"].std() == pytest.approx(0.02, rel=0.05)
    assert state["model.layers.1.mlp.experts.up_proj"].std() == pytest.approx(64**-0.5, rel=0.05)
    assert state["model.layers.1.mlp.experts.down_proj"].std() == pytest.approx(0.1 * 32**-0.5, rel=0.05)
