"""QK-Clip on a real model: a hot head's logits shrink by exactly γ, and nothing else changes by a bit."""

from typing import Any

import pytest
import torch
from torch import Tensor

from karakoram.model.attention import LatentAttention
from karakoram.model.transformer import Transformer
from karakoram.model.watch import Watch
from karakoram.train.initialize import initialize
from karakoram.train.masters import Masters
from karakoram.train.optim.qk_clip import qk_clip
from tests.train import tiny

IDS = torch.randint(0, tiny.SHAPE["vocab_size"], (2, 24), generator=torch.Generator().manual_seed(3))


def _model(q_lora_rank: int | None, dtype: torch.dtype = torch.float32) -> tuple[Transformer, Masters]:
    """With queries large enough for heads to differ clearly."""
    model = initialize(Transformer(tiny.model_config(q_lora_rank=q_lora_rank), dtype=dtype), 0)
    masters = Masters(model)
    for name, weight in masters.weights.items():
        if name.endswith(("q_proj.weight", "q_b_proj.weight")):
            weight *= 4
    masters.publish()
    return model, masters


def _scores(model: Transformer, layer: int) -> Tensor:
    """The layer's logits [B, H, T, T] before masking, in the model's dtype, from the attention's own projections."""
    attention, seen = model.model.layers[layer].get_submodule("self_attn"), list[Tensor]()

    def see(module: LatentAttention, inputs: tuple[Any, ...]) -> None:
        q_nope, q_rope, latent, k_rope = module.project(inputs[0], inputs[1])
        keys = module.kv_b_proj(latent).unflatten(-1, (4, -1))[..., : module.config.qk_nope_head_dim]
        nope_BHTT = q_nope.transpose(1, 2) @ keys.transpose(1, 2).mT
        seen.append((nope_BHTT + q_rope.transpose(1, 2) @ k_rope.unsqueeze(1).mT) * module.scale)

    handle = attention.register_forward_pre_hook(see)
    with torch.no_grad():
        model.hidden(IDS)
    handle.remove()
    return seen[0]


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`rope.rotate`, which computes in float32, in x's dtype."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).to(x.dtype)


def _largest(model: Transformer, layer: int) -> Tensor:
    """S of each head, measured exactly: at threshold 0 no head is left to the bound."""
    watch = Watch(threshold=0.0)
    model.hidden(IDS, watch=watch)
    return watch.max_logits[layer]


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("q_lora_rank", [32, None], ids=["q_lora", "plain_query"])
def test_a_hot_head_shrinks_by_gamma_and_no_other(q_lora_rank: int | None, layer: int) -> None:
    model, masters = _model(q_lora_rank)
    before_BHTT, largest_H = _scores(model, layer), _largest(model, layer)
    second, first = largest_H.sort().values[-2:].tolist()
    threshold, hot = (first + second) / 2, int(largest_H.argmax())
    assert qk_clip(masters.weights, {layer: largest_H}, model.config, threshold) == 1
    masters.publish()

    after_BHTT, gamma = _scores(model, layer), threshold / first
    others = [head for head in range(4) if head != hot]
    assert torch.equal(after_BHTT[:, others], before_BHTT[:, others])
    # products of 16 + 16 float32 terms whose factors were each rounded once more
    assert torch.allclose(after_BHTT[:, hot], before_BHTT[:, hot] * gamma, rtol=1e-5, atol=1e-5 * first)
    assert float(_largest(model, layer)[hot]) == pytest.approx(threshold, rel=1e-5)
    assert qk_clip(masters.weights, {layer: _largest(model, layer)}, model.config, threshold * (1 + 1e-5)) == 0


@pytest.mark.parametrize("q_lora_rank", [32, None], ids=["q_lora", "plain_query"])
def test_only_the_rows_of_the_hot_head_are_edited(q_lora_rank: int | None) -> None:
    model, masters = _model(q_lora_rank)
    before = {name: w.clone() for name, w in masters.weights.items()}
    qk_clip(masters.weights, {1: torch.tensor([1.0, 400.0, 99.0, -3.0])}, model.config, 100.0)
    prefix = "model.layers.1.self_attn."
    query = f"{prefix}q_proj.weight" if q_lora_rank is None else f"{prefix}q_b_proj.weight"
    edited = {name for name, w in masters.weights.items() if not torch.equal(w, before[name])}
    assert edited == {query, f"{prefix}kv_b_proj.weight"}, "the shared rope key and everything else stay"

    ratio_q = (masters.weights[query] / before[query]).view(4, 32, -1)  # 16 nope rows, then 16 rope rows
    assert torch.allclose(ratio_q[1, :16], torch.tensor(0.5))  # √(100 / 400)
    assert torch.allclose(ratio_q[1, 16:], torch.tensor(0.25))
    ratio_kv = (masters.weights[f"{prefix}kv_b_proj.weight"] / before[f"{prefix}kv_b_proj.weight"]).view(4, 32, -1)
    assert torch.allclose(ratio_kv[1, :16], torch.tensor(0.5))
    assert torch.equal(ratio_kv[1, 16:], torch.ones_like(ratio_kv[1, 16:])), "values stay"
    for ratio in (ratio_q, ratio_kv):
        assert torch.equal(ratio[[0, 2, 3]], torch.ones_like(ratio[[0, 2, 3]]))


