"""The deterministic mode: a seeded request is the same bits whatever happens around it, log-probabilities included.

Compared are `Result`s: token ids, every log-probability and alternative as floats, equal to the last bit, between a
request alone in an engine of its own and the same request under each circumstance.
"""

from collections.abc import Callable
from dataclasses import replace
from random import Random

import pytest
import torch

from karakoram.engine.engine import Engine
from karakoram.engine.request import Request, Sampling
from karakoram.kernels import ops
from karakoram.model.transformer import Transformer
from tests.engine import models
from tests.engine.heard import Result, Watched, all_blocks_back, gathered, greedy, repetitive, run, seeded

CONTEXT = 112
KINDS = ["tiny", "tiny_bf16", "tiny_packed", "nano"]


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest) -> Transformer:
    return request.getfixturevalue(request.param)


@pytest.fixture
def prompt(model: Transformer) -> list[int]:
    return models.prompt(55, 11, min(model.config.vocab_size, 3900))


def asked(prompt: list[int], **how: object) -> Request:
    """Drawn among all tokens, with everything that can be asked about them."""
    sampling = Sampling(temperature=0.9, top_p=0.95, seed=1234)
    return replace(Request("asked", prompt, 20, sampling, logprobs=4), **how)


def others(model: Transformer, count: int, seed: int = 0) -> list[Request]:
    """Neighbours of all kinds: long and short, greedy and drawn, with penalties, with log-probabilities."""
    draw, vocabulary, made = Random(seed), min(model.config.vocab_size, 3900), list[Request]()
    for number in range(count):
        ids = models.prompt(draw.randint(1, 40), 100 + number, vocabulary)
        how = Sampling(
            temperature=draw.choice([0.0, 1.0]), seed=number, top_k=draw.choice([0, 5]),
            repetition_penalty=draw.choice([1.0, 1.2]),
        )  # fmt: skip
        made.append(Request(f"n{number}", ids, draw.randint(1, 20), how, logprobs=draw.choice([None, 2])))
    return made


def engine_for(model: Transformer, **how: object) -> Engine:
    return Engine(model, context=CONTEXT, deterministic=True, **{"speculate": False, **how})  # type: ignore[arg-type]


_ALONE: dict[tuple[int, str], Result] = {}


@pytest.fixture
def alone(model: Transformer, prompt: list[int]) -> Callable[..., Result]:
    """The result of the request in an engine of its own, with its prompt in one piece; made once a model."""

    def result(**how: object) -> Result:
        key = id(model), repr(how)
        if key not in _ALONE:
            with engine_for(model) as engine:
                _ALONE[key] = run(engine, asked(prompt, **how))
        return _ALONE[key]

    return result


def beside(engine: Engine, request: Request, neighbours: list[Request], place: int = 0) -> Result:
    heard = gathered(Watched(engine), [*neighbours[:place], request, *neighbours[place:]])
    result = heard.end(request.id)
    for one in neighbours:
        assert heard.end(one.id).error == ""
    all_blocks_back(engine)
    return result


@pytest.mark.parametrize("count", [1, 16])
def test_in_a_batch(model: Transformer, prompt: list[int], alone: Callable[..., Result], count: int) -> None:
    with engine_for(model) as engine:
        assert beside(engine, asked(prompt), others(model, count), count // 2) == alone()


@pytest.mark.parametrize("most_batch_tokens", [1, 16, 33])
def test_with_its_prompt_in_pieces(
    model: Transformer, prompt: list[int], alone: Callable[..., Result], most_batch_tokens: int
) -> None:
    with engine_for(model, most_batch_tokens=most_batch_tokens) as engine:
        watched = Watched(engine)
        assert run(engine, asked(prompt)) == alone()
        assert sum(piece.count for piece in watched.passes[0]) == min(most_batch_tokens, len(prompt))


def test_with_its_prompts_logprobs(model: Transformer, prompt: list[int], alone: Callable[..., Result]) -> None:
    """All logits of the prompt are wanted then, and it runs in other pieces; the same bits in both ways."""
    with engine_for(model, most_batch_tokens=40) as engine:
        pieces = beside(engine, asked(prompt, prompt_logprobs=2), others(model, 3))
    whole = alone(prompt_logprobs=2)
    assert pieces == whole and len(whole.prompt_logprobs) == len(prompt) - 1
    assert replace(whole, prompt_logprobs=()) == alone()


@pytest.mark.parametrize("name", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow), "nano"])
def test_a_long_prompt_in_pieces(name: str, request: pytest.FixtureRequest) -> None:
    """Torch's sums over 800 tokens depend on how many there might be: on blocks that a piece has been given already."""
    if name == "nano":
        model = request.getfixturevalue("nano")
    else:
        model = models.tiny(getattr(torch, name), max_position_embeddings=1024)
    results = []
    for most_batch_tokens in (1000, 33):
        with Engine(model, 1024, 1024, most_batch_tokens=most_batch_tokens, deterministic=True) as engine:
            results.append(run(engine, asked(models.prompt(800, 11), max_new_tokens=8)))
    assert results[0] == results[1]


