"""A packed model's layers in one call compute what its modules compute, bit for bit; where they cannot, modules do."""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from karakoram.config import ModelConfig
from karakoram.errors import InputError
from karakoram.evals.bench.model import RandomWeights
from karakoram.kernels import ops
from karakoram.model.attention import ABSORB_UP_TO
from karakoram.model.cache import PagedPass, Span
from karakoram.model.packed.assemble import assemble
from karakoram.model.packed.layers import PackedDecoder, PackedLayer
from karakoram.model.packed.modules import PackedBank
from karakoram.model.transformer import Decoder, Layer, Transformer
from karakoram.model.watch import Watch

pytestmark = pytest.mark.skipif(ops.chosen() is None, reason="the CPU kernels are not there (no compiler)")

NANO = replace(ModelConfig.preset("nano"), num_hidden_layers=3, vocab_size=256)
SHAPES = {
    "nano": NANO,
    "plain query": replace(NANO, q_lora_rank=None),
    "groups of experts, two shared": replace(NANO, n_group=4, topk_group=2, n_shared_experts=2),
    "20 heads, all dense but one": replace(NANO, num_attention_heads=20, first_k_dense_replace=2, v_head_dim=32),
}
BLOCK = 16


def built(config: ModelConfig, weight_format: str = "int4") -> Transformer:
    model = Transformer(config, device="meta", dtype=torch.bfloat16)
    assemble(model, RandomWeights(weight_format))
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module", params=[(name, kind) for name in SHAPES for kind in ("int4", "int4-all")], ids=str)
def model(request: pytest.FixtureRequest) -> Transformer:
    name, kind = request.param
    return built(SHAPES[name], kind)


@pytest.fixture(scope="module")
def nano() -> Transformer:
    return built(NANO)


@contextmanager
def by_modules(model: Transformer) -> Iterator[None]:
    """Every layer as its modules, one operation after another."""
    model.model.__class__ = Decoder
    for layer in model.model.layers:
        layer.__class__ = Layer
    yield
    model.model.__class__ = PackedDecoder
    for layer in model.model.layers:
        layer.__class__ = PackedLayer


def ids(rows: int, count: int) -> Tensor:
    return torch.randint(0, 256, (rows, count))


def same(found: Tensor, expected: Tensor) -> bool:
    return torch.equal(found.view(torch.int16), expected.view(torch.int16))


