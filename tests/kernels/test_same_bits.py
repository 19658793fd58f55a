"""Results do not depend on how work is shared, on the order in which experts come, or on who else is in the batch."""

from collections.abc import Callable, Iterator
from random import Random

import pytest
import torch

from karakoram.errors import InputError
from karakoram.kernels import ops, reference
from karakoram.kernels.cpu.library import Library
from karakoram.kernels.ops import MoeSteps
from karakoram.kernels.packed import Kind, PackedExperts
from tests.kernels import drawn

LENGTHS = [127, 128, 129, 1023, 1024, 1025, 2049]  # either side of a stretch of attention, and of a piece


@pytest.fixture
def two_threads(lib: Library) -> None:
    try:
        with ops.using(threads=2):
            pass
    except InputError:
        pytest.skip("this process may use one core only")


def every_result(tokens: int) -> list[torch.Tensor]:
    """Of every operation on the same random numbers."""
    torch.manual_seed(11)
    x, experts, shared = drawn.rows(tokens, 288), drawn.experts(6, 288, 96), drawn.feed_forward("bf16", 288, 160)
    ids, weights = drawn.routing(tokens, 6, 3)
    q, cache = drawn.rows(2 * 17, 96).view(2, 17, 96), drawn.rows(2 * 1300, 96).view(2, 1300, 96)
    return [
        *(ops.linear(x, drawn.matrix(kind, 200, 288)) for kind in drawn.KINDS),
        ops.linear_by_head(x.view(-1, 3, 96), drawn.matrix("bf16", 144, 96), 32, 16),
        ops.mlp(x, *shared),
        ops.moe_int4(x, ids, weights, experts, shared),
        ops.mla_decode(q, cache, torch.tensor([1300, 1029]), 64, 0.2),
        ops.rms_norm(x, x[0], 1e-6),
    ]


@pytest.mark.parametrize("tokens", [3, 50])
def test_with_one_thread_and_with_two(isa: str, two_threads: None, tokens: int) -> None:
    with ops.using(threads=1):
        alone = every_result(tokens)
    with ops.using(threads=2):
        for _ in range(2):  # who does what differs from run to run
            for one, both in zip(alone, every_result(tokens)):
                assert torch.equal(one, both)


def given_in_groups(step: MoeSteps, experts: PackedExperts, draw: Random) -> None:
    """All of them, in random order and groups, some twice."""
    order = [*range(experts.experts), *draw.choices(range(experts.experts), k=2)]
    draw.shuffle(order)
    while order:
        group = [order.pop() for _ in range(min(len(order), draw.randint(1, 4)))]
        step.experts(group, [experts.records[e] for e in group])


@pytest.mark.parametrize("tokens", [1, 7, 60])
@pytest.mark.parametrize("with_shared", [False, True])
def test_experts_in_any_order_and_grouping(isa: str, tokens: int, with_shared: bool) -> None:
    experts, x, (ids, weights) = drawn.experts(8, 96, 64), drawn.rows(tokens, 96), drawn.routing(tokens, 8, 3)
    shared = drawn.feed_forward("int4", 96, 32) if with_shared else None
    expected = ops.moe_int4(x, ids, weights, experts, shared)
    for seed in range(5):
        step = MoeSteps(x, ids, weights, 8, 64)
        if shared is not None and seed % 2:
            step.shared(shared)
        given_in_groups(step, experts, Random(seed))
        assert torch.equal(step.finish(None if seed % 2 else shared), expected)


def test_an_expert_given_twice_counts_once(lib: Library) -> None:
    """Also within one call, and with another record the second time: the first one counts."""
    experts, x, (ids, weights) = drawn.experts(2, 96, 64), drawn.rows(9, 96), drawn.routing(9, 1, 2)
    step = MoeSteps(x, ids, weights, 2, 64)
    step.experts([0, 0], [experts.records[0], experts.records[1]])
    step.experts([0], [experts.records[1]])
    assert torch.equal(step.finish(), ops.moe_int4(x, ids, weights, experts))


