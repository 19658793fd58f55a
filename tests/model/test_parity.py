"""Against transformers: logits, gradients and bfloat16, on checkpoints that its `save_pretrained` wrote."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DeepseekV3ForCausalLM, Kimi_K25Config, Kimi_K25ForConditionalGeneration

from tests.model import reference
from tests.model.reference import COVERING, GRID, SHAPE, TOLERANCE, Case

Measured = Callable[[str, float], None]


def compare(case: Case, directory: Path, measured: Measured) -> None:
    theirs = reference.build(case)
    ours = reference.opened(theirs, directory)
    ids_BT = reference.token_ids(2)
    delta = reference.distance(reference.logits(ours, ids_BT), reference.logits(theirs, ids_BT))
    measured("forward, float32, grid", delta)
    assert delta <= TOLERANCE


def test_the_part_of_the_grid_in_ring_0_has_every_pair_of_settings() -> None:
    assert len(GRID) == 240
    assert set().union(*map(reference.pairs, COVERING)) == set().union(*map(reference.pairs, GRID))


@pytest.mark.parametrize("case", COVERING, ids=str)
def test_forward(case: Case, tmp_path: Path, measured: Measured) -> None:
    compare(case, tmp_path, measured)


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in GRID if case not in COVERING], ids=str)
def test_forward_on_the_rest_of_the_grid(case: Case, tmp_path: Path, measured: Measured) -> None:
    compare(case, tmp_path, measured)


def test_forward_with_values_wider_than_keys(tmp_path: Path, measured: Measured) -> None:
    """Narrower values are padded for torch's kernel, wider ones must pass it too."""
    theirs = reference.build(v_head_dim=56)
    ids_BT = reference.token_ids()
    delta = reference.distance(
        reference.logits(reference.opened(theirs, tmp_path), ids_BT), reference.logits(theirs, ids_BT)
    )
    measured("forward, float32, grid", delta)
    assert delta <= TOLERANCE


@pytest.mark.parametrize("case", [Case(yarn=(64, 32)), Case(48, 4, (32, 1), 2, 0)], ids=str)
def test_text_of_kimi_k25(case: Case, tmp_path: Path, measured: Measured) -> None:
    """With q_lora, as K2.5 has it: without, transformers 5.23 saves q_proj under a name of its vision tower."""
    vision = {"num_attention_heads": 2, "num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 32}
    config = Kimi_K25Config(
        text_config={"model_type": "deepseek_v3", **SHAPE, **case.changes},
        vision_config={**vision, "pos_emb_height": 4, "pos_emb_width": 4},
        tie_word_embeddings=False,
    )
    theirs = Kimi_K25ForConditionalGeneration(config).eval()
    reference.draw(theirs)
    ours = reference.opened(theirs, tmp_path)
    ids_BT = reference.token_ids(2)
    delta = reference.distance(reference.logits(ours, ids_BT), reference.logits(theirs, ids_BT))
    measured("forward, float32, text of Kimi-K2.5", delta)
    assert delta <= TOLERANCE


def gradients(model: nn.Module, ids_BT: Tensor) -> dict[str, Tensor]:
    """Of the mean next-token loss, by parameter."""
    out = model(ids_BT)
    logits_BTV = out if isinstance(out, Tensor) else out.logits
    F.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten()).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def split_fused(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """transformers holds [E, 2I, D] (gate above up) where we hold two stacks."""
    split: dict[str, Tensor] = {}
    for name, tensor in theirs.items():
        if name.endswith("experts.gate_up_proj"):
            stem = name.removesuffix("gate_up_proj")
            split[stem + "gate_proj"], split[stem + "up_proj"] = tensor.chunk(2, dim=1)
        else:
            split[name] = tensor
    return split


@pytest.mark.parametrize(
    "case",
    [Case(), Case(None, 4, None, 2, 0, True), Case(48, 4, (64, 32), 2, 3), Case(None, 1, (32, 32), 1, 1, True)],
    ids=str,
)
def test_gradients(case: Case, tmp_path: Path, measured: Measured) -> None:
    theirs = reference.build(case)
    ours = reference.opened(theirs, tmp_path).train().requires_grad_(True)
    ids_BT = reference.token_ids(2)
    expected, got = split_fused(gradients(theirs.train(), ids_BT)), gradients(ours, ids_BT)
    assert got.keys() == expected.keys() == dict(ours.named_parameters()).keys()
    for name, reference_gradient in expected.items():
        delta = float((got[name] - reference_gradient).norm() / reference_gradient.norm())
        measured("gradients, float32, per tensor", delta)
        assert delta <= 1e-3, name


BF16_CASES = {
    "experts": (Case(), {}),
    "experts in groups": (Case(None, 4, (64, 32), 2, 0), {}),
    "dense": (Case(), {"first_k_dense_replace": 4}),
    "dense without q_lora": (Case(None, yarn=None), {"first_k_dense_replace": 4}),
}


@pytest.mark.parametrize("name", BF16_CASES)
def test_bfloat16_is_as_near_as_transformers(name: str, tmp_path: Path, measured: Measured) -> None:
    """Weights rounded to bf16 once; the same numbers in float32, by transformers, are the truth for both sides.

    With experts the distance is large on either side (0.3 to 0.8): a token whose last chosen expert is nearly tied gets
    another one. Which tokens do is luck, hence the sums over four models; without experts the distance is near 0.02.
    """
    case, changes = BF16_CASES[name]
    ours, theirs = torch.zeros(2), torch.zeros(2)
    for seed in range(4):
        reference.build(case, seed, **changes).to(torch.bfloat16).save_pretrained(tmp_path)
        ids_BT = reference.token_ids(2, seed=seed)
        model = DeepseekV3ForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
        truth = reference.logits(model, ids_BT)
        model = DeepseekV3ForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
        for total, got in (
            (theirs, reference.logits(model, ids_BT)),
            (ours, reference.logits(reference.load_model(tmp_path), ids_BT)),
        ):
            total += torch.tensor([reference.distance(got, truth), (got - truth).norm() / truth.norm()]) / 4
    for measure, a, b in zip(("max", "L2"), ours.tolist(), theirs.tolist()):
        measured(f"bf16, {name}, {measure}: our mean distance from float32", a)
        measured(f"bf16, {name}, {measure}: transformers' own", b)
        measured(f"bf16, {name}, {measure}: ratio of the two", a / b)
        assert a <= 2 * b
