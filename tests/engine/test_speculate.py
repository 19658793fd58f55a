"""Guessing changes how many passes an output takes, never the output; and it stops where it does not pay."""

from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from karakoram.engine.engine import Engine
from karakoram.engine.request import Request, Sampling
from karakoram.engine.speculate import GUESSES, HOPEFUL, LONGEST, PAUSE, SHORTEST, Guesser, PassCosts
from karakoram.model.transformer import Transformer
from tests.engine import models
from tests.engine.heard import Watched, all_blocks_back, gathered, greedy, repetitive, run, run_all

FREE: Callable[[int], float] = lambda tokens: 0.0  # noqa: E731  what a further token of a pass costs


def guessing(model: Transformer, cost: Callable[[int], float] = FREE, deterministic: bool = False) -> Engine:
    """An engine whose guesses cost this much, whatever the clock says."""
    engine = Engine(model, deterministic=deterministic)
    engine.scheduler.costs.extra = cost  # type: ignore[method-assign]
    return engine


# ------------------------------------------------------------------------------------------------ what is guessed


def naive_guess(tokens: list[int], most: int) -> list[int]:
    """The longest tail of 4, 3, 2 tokens that stood before: what followed it where it stood last."""
    for length in range(LONGEST, SHORTEST - 1, -1):
        tail = tokens[-length:]
        for end in range(len(tokens) - 1, length - 1, -1):
            if len(tail) == length and tokens[end - length : end] == tail:
                return tokens[end : end + min(most, GUESSES)]
    return []


@given(st.lists(st.integers(0, 3), max_size=40), st.integers(0, 6), st.lists(st.integers(1, 6)))
def test_the_last_place_of_the_longest_tail(tokens: list[int], most: int, pieces: list[int]) -> None:
    """As a naive search finds it; learnt at once or token by token."""
    assert Guesser().guess(tokens, most, 0.0) == naive_guess(tokens, most)
    slowly, at = Guesser(), 0
    for piece in [*pieces, len(tokens)]:
        at += piece
        assert slowly.guess(tokens[:at], most, 0.0) == naive_guess(tokens[:at], most)


def test_a_share_follows_what_was_right() -> None:
    guesser = Guesser()
    assert guesser.share == HOPEFUL
    guesser.learn(4, 4)
    good = guesser.share
    assert HOPEFUL < good < 1
    guesser.learn(4, 0)  # one wrong one; the three behind it tell nothing
    assert 0.8 * good < guesser.share < good
    for _ in range(50):
        guesser.learn(1, 0)
    assert guesser.share < 0.01
    before = guesser.share
    guesser.learn(0, 0)
    assert guesser.share == before


def test_it_pauses_where_it_does_not_pay_and_asks_again() -> None:
    loop, guesser = [1, 2, 3] * 40, Guesser()
    assert guesser.guess(loop[:30], 4, 0.5) == [1, 2, 3]
    while guesser.share > 0.5:
        guesser.learn(4, 0)
    assert guesser.guess(loop[:31], 4, 0.5) == []
    assert [guesser.guess(loop[:end], 4, 0.5) for end in range(32, 31 + PAUSE)] == [[]] * (PAUSE - 1)
    assert guesser.guess(loop[: 31 + PAUSE], 4, 0.5) != []


def test_the_cost_of_one_token_more() -> None:
    costs = PassCosts()
    assert costs.extra(1) == 0.0 and costs.ms(1) is None
    costs.saw(1, 10.0)
    assert costs.extra(1) == 0.0  # unknown until a pass with guesses was seen
    costs.saw(5, 16.0)
    assert costs.extra(1) == pytest.approx(0.2)  # 0.6 of a pass for three tokens
    costs.saw(1, 20.0)
    assert costs.ms(1) == pytest.approx(11.0)
    for _ in range(99):
        costs.saw(1, 30.0)
    assert costs.extra(1) == 0.0  # never less than nothing
    short = PassCosts()
    short.saw(1, 10.0)
    short.saw(2, 15.0)  # guesses of one token only: that is known, too
    assert short.extra(1) == pytest.approx(0.5)


# ------------------------------------------------------------------------------------------------ outputs


@pytest.mark.parametrize("deterministic", [False, True])
def test_outputs_are_those_without_guessing(tiny: Transformer, deterministic: bool) -> None:
    """Greedy and seeded, together in one batch; free outputs, and such that repeat themselves."""
    requests = [
        *(greedy(f"g{i}", models.prompt(10 * i + 5, i), 20) for i in range(3)),
        *(Request(f"s{i}", models.prompt(10 * i + 5, i), 20, Sampling(seed=i, top_p=0.9)) for i in range(2)),
        *(repetitive(f"r{i}", models.prompt(8 * i + 5, i), 50, None if i < 2 else i) for i in range(5)),
        repetitive("stops", models.prompt(33), 60, 9, stop_ids=frozenset({12})),
    ]
    with Engine(tiny, deterministic=deterministic, speculate=False) as engine:
        expected = run_all(engine, requests)
    with guessing(tiny, deterministic=deterministic) as engine:
        watched = Watched(engine)
        heard = gathered(watched, requests)
        assert [heard.end(request.id) for request in requests] == expected
        guessed = Counter(piece.id for seen in watched.passes for piece in seen if piece.guesses)
        assert all(guessed[f"r{i}"] > 5 for i in range(5))
        all_blocks_back(engine)


