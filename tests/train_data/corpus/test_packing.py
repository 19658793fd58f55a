"""Plans: each token once, no row too long, best fit as good as its slow twin."""

from bisect import bisect_left, insort
from typing import get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from karakoram.errors import TrainingError
from karakoram.train.data.corpus.packing import Packing, Plan, pack

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=80)


def tokens_of(plan: Plan) -> list[tuple[int, int]]:
    return [(s, i) for r in range(len(plan)) for s, start, length in plan.row(r) for i in range(start, start + length)]


@given(lengths=LENGTHS, T=st.integers(1, 20), seed=st.integers(0, 5), packing=st.sampled_from(get_args(Packing)))
def test_every_token_once(lengths: list[int], T: int, seed: int, packing: Packing) -> None:
    plan = pack(np.array(lengths), T, seed, packing)
    assert sorted(tokens_of(plan)) == [(s, i) for s, length in enumerate(lengths) for i in range(length)]
    sizes = [sum(length for _, _, length in plan.row(r)) for r in range(len(plan))]
    assert all(0 < size <= T for size in sizes)
    assert plan.filled == pytest.approx(sum(lengths) / (T * len(plan)))  # float64 division
    if packing == "in_order":
        assert len(plan) == -(-sum(lengths) // T)
    else:  # only what is longer than a row is cut
        assert all(start == 0 for s, start in zip(plan.sample_P, plan.start_P) if lengths[s] <= T)


def rows_of_twin(lengths: list[int], T: int) -> list[tuple[int, ...]]:
    """Best-fit decreasing, piece by piece."""
    pieces = [T for length in lengths for _ in range(length // T)] + [length % T for length in lengths if length % T]
    rooms: list[tuple[int, tuple[int, ...]]] = []
    for piece in sorted(pieces, reverse=True):
        at = bisect_left(rooms, (piece, ()))
        room, row = rooms.pop(at) if at < len(rooms) else (T, ())
        insort(rooms, (room - piece, (*row, piece)))
    return sorted(row for _, row in rooms)


@given(lengths=LENGTHS, T=st.integers(1, 25))
def test_best_fit_fills_rows_as_its_twin_does(lengths: list[int], T: int) -> None:
    """Among rows with the same room either may take a piece, so the number of rows is compared, and their sizes."""
    plan, twin = pack(np.array(lengths), T, 0), rows_of_twin(lengths, T)
    assert len(plan) == len(twin)
    sizes = [sum(length for _, _, length in plan.row(r)) for r in range(len(plan))]
    assert sorted(sizes) == sorted(map(sum, twin))


def test_lengths_as_they_occur() -> None:
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(5.5, 1.2, 50_000), 2, 50_000).astype(np.int64)
    assert pack(lengths, 2048, 0).filled > 0.999


def test_a_seed_draws_which_samples_meet() -> None:
    lengths = np.full(64, 5)
    for packing in get_args(Packing):
        first, again, other = (tokens_of(pack(lengths, 20, seed, packing)) for seed in (0, 0, 1))
        assert first == again != other


def test_impossible_packings() -> None:
    with pytest.raises(TrainingError, match="has no room"):
        pack(np.array([1]), 0, 0)
    with pytest.raises(TrainingError, match="Unknown packing 'tight'"):
        pack(np.array([1]), 4, 0, "tight")  # type: ignore[arg-type]