def test_partials_from_elsewhere_take_their_places_in_the_sum(lib: Library) -> None:
    """One-hot weights show each partial by itself; a token that chose an expert twice has two rows of it."""
    experts, x = drawn.experts(3, 64, 32), drawn.rows(4, 64)
    ids = torch.tensor([[0, 1], [1, 1], [2, 0], [1, 2]])
    rows = torch.arange(4.0)[:, None].expand(4, 64).contiguous() + 10  # expert 1: tokens 0, 1, 1, 3
    for slot in range(2):
        step = MoeSteps(x, ids, torch.eye(2)[slot].expand(4, 2).contiguous(), 3, 32)
        step.partial(1, rows)
        step.experts([0, 1, 2], [experts.records[e] for e in range(3)])  # the second time counts no more
        got = step.finish()
        for token, row in ((0, 0), (1, 1 + slot), (3, 3)):
            if ids[token, slot] == 1:
                assert torch.equal(got[token], rows[row].bfloat16())


def test_partials_and_shared_experts_that_do_not_fit_are_refused(lib: Library) -> None:
    x, ids = drawn.rows(2, 64), torch.tensor([[0], [1]])
    step = MoeSteps(x, ids, torch.ones(2, 1), 2, 32)
    for expert, rows in ((2, torch.zeros(1, 64)), (0, torch.zeros(2, 64)), (0, torch.zeros(1, 32))):
        with pytest.raises(InputError, match="partial"):
            step.partial(expert, rows)
    with pytest.raises(InputError, match=r"dtype|float32"):
        step.partial(0, torch.zeros(1, 64, dtype=torch.bfloat16))
    shared = drawn.feed_forward("int4", 64, 32)
    step.shared(shared)
    with pytest.raises(InputError, match="before"):
        step.shared(shared)


def test_experts_without_tokens_need_no_record(lib: Library) -> None:
    experts, x, (ids, weights) = drawn.experts(3, 64, 32), drawn.rows(4, 64), drawn.routing(4, 1, 2)
    step = MoeSteps(x, ids, weights, 3, 32)
    step.experts([2, 0, 1], [torch.empty(0, dtype=torch.uint8), experts.records[0], torch.empty(0, dtype=torch.uint8)])
    assert torch.equal(step.finish(), ops.moe_int4(x, ids, weights, experts))


def test_the_instruction_set_of_the_beginning_is_kept(lib: Library) -> None:
    experts, x, (ids, weights) = drawn.experts(3, 64, 32), drawn.rows(30, 64), drawn.routing(30, 3, 2)
    with ops.using("scalar"):
        expected = ops.moe_int4(x, ids, weights, experts)
        step = MoeSteps(x, ids, weights, 3, 32)
    step.experts([0, 1, 2], list(experts.records))
    assert torch.equal(step.finish(), expected)


@pytest.mark.parametrize(("latent", "rope"), [(64, 32), (48, 24)])  # rows used where they lie, and copied first
def test_attention_contiguous_in_blocks_alone_and_in_a_batch(isa: str, latent: int, rope: int) -> None:
    batch, heads, slots = len(LENGTHS), 3, max(LENGTHS)
    q = drawn.rows(batch * heads, latent + rope).view(batch, heads, -1)
    cache = drawn.rows(batch * slots, latent + rope).view(batch, slots, -1)
    lengths = torch.tensor(LENGTHS)
    expected = ops.mla_decode(q, cache, lengths, latent, 0.2)
    for size in (16, 64, 7):
        pool, blocks = drawn.in_blocks(cache, size)
        assert torch.equal(ops.mla_decode(q, pool, lengths, latent, 0.2, blocks), expected)
    for b in range(batch):
        alone = ops.mla_decode(q[b : b + 1], cache[b : b + 1, : LENGTHS[b]], lengths[b : b + 1], latent, 0.2)
        assert torch.equal(alone[0], expected[b])