def test_below_the_threshold_nothing_changes() -> None:
    model, masters = _model(32)
    before = {name: w.clone() for name, w in masters.weights.items()}
    logits = {layer: torch.tensor([100.0, 99.0, 0.0, -5.0]) for layer in (0, 1)}
    assert qk_clip(masters.weights, logits, model.config, 100.0) == 0
    assert all(torch.equal(w, before[name]) for name, w in masters.weights.items())


def test_a_layer_whose_projections_are_not_trained_stays_as_it_is() -> None:
    model, masters = _model(32)
    trained = {name: w for name, w in masters.weights.items() if ".0.self_attn.q_b_proj" not in name}
    before = {name: w.clone() for name, w in trained.items()}
    logits = {layer: torch.tensor([200.0, 99.0, 300.0, -5.0]) for layer in (0, 1)}
    assert qk_clip(trained, logits, model.config, 100.0) == 2
    changed = {name for name, w in trained.items() if not torch.equal(w, before[name])}
    assert changed == {f"model.layers.1.self_attn.{kind}_proj.weight" for kind in ("q_b", "kv_b")}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("q_lora_rank", [32, None], ids=["q_lora", "plain_query"])
def test_logits_are_gamma_times_what_they_were(
    q_lora_rank: int | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the roundings of the dtype; heads that stay have the same bits."""
    monkeypatch.setattr("karakoram.model.attention.rotate", _rotate)
    model, _ = _model(q_lora_rank, dtype)
    before_BHTT = _scores(model, 1)
    largest_H = before_BHTT.tril().amax((0, 2, 3))
    threshold = float(largest_H.sort().values[1:3].mean())
    weights = dict(model.named_parameters())
    assert qk_clip(weights, {1: largest_H}, model.config, threshold) == 2
    after_BHTT = _scores(model, 1)
    for head, largest in enumerate(largest_H.tolist()):
        if largest <= threshold:
            assert torch.equal(after_BHTT[:, head], before_BHTT[:, head])
            continue
        expected = before_BHTT[:, head] * (threshold / largest)
        off = (after_BHTT[:, head] - expected).norm() / expected.norm()
        assert off <= {torch.float64: 1e-15, torch.float32: 6e-7}[dtype]


def _all(part: dict[str, Tensor], held: slice) -> dict[str, slice]:
    return dict.fromkeys(part, held)


@pytest.mark.parametrize("q_lora_rank", [32, None], ids=["q_lora", "plain_query"])
def test_rows_of_a_master_get_what_the_whole_would(q_lora_rank: int | None) -> None:
    """Cut where no head ends, and with a part of no rows."""
    model, masters = _model(q_lora_rank)
    logits = {0: torch.tensor([250.0, 99.0, 101.0, 1.0]), 1: torch.tensor([1.0, 1.0, 3e3, 100.0])}
    cuts = [slice(0, 7), slice(7, 7), slice(7, 100), slice(100, None)]
    parts = [{name: w[held].clone() for name, w in masters.weights.items()} for held in cuts]
    clipped = [
        qk_clip(part, logits, model.config, 100.0, _all(part, held)) for part, held in zip(parts, cuts, strict=True)
    ]
    assert clipped == [3] * 4, "each counts the heads of all"
    assert qk_clip(masters.weights, logits, model.config, 100.0) == 3
    for name, weight in masters.weights.items():
        assert torch.equal(torch.cat([part[name] for part in parts]), weight), name


def test_what_is_no_number_clips_nothing() -> None:
    model, masters = _model(32)
    before = {name: w.clone() for name, w in masters.weights.items()}
    logits = {0: torch.tensor([float("nan"), float("inf"), float("-inf"), 0.0])}
    assert qk_clip(masters.weights, logits, model.config, 100.0) == 0
    assert all(torch.equal(w, before[name]) for name, w in masters.weights.items())


def test_the_cheap_bound_clips_as_the_exact_maximum_does() -> None:
    for threshold in (0.5, 2.0, 5.0, 20.0, 1000.0):
        model, cheap = _model(32)
        watch = Watch(threshold)
        model.hidden(IDS, watch=watch)
        _, exact = _model(32)
        counted = qk_clip(cheap.weights, watch.max_logits, model.config, threshold)
        largest = {layer: _largest(model, layer) for layer in (0, 1)}
        assert counted == qk_clip(exact.weights, largest, model.config, threshold)
        assert all(torch.equal(w, exact.weights[name]) for name, w in cheap.weights.items())
