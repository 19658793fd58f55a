"""Many requests at once are each request alone: tokens, ends, order of news; and wrong requests stop at the door."""

import math
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from karakoram.chat import load_chat_format
from karakoram.engine.engine import Engine
from karakoram.engine.request import MAX_LOGIT_BIAS, Request, Sampling
from karakoram.env import bundled_model_dir
from karakoram.errors import ContextOverflow, InputError
from karakoram.model.generate import generate
from karakoram.model.transformer import Transformer
from tests.engine import models
from tests.engine.heard import GREEDY, Heard, Watched, all_blocks_back, gathered, greedy, run, run_all, seeded, together

LENGTHS = (1, 2, 15, 16, 17, 31, 32, 40, 64, 100, 3, 7)


@pytest.fixture(scope="module")
def engine(tiny: Transformer) -> Iterator[Engine]:
    with Engine(tiny) as made:
        yield made
        all_blocks_back(made)


def expected(model: Transformer, prompt: list[int], new: int, **how: Any) -> tuple[int, ...]:
    return tuple(generate(model, prompt, new, stop_ids=how.pop("stop_ids", ()), **how))


@pytest.mark.parametrize("speculate", [True, False])
@pytest.mark.parametrize("most_batch_tokens", [512, 48])
def test_many_at_once_are_each_alone(tiny: Transformer, speculate: bool, most_batch_tokens: int) -> None:
    """Greedy, float32: sums in another order move logits by 1e-6 (docs/numerics.md), the margins here are larger."""
    prompts = [models.prompt(length, seed) for seed, length in enumerate(LENGTHS)]
    with Engine(tiny, most_batch_tokens=most_batch_tokens, speculate=speculate) as engine:
        results = together(engine, [greedy(str(i), prompt, 20 + i) for i, prompt in enumerate(prompts)])
        for i, (prompt, result) in enumerate(zip(prompts, results)):
            assert result.tokens == expected(tiny, prompt, 20 + i)
            assert (result.finish, result.error) == ("length", "")
        all_blocks_back(engine)


def test_nano_says_what_it_says_alone(nano: Transformer) -> None:
    """Real prompts, packed weights: bf16 rounds at other places in a batch, so outputs may part where the two best
    tokens are within 0.1 nats of each other, and only there. Most do not part."""
    fmt = load_chat_format(bundled_model_dir())
    asked = ["What is 7 plus 5?", "What is the capital of France?", "Say hello.", "Sort 3, 1, 2.", "Who are you?", "hi"]
    prompts = [fmt.encode([{"role": "user", "content": text}], thinking=False) for text in asked]
    with Engine(nano) as engine:
        how = {"stop_ids": fmt.stop_ids, "logprobs": 2}
        results = run_all(engine, [greedy(str(i), prompt, 24, **how) for i, prompt in enumerate(prompts)])
    same = 0
    for prompt, result in zip(prompts, results):
        alone = expected(nano, prompt, 24, stop_ids=fmt.stop_ids)
        parted = [i for i, (ours, theirs) in enumerate(zip(result.tokens, alone)) if ours != theirs]
        if parted:
            (_, best), (_, second) = result.logprobs[parted[0]].best
            assert best - second < 0.1
        else:
            assert result.tokens == alone
            assert result.finish == ("stop" if alone[-1] in fmt.stop_ids else "length")
            same += 1
    assert same >= len(asked) / 2


@pytest.mark.parametrize("new", [1, 2, 17])
def test_as_many_tokens_as_asked_for(engine: Engine, tiny: Transformer, new: int) -> None:
    result = run(engine, greedy("a", models.prompt(20), new))
    assert result.tokens == expected(tiny, models.prompt(20), new) and result.finish == "length"


def test_a_whole_context_can_be_used(tiny: Transformer) -> None:
    with Engine(tiny, context=64, cache_tokens=64) as small:
        result = run(small, greedy("a", models.prompt(40), 24))
        assert result.tokens == expected(tiny, models.prompt(40), 24) and result.finish == "length"
        assert run(small, greedy("b", models.prompt(63), 1)).finish == "length"
        assert small.context == 64
    with Engine(tiny, context=10_000) as large:
        assert large.context == models.CONTEXT  # not beyond the model's positions


def test_a_stop_id_is_emitted_and_is_the_last(engine: Engine, tiny: Transformer) -> None:
    free = expected(tiny, models.prompt(20), 20)
    stop = next(token for i, token in enumerate(free) if i > 1 and token not in free[:i])
    result = run(engine, greedy("a", models.prompt(20), 20, stop_ids=frozenset({stop, 95})))
    assert result.tokens == free[: free.index(stop) + 1] and result.finish == "stop"
    last = run(engine, greedy("b", models.prompt(20), free.index(stop) + 1, stop_ids=frozenset({stop})))
    assert last.finish == "stop"  # also where it is the last that may come


