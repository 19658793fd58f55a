"""A pass over a ragged batch computes what a forward pass over each sequence alone computes, in whatever pieces."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from karakoram.engine.blocks import BLOCK_TOKENS, BlockPool
from karakoram.engine.request import Request
from karakoram.engine.runner import Piece, Runner
from karakoram.engine.sequence import Sequence
from karakoram.model.load import load_model
from karakoram.model.transformer import Transformer
from tests.engine import models
from tests.model.reference import TOLERANCE, distance

# Tokens of each of four sequences in each of five passes: long pieces, short ones, single tokens, nothing at all.
PIECES = [(40, 17, 16, 1), (1, 1, 30, 0), (0, 5, 1, 16), (17, 1, 1, 33), (1, 1, 1, 1)]
BLOCKS = 32


class Batch:
    """Sequences that move on together, with blocks from a pool that hands them out in no order."""

    def __init__(self, model: Transformer, tokens: list[list[int]], deterministic: bool = False) -> None:
        self.runner, self.pool = Runner(model, BLOCKS, deterministic), BlockPool(BLOCKS)
        # What a block held before does not matter: in the kernels not even what is no number, in torch any number.
        self.runner.rows.fill_(float("nan") if hasattr(model.lm_head, "matrix") else 1e30)
        self.pool._free = torch.randperm(BLOCKS, generator=torch.Generator().manual_seed(3)).tolist()
        self.sequences: list[Sequence] = []
        for number, ids in enumerate(tokens):
            sequence = Sequence(Request(str(number), ids, 1), lambda news: None, 0)
            sequence.tokens = list(ids)
            self.sequences.append(sequence)

    def piece(self, number: int, count: int, wanted: int | None = None, guesses: list[int] | None = None) -> Piece:
        sequence, guesses = self.sequences[number], guesses or []
        assert sequence.room(self.pool, sequence.computed + count + len(guesses))
        return Piece(sequence, count, guesses, count + len(guesses) if wanted is None else wanted)

    def run(self, pieces: list[Piece]) -> list[Tensor]:
        """Logits of each piece; the sequences have moved on."""
        before = [piece.sequence.computed for piece in pieces]
        logits_nV = self.runner.run(pieces)
        assert logits_nV.dtype == torch.float32 and len(logits_nV) == sum(piece.wanted for piece in pieces)
        assert [piece.sequence.computed for piece in pieces] == before
        for piece in pieces:
            piece.sequence.computed += piece.count
            piece.sequence.remember(self.pool)
        return list(logits_nV.split([piece.wanted for piece in pieces]))


def token_lists(vocabulary: int = models.VOCABULARY) -> list[list[int]]:
    return [models.prompt(sum(column), seed, vocabulary) for seed, column in enumerate(zip(*PIECES))]


def in_passes(batch: Batch, order: tuple[int, ...] = (0, 1, 2, 3)) -> list[Tensor]:
    """All logits of each sequence, [tokens, V]."""
    parts: list[list[Tensor]] = [[] for _ in batch.sequences]
    for counts in PIECES:
        numbers = [number for number in order if counts[number]]
        logits = batch.run([batch.piece(number, counts[number]) for number in numbers])
        for number, logits_nV in zip(numbers, logits):
            parts[number].append(logits_nV)
    return [torch.cat(one) for one in parts]


@pytest.fixture(params=[(0, 1, 2, 3), (3, 1, 0, 2)], ids=["in order", "mixed"])
def order(request: pytest.FixtureRequest) -> tuple[int, ...]:
    return request.param


@pytest.mark.parametrize("deterministic", [False, True])
def test_ragged_passes_are_whole_ones(tiny: Transformer, order: tuple[int, ...], deterministic: bool) -> None:
    """TOLERANCE: float32 sums in another order differ by 1e-6 to 1e-5 (docs/numerics.md), a wrong row by 1."""
    tokens = token_lists()
    for ids, ours_TV in zip(tokens, in_passes(Batch(tiny, tokens, deterministic), order)):
        assert distance(ours_TV, tiny(torch.tensor([ids]))[0]) <= TOLERANCE


@pytest.mark.parametrize("deterministic", [False, True])
def test_packed_passes_are_as_near_to_float32_as_packed_ones_at_once(
    nano: Transformer, order: tuple[int, ...], deterministic: bool
) -> None:
    """bf16 rounds in other places when pieces are cut elsewhere; means over 180 positions must not differ by that.

    The bound is the one of tests/model/test_packed.py: half as far again as one packed pass is from float32.
    """
    exact, tokens = load_model(dtype="float32"), token_lists(3900)

    def off(ours: list[Tensor]) -> float:
        whole = torch.cat([exact(torch.tensor([ids]))[0] for ids in tokens])
        return float((torch.cat(ours) - whole).norm() / whole.norm())

    at_once = off([nano(torch.tensor([ids]))[0] for ids in tokens])
    assert off(in_passes(Batch(nano, tokens, deterministic), order)) < 1.5 * at_once + 1e-3


def test_a_tiny_packed_model_runs_in_passes(packed_checkpoint: Path, tiny_packed: Transformer) -> None:
    exact, tokens = load_model(packed_checkpoint, dtype="float32"), token_lists()
    for ids, ours_TV in zip(tokens, in_passes(Batch(tiny_packed, tokens))):
        whole_TV = exact(torch.tensor([ids]))[0]
        at_once = float((tiny_packed(torch.tensor([ids]))[0] - whole_TV).norm())
        assert float((ours_TV - whole_TV).norm()) < 1.5 * at_once + 1e-3 * float(whole_TV.norm())


@pytest.mark.parametrize("deterministic", [False, True])
def test_only_wanted_logits_come_in_the_order_of_the_pieces(tiny: Transformer, deterministic: bool) -> None:
    tokens = token_lists()
    batch, whole = Batch(tiny, tokens, deterministic), [tiny(torch.tensor([ids]))[0] for ids in tokens]
    # A span, a short piece, a piece of which nothing is wanted, a span of which three are.
    got = batch.run([batch.piece(0, 40, 1), batch.piece(1, 3, 2), batch.piece(2, 20, 0), batch.piece(3, 20, 3)])
    assert [len(one) for one in got] == [1, 2, 0, 3]
    for one, expected in zip(got, (whole[0][39:40], whole[1][1:3], whole[2][:0], whole[3][17:20])):
        if len(one):
            assert distance(one, expected) <= TOLERANCE
    nothing = batch.runner.run([batch.piece(0, 2, 0)])
    assert tuple(nothing.shape) == (0, models.VOCABULARY)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("right", [0, 2, 4])
def test_guesses_are_run_behind_the_newest_token(tiny: Transformer, right: int, deterministic: bool) -> None:
    """Logits after guesses are those of the sequence that has them; wrong guesses leave no trace."""
    ids = models.prompt(45)
    batch = Batch(tiny, [ids[:31], ids[:20]], deterministic)
    batch.run([batch.piece(0, 30, 0), batch.piece(1, 19, 0)])
    guesses = ids[31 : 31 + right] + [(token + 1) % 90 for token in ids[31 + right : 35]]
    got, other = batch.run([batch.piece(0, 1, guesses=guesses), batch.piece(1, 1)])
    expected = tiny(torch.tensor([ids[:31] + guesses]))[0, 30:]
    assert distance(got, expected) <= TOLERANCE
    assert distance(other, tiny(torch.tensor([ids[:20]]))[0, -1:]) <= TOLERANCE
    batch.sequences[0].tokens = ids[:45]
    (after,) = batch.run([batch.piece(0, 14)])
    assert distance(after, tiny(torch.tensor([ids]))[0, 31:]) <= TOLERANCE


def test_fresh_memory_is_zero(tiny: Transformer) -> None:
    """torch multiplies rows that nobody wrote by 0, which only numbers survive: chance memory may hold others."""
    for _ in range(3):  # memory that was full of NaN is given back and taken again
        rows = Runner(tiny, BLOCKS).rows
        assert not rows.any()
        rows.fill_(float("nan"))
        del rows


def test_a_copied_block_is_a_prefix(tiny: Transformer) -> None:
    ids = models.prompt(30)
    batch = Batch(tiny, [ids, ids[:25] + [5, 6]])
    batch.run([batch.piece(0, 30, 0)])
    one, two = batch.sequences
    two.nodes, two.computed = list(one.nodes), BLOCK_TOKENS
    assert two.room(batch.pool, 27)
    batch.runner.copy(one.private[0], two.private[0], 25 - BLOCK_TOKENS)
    two.computed = 25
    (logits,) = batch.run([batch.piece(1, 2)])
    assert distance(logits, tiny(torch.tensor([two.tokens]))[0, 25:]) <= TOLERANCE


@pytest.fixture
def broken_at(tiny: Transformer) -> Iterator[list[int]]:
    """The model raises when it sees this token."""
    tokens: list[int] = []

    def look(_: object, inputs: tuple[Tensor, ...]) -> None:
        if any(int(token) in tokens for token in inputs[0].flatten()):
            raise RuntimeError("a token that hurts")

    handle = tiny.model.embed_tokens.register_forward_pre_hook(look)
    yield tokens
    handle.remove()


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_pass_that_fails_leaves_the_sequence_where_it_was(
    tiny: Transformer, broken_at: list[int], deterministic: bool
) -> None:
    batch = Batch(tiny, [[2, 3, 4, 5]], deterministic)
    broken_at.append(4)
    with pytest.raises(RuntimeError, match="hurts"):
        batch.runner.run([batch.piece(0, 4)])
    assert batch.sequences[0].computed == 0
