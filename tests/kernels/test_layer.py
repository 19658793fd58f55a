"""Whole layers in one call compute what the operations compute one after another, bit for bit, and refuse what they do.

Legend as in `karakoram.kernels.layer`.
"""

import copy
import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from karakoram.errors import FormatError, InputError
from karakoram.kernels import ops, reference
from karakoram.kernels.cpu.library import Library, describe
from karakoram.kernels.layer import DecoderLayer, Mixture, Stack
from tests.kernels import drawn
from tests.kernels.drawn_layer import SHAPES, Pass, Shape, clearly_routed, drawn_layer, drawn_pass, layers_near, vector


def attend_by_ops(layer: DecoderLayer, p: Pass, rows: Tensor) -> tuple[Tensor, Tensor]:
    """`reference._attend`, every operation on the library."""
    a, size = layer.attention, rows.shape[1]
    latent, nope = len(a.kv_a_norm), a.keys.inputs
    normed = ops.rms_norm(p.x_nD, layer.input_norm, layer.eps)
    q_in = normed
    if a.q_a is not None and a.q_a_norm is not None:
        q_in = ops.rms_norm(ops.linear(normed, a.q_a), a.q_a_norm, a.eps)
    q = ops.linear(q_in, a.q).unflatten(-1, (a.heads, -1))
    queries = torch.empty(*q.shape[:2], a.kv_a.outputs, dtype=torch.bfloat16)
    at, blocks = p.lengths_n - 1, p.blocks_nM
    assert blocks is not None
    slots = blocks.gather(1, (at // size)[:, None])[:, 0].long() * size + at % size
    ops.latent_append(
        ops.linear(normed, a.kv_a), a.kv_a_norm, a.eps, q[..., nope:], p.cos_nP, p.sin_nP, slots,
        rows.flatten(0, 1)[None], queries,
    )  # fmt: skip
    ops.linear_by_head(q[..., :nope], a.keys, latent, out=queries[..., :latent])
    mixed = ops.mla_decode(queries, rows, p.lengths_n, latent, a.scale, blocks)
    values = ops.linear_by_head(mixed, a.kv_b, a.kv_b.outputs // a.heads - nope, nope)
    x = p.x_nD + ops.linear(values.flatten(1), a.o)
    return x, ops.rms_norm(x, layer.post_norm, layer.eps)


def by_ops(stack: Stack, p: Pass) -> Tensor:
    for layer, rows in zip(stack.layers, p.cache, strict=True):
        x, normed = attend_by_ops(layer, p, rows)
        m = layer.feed
        if isinstance(m, Mixture):
            logits = ops.linear(normed, m.router, torch.float32)
            ids, weights = ops.route(logits, m.bias, m.chosen, m.groups, m.best_groups, m.normalise, m.scale)
            fed = ops.moe_int4(normed, ids, weights, m.experts, m.shared)
        else:
            assert m is not None
            fed = ops.mlp(normed, *m)
        p = p._replace(x_nD=x + fed)
    return p.x_nD


def same(found: Tensor, expected: Tensor) -> bool:
    """Bits, also those of NaN."""
    return torch.equal(found.view(torch.int16), expected.view(torch.int16))


@pytest.mark.parametrize("tokens", [1, 2, 9, 25, 33])
@pytest.mark.parametrize("name", SHAPES)
def test_the_same_bits_as_one_operation_after_another(isa: str, name: str, tokens: int) -> None:
    stack, p = Stack((drawn_layer(SHAPES[name]), drawn_layer(SHAPES[name]))), drawn_pass(SHAPES[name], tokens, 2)
    ours, theirs = p.copy(), p.copy()
    before = p.x_nD.clone()
    found = ops.decode_layers(stack, *ours)
    assert same(found, by_ops(stack, theirs))
    assert same(ours.cache, theirs.cache)
    assert same(p.x_nD, before) and bool(found.isfinite().all())


@pytest.mark.parametrize("name", SHAPES)
def test_as_the_reference_has_it(isa: str, name: str) -> None:
    stack, p = Stack((clearly_routed(drawn_layer(SHAPES[name])),)), drawn_pass(SHAPES[name], 7, 1)
    ours, theirs = p.copy(), p.copy()
    found, expected = ops.decode_layers(stack, *ours), ops.decode_layers(stack, *theirs, implementation="reference")
    assert layers_near(found, expected)
    there = ~p.cache.isnan() | ~theirs.cache.isnan()
    assert torch.equal(ours.cache.isnan(), theirs.cache.isnan())
    assert drawn.near(ours.cache[there][None], theirs.cache[there][None])


@pytest.mark.parametrize("name", SHAPES)
def test_the_first_half_of_a_layer(isa: str, name: str) -> None:
    """Its router and experts are not looked at: they may be elsewhere."""
    layer, p = drawn_layer(SHAPES[name]), drawn_pass(SHAPES[name], 5, 1)
    ours, theirs = p.copy(), p.copy()
    x, normed = ops.decode_attention(Stack((layer._replace(feed=None),)), *ours)
    expected_x, expected_normed = attend_by_ops(layer, theirs, theirs.cache[0])
    assert same(x, expected_x) and same(normed, expected_normed) and same(ours.cache, theirs.cache)
    found = ops.decode_attention(Stack((layer,)), *p.copy(), implementation="reference")
    assert layers_near(x, found[0]) and layers_near(normed, found[1])


@pytest.mark.parametrize(("rows", "each"), [(1, 1), (1, 5), (3, 1), (3, 4)])
def test_a_contiguous_cache_needs_no_blocks(lib: Library, rows: int, each: int) -> None:
    """Tokens that follow one another see those before them, of this call too."""
    s = Shape(experts=0)
    stack, n = Stack((drawn_layer(s), drawn_layer(s))), rows * each
    cache = drawn.rows(2 * rows * 40, s.latent + s.rope).view(2, rows, 40, -1)
    lengths = (torch.randint(1, 30, (rows, 1)) + torch.arange(each)).flatten()
    angles = torch.rand(n, s.rope // 2)
    p = Pass(drawn.rows(n, s.hidden), angles.cos(), angles.sin(), lengths, cache, None)
    table = torch.arange(rows, dtype=torch.int32).repeat_interleave(each)[:, None]
    ours, theirs, plain = p.copy(), p.copy(), p.copy()
    found = ops.decode_layers(stack, *ours)
    assert same(found, ops.decode_layers(stack, *theirs._replace(blocks_nM=table)))
    assert same(ours.cache, theirs.cache)
    assert layers_near(found, ops.decode_layers(stack, *plain, implementation="reference"))


def test_tokens_do_not_depend_on_each_other(isa: str) -> None:
    stack, p = Stack((drawn_layer(Shape()),)), drawn_pass(Shape(), 30, 1)
    with_unit = ops.deterministic(True)
    try:
        together = ops.decode_layers(stack, *p.copy())
        for t in (0, 13, 29):
            one = slice(t, t + 1)
            alone = p.copy()._replace(
                x_nD=p.x_nD[one], cos_nP=p.cos_nP[one], sin_nP=p.sin_nP[one], lengths_n=p.lengths_n[one],
                blocks_nM=p.blocks_nM[one],  # type: ignore[index]
            )  # fmt: skip
            assert same(ops.decode_layers(stack, *alone), together[one])
    finally:
        ops.deterministic(with_unit)


@pytest.mark.parametrize("tokens", [1, 33])
def test_with_one_thread_and_with_more(isa: str, tokens: int) -> None:
    s = Shape(hidden=512, heads=8, experts=16, shared=512)
    stack, p = Stack((drawn_layer(s),)), drawn_pass(s, tokens, 1, longest=300)
    with ops.using(threads=1):
        alone = ops.decode_layers(stack, *p.copy())
    for _ in range(3):
        assert same(ops.decode_layers(stack, *p.copy()), alone)


def test_several_callers_at_once(lib: Library) -> None:
    stack, s = Stack((drawn_layer(Shape()),)), Shape()
    passes = [drawn_pass(s, tokens, 1) for tokens in (1, 3, 20, 40)]
    expected = [ops.decode_layers(stack, *p.copy()) for p in passes]

    def right(number: int) -> bool:
        return all(same(ops.decode_layers(stack, *passes[number].copy()), expected[number]) for _ in range(10))

    with ThreadPoolExecutor(len(passes)) as pool:
        assert all(pool.map(right, range(len(passes))))


def test_no_tokens(lib: Library) -> None:
    stack, p = Stack((drawn_layer(Shape()),)), drawn_pass(Shape(), 1, 1)
    none = Pass(*(part[:0] for part in p[:4]), p.cache, torch.empty(0, 1, dtype=torch.int32))  # type: ignore[arg-type]
    assert ops.decode_layers(stack, *none).shape == (0, 96)
    assert [half.shape for half in ops.decode_attention(stack, *none)] == [(0, 96), (0, 96)]


def test_rows_that_lie_apart(lib: Library) -> None:
    """x, cos and sin as parts of wider tensors; lengths and blocks of more tokens."""
    stack, p = Stack((drawn_layer(Shape()),)), drawn_pass(Shape(), 4, 1)
    expected = ops.decode_layers(stack, *p.copy())
    wide = [torch.cat((part, part), 1)[:, : part.shape[1]] for part in p[:3]]
    assert p.blocks_nM is not None
    blocks = torch.cat((p.blocks_nM, p.blocks_nM), 1)[:, : p.blocks_nM.shape[1]]
    assert same(ops.decode_layers(stack, *wide, p.lengths_n, p.cache.clone(), blocks), expected)


def test_copies_are_described_anew(lib: Library) -> None:
    """A description holds addresses: those of the copy's tensors, and the original may go."""
    stack, p = Stack((drawn_layer(Shape()),)), drawn_pass(Shape(), 3, 1)
    expected = ops.decode_layers(stack, *p.copy())
    for again in (copy.deepcopy(stack), pickle.loads(pickle.dumps(stack))):
        assert not again.described
        assert same(ops.decode_layers(again, *p.copy()), expected)
        assert again.describe() != stack.describe()


# ------------------------------------------------------------------------------------------------ refusals


@pytest.fixture
def unharmed(lib: Library) -> Iterator[tuple[Stack, Pass]]:
    """A stack and a pass; afterwards the cache is as it was and the library works on."""
    stack, p = Stack((drawn_layer(Shape()), drawn_layer(Shape()))), drawn_pass(Shape(), 4, 2)
    before = p.cache.clone()
    yield stack, p
    assert same(p.cache, before)
    ours, theirs = p.copy(), p.copy()
    assert same(ops.decode_layers(stack, *ours), by_ops(stack, theirs))


def check(words: str, call: Callable[[], object]) -> None:
    with pytest.raises((InputError, FormatError), match=words):
        call()


def test_places_outside_the_cache(unharmed: tuple[Stack, Pass]) -> None:
    """Seen before anything is written."""
    stack, p = unharmed
    blocks, lengths = p.blocks_nM, p.lengths_n
    assert blocks is not None
    most = blocks.shape[1] * 16

    def placed(token: int, length: int, block: int | None = None) -> Callable[[], Tensor]:
        other, table = lengths.clone(), blocks.clone()
        other[token] = length
        if block is not None:
            table[token] = block
        return lambda: ops.decode_layers(stack, *p._replace(lengths_n=other, blocks_nM=table))

    check("token 2 sees 0 tokens, its blocks hold 1 to", placed(2, 0))
    check("token 1 sees -9223372036854775808 tokens", placed(1, -(1 << 63)))
    check(f"token 3 sees {most + 1} tokens, its blocks hold 1 to {most}", placed(3, most + 1))
    check(f"block {p.cache.shape[1]} of token 0 is none of {p.cache.shape[1]}", placed(0, 5, p.cache.shape[1]))
    check("block -1 of token 3 is none of", placed(3, 5, -1))
    check("4 tokens do not divide among", lambda: ops.decode_layers(stack, *p._replace(blocks_nM=None)))


def test_arguments_that_do_not_fit(unharmed: tuple[Stack, Pass]) -> None:
    stack, p = unharmed
    assert p.blocks_nM is not None

    def given(**changes: Tensor) -> Callable[[], Tensor]:
        return lambda: ops.decode_layers(stack, *p._replace(**changes))

    check("x is float32, expected bfloat16", given(x_nD=p.x_nD.float()))
    check("x has 3 dimensions", given(x_nD=p.x_nD[None]))
    check("projections of attention do not fit each other, x or the cache", given(x_nD=p.x_nD[:, :64].contiguous()))
    check("x, lengths and blocks are of 4, 3 and 4 tokens", given(lengths_n=p.lengths_n[:3]))
    check("x, lengths and blocks are of 3, 4 and 4 tokens", given(x_nD=p.x_nD[:3]))
    check("lengths is int32, expected int64", given(lengths_n=p.lengths_n.int()))
    check("blocks is int64, expected int32", given(blocks_nM=p.blocks_nM.long()))
    check("cache is float32", given(cache=p.cache.float()))
    check("cache has 3 dimensions", given(cache=p.cache[0]))
    check("2 layers do not fit a cache of 1", given(cache=p.cache[:1]))
    check("2 layers do not fit a cache of 3", given(cache=torch.cat((p.cache, p.cache[:1]))))
    check("x or the cache", given(cache=p.cache[..., :80].contiguous()))
    check("blocks of a layer's cache do not lie one after another", given(cache=p.cache[:, :, :8]))
    check("blocks of a layer's cache do not lie one after another", given(cache=p.cache[:, ::2]))
    check("cos is bfloat16, expected float32", given(cos_nP=p.cos_nP.bfloat16()))
    check("do not fit each other", given(cos_nP=p.cos_nP[:3]))
    check("do not fit each other", given(sin_nP=p.sin_nP[:, :8]))


@pytest.mark.parametrize("part", ["q_a", "q", "kv_a", "keys", "kv_b", "o"])
@pytest.mark.parametrize("axis", ["outputs", "inputs"])
def test_matrices_that_do_not_fit(lib: Library, part: str, axis: str) -> None:
    layer, p = drawn_layer(Shape(experts=0)), drawn_pass(Shape(), 2, 1)
    right = getattr(layer.attention, part)
    sizes = {"outputs": right.outputs, "inputs": right.inputs}
    sizes[axis] += 48
    wrong = layer._replace(attention=layer.attention._replace(**{part: drawn.matrix("bf16", **sizes)}))
    before = p.cache.clone()
    check("projections of attention do not fit", lambda: ops.decode_layers(Stack((wrong,)), *p))
    assert same(p.cache, before)


def test_other_weights_that_do_not_fit(lib: Library) -> None:
    layer, p = drawn_layer(Shape()), drawn_pass(Shape(), 2, 1)
    m = layer.feed
    assert isinstance(m, Mixture)

    def changed(**changes: object) -> Callable[[], Tensor]:
        return lambda: ops.decode_layers(Stack((layer._replace(**changes),)), *p.copy())

    def mixed(**changes: object) -> Callable[[], Tensor]:
        return changed(feed=m._replace(**changes))

    check("x, weight and y do not fit", changed(input_norm=vector(95)))
    check("x, weight and y do not fit", changed(post_norm=vector(95)))
    check("weight is float32", changed(input_norm=torch.ones(96)))
    check("x has 96 columns, the weight 64 inputs", mixed(router=drawn.matrix("bf16", 8, 64)))
    check("bias is bfloat16", mixed(bias=m.bias.bfloat16()))
    check("logits, bias, ids, weights and groups do not fit", mixed(bias=torch.zeros(7)))
    check("logits, bias, ids, weights and groups do not fit", mixed(groups=3))
    check("9 of 8 experts cannot be chosen", mixed(chosen=9))
    check("0 of 8 experts cannot be chosen", mixed(chosen=0))
    check("shared experts' gate, up and down do not fit", mixed(shared=(m.shared[1], m.shared[2], m.shared[2])))
    check("experts of a layer are not part of it", changed(feed=None))
    check("with 0 heads", changed(attention=layer.attention._replace(heads=0)))
    check("do not fit", changed(attention=layer.attention._replace(heads=1 << 62)))
    check("8 experts of 64 inputs do not fit a router of 8", mixed(experts=drawn.experts(8, 64, 64)))
    check("7 experts of 96 inputs do not fit a router of 8", mixed(experts=drawn.experts(7, 96, 64)))


def test_a_router_that_is_no_number(lib: Library) -> None:
    layer, p = drawn_layer(Shape()), drawn_pass(Shape(), 2, 1)
    p.x_nD[1] = float("nan")
    check("routing logits are not numbers", lambda: ops.decode_layers(Stack((layer,)), *p))


def test_halves_are_of_one_layer(lib: Library) -> None:
    stack, p = Stack((drawn_layer(Shape()), drawn_layer(Shape()))), drawn_pass(Shape(), 2, 2)
    check("2 layers has many halves", lambda: ops.decode_attention(stack, *p))
    one = Stack(stack.layers[:1])
    assert p.blocks_nM is not None
    short = describe(torch.empty(1, 96, dtype=torch.bfloat16))
    with pytest.raises(InputError, match="x, weight and y do not fit"):
        lib.call(
            "k2_decode_attention", one.describe(), describe(p.cos_nP), describe(p.sin_nP), describe(p.blocks_nM),
            describe(p.lengths_n), describe(p.cache[:1]), describe(p.x_nD), short,
        )  # fmt: skip


def test_the_reference_serves_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "_prepared", lambda: None)
    stack, p = Stack((drawn_layer(Shape()),)), drawn_pass(Shape(), 3, 1)
    ours, theirs = p.copy(), p.copy()
    assert torch.equal(ops.decode_layers(stack, *ours), reference.decode_layers(stack, *theirs))