def test_what_lies_behind_a_sequence_is_never_read(isa: str) -> None:
    q, cache, lengths = drawn.rows(6, 72).view(2, 3, 72), drawn.rows(400, 72).view(2, 200, 72), torch.tensor([130, 33])
    expected = ops.mla_decode(q, cache, lengths, 48, 0.2)
    for b in range(2):
        cache[b, lengths[b] :] = float("nan")
    assert torch.equal(ops.mla_decode(q, cache, lengths, 48, 0.2), expected)
    pool, blocks = drawn.in_blocks(cache, 16)
    for b in range(2):
        blocks[b, -(-int(lengths[b]) // 16) :] = -1  # not given yet
    assert torch.equal(ops.mla_decode(q, pool, lengths, 48, 0.2, blocks), expected)


def test_a_token_does_not_depend_on_others_in_the_tile(isa: str) -> None:
    """A NaN in one row stays there."""
    x, weight, parts = drawn.rows(40, 96), drawn.matrix("int4", 48, 96), drawn.feed_forward("bf16", 96, 64)
    before = ops.linear(x, weight), ops.mlp(x, *parts)
    x[17] = float("nan")
    others = [t for t in range(40) if t != 17]
    for found, expected in zip((ops.linear(x, weight), ops.mlp(x, *parts)), before):
        assert torch.equal(found[others], expected[others])
        assert bool(found[17].isnan().all())


# ------------------------------------------------------------------------------------ however many rows are in a call

MANY = 200
COUNTS = [1, 2, 3, 4, 5, 6, 8, 9, 16, 17, 25, 33, 64]  # every way of cutting rows into steps


@pytest.fixture
def deterministic(isa: str) -> Iterator[None]:
    """A matrix unit sums many rows otherwise than few unless it is told not to; the others need no telling."""
    before = ops.deterministic(isa.startswith("amx"))
    yield
    ops.deterministic(before)


def rows_are_alone(call: Callable[[slice], torch.Tensor], many: int = MANY) -> None:
    """`call` computes some of `many` rows: the same bits wherever they are cut out, and however many."""
    expected = call(slice(0, many))
    assert len(expected) == many and bool(expected.isfinite().all())
    for count in COUNTS:
        for first in {0, 3, many - count} if count <= many // 2 else {0}:
            rows = slice(first, first + count)
            assert torch.equal(call(rows), expected[rows]), f"{count} rows from {first} on"


@pytest.mark.parametrize("kind", drawn.KINDS)
@pytest.mark.parametrize(("outputs", "inputs"), [(52, 672), (16, 64), (40, 96), (7, 2080), (50, 1408)])
def test_linear_whatever_the_number_of_rows(
    isa: str, deterministic: None, kind: Kind, outputs: int, inputs: int
) -> None:
    weight, x = drawn.matrix(kind, outputs, inputs), drawn.rows(MANY, inputs)
    rows_are_alone(lambda rows: ops.linear(x[rows], weight, torch.float32))


@pytest.mark.parametrize("kind", ["bf16", "fp8"])
@pytest.mark.parametrize("inputs", [1, 63, 65, 131, 1100])
def test_linear_with_inputs_that_fill_no_block(isa: str, deterministic: None, kind: Kind, inputs: int) -> None:
    weight, x = drawn.matrix(kind, 33, inputs), drawn.rows(MANY, inputs)
    rows_are_alone(lambda rows: ops.linear(x[rows], weight, torch.float32))


@pytest.mark.parametrize("kind", drawn.KINDS)
def test_linear_by_head_whatever_the_number_of_rows(isa: str, deterministic: None, kind: Kind) -> None:
    weight, x = drawn.matrix(kind, 3 * 64, 160), drawn.rows(MANY * 3, 160).view(MANY, 3, 160)
    rows_are_alone(lambda rows: ops.linear_by_head(x[rows], weight, 48, 16))


@pytest.mark.parametrize("kinds", [("int4", "int4"), ("bf16", "bf16"), ("fp8", "fp8"), ("int4", "bf16")])
def test_mlp_whatever_the_number_of_rows(isa: str, deterministic: None, kinds: tuple[Kind, Kind]) -> None:
    parts, x = drawn.feed_forward(kinds[0], 288, 608, kinds[1]), drawn.rows(MANY, 288)
    rows_are_alone(lambda rows: ops.mlp(x[rows], *parts))


@pytest.mark.parametrize("shared", [None, *drawn.KINDS])
def test_experts_whatever_the_number_of_tokens(isa: str, deterministic: None, shared: Kind | None) -> None:
    experts, x = drawn.experts(5, 608, 96), drawn.rows(MANY, 608)
    beside = drawn.feed_forward(shared, 608, 160) if shared else None
    ids, weights = drawn.routing(MANY, 5, 3)
    rows_are_alone(lambda rows: ops.moe_int4(x[rows], ids[rows], weights[rows], experts, beside))


@pytest.mark.parametrize("kind", ["bf16", "fp8"])
def test_other_experts_whatever_the_number_of_tokens(isa: str, deterministic: None, kind: Kind) -> None:
    experts, x, (ids, weights) = drawn.experts(5, 608, 96, kind), drawn.rows(MANY, 608), drawn.routing(MANY, 5, 3)
    rows_are_alone(lambda rows: ops.moe(x[rows], ids[rows], weights[rows], experts))


@pytest.mark.parametrize(("heads", "latent", "rope"), [(1, 64, 32), (3, 48, 24), (17, 64, 32), (64, 128, 16)])
def test_attention_whatever_the_number_of_queries(
    isa: str, deterministic: None, heads: int, latent: int, rope: int
) -> None:
    """Many queries over one sequence, as a piece of a prompt attends, and over blocks."""
    many = 40
    q, cache = drawn.rows(many * heads, latent + rope).view(many, heads, -1), drawn.rows(1050, latent + rope)[None]
    lengths = torch.arange(1000, 1000 + many)
    shared = cache.expand(many, -1, -1)
    rows_are_alone(lambda rows: ops.mla_decode(q[rows], shared[rows], lengths[rows], latent, 0.2), many)
    pool, blocks = drawn.in_blocks(cache, 16)
    tables = blocks.expand(many, -1).contiguous()
    rows_are_alone(lambda rows: ops.mla_decode(q[rows], pool, lengths[rows], latent, 0.2, tables[rows]), many)


@pytest.mark.parametrize("heads", [2, 17])
def test_attention_whoever_shares_rows(isa: str, deterministic: None, heads: int) -> None:
    """Sequences with a prefix in common, then several of one, then one alone: as each by itself."""
    size, owners, lengths = 16, [0, 1, 1, 1, 2, 3, 3, 0], torch.tensor([1100, 1030, 1031, 1200, 17, 5, 6, 1100])
    q, pool = drawn.rows(8 * heads, 96).view(8, heads, 96), drawn.rows(400 * size, 96).view(400, size, 96)
    own = torch.randperm(400)[:320].view(4, 80).to(torch.int32)
    own[1, :66] = own[0, :66]  # of 1,056 tokens: more than a piece
    own[3, 0] = own[2, 0]
    tables = own[owners]
    together = ops.mla_decode(q, pool, lengths, 64, 0.2, tables)
    for b in range(8):
        rows = slice(b, b + 1)
        assert torch.equal(ops.mla_decode(q[rows], pool, lengths[rows], 64, 0.2, tables[rows])[0], together[b])
    assert drawn.near(together, reference.mla_decode(q, pool, lengths, 64, 0.2, tables))


def test_norms_routes_and_new_latents_whatever_the_number_of_rows(isa: str, deterministic: None) -> None:
    x, weight, logits, bias = drawn.rows(MANY, 300), drawn.rows(1, 300)[0], torch.randn(MANY, 64), torch.randn(64)
    rows_are_alone(lambda rows: ops.rms_norm(x[rows], weight, 1e-6))
    rows_are_alone(lambda rows: torch.cat(ops.route(logits[rows], bias, 6, 4, 2, True, 2.5), -1))
    q, cos, sin = drawn.rows(MANY * 3, 16).view(MANY, 3, 16), torch.randn(MANY, 8), torch.randn(MANY, 8)
    at = torch.randperm(MANY)

    def append(rows: slice) -> torch.Tensor:
        cache, queries = torch.zeros(1, MANY, 300).bfloat16(), torch.zeros(len(at[rows]), 3, 300).bfloat16()
        ops.latent_append(x[rows], weight[:284], 1e-6, q[rows], cos[rows], sin[rows], at[rows], cache, queries)
        return torch.cat((cache[0, at[rows]], queries.flatten(1)), -1)

    rows_are_alone(append)


def test_the_switch_tells_what_was_chosen_before(lib: Library) -> None:
    before = ops.deterministic(True)
    assert ops.deterministic(False) and not ops.deterministic(before)
