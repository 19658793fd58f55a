"""The sampler draws exactly what a naive reference allows, as often as it should.

A draw inverts a cumulative distribution at one number in [0, 1). Feeding it an even grid of M such numbers shows the
whole distribution: each token is drawn M times its probability, give or take one, in whatever order tokens are summed.
"""

import math
from collections import Counter
from collections.abc import Sequence
from itertools import count
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from karakoram.engine import sampler
from karakoram.engine.request import Request, Sampling
from karakoram.engine.sampler import CANDIDATES, Row, draw, logprobs, uniform
from karakoram.engine.sequence import Sequence as Running
from tests.engine.naive_sampler import adjusted, probabilities, sequence

GRID = 400
LARGEST = 1 - 2**-53  # chances end here


def packed_mask(allowed: Sequence[int], vocabulary: int) -> np.ndarray:
    mask = np.zeros(-(-vocabulary // 32), np.uint32)
    for token in allowed:
        mask[token // 32] |= np.uint32(1 << token % 32)
    return mask


def drawn_at(chances: Sequence[float], logits: torch.Tensor, sampling: Sampling, **more: Any) -> list[int]:
    """One draw at each of these numbers, from the same logits [V]."""
    prompt, output, allowed = more.get("prompt", (1,)), more.get("output", ()), more.get("allowed")
    seq = sequence(sampling, prompt, output)
    mask = None if allowed is None else packed_mask(allowed, len(logits))
    left = iter(chances)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampler, "_chance", lambda row: next(left))
        rows = [Row(seq, len(seq.tokens), mask) for _ in chances]
        return draw(logits.repeat(len(chances), 1), rows)


def assert_drawn_as_expected(logits: torch.Tensor, sampling: Sampling, **more: Any) -> None:
    """Against the reference over the whole grid, give or take one (and a rounding of both at the edges)."""
    got = Counter(drawn_at([(i + 0.5) / GRID for i in range(GRID)], logits, sampling, **more))
    prompt, output, allowed = more.get("prompt", (1,)), more.get("output", ()), more.get("allowed")
    expected = probabilities(adjusted(logits.tolist(), sampling, prompt, output, allowed), sampling)
    assert set(got) <= set(expected)
    for token, p in expected.items():
        assert abs(got[token] - GRID * p) <= 1.001, (token, got[token], GRID * p)


LOGITS = st.builds(
    lambda size, seed, width: width * torch.randn(size, generator=torch.Generator().manual_seed(seed)),
    st.integers(2, 40), st.integers(0, 9999), st.sampled_from([0.3, 1.0, 4.0]),
)  # fmt: skip
CUTS: dict[str, st.SearchStrategy[Any]] = {
    "temperature": st.sampled_from([0.3, 0.7, 1.0, 1.5]),
    "top_k": st.sampled_from([0, 1, 2, 5, 39, 1000]),
    "top_p": st.one_of(st.just(1.0), st.floats(0.01, 0.999)),
    "min_p": st.one_of(st.just(0.0), st.floats(0.001, 1.0)),
}


@given(LOGITS, st.fixed_dictionaries(CUTS))
def test_cuts_keep_the_reference_set(logits: torch.Tensor, cuts: dict[str, Any]) -> None:
    assert_drawn_as_expected(logits, Sampling(**cuts))


PENALTIES: dict[str, st.SearchStrategy[Any]] = {
    "repetition_penalty": st.sampled_from([1.0, 0.7, 1.3, 5.0]),
    "presence_penalty": st.sampled_from([0.0, 0.5, -1.0]),
    "frequency_penalty": st.sampled_from([0.0, 0.4, -0.3]),
    "logit_bias": st.dictionaries(st.integers(0, 19), st.sampled_from([-100.0, -1.5, 2.0]), max_size=4),
    "top_p": st.sampled_from([1.0, 0.8]),
}


def tokens_of_20(least: int) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(0, 19), min_size=least, max_size=12)


@given(
    st.integers(0, 9999), st.fixed_dictionaries(PENALTIES), tokens_of_20(1), tokens_of_20(0),
    st.one_of(st.none(), tokens_of_20(1)),
)  # fmt: skip
def test_bias_penalties_and_mask(
    seed: int, how: dict[str, Any], prompt: list[int], output: list[int], allowed: list[int] | None
) -> None:
    logits = 2 * torch.randn(20, generator=torch.Generator().manual_seed(seed))
    sampling, more = Sampling(**how), {"prompt": prompt, "output": output, "allowed": allowed}
    assert_drawn_as_expected(logits, sampling, **more)
    best = adjusted(logits.tolist(), sampling, prompt, output, allowed)
    (token,) = drawn_at([0.5], logits, Sampling(**{**how, "temperature": 0}), **more)
    assert best[token] == pytest.approx(max(best), abs=1e-5)  # float32 there, Python's numbers here


def test_repetition_counts_prompt_and_output_presence_only_output() -> None:
    """Token 3 stands in the prompt, 5 in the output; the others win only where these are penalised."""
    logits = torch.tensor([0.0, 1.0, 0.0, 2.0, 0.0, 3.0, 1.5])
    more = {"prompt": [3], "output": [5]}

    def best(**how: Any) -> int:
        return drawn_at([0.5], logits, Sampling(temperature=0, **how), **more)[0]

    assert [best(), best(presence_penalty=9), best(frequency_penalty=9), best(repetition_penalty=9)] == [5, 3, 3, 6]


def test_a_guessed_position_sees_the_tokens_before_it_only() -> None:
    seq = sequence(Sampling(temperature=0, repetition_penalty=9.0), [1, 2, 3])
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0, 0.5]] * 3)
    assert draw(logits, [Row(seq, 1), Row(seq, 2), Row(seq, 3)]) == [3, 3, 4]