def test_stop_when_sees_each_token_once(engine: Engine, tiny: Transformer) -> None:
    free, seen = expected(tiny, models.prompt(20), 20), list[int]()

    def stop(token: int) -> bool:
        assert threading.current_thread() is engine._thread
        seen.append(token)
        return len(seen) == 7

    result = run(engine, greedy("a", models.prompt(20), 20, stop_when=stop))
    assert result.tokens == tuple(seen) == free[:7] and result.finish == "stop"


def test_seeds_repeat_and_differ(tiny: Transformer) -> None:
    with Engine(tiny, deterministic=True) as engine:
        results = run_all(engine, [seeded(str(i), models.prompt(20), 20, seed) for i, seed in enumerate((1, 2, 1, -1))])
        drawn = [result.tokens for result in results]
        assert drawn[0] == drawn[2] and len(set(drawn)) == 3
        free = Sampling(temperature=5.0)
        unseeded = run_all(engine, [Request(f"u{i}", models.prompt(20), 20, free) for i in range(3)])
        assert len({result.tokens for result in unseeded}) == 3


# ------------------------------------------------------------------------------------------------ streams and news


def test_a_stream_yields_news_until_the_end(engine: Engine, tiny: Transformer) -> None:
    news = list(engine.stream(greedy("a", models.prompt(20), 12)))
    assert [one.finish for one in news] == [None] * (len(news) - 1) + ["length"]
    assert all(one.id == "a" and one.tokens for one in news)
    assert sum((one.tokens for one in news), ()) == expected(tiny, models.prompt(20), 12)
    assert engine.generate(greedy("a", models.prompt(20), 12)) == list(expected(tiny, models.prompt(20), 12))


def test_closing_a_stream_cancels(engine: Engine) -> None:
    watched = Watched(engine)
    stream = engine.stream(greedy("a", models.prompt(20), 400))
    next(stream)
    with watched.held():
        watched.inside()
        stream.close()
    run(engine, greedy("b", [5], 1))  # after a step that begins later than the cancel, the slot is free
    watched.remove()
    assert engine.stats()["running"] == 0 and "a" not in engine._live


def test_a_listener_hears_once_a_step_of_all_its_requests(tiny: Transformer) -> None:
    mine, other = Heard(), Heard()
    with Engine(tiny, speculate=False) as engine:
        watched = Watched(engine)
        with watched.held():
            engine.submit(greedy("plug", [2], 1), Heard())
            watched.inside()
            for i in range(4):
                engine.submit(greedy(f"m{i}", models.prompt(10 + i), 8), mine)
            engine.submit(greedy("o", models.prompt(9), 8), other)
        for name in ("m0", "m1", "m2", "m3"):
            mine.end(name)
        other.end("o")
        passes = len(watched.passes)
    assert len(mine.calls) <= passes and len(other.calls) <= passes
    assert all(len({one.id for one in call}) == len(call) for call in mine.calls)  # one news a request and step
    assert {one.id for call in mine.calls for one in call} == {"m0", "m1", "m2", "m3"}
    assert max(len(call) for call in mine.calls) == 4
    assert {one.id for call in other.calls for one in call} == {"o"}


def test_a_flood_does_not_hold_up_another_client(tiny: Transformer) -> None:
    """One at a time: twelve of one client wait already when another's single request comes."""
    with Engine(tiny, most_running=1) as engine:
        flood = [greedy(f"a{i}", models.prompt(5, i), 2, client="a") for i in range(12)]
        heard = gathered(Watched(engine), [*flood, greedy("b", models.prompt(9), 2, client="b")])
        for request in [*flood, greedy("b", [2], 2)]:
            heard.end(request.id)
        assert heard.order() == ["plug", "a0", "b", *(f"a{i}" for i in range(1, 12))]


def test_news_of_a_step_come_after_its_blocks_are_back(engine: Engine) -> None:
    """Whoever hears of an end may submit at once under the same name, from the listener itself."""
    again = Heard()

    def listen(batch: Any) -> None:
        for one in batch:
            if one.finish:
                assert engine.stats()["cache_used_blocks"] == 0
                engine.submit(greedy("a", models.prompt(20), 3), again)

    engine.submit(greedy("a", models.prompt(20), 3), listen)
    assert again.end("a").finish == "length"


