"""One model, many ways to run it: absorbed or expanded, at once or in pieces, alone or in a batch: the same logits."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from karakoram.errors import InputError
from karakoram.model import attention
from karakoram.model.generate import generate, generate_batch
from karakoram.model.transformer import Transformer
from tests.model import reference
from tests.model.reference import POSITIONS, TOLERANCE, VOCABULARY, Case

CASES = [Case(n_group=4), Case(None, yarn=(64, 32), shared=2, dense=0, tied=True)]
Measured = Callable[[str, float], None]


@pytest.fixture(scope="module", params=CASES, ids=str)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple:
    theirs = reference.build(request.param)
    return theirs, reference.opened(theirs, tmp_path_factory.mktemp("model"))


@pytest.fixture
def model(pair: tuple) -> Transformer:
    return pair[1]


@pytest.mark.parametrize(("queries", "slots"), [(1, 1), (1, POSITIONS), (7, 50), (POSITIONS, POSITIONS)])
def test_absorbed_is_expanded(model: Transformer, queries: int, slots: int, measured: Measured) -> None:
    attend = model.model.layers[1].self_attn
    c = model.config
    heads = c.num_attention_heads
    q_nope, q_rope = (torch.randn(2, queries, heads, width) for width in (c.qk_nope_head_dim, c.qk_rope_head_dim))
    latent, k_rope = torch.randn(2, slots, c.kv_lora_rank), torch.randn(2, slots, c.qk_rope_head_dim)
    visible_BTS = torch.arange(slots) <= torch.arange(slots - queries, slots)[None, :, None].expand(2, -1, -1)
    arguments = (q_nope, q_rope, latent, k_rope, visible_BTS)
    with torch.no_grad():
        expanded, absorbed = attend.expanded(*arguments), attend.absorbed(*arguments)
        delta = reference.distance(absorbed, expanded)
        if queries == slots:
            without_mask = attend.expanded(q_nope, q_rope, latent, k_rope, None)
            assert reference.distance(without_mask, expanded) <= 1e-5  # causal and an explicit causal mask: one rule
    measured("absorbed attention = expanded", delta)
    assert delta <= TOLERANCE


def in_pieces(model: Transformer, ids_BT: Tensor, lengths: list[int]) -> Tensor:
    cache = model.new_cache(ids_BT.shape[0], ids_BT.shape[1])
    with torch.inference_mode():
        parts = [model(piece_BT, cache) for piece_BT in ids_BT.split(lengths, 1)]
    assert cache.length == ids_BT.shape[1]
    return torch.cat(parts, 1)


@pytest.mark.parametrize(
    ("what", "lengths"),
    [
        ("token by token", [1] * POSITIONS),
        ("prefill in two chunks", [150, 50]),
        ("prefill in two chunks", [150, 5, 45]),
        ("prefill, then token by token", [POSITIONS - 8] + [1] * 8),
        ("prefill at once over a cache", [POSITIONS]),
    ],
)
def test_in_pieces_is_at_once(model: Transformer, what: str, lengths: list[int], measured: Measured) -> None:
    ids_BT = reference.token_ids(2)
    delta = reference.distance(in_pieces(model, ids_BT, lengths), reference.logits(model, ids_BT))
    measured(f"{what} = one forward pass", delta)
    assert delta <= TOLERANCE


def test_token_by_token_is_transformers(pair: tuple, measured: Measured) -> None:
    theirs, ours = pair
    ids_BT = reference.token_ids()
    delta = reference.distance(in_pieces(ours, ids_BT, [1] * POSITIONS), reference.logits(theirs, ids_BT))
    measured("token by token = transformers' forward pass", delta)
    assert delta <= TOLERANCE


@pytest.mark.parametrize("absorb_up_to", [0, POSITIONS])
def test_either_form_serves_a_whole_pass(
    model: Transformer, absorb_up_to: int, monkeypatch: pytest.MonkeyPatch, measured: Measured
) -> None:
    ids_BT = reference.token_ids()
    monkeypatch.setattr(attention, "ABSORB_UP_TO", absorb_up_to)
    got = in_pieces(model, ids_BT, [100, 1, 99])
    delta = reference.distance(got, reference.logits(model, ids_BT))
    measured("absorbed or expanded throughout = one forward pass", delta)
    assert delta <= TOLERANCE


def test_rows_of_unequal_length_are_single_rows(model: Transformer, measured: Measured) -> None:
    """Right-padded prompts in one cache, then three tokens more: every row as if it were alone."""
    lengths = [37, 90, 3]
    whole_BT = reference.token_ids(3, max(lengths) + 3)
    padded_BT = whole_BT[:, : max(lengths)].clone()
    for row, length in enumerate(lengths):
        padded_BT[row, length:] = 0
    cache = model.new_cache(3, max(lengths) + 3)
    with torch.inference_mode():
        prompt_BTV = model(padded_BT, cache)
        positions_B = torch.tensor(lengths)
        steps = []
        for step in range(3):
            next_B1 = whole_BT[torch.arange(3), positions_B + step][:, None]
            steps.append(model(next_B1, cache, (positions_B + step)[:, None]))
    more_BTV = torch.cat(steps, 1)
    for row, length in enumerate(lengths):
        alone_TV = reference.logits(model, whole_BT[row : row + 1, : length + 3])[0]
        together_TV = torch.cat((prompt_BTV[row, :length], more_BTV[row]))
        delta = reference.distance(together_TV, alone_TV)
        measured("rows of unequal length = single rows", delta)
        assert delta <= TOLERANCE


def test_rows_may_leave_a_cache(model: Transformer) -> None:
    ids_BT = reference.token_ids(3, 20)
    cache = model.new_cache(3, 21)
    with torch.inference_mode():
        model(ids_BT, cache)
        cache.keep_rows(torch.tensor([2, 0]))
        kept = model(torch.tensor([[5], [6]]), cache)
    expected = reference.logits(model, torch.cat((ids_BT[[2, 0]], torch.tensor([[5], [6]])), 1))[:, -1:]
    assert reference.distance(kept, expected) <= TOLERANCE


def test_last_logits_are_the_last(model: Transformer) -> None:
    ids_BT = reference.token_ids(2, 9)
    with torch.inference_mode():
        last = model(ids_BT, logits_for="last")
        # a product with fewer rows may sum in another order: not bit for bit
        assert last.shape == (2, 1, VOCABULARY) and reference.distance(last, model(ids_BT)[:, -1:]) <= 1e-6
        assert last.dtype == torch.float32


def test_greedy_generation_is_transformers(pair: tuple) -> None:
    """Token for token; alone and in a batch. Ties within rounding would break it; the seed has none."""
    theirs, ours = pair
    prompts = [reference.token_ids(1, length, seed)[0].tolist() for seed, length in enumerate((5, 40, 130, 17))]
    expected = []
    for prompt in prompts:
        with torch.inference_mode():
            out = theirs.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=24, eos_token_id=-1)
        expected.append(out[0, len(prompt) :].tolist())
    assert [len(written) for written in expected] == [24] * 4
    assert [list(generate(ours, prompt, 24, stop_ids=())) for prompt in prompts] == expected
    assert generate_batch(ours, prompts, 24, stop_ids=()) == expected


def test_a_batch_stops_row_by_row(model: Transformer) -> None:
    prompts = [reference.token_ids(1, length, seed)[0].tolist() for seed, length in enumerate((5, 40, 13, 17))]
    free = generate_batch(model, prompts, 24, stop_ids=())
    stops = {free[0][2], free[2][9]}
    alone = [list(generate(model, prompt, 24, stop_ids=stops)) for prompt in prompts]
    assert generate_batch(model, prompts, 24, stops) == alone
    assert len(alone[0]) <= 3 and len({len(written) for written in alone}) > 1
    assert all(written[-1] in stops or len(written) == 24 for written in alone)


def test_generation_ends_with_the_context(tmp_path: Path) -> None:
    model = reference.opened(reference.build(Case(yarn=None), max_position_embeddings=16), tmp_path)
    prompts = [list(range(2, 14)), [3, 4], list(range(2, 17))]
    alone = [list(generate(model, prompt, 10, stop_ids=())) for prompt in prompts]
    assert [len(written) for written in alone] == [4, 10, 1]
    assert generate_batch(model, prompts, 10, stop_ids=()) == alone
    assert generate_batch(model, [], 10, stop_ids=()) == []


def test_training_after_generating(tmp_path: Path) -> None:
    """Tables made under inference mode must not poison a later backward."""
    model = reference.opened(reference.build(), tmp_path)
    list(generate(model, [2, 3, 4], 2, stop_ids=()))
    model.requires_grad_(True)
    model(reference.token_ids(1, 12)).square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_cache_refuses_what_does_not_fit(model: Transformer) -> None:
    cache = model.new_cache(2, 8)
    with torch.inference_mode():
        model(reference.token_ids(2, 8), cache)
        with pytest.raises(InputError, match=r"Position 8 does not fit a latent cache of 8 tokens\. Make the cache"):
            model(reference.token_ids(2, 1), cache)
        assert cache.length == 8
        for rows in (1, 3):
            with pytest.raises(InputError, match=f"{rows} rows do not fit a latent cache of 2"):
                model(reference.token_ids(rows, 1), cache, torch.zeros(rows, 1, dtype=torch.long))


def test_ids_and_positions_that_cannot_be(model: Transformer) -> None:
    ids_BT = reference.token_ids(1, 4)
    for bad, message in (
        (torch.tensor([[1, VOCABULARY]]), f"Token id {VOCABULARY} is outside the vocabulary of {VOCABULARY}"),
        (torch.tensor([[-1, 3]]), "Token id -1 is outside"),
        (torch.tensor([1, 2]), r"shape \(2,\).*Give \[batch, tokens\]"),
        (torch.zeros(1, 0, dtype=torch.long), r"shape \(1, 0\)"),
        (torch.tensor([[0.5, 1.0]]), r"Token ids are torch\.float32"),
    ):
        with pytest.raises(InputError, match=message):
            model(bad)
    with pytest.raises(InputError, match=r"Positions \(1, 3\) do not match token ids \(1, 4\)"):
        model(ids_BT, positions=torch.zeros(1, 3, dtype=torch.long))
    with pytest.raises(InputError, match="Position -1 is before the first"):
        model(ids_BT, model.new_cache(1, 8), positions=torch.tensor([[-1, 0, 1, 2]]))
    with pytest.raises(InputError, match="no logits for 'first'"):
        model(ids_BT, logits_for="first")
