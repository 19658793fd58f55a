"""Every operation on every instruction set against its plain twin.

Distances are those of the row that is furthest off, relative to its length (`drawn.deviation`). Results in bf16 may
differ by rounding (`drawn.near`); those in float32 by less:
  SUMMED   the same bf16 numbers multiplied and summed in float32 in another order: n · 2^-24 with n of some hundreds
  DECODED  int4 and fp8 codes are multiplied, a group's sum scaled once, in float32, where the twin rounds every weight
           to bf16: each differs by at most 2^-8 of itself, and so does their sum
"""

import pytest
import torch

from karakoram.formats import int4_group
from karakoram.kernels import ops, reference
from karakoram.kernels.packed import Kind, unpack_int4
from tests.kernels import drawn
from tests.kernels.drawn import deviation, near

SUMMED, DECODED = 2e-5, 2**-8
ROW_COUNTS = [1, 2, 7, 8, 9, 24, 25, 33]  # either side of where a matrix unit takes over, or other stretches are cut


@pytest.mark.parametrize("kind", drawn.KINDS)
@pytest.mark.parametrize("tokens", ROW_COUNTS)
def test_linear(isa: str, kind: Kind, tokens: int) -> None:
    x, weight = drawn.rows(tokens, 672), drawn.matrix(kind, 52, 672)
    expected = reference.linear(x, weight, torch.float32)
    found = ops.linear(x, weight, torch.float32)
    assert deviation(found, expected) < (SUMMED if kind == "bf16" else DECODED)
    assert torch.equal(ops.linear(x, weight), found.to(torch.bfloat16))


@pytest.mark.parametrize("tokens", [1, 8, 40])
def test_int4_weights_are_multiplied_unrounded(isa: str, tokens: int) -> None:
    """A code times its scale has twelve bits: bf16, in which a checkpoint's decoder returns it, would round it."""
    x, weight = drawn.rows(tokens, 672), drawn.matrix("int4", 52, 672)
    codes, scale = unpack_int4(weight)
    exact = (int4_group.unpack(codes, 672).unflatten(-1, (-1, 32)) * scale.float()[..., None]).flatten(-2)
    by_matrix_unit = isa.startswith("amx") and tokens > 8  # which sums across groups, scales and all
    expected = reference.linear(x, weight, torch.float32) if by_matrix_unit else x.float() @ exact.T
    assert deviation(ops.linear(x, weight, torch.float32), expected) < SUMMED


@pytest.mark.parametrize("kind", drawn.KINDS)
def test_one_weight_at_a_time(isa: str, kind: Kind) -> None:
    """A unit vector picks out one input: every weight is where it should be, and no other is touched."""
    weight = drawn.matrix(kind, 20, 96)
    one = torch.eye(96, dtype=torch.bfloat16)
    assert torch.equal(ops.linear(one, weight).T, weight.dense())


@pytest.mark.parametrize("kind", drawn.KINDS)
@pytest.mark.parametrize(("tokens", "heads", "each", "first", "outputs"), [(1, 3, 48, 0, 32), (27, 4, 64, 16, 48)])
def test_linear_by_head(isa: str, kind: Kind, tokens: int, heads: int, each: int, first: int, outputs: int) -> None:
    weight = drawn.matrix(kind, heads * each, 160)
    x = drawn.rows(tokens * heads, 160).view(tokens, heads, 160)
    expected = reference.linear_by_head(x, weight, outputs, first)
    assert near(ops.linear_by_head(x, weight, outputs, first), expected)


@pytest.mark.parametrize("kinds", [("int4", "int4"), ("bf16", "bf16"), ("fp8", "fp8"), ("int4", "bf16")])
@pytest.mark.parametrize("tokens", [1, 9, 33])
def test_mlp(isa: str, kinds: tuple[Kind, Kind], tokens: int) -> None:
    x, parts = drawn.rows(tokens, 288), drawn.feed_forward(kinds[0], 288, 160, kinds[1])
    assert near(ops.mlp(x, *parts), reference.mlp(x, *parts))


@pytest.mark.parametrize("shared", [None, "int4", "bf16", "fp8"])
@pytest.mark.parametrize("tokens", [1, 12, 80])
def test_moe_int4(isa: str, shared: Kind | None, tokens: int) -> None:
    x, experts = drawn.rows(tokens, 288), drawn.experts(5, 288, 96)
    beside = drawn.feed_forward(shared, 288, 160) if shared else None
    ids, weights = drawn.routing(tokens, 5, 3)
    expected = reference.moe_int4(x, ids, weights, experts, beside)
    assert near(ops.moe_int4(x, ids, weights, experts, beside), expected)


