"""Shapes nobody would choose, drawn with fixed seeds: one expert, none of the tokens, single columns, rows apart.

Sizes cross everything that the kernels cut by: panels of 16, groups of 32, blocks of 64, stretches of 1,024, pieces of
attention of 128 and 1,024, and the 3 to 24 rows that are handled together.
"""

from random import Random

import pytest
import torch

from karakoram.kernels import ops, reference
from karakoram.kernels.packed import Kind
from tests.kernels import drawn
from tests.kernels.drawn import deviation, near

SEEDS = range(8)


def some_tokens(draw: Random) -> int:
    """Mostly few, now and then many; none once in a while."""
    return draw.choice([0, 1, 2, 3, 5, draw.randint(4, 12), draw.randint(20, 30), draw.randint(31, 100)])


@pytest.mark.parametrize("seed", SEEDS)
def test_linear(isa: str, seed: int) -> None:
    draw = Random(seed)
    for _ in range(4):
        kind: Kind = draw.choice(drawn.KINDS)
        inputs = 32 * draw.randint(1, 40) if kind == "int4" else draw.randint(1, 1400)
        weight = drawn.matrix(kind, draw.randint(1, 150), inputs)
        x = drawn.rows(some_tokens(draw), inputs, inputs + draw.choice([0, 0, 1, 8, 64]))
        found, expected = ops.linear(x, weight, torch.float32), reference.linear(x, weight, torch.float32)
        # int4 and fp8 weights are not rounded to bf16, as the twin does it (test_parity.py); here a row may be one sum.
        assert deviation(found, expected) < (2e-5 if kind == "bf16" else 2**-7), (kind, x.shape, weight.outputs)


@pytest.mark.parametrize("seed", SEEDS)
def test_linear_by_head(isa: str, seed: int) -> None:
    draw = Random(seed)
    heads, panels = draw.randint(1, 20), draw.randint(1, 4)
    weight = drawn.matrix("bf16", heads * panels * 16, draw.randint(1, 150))
    first = draw.randrange(panels)
    outputs = 16 * draw.randint(1, panels - first)
    whole = drawn.rows(some_tokens(draw) * heads, weight.inputs).view(-1, heads, weight.inputs)
    for x in (whole, whole.transpose(0, 1).contiguous().transpose(0, 1)):  # heads apart instead of tokens
        expected = reference.linear_by_head(x, weight, outputs, 16 * first)
        assert near(ops.linear_by_head(x, weight, outputs, 16 * first), expected)


@pytest.mark.parametrize("seed", SEEDS)
def test_mlp(isa: str, seed: int) -> None:
    draw = Random(seed)
    kind: Kind = draw.choice(drawn.KINDS)
    step = 32 if kind == "int4" else 1
    parts = drawn.feed_forward(kind, step * draw.randint(1, 200 // step), step * draw.randint(1, 200 // step))
    x = drawn.rows(some_tokens(draw), parts[0].inputs, parts[0].inputs + draw.choice([0, 3]))
    assert near(ops.mlp(x, *parts), reference.mlp(x, *parts))


@pytest.mark.parametrize("seed", [*SEEDS, *range(100, 108)])
def test_moe_int4(isa: str, seed: int) -> None:
    draw = Random(seed)
    count, hidden, intermediate = draw.choice([1, 1, 2, 5, 9]), 32 * draw.randint(1, 9), 32 * draw.randint(1, 5)
    experts = drawn.experts(count, hidden, intermediate)
    kind: Kind | None = draw.choice([None, *drawn.KINDS])
    shared = drawn.feed_forward(kind, hidden, 32 * draw.randint(1, 5)) if kind else None
    x = drawn.rows(some_tokens(draw), hidden, hidden + draw.choice([0, 0, 5, 32]))
    visited = draw.randint(1, count)  # the others get no token
    ids, weights = drawn.routing(len(x), visited, draw.randint(1, 4), draw.choice([torch.int32, torch.int64]))
    expected = reference.moe_int4(x, ids, weights, experts, shared)
    found = ops.moe_int4(x, ids, weights, experts, shared)
    assert found.shape == x.shape
    assert near(found, expected), (count, hidden, intermediate, x.shape, ids.shape, kind)


@pytest.mark.parametrize("seed", SEEDS)
def test_mla_decode(isa: str, seed: int) -> None:
    draw = Random(seed)
    batch, heads, latent, rope = draw.randint(0, 4), draw.randint(1, 40), draw.randint(1, 90), draw.randint(0, 40)
    slots, width = draw.choice([1, 5, 100, 140, 1030]), latent + rope
    q = drawn.rows(batch * heads, width, width + draw.choice([0, 7])).unflatten(0, (batch, heads))
    cache = drawn.rows(batch * slots, width, width + draw.choice([0, 5])).unflatten(0, (batch, slots))
    lengths = torch.tensor([draw.randint(1, slots) for _ in range(batch)], dtype=torch.int64)
    found = ops.mla_decode(q, cache, lengths, latent, 0.3)
    assert found.shape == (batch, heads, latent)
    if batch:
        assert near(found, reference.mla_decode(q, cache, lengths, latent, 0.3))


def test_the_same_row_for_every_token(isa: str) -> None:
    """Rows of stride 0, as `expand` makes them."""
    x, weight = drawn.rows(1, 96).expand(30, 96), drawn.matrix("int4", 20, 96)
    assert near(ops.linear(x, weight), reference.linear(x, weight))
    experts, (ids, weights) = drawn.experts(2, 96, 32), drawn.routing(30, 2, 2)
    expected = reference.moe_int4(x, ids, weights, experts)
    assert near(ops.moe_int4(x, ids, weights, experts), expected)


def test_ids_and_weights_with_rows_apart(isa: str) -> None:
    x, experts, (ids, weights) = drawn.rows(6, 64), drawn.experts(4, 64, 32), drawn.routing(6, 4, 5)
    expected = reference.moe_int4(x, ids[:, :2], weights[:, :2], experts)
    assert near(ops.moe_int4(x, ids[:, :2], weights[:, :2], experts), expected)