def large(seed: int, width: float, size: int = 20_000) -> torch.Tensor:
    return width * torch.randn(size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("width", "cuts"),
    [
        (4.0, {"top_p": 0.9}),  # a nucleus of dozens
        (1.0, {"top_p": 0.5}),  # thousands: beyond the candidates
        (0.1, {"top_p": 0.9}),  # nearly all
        (1.0, {"top_k": 50}),
        (1.0, {"top_k": CANDIDATES}),
        (1.0, {"top_k": CANDIDATES + 1}),
        (1.0, {"top_k": 3000}),
        (1.0, {"top_k": 3000, "top_p": 0.3}),  # the nucleus of the best 3,000 lies within the candidates …
        (1.0, {"top_k": 3000, "top_p": 0.95}),  # … and beyond
        (1.0, {"top_k": 700, "top_p": 0.5}),
        (1.0, {"min_p": 0.3}),
        (1.0, {"min_p": 0.02}),
        (1.0, {"top_p": 0.7, "min_p": 0.05}),
        (3.0, {"top_k": 2000, "top_p": 0.999, "min_p": 1e-4, "temperature": 1.5}),
    ],
    ids=str,
)
@pytest.mark.parametrize("masked", [False, True])
def test_sets_of_a_large_vocabulary(width: float, cuts: dict[str, Any], masked: bool) -> None:
    """From the best downwards: the largest chance draws the last token of the set, any chance that of the reference.

    The set's end is a comparison of sums: float64 there and exact ones here agree to 1e-12, so one token's room is
    enough (its share is at least 1e-9).
    """
    logits = large(5, width)
    allowed = range(0, len(logits), 2) if masked else None
    values = logits.clone()
    if masked:
        values[1::2] = -torch.inf
    expected = probabilities(values.tolist(), Sampling(**cuts))
    tokens = list(expected)
    sums = np.cumsum(list(expected.values()))
    chances = [0.0, *np.random.default_rng(1).random(20).tolist(), LARGEST]
    got = drawn_at(chances, logits, Sampling(**cuts), allowed=allowed)
    assert got[0] == tokens[0] and got[-1] == tokens[-1]
    for chance, token in zip(chances[1:-1], got[1:-1]):
        at = int((sums <= chance).sum())
        assert token in tokens[max(at - 1, 0) : at + 2]


@pytest.mark.parametrize("cuts", [{}, {"top_k": 3}, {"top_p": 0.6}, {"min_p": 1.0}, {"temperature": 0}], ids=str)
@pytest.mark.parametrize("size", [33, 2000])
def test_ties(cuts: dict[str, Any], size: int) -> None:
    """All alike: top-k keeps k of them, top-p its share, min-p all; greedy takes the first."""
    logits = torch.full((size,), 0.5)
    logits[0] = -torch.inf
    drawn = drawn_at([(i + 0.5) / size for i in range(size)], logits, Sampling(**cuts))
    assert 0 not in drawn
    expected = {"top_k": 3, "top_p": math.ceil(0.6 * (size - 1)), "temperature": 1}
    assert len(set(drawn)) == expected.get(next(iter(cuts), ""), size - 1)
    if "temperature" in cuts:
        assert set(drawn) == {1}