def paged(model: Transformer, tokens: int) -> tuple[PagedPass, Tensor, Tensor]:
    """Pass, token ids and positions of sequences of one or more new tokens each, in blocks anywhere."""
    c, owners = model.config, []
    while len(owners) < tokens:  # pieces of 1, 2, 3 … tokens
        owners += [len(set(owners))] * (1 + len(set(owners)) % 3)
    owner = torch.tensor(owners[:tokens])
    sequences, longest = int(owner.max()) + 1, 70
    within = torch.tensor([owners[:t].count(owners[t]) for t in range(tokens)])
    positions = torch.randint(0, longest - 4, (sequences,))[owner] + within
    each = -(-longest // BLOCK)
    tables = torch.randperm(sequences * each).view(sequences, each).int()[owner]
    slots = tables.gather(1, (positions // BLOCK)[:, None])[:, 0].long() * BLOCK + positions % BLOCK
    width = c.kv_lora_rank + c.qk_rope_head_dim
    rows = torch.randn(c.num_hidden_layers, sequences * each, BLOCK, width).bfloat16()
    return PagedPass(rows, slots, positions + 1, tokens, tables), ids(1, tokens), positions[None]


@pytest.mark.parametrize("tokens", [1, 2, 7, 24, 25, 33])
def test_over_blocks(model: Transformer, tokens: int) -> None:
    ours, token_ids, positions = paged(model, tokens)
    theirs = replace(ours, rows=ours.rows.clone())
    found = model.hidden(token_ids, ours, positions)
    with by_modules(model):
        expected = model.hidden(token_ids, theirs, positions)
    assert same(found, expected) and same(ours.rows, theirs.rows)


@pytest.mark.parametrize(("rows", "step"), [(1, 1), (1, 5), (1, ABSORB_UP_TO), (3, 1), (3, 4), (33, 1)])
def test_over_a_contiguous_cache(model: Transformer, rows: int, step: int) -> None:
    token_ids, ours, theirs = ids(rows, 20 + 3 * step), model.new_cache(rows, 80), model.new_cache(rows, 80)
    model.hidden(token_ids[:, :20], ours)
    theirs.rows.copy_(ours.rows)
    theirs.length = ours.length
    for start in range(20, 20 + 3 * step, step):
        piece = token_ids[:, start : start + step]
        found = model.hidden(piece, ours)
        with by_modules(model):
            expected = model.hidden(piece, theirs)
        assert same(found, expected) and same(ours.rows, theirs.rows) and ours.length == theirs.length == start + step


@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512f", "avx512", "amx_emulated"])
def test_on_every_instruction_set(nano: Transformer, isa: str) -> None:
    library = ops.chosen("cpu")
    assert library is not None
    if not library.c.k2_isa_available(isa.encode()):
        pytest.skip(f"{isa} is not built in, or not usable on this CPU")
    with ops.using(isa):
        test_over_blocks(nano, 9)
        test_over_a_contiguous_cache(nano, 1, 1)


def test_unequal_rows_of_a_batch(nano: Transformer) -> None:
    """Right-padded prompts: every row goes on at a position of its own; rows that have ended are dropped."""
    prompt, lengths = ids(3, 20), torch.tensor([20, 7, 15])
    ours, theirs = nano.new_cache(3, 30), nano.new_cache(3, 30)
    for cache in (ours, theirs):
        nano.hidden(prompt, cache)
        cache.keep_rows(torch.tensor([0, 2]))
    positions, token_ids = lengths[[0, 2], None], ids(2, 1)
    found = nano.hidden(token_ids, ours, positions)
    with by_modules(nano):
        expected = nano.hidden(token_ids, theirs, positions)
    assert same(found, expected) and same(ours.rows, theirs.rows)


def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the operations for whole layers, as they are called."""
    seen: list[str] = []
    for name in ("decode_layers", "decode_attention"):
        right = getattr(ops, name)
        monkeypatch.setattr(ops, name, lambda *a, right=right, name=name: (seen.append(name), right(*a))[1])
    return seen


def test_one_call_a_pass(nano: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = calls(monkeypatch)
    batch, token_ids, positions = paged(nano, 5)
    nano.hidden(token_ids, batch, positions)
    assert seen == ["decode_layers"]
    cache = nano.new_cache(1, 40)
    nano.hidden(ids(1, ABSORB_UP_TO), cache)
    assert seen == ["decode_layers"] * 2
    nano.hidden(ids(1, ABSORB_UP_TO + 1), cache)  # expanded
    nano.hidden(ids(1, 3))  # no cache
    with_a_span = replace(batch, single=4, tables=batch.tables[:4], spans=[Span(4, 1, torch.arange(20))])
    nano.hidden(token_ids, with_a_span, positions)
    assert seen == ["decode_layers"] * 2


def test_layers_one_by_one(nano: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hooks of layers run then."""
    seen, hooked = calls(monkeypatch), []
    handle = nano.model.layers[1].register_forward_hook(lambda *_: hooked.append(1))
    ours, token_ids, positions = paged(nano, 5)
    theirs = replace(ours, rows=ours.rows.clone())
    expected = nano.hidden(token_ids, ours, positions)
    assert seen == ["decode_layers"] and not hooked
    assert isinstance(nano.model, PackedDecoder)
    nano.model.one_by_one = True
    try:
        assert same(nano.hidden(token_ids, theirs, positions), expected) and same(ours.rows, theirs.rows)
    finally:
        nano.model.one_by_one = False
        handle.remove()
    assert seen == ["decode_layers"] * 4 and hooked == [1]


@pytest.mark.parametrize("over", ["blocks", "a contiguous cache"])
def test_experts_from_elsewhere_and_a_watch(nano: Transformer, over: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention is one call then, and the bank gets what it gets of the modules."""
    seen, given = calls(monkeypatch), list[Tensor]()

    def bank(layer: int, x_ND: Tensor, ids_NK: Tensor, weights_NK: Tensor) -> Tensor:
        own = nano.model.layers[layer].mlp.experts
        assert isinstance(own, PackedBank)
        given.append(x_ND.clone())
        return own(x_ND, ids_NK, weights_NK)

    results, watches = list[Tensor](), (Watch(), Watch())
    batch, token_ids, positions = paged(nano, 5)
    for modules, watch in zip((False, True), watches):
        cache = replace(batch, rows=batch.rows.clone()) if over == "blocks" else nano.new_cache(1, 80)
        at = positions if over == "blocks" else None
        for keywords in ({"experts": bank}, {"watch": watch}):
            if modules:
                with by_modules(nano):
                    results.append(nano.hidden(token_ids, cache, at, **keywords))
            else:
                results.append(nano.hidden(token_ids, cache, at, **keywords))
    assert same(results[0], results[2]) and same(results[1], results[3])
    assert len(given) == 4 and same(given[0], given[2]) and same(given[1], given[3])
    assert seen == ["decode_attention"] * 6
    assert all(torch.equal(watches[0].loads[layer], watches[1].loads[layer]) for layer in (1, 2))


def test_experts_that_the_kernels_do_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mixture with another bank inside: attention in one call, the bank as a module."""
    from karakoram.model.packed.layers import join

    model = built(NANO)

    class Bank(nn.Module):
        def __init__(self, own: PackedBank) -> None:
            super().__init__()
            self.own = own

        def forward(self, *arguments: Tensor) -> Tensor:
            return self.own(*arguments)

    other: nn.Module = model.model.layers[2].mlp
    other.experts = Bank(other.experts)  # type: ignore[arg-type]
    other.shared_experts = None
    other.__class__ = other.__class__.__mro__[1]  # MixtureOfExperts
    join(model.model)
    seen = calls(monkeypatch)
    ours, token_ids, positions = paged(model, 5)
    theirs = replace(ours, rows=ours.rows.clone())
    found = model.hidden(token_ids, ours, positions)
    assert seen == ["decode_layers", "decode_layers", "decode_attention"]
    with by_modules(model):
        expected = model.hidden(token_ids, theirs, positions)
    assert same(found, expected) and same(ours.rows, theirs.rows)


def test_refusals_leave_the_cache_alone(nano: Transformer) -> None:
    cache = nano.new_cache(2, 8)
    before = cache.rows.clone()
    for token_ids, positions, words in (
        (ids(2, 1), torch.tensor([[3], [8]]), "Position 8 does not fit a latent cache of 8 tokens"),
        (ids(3, 1), torch.tensor([[0], [0], [0]]), "3 rows do not fit a latent cache of 2"),
        (ids(2, 1), torch.tensor([[0], [-1]]), "token 1 sees 0 tokens"),
    ):
        with pytest.raises(InputError, match=words):
            nano.hidden(token_ids, cache, positions)
    assert same(cache.rows, before)


def test_a_copy_of_a_model_runs_on_its_own_weights(nano: Transformer) -> None:
    batch, token_ids, positions = paged(nano, 3)
    expected = nano.hidden(token_ids, replace(batch, rows=batch.rows.clone()), positions)
    copy = deepcopy(nano)
    for layer in copy.model.layers:
        layer.input_layernorm.weight.zero_()
    assert same(nano.hidden(token_ids, replace(batch, rows=batch.rows.clone()), positions), expected)
    zeroed = copy.hidden(token_ids, replace(batch, rows=batch.rows.clone()), positions)
    assert not same(zeroed, expected)