@pytest.mark.parametrize("kind", ["bf16", "fp8"])
@pytest.mark.parametrize(("hidden", "intermediate"), [(288, 96), (130, 33), (512, 200)])
def test_moe_of_other_weights(isa: str, kind: Kind, hidden: int, intermediate: int) -> None:
    """Sizes that leave a rest of a panel, of a block, of the alignment of fp8's records."""
    experts, beside = drawn.experts(5, hidden, intermediate, kind), drawn.feed_forward("bf16", hidden, 64)
    for tokens in (1, 12, 80):
        x, (ids, weights) = drawn.rows(tokens, hidden), drawn.routing(tokens, 5, 3)
        expected = reference.moe(x, ids, weights, experts, beside)
        assert near(ops.moe(x, ids, weights, experts, beside), expected)


@pytest.mark.parametrize(
    ("batch", "heads", "latent", "rope", "slots"),
    [(1, 4, 128, 32, 7), (2, 20, 512, 64, 300), (3, 17, 48, 8, 1100), (2, 33, 40, 0, 140), (1, 1, 5, 2, 3)],
)
def test_mla_decode(isa: str, batch: int, heads: int, latent: int, rope: int, slots: int) -> None:
    q = drawn.rows(batch * heads, latent + rope).view(batch, heads, -1)
    cache = drawn.rows(batch * slots, latent + rope).view(batch, slots, -1)
    lengths = torch.randint(1, slots + 1, (batch,))
    lengths[0] = slots
    expected = reference.mla_decode(q, cache, lengths, latent, 0.2)
    assert near(ops.mla_decode(q, cache, lengths, latent, 0.2), expected)
    pool, blocks = drawn.in_blocks(cache, 16)
    assert torch.equal(reference.mla_decode(q, pool, lengths, latent, 0.2, blocks), expected)
    assert near(ops.mla_decode(q, pool, lengths, latent, 0.2, blocks), expected)


@pytest.mark.parametrize("width", [1, 7, 16, 300, 2048])
@pytest.mark.parametrize("tokens", [1, 9])
def test_rms_norm(isa: str, width: int, tokens: int) -> None:
    x, weight = 3 * drawn.rows(tokens, width), drawn.rows(1, width)[0]
    assert near(ops.rms_norm(x, weight, 1e-6), reference.rms_norm(x, weight, 1e-6))


def test_rms_norm_of_zeros_is_zero(isa: str) -> None:
    assert not ops.rms_norm(torch.zeros(2, 40, dtype=torch.bfloat16), drawn.rows(1, 40)[0], 1e-6).any()


def test_silu_at_both_ends(isa: str) -> None:
    """Gates of ±200: e^200 is beyond float32, the result must be neither infinite nor NaN."""
    gate = torch.full((16, 64), 3.125, dtype=torch.bfloat16)
    gate[8:] *= -1
    parts = [ops.pack_bf16(w) for w in (gate, torch.ones_like(gate), torch.ones(8, 16, dtype=torch.bfloat16))]
    x = torch.ones(1, 64, dtype=torch.bfloat16)
    assert near(ops.mlp(x, *parts), reference.mlp(x, *parts))
    assert near(ops.mlp(-x, *parts), reference.mlp(-x, *parts))


def test_attention_to_one_token_among_many(isa: str) -> None:
    """A score far above the others, late in the context: what was summed before must fade to nothing."""
    cache = 0.1 * drawn.rows(1200, 96).view(1, 1200, 96)
    cache[0, 1190] = 20
    q = torch.full((1, 3, 96), 1.0, dtype=torch.bfloat16)
    found = ops.mla_decode(q, cache, torch.tensor([1200]), 64, 1.0)
    assert torch.equal(found, torch.full((1, 3, 64), 20.0, dtype=torch.bfloat16))


@pytest.mark.parametrize("implementation", ["reference", None, "cpu"])
def test_the_implementation_can_be_named(lib: object, implementation: str | None) -> None:
    x, weight = drawn.rows(3, 64), drawn.matrix("int4", 16, 64)
    found = ops.linear(x, weight, implementation=implementation)
    same = torch.equal(found, reference.linear(x, weight))
    assert same if implementation == "reference" else near(found, reference.linear(x, weight))