def test_on_kernels_with_a_matrix_unit(tiny_packed: Transformer) -> None:
    """AMX (emulated) sums in another order than the instructions for few rows: the mode does without it."""
    prompt = models.prompt(75, 11)
    with ops.using("amx_emulated"):
        with engine_for(tiny_packed) as engine:
            whole = run(engine, asked(prompt))
        with engine_for(tiny_packed, most_batch_tokens=33) as engine:
            assert beside(engine, asked(prompt), others(tiny_packed, 16), 8) == whole


@pytest.mark.parametrize("known", [10, 16, 54])
def test_resumed_from_a_prefix(model: Transformer, prompt: list[int], alone: Callable[..., Result], known: int) -> None:
    with engine_for(model) as engine:
        run(engine, greedy("before", prompt[:known] + [5, 6, 7], 3))
        result = run(engine, asked(prompt))
        assert result.cached == known and result == alone()


def test_as_a_later_turn(model: Transformer, prompt: list[int], alone: Callable[..., Result]) -> None:
    """The first half of the output is the next prompt's end: it was computed token by token, here in a piece."""
    whole = alone()
    with engine_for(model) as engine:
        first = run(engine, asked(prompt, max_new_tokens=10))
        turn = [*prompt, *first.tokens]
        second = run(engine, asked(turn, max_new_tokens=10))
        assert second.cached == len(turn) - 1
    with engine_for(model) as fresh:
        again = run(fresh, asked(turn, max_new_tokens=10))
        assert again.cached == 0
    assert first.tokens + second.tokens == whole.tokens
    assert first.logprobs + second.logprobs == whole.logprobs
    assert again == second


def test_preempted(model: Transformer, prompt: list[int], alone: Callable[..., Result]) -> None:
    """An older request needs the room twice over; what was thrown out is computed anew in one piece."""
    with engine_for(model, cache_tokens=CONTEXT) as engine:
        watched = Watched(engine)
        old = [seeded(f"o{i}", models.prompt(20, i), 90, seed=i) for i in range(2)]
        heard = gathered(watched, [*old, asked(prompt)])
        result = heard.end("asked")
        for one in old:
            heard.end(one.id)
        times = [p.computed for seen in watched.passes for p in seen if p.id == "asked" and p.count > 1]
        assert len(times) > 1  # it came back
    assert result == alone()


@pytest.mark.parametrize("neighbours", [0, 6])
def test_with_and_without_guesses(model: Transformer, prompt: list[int], neighbours: int) -> None:
    """Drawn among four tokens, so that guesses are made and many are right."""
    request = repetitive("asked", prompt, 40, 8, logprobs=3)
    with engine_for(model) as engine:
        plain = run(engine, request)
    with engine_for(model, speculate=True) as engine:
        engine.scheduler.costs.extra = lambda tokens: 0.0  # type: ignore[method-assign]
        watched = Watched(engine)
        more = [repetitive(f"r{i}", prompt[10 * i :], 20 + i, i) for i in range(neighbours)]
        heard = gathered(watched, [request, *more])
        assert heard.end("asked") == plain
        assert sum(piece.guesses for seen in watched.passes for piece in seen if piece.id == "asked") > 10


def test_all_of_it_at_once(model: Transformer, prompt: list[int], alone: Callable[..., Result]) -> None:
    """In a full cache, in pieces, with guesses, from a prefix, beside sixteen."""
    with engine_for(model, cache_tokens=CONTEXT, most_batch_tokens=48, speculate=True) as engine:
        run(engine, greedy("before", prompt[:40], 2))
        assert beside(engine, asked(prompt), others(model, 16, 3), 9) == alone()
        assert engine.stats()["preemptions"] > 0