def test_the_smallest_set_that_reaches_top_p() -> None:
    """Four alike: half of the probability is two of them, a little more is three."""
    for top_p, size in ((0.25, 1), (0.26, 2), (0.5, 2), (0.51, 3), (0.75, 3), (0.76, 4)):
        drawn = drawn_at([(i + 0.5) / 40 for i in range(40)], torch.zeros(4), Sampling(top_p=top_p))
        assert len(set(drawn)) == size


@pytest.mark.parametrize("temperature", [1e-310, 1e-30, 1e-6])
@pytest.mark.parametrize("cuts", [{}, {"top_p": 0.9}, {"top_k": 2}, {"min_p": 0.1}], ids=str)
def test_a_temperature_near_zero_is_greedy(temperature: float, cuts: dict[str, Any]) -> None:
    logits = 30 * torch.randn(50, generator=torch.Generator().manual_seed(2)) - 40
    drawn = drawn_at([0.0, 0.3, LARGEST], logits, Sampling(temperature=temperature, **cuts))
    assert set(drawn) == {int(logits.argmax())}
    assert set(drawn_at([0.0, LARGEST], large(1, 9.0), Sampling(temperature=temperature, **cuts))) == {
        int(large(1, 9.0).argmax())
    }


def test_a_high_temperature_is_nearly_even() -> None:
    drawn = Counter(drawn_at([(i + 0.5) / GRID for i in range(GRID)], torch.arange(10.0), Sampling(temperature=100)))
    assert all(0.09 * GRID <= drawn[token] <= 0.11 * GRID for token in range(10))


@pytest.mark.parametrize("cuts", [{}, {"temperature": 0}, {"top_k": 4}, {"top_p": 0.9}, {"min_p": 0.01}], ids=str)
@pytest.mark.parametrize("vocabulary", [31, 32, 33, 4096])
def test_a_mask_is_never_violated(cuts: dict[str, Any], vocabulary: int) -> None:
    """Not by a bias of 100 on a forbidden token, not where one token is left, nor at the mask's last bits."""
    logits = torch.randn(vocabulary, generator=torch.Generator().manual_seed(1))
    for allowed in ([vocabulary - 1], [0], [3, 30], [1, vocabulary - 2, vocabulary - 1]):
        for how in ({}, {"logit_bias": {2: 100.0}, "repetition_penalty": 3.0, "frequency_penalty": -50.0}):
            drawn = drawn_at([0.0, 0.4, 0.9, LARGEST], logits, Sampling(**cuts, **how), allowed=allowed, output=[2, 2])
            assert set(drawn) <= set(allowed)


def test_zero_is_never_drawn_at_either_end() -> None:
    logits = torch.tensor([-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf])
    for cuts in ({}, {"top_p": 0.99}, {"top_k": 4}, {"min_p": 1e-6}):
        assert set(drawn_at([0.0, LARGEST], logits, Sampling(**cuts))) == {1, 3}


def assert_plausible(got: Counter[int], expected: dict[int, float], draws: int) -> None:
    """Chi-square within six standard deviations of its mean (degrees of freedom ± √(2 · degrees)): a fair draw is
    outside once in some million times, and the seeds are fixed; a shift of 2 % in a token of 10 % is 8 outside."""
    assert sum(got.values()) == draws and set(got) <= set(expected)
    chi = sum((got[token] - draws * p) ** 2 / (draws * p) for token, p in expected.items())
    freedom = len(expected) - 1
    assert abs(chi - freedom) < 6 * (2 * freedom) ** 0.5, (chi, freedom)