def test_drawn_outputs_are_distributed_as_the_model_says(tiny: Transformer) -> None:
    """1,000 seeds: the second token after a prompt that invites guesses, against its exact marginal.

    Chi-square within six standard deviations of its mean, as in test_sampler; the third and fourth tokens are compared
    with an engine that does not guess, seed by seed.
    """
    import torch

    seeds, prompt, few = 1000, [10, 11, 12, 13] * 5, dict.fromkeys(range(10, 14), 50.0)

    def drawn(engine: Engine) -> list[tuple[int, ...]]:
        how = [Sampling(temperature=1.5, seed=seed, logit_bias=few) for seed in range(seeds)]
        return [result.tokens for result in run_all(engine, [Request(str(s.seed), prompt, 4, s) for s in how])]

    with guessing(tiny) as engine:
        engine.most_waiting = 2 * seeds
        watched = Watched(engine)
        outputs = drawn(engine)
        assert sum(piece.guesses for seen in watched.passes for piece in seen) > seeds / 4
    with Engine(tiny, speculate=False, most_waiting=2 * seeds) as engine:
        assert drawn(engine) == outputs
    bias = torch.zeros(models.VOCABULARY)
    bias[10:14] = 50.0
    first = ((tiny(torch.tensor([prompt]))[0, -1] + bias) / 1.5).softmax(-1)
    expected: Counter[int] = Counter()
    for token in range(10, 14):
        second = ((tiny(torch.tensor([[*prompt, token]]))[0, -1] + bias) / 1.5).softmax(-1)
        for other in range(10, 14):
            expected[other] += float(first[token] * second[other]) * seeds
    got = Counter(tokens[1] for tokens in outputs)
    chi = sum((got[token] - n) ** 2 / n for token, n in expected.items())
    assert chi < 3 + 6 * (2 * 3) ** 0.5


def test_right_guesses_save_passes(tiny: Transformer) -> None:
    """A greedy output that has fallen into a loop: nearly every guess is right, up to five tokens a pass."""
    looping = repetitive("a", models.prompt(20), 200, None)
    with guessing(tiny) as engine:
        watched = Watched(engine)
        result = run(engine, looping)
        last = result.tokens[-60:]
        assert any(last[:-period] == last[period:] for period in range(1, 20))  # it is a loop
        guesses = sum(piece.guesses for seen in watched.passes for piece in seen)
        assert len(watched.passes) < 200 / 2.5
        assert (200 - len(watched.passes)) / guesses > 0.7  # what each guess brought
    with Engine(tiny, speculate=False) as engine:
        watched = Watched(engine)
        assert run(engine, looping) == result
        assert len(watched.passes) == 200


def test_guesses_never_go_beyond_what_was_asked(tiny: Transformer) -> None:
    """Nor beyond the context, whose last token is never computed."""
    with Engine(tiny, context=64, cache_tokens=64) as engine:
        engine.scheduler.costs.extra = FREE  # type: ignore[method-assign]
        watched = Watched(engine)
        result = run(engine, repetitive("a", models.prompt(20), 44, None))
        assert len(result.tokens) == 44
        assert max(p.computed + p.count + p.guesses for seen in watched.passes for p in seen) <= 63


def test_it_switches_off_where_it_does_not_pay(tiny: Transformer) -> None:
    """A token that costs a whole pass: never. One that costs half of one: until too many guesses were wrong, with
    another try after a pause."""
    drawn = repetitive("a", models.prompt(20), 300, 3)  # four tokens at random: about a quarter of guesses is right
    with guessing(tiny, lambda tokens: 1.0) as engine:
        watched = Watched(engine)
        result = run(engine, drawn)
        assert not any(piece.guesses for seen in watched.passes for piece in seen)
    with guessing(tiny, lambda tokens: 0.5) as engine:
        watched = Watched(engine)
        assert run(engine, drawn) == result
        with_guesses = sum(bool(piece.guesses) for seen in watched.passes for piece in seen)
        assert 0 < with_guesses < len(watched.passes) / 3
    with guessing(tiny, FREE) as engine:
        watched = Watched(engine)
        assert run(engine, drawn) == result
        assert sum(bool(piece.guesses) for seen in watched.passes for piece in seen) > len(watched.passes) / 2


def test_what_depends_on_counts_is_not_guessed(tiny: Transformer) -> None:
    few = dict.fromkeys(range(10, 14), 50.0)
    with guessing(tiny) as engine:
        watched = Watched(engine)
        for how in ({"repetition_penalty": 1.1}, {"presence_penalty": 0.1}, {"frequency_penalty": 0.1}):
            run(engine, Request("a", models.prompt(20), 50, Sampling(temperature=0, logit_bias=few, **how)))
        assert not any(piece.guesses for seen in watched.passes for piece in seen)


def test_a_running_engine_learns_what_passes_cost(tiny: Transformer) -> None:
    with Engine(tiny) as engine:
        run(engine, repetitive("a", models.prompt(20), 60, None))
        costs = engine.scheduler.costs
        assert costs.ms(1) is not None and (costs.ms(2) is not None or costs.ms(5) is not None)
