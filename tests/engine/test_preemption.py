"""A cache that holds little more than one context: everyone ends, with the tokens of an engine that has room."""

import pytest

from karakoram.engine.engine import Engine
from karakoram.engine.request import Request, Sampling
from karakoram.model.transformer import Transformer
from tests.engine import models
from tests.engine.heard import Watched, all_blocks_back, gathered, greedy, run_all, seeded

CONTEXT = 112
ROOM = {"context": CONTEXT, "most_running": 8}
TIGHT = {**ROOM, "cache_tokens": CONTEXT + 16}


def long_ones(seed: int = 0) -> list[Request]:
    """Each nearly a context long at its end; prompts of unlike lengths, two with a common prefix."""
    lengths = (20, 45, 10, 60)
    requests = [seeded(f"s{i}", models.prompt(n, seed + i), CONTEXT - n - i, seed=i) for i, n in enumerate(lengths)]
    common = models.prompt(40, seed + 50)
    return [*requests, greedy("g0", [*common, 5], CONTEXT - 41), greedy("g1", [*common, 6], CONTEXT - 41)]


def test_all_finish_with_the_same_tokens(tiny: Transformer) -> None:
    """In the deterministic mode bit for bit, log-probabilities included."""
    requests = [Request(**{name: getattr(r, name) for name in r.__slots__} | {"logprobs": 2}) for r in long_ones()]
    with Engine(tiny, deterministic=True, **ROOM) as engine:
        alone = run_all(engine, requests)
        assert engine.stats()["preemptions"] == 0
    with Engine(tiny, deterministic=True, **TIGHT) as engine:
        watched = Watched(engine)
        heard = gathered(watched, requests)
        tight = [heard.end(request.id) for request in requests]
        assert engine.stats()["preemptions"] >= 5
        all_blocks_back(engine)
    assert tight == alone
    assert all(result.finish == "length" for result in tight)


@pytest.mark.parametrize("most_batch_tokens", [16, 512])
def test_greedy_ones_in_the_default_mode(tiny: Transformer, most_batch_tokens: int) -> None:
    """float32's last bits move no greedy token here (see test_engine)."""
    requests = [greedy(request.id, request.prompt, request.max_new_tokens) for request in long_ones(20)]
    with Engine(tiny, **ROOM) as engine:
        alone = run_all(engine, requests)
    with Engine(tiny, most_batch_tokens=most_batch_tokens, **TIGHT) as engine:
        heard = gathered(Watched(engine), requests)
        assert [heard.end(request.id) for request in requests] == alone
        assert engine.stats()["preemptions"] >= 3
        all_blocks_back(engine)


def test_coming_back_is_cheap_while_there_is_room(tiny: Transformer) -> None:
    """What a preempted one had computed is taken from the tree, as far as nobody needed the room."""
    requests = [greedy("old", models.prompt(40), 60), greedy("new", models.prompt(30, 1), 50)]
    with Engine(tiny, speculate=False, **TIGHT) as engine:
        watched = Watched(engine)
        heard = gathered(watched, requests)
        for request in requests:
            assert len(heard.end(request.id).tokens) == request.max_new_tokens
        preemptions = engine.stats()["preemptions"]
        assert preemptions >= 1
        again = watched.tokens("new") - (30 + 50 - 1)
        assert 0 < again < 30 + 50  # never all of it


def test_cached_tokens_are_told_once_and_are_those_of_the_first_admission(tiny: Transformer) -> None:
    with Engine(tiny, speculate=False, **TIGHT) as engine:
        heard = gathered(Watched(engine), long_ones())
        for request in long_ones():
            result = heard.end(request.id)  # asserts that no later news has any
            assert result.cached <= 40
        stats = engine.stats()
        assert stats["preemptions"] and stats["prefix_query_tokens"] == 1 + sum(len(r.prompt) for r in long_ones())


def test_penalties_and_prompt_logprobs_survive(tiny: Transformer) -> None:
    """What depends on all tokens so far, and what is told with the first news."""
    how = Sampling(temperature=1.0, seed=3, repetition_penalty=1.3, presence_penalty=0.2, frequency_penalty=0.1)
    prompts = [models.prompt(40 + i, i) for i in range(4)]
    requests = [
        Request(str(i), prompt, CONTEXT - len(prompt), how, logprobs=1, prompt_logprobs=1)
        for i, prompt in enumerate(prompts)
    ]
    with Engine(tiny, deterministic=True, **ROOM) as engine:
        alone = run_all(engine, requests)
    with Engine(tiny, deterministic=True, **TIGHT) as engine:
        heard = gathered(Watched(engine), requests)
        assert [heard.end(request.id) for request in requests] == alone
        assert engine.stats()["preemptions"] >= 2
    assert [len(result.prompt_logprobs) for result in alone] == [39, 40, 41, 42]