def test_stats_count_tokens(tiny: Transformer) -> None:
    with Engine(tiny) as engine:
        run_all(engine, [greedy(str(i), models.prompt(20, i), 10) for i in range(5)])
        stats = engine.stats()
        assert (stats["prompt_tokens"], stats["generation_tokens"]) == (100, 50)
        assert stats["prefix_query_tokens"] == 100 and stats["prefix_hit_tokens"] == 0
        run(engine, greedy("again", models.prompt(20), 10))
        assert engine.stats()["prefix_hit_tokens"] == 19
        assert stats["cache_blocks"] == engine.pool.blocks >= (models.CONTEXT // 16) + 1


# ------------------------------------------------------------------------------------------------ at the door

GOOD = greedy("a", [2, 3, 4], 4)


def sampled(**how: Any) -> dict[str, Any]:
    return {"sampling": Sampling(**how)}


WRONG = [
    ({"prompt": []}, "The prompt has no tokens. Give some text."),
    ({"max_new_tokens": 0}, "max_new_tokens is 0. Ask for at least 1"),
    ({"max_new_tokens": -3}, "max_new_tokens is -3. Ask for at least 1"),
    ({"max_new_tokens": 510}, "has 3 tokens; with 510 new that is 513, but the context ends at 512. Shorten"),
    ({"prompt": [2] * 512}, "has 512 tokens; with 4 new that is 516, but the context ends at 512. Shorten"),
    ({"prompt": [2, -1, 3]}, "Token id -1 is outside the vocabulary of 96. Use this model's tokenizer"),
    ({"prompt": [2, 96, 3]}, "Token id 96 is outside the vocabulary of 96. Use"),
    ({"logprobs": -1}, "logprobs is -1. logprobs must be between 0 and 20"),
    ({"logprobs": 21}, "logprobs is 21. logprobs must be between 0 and 20"),
    ({"prompt_logprobs": 21}, "prompt_logprobs is 21. prompt_logprobs must be between 0 and 20"),
    (sampled(temperature=-0.1), "temperature is -0.1. temperature must be between 0 and 100"),
    (sampled(temperature=math.nan), "temperature is nan. temperature must be"),
    (sampled(temperature=math.inf), "temperature is inf. temperature must be"),
    (sampled(top_p=0), "top_p is 0. top_p must be between 1e-09 and 1"),
    (sampled(top_p=1.1), "top_p is 1.1. top_p must be"),
    (sampled(top_k=-1), r"top_k is -1. top_k must be 0 \(off\) or a positive number"),
    (sampled(top_k=2**31), "top_k is 2147483648. top_k must be"),
    (sampled(min_p=1.5), "min_p is 1.5. min_p must be between 0 and 1"),
    (sampled(repetition_penalty=0), "repetition_penalty is 0. repetition_penalty must be between 0.001 and 100"),
    (sampled(presence_penalty=101), "presence_penalty is 101. presence_penalty must be between -100 and 100"),
    (sampled(frequency_penalty=-math.inf), "frequency_penalty is -inf. frequency_penalty must be between"),
    (sampled(seed=2**64), "seed is 18446744073709551616. seed must be a number of 64 bits"),
    (sampled(logit_bias={96: 1.0}), "logit_bias is for token 96. logit_bias must be for tokens 0 to 95"),
    (sampled(logit_bias={-1: 1.0}), "logit_bias is for token -1. logit_bias must be"),
    (sampled(logit_bias={3: 101.0}), "logit_bias is 101.0. logit_bias must be between -100 and 100"),
    (sampled(logit_bias=dict.fromkeys(range(MAX_LOGIT_BIAS + 1), 0.0)), "is 1025 tokens. logit_bias must be at most"),
]


@pytest.mark.parametrize(("change", "message"), WRONG, ids=str)
def test_what_is_wrong_is_said_with_its_fix(engine: Engine, change: dict[str, Any], message: str) -> None:
    before = engine.stats()
    with pytest.raises(InputError, match=message):
        engine.submit(replace(GOOD, **change), Heard())
    assert engine.stats() == before and not engine._live


def test_an_overflow_tells_both_numbers(engine: Engine) -> None:
    with pytest.raises(ContextOverflow) as caught:
        engine.submit(greedy("a", [2] * 500, 13), Heard())
    assert (caught.value.wanted, caught.value.context) == (513, 512)


@pytest.mark.parametrize(
    "edge",
    [
        {"sampling": Sampling(temperature=100, top_p=1e-9, top_k=2**31 - 1, min_p=1.0, seed=-(2**63))},
        {"sampling": Sampling(repetition_penalty=100, presence_penalty=-100, frequency_penalty=100, seed=2**64 - 1)},
        {"sampling": Sampling(logit_bias={0: -100.0, 95: 100.0}, repetition_penalty=1e-3)},
        {"logprobs": 0, "prompt_logprobs": 0},
        {"logprobs": 20, "prompt_logprobs": 20},
        {"prompt": [0, 95], "max_new_tokens": 510, "stop_when": lambda token: True},
        {"prompt": range(2, 50)},
    ],
    ids=str,
)  # fmt: skip
def test_what_is_just_allowed_works(engine: Engine, edge: dict[str, Any]) -> None:
    assert run(engine, replace(GOOD, **edge)).finish in ("length", "stop")


def test_a_cache_must_hold_a_context(tiny: Transformer) -> None:
    with pytest.raises(InputError, match=r"A cache of 100 tokens does not hold one context of 512\. Give at least 512"):
        Engine(tiny, cache_tokens=100)


def test_greedy_ignores_what_only_shapes_draws(engine: Engine) -> None:
    plain = run(engine, greedy("a", models.prompt(12), 10)).tokens
    shaped = replace(GREEDY, top_k=3, top_p=0.5, min_p=0.2, seed=4)
    assert run(engine, Request("a", models.prompt(12), 10, shaped)).tokens == plain
    banned = replace(GREEDY, logit_bias=dict.fromkeys(plain, -100.0))
    assert not set(run(engine, Request("a", models.prompt(12), 10, banned)).tokens) & set(plain)