@pytest.mark.parametrize("cuts", [{}, {"top_k": 8}, {"top_p": 0.8, "temperature": 1.3}, {"min_p": 0.1}], ids=str)
@pytest.mark.parametrize("along", ["positions", "seeds"])
def test_seeded_draws_are_distributed_as_they_should(cuts: dict[str, Any], along: str) -> None:
    """20,000 draws of one seed at successive positions, and of successive seeds at one position."""
    draws, sampling = 20_000, Sampling(**cuts)
    logits = torch.randn(24, generator=torch.Generator().manual_seed(9))
    one = sequence(sampling, seed=123)
    if along == "positions":
        rows = [Row(one, position) for position in range(draws)]
    else:
        rows = [Row(sequence(sampling, seed=seed), 17) for seed in range(draws)]
    got = Counter(draw(logits.repeat(draws, 1), rows))
    assert_plausible(got, probabilities(logits.tolist(), sampling), draws)


def test_chances_are_even_and_strangers_to_one_another() -> None:
    """Tenths of [0, 1), and pairs of tenths of neighbouring positions, of neighbouring seeds."""
    n = 40_000
    for first, second in (
        ([uniform(5, i) for i in range(n)], [uniform(5, i + 1) for i in range(n)]),
        ([uniform(i, 8) for i in range(n)], [uniform(i + 1, 8) for i in range(n)]),
        ([uniform(i, 8) for i in range(n)], [uniform(i, 9) for i in range(n)]),
        ([uniform(-i, 0) for i in range(n)], [uniform(2**63 + i, 0) for i in range(n)]),
    ):
        assert all(0 <= chance < 1 for chance in first)
        pairs = Counter(int(10 * a) * 10 + int(10 * b) for a, b in zip(first, second))
        assert_plausible(pairs, dict.fromkeys(range(100), 0.01), n)


@pytest.mark.parametrize("cuts", [{}, {"top_k": 20}, {"top_p": 0.9}], ids=str)
def test_a_draw_depends_on_seed_and_position_alone(cuts: dict[str, Any]) -> None:
    """Not on the other rows, on their number or order, or on what was drawn before."""
    logits = torch.randn(40, 200, generator=torch.Generator().manual_seed(4))
    rows = [Row(sequence(Sampling(**cuts), seed=n % 5), n) for n in range(40)]
    rows[7] = Row(sequence(Sampling(temperature=0)), 7)
    rows[9] = Row(sequence(Sampling(top_k=3, temperature=0.5), seed=1), 9)
    whole = draw(logits.clone(), rows)
    assert [draw(logits[n : n + 1].clone(), [rows[n]])[0] for n in range(40)] == whole
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0)).tolist()
    assert draw(logits[order].clone(), [rows[n] for n in order]) == [whole[n] for n in order]
    assert len(set(whole)) > 20


@settings(max_examples=20)
@given(st.integers(0, 999), st.integers(0, 20))
def test_logprobs_are_log_softmax(seed: int, alternatives: int) -> None:
    logits = 3 * torch.randn(5, 300, generator=torch.Generator().manual_seed(seed))
    tokens = [0, 299, 7, 7, int(logits[4].argmax())]
    expected = logits.double().log_softmax(-1)
    got = logprobs(logits, tokens, [alternatives, 0, alternatives, 20, 1])
    for row, one, token, n in zip(expected, got, tokens, (alternatives, 0, alternatives, 20, 1)):
        assert one.token == token
        assert one.logprob == pytest.approx(float(row[token]), abs=1e-5)  # float32
        assert [t for t, _ in one.best] == row.topk(n).indices.tolist()
        assert [p for _, p in one.best] == pytest.approx(row.topk(n).values.tolist(), abs=1e-5)
    assert got[4].best[0] == (got[4].token, got[4].logprob)


def test_drawing_does_not_run_out_of_a_mask_between_calls() -> None:
    """One mask object serves many rows; it is read, not written."""
    mask = packed_mask([4, 9], 12)
    before, calls = mask.copy(), count()
    for _ in range(3):
        draw(torch.randn(2, 12), [Row(sequence(Sampling(seed=next(calls))), 3, mask)] * 2)
    assert (mask == before).all()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_what_is_banned_is_never_drawn(temperature: float) -> None:
    request = Request("r", [1], 9, Sampling(temperature=temperature, seed=3, logit_bias={5: 100.0}), banned=(5, 6))
    logits = torch.tensor([[0.0, 1.0, 2.0, 1.0, 0.0, 9.0, 9.0]])
    drawn = {draw(logits.clone(), [Row(Running(request, lambda _: None, 3), place)])[0] for place in range(200)}
    assert drawn == ({2} if temperature == 0 else {0, 1, 2, 3, 4})
