"""A cancel frees place and blocks within a step, whenever it comes, and touches nobody else."""

from collections.abc import Sequence
from random import Random

import pytest

from karakoram.engine.blocks import BLOCK_TOKENS
from karakoram.engine.engine import Engine
from karakoram.engine.request import News
from karakoram.model.generate import generate
from karakoram.model.transformer import Transformer
from tests.engine import models
from tests.engine.heard import Heard, Watched, all_blocks_back, greedy, run, submit_all

LONG = 400


class HeardWithStats(Heard):
    """Keeps the engine's stats at the time of each last news."""

    def __init__(self, engine: Engine) -> None:
        super().__init__()
        self.engine, self.stats_at_end = engine, dict[str, dict[str, float]]()

    def __call__(self, batch: Sequence[News]) -> None:
        for one in batch:
            if one.finish:
                self.stats_at_end[one.id] = self.engine.stats()
        super().__call__(batch)


def expected(model: Transformer, prompt: list[int], new: int) -> tuple[int, ...]:
    return tuple(generate(model, prompt, new, stop_ids=()))


def test_while_it_decodes(tiny: Transformer) -> None:
    """The pass that runs when the cancel comes is the last; when "cancelled" is told, place and blocks are free."""
    with Engine(tiny, speculate=False) as engine:
        watched, heard = Watched(engine), HeardWithStats(engine)
        engine.submit(greedy("a", models.prompt(20), LONG), heard)
        engine.submit(greedy("b", models.prompt(30), LONG), heard)
        heard.begun("a", 3)
        heard.begun("b", 3)
        with watched.held():
            watched.inside()
            passes = len(watched.passes)
            (b_tokens,) = (piece.computed + 1 for piece in watched.passes[-1] if piece.id == "b")
            engine.cancel("a")
            engine.cancel("a")  # twice is once
        assert heard.end("a").finish == "cancelled"
        assert heard.news("a")[-1].tokens == ()
        assert all(piece.id != "a" for seen in watched.passes[passes:] for piece in seen)
        stats = heard.stats_at_end["a"]
        assert stats["running"] == 1
        assert stats["cache_used_blocks"] == -(-b_tokens // BLOCK_TOKENS)
        engine.cancel("b")
        assert heard.end("b").finish == "cancelled"
        assert heard.stats_at_end["b"]["cache_used_blocks"] == 0
        together = sum((news.tokens for news in heard.news("b")), ())
        assert together == expected(tiny, models.prompt(30), len(together))
        all_blocks_back(engine)


def test_while_its_prompt_is_computed(tiny: Transformer) -> None:
    with Engine(tiny, most_batch_tokens=32) as engine:
        watched, heard = Watched(engine), HeardWithStats(engine)
        with watched.held():
            engine.submit(greedy("a", models.prompt(300), 4), heard)
            watched.inside()
            engine.cancel("a")
        result = heard.end("a")
        assert (result.tokens, result.finish) == ((), "cancelled")
        assert watched.tokens("a") == 32
        assert heard.stats_at_end["a"]["cache_used_blocks"] == 0
        # What was computed is not lost: it is a prefix like any other.
        assert run(engine, greedy("again", models.prompt(300), 4)).cached == 32
        all_blocks_back(engine)


def test_while_it_waits(tiny: Transformer) -> None:
    """In the inbox, and in the queue behind others; it never runs."""
    with Engine(tiny, most_running=1) as engine:
        watched, heard = Watched(engine), HeardWithStats(engine)
        with watched.held():
            engine.submit(greedy("first", models.prompt(20), 30), heard)
            watched.inside()
            for name in ("queued", "kept", "inbox"):
                engine.submit(greedy(name, models.prompt(5), 4), heard)
            engine.cancel("inbox")
        assert heard.end("inbox").finish == "cancelled"
        heard.begun("first", 2)
        engine.cancel("queued")
        assert heard.end("queued").finish == "cancelled"
        assert heard.end("first").finish == heard.end("kept").finish == "length"
        assert watched.tokens("queued") == watched.tokens("inbox") == 0
        all_blocks_back(engine)


def test_before_and_after_is_nothing(tiny: Transformer) -> None:
    with Engine(tiny) as engine:
        engine.cancel("never")
        result = run(engine, greedy("a", models.prompt(20), 5))
        engine.cancel("a")
        assert result.finish == "length"
        assert (
            run(engine, greedy("a", models.prompt(20), 5)) == result
        )  # a late cancel does not hit the next of its name
        assert not engine._cancels


def test_a_cancel_that_comes_too_late_does_not_hit_the_next_of_its_name(tiny: Transformer) -> None:
    """The cancel arrives in the very pass that ends the request; its name is taken again before the next step."""
    with Engine(tiny) as engine:
        watched, again = Watched(engine), Heard()

        def listen(batch: Sequence[News]) -> None:
            if batch[-1].finish == "length":
                engine.submit(greedy("a", models.prompt(20), 5), again)

        with watched.held():
            engine.submit(greedy("a", models.prompt(20), 1), listen)
            watched.inside()
            engine.cancel("a")
        assert again.end("a").finish == "length"


def test_whoever_waits_for_a_cancelled_ones_prefix_computes_it(tiny: Transformer) -> None:
    prefix = models.prompt(200)
    with Engine(tiny, most_batch_tokens=32) as engine:
        watched, heard = Watched(engine), Heard()
        with watched.held():
            engine.submit(greedy("a", prefix + [5], 4), heard)
            watched.inside()
            engine.submit(greedy("b", prefix + [6], 4), heard)
            engine.cancel("a")
        assert heard.end("a").finish == "cancelled"
        assert heard.end("b").tokens == expected(tiny, prefix + [6], 4)
        assert watched.tokens() == 201 + 3  # 32 of them for a, the others for b
        all_blocks_back(engine)


@pytest.mark.parametrize("cache_tokens", [None, models.CONTEXT])
def test_two_hundred_cancels_leave_nothing(tiny: Transformer, cache_tokens: int | None) -> None:
    """At random moments, with and without a cache that overflows all the time."""
    draw = Random(5)
    with Engine(tiny, cache_tokens, most_running=8, most_batch_tokens=64) as engine:
        heard = Heard()
        for start in range(0, 200, 20):
            names = [str(start + i) for i in range(20)]
            for name in names:
                prompt = models.prompt(draw.randint(1, 120), draw.randint(0, 5))
                engine.submit(greedy(name, prompt, draw.randint(100, LONG - 20), client=str(draw.randint(0, 3))), heard)
            for name in draw.sample(names, 20):
                steps = len(heard.calls) + draw.randint(0, 3)
                heard.until(lambda steps=steps: len(heard.calls) >= steps or not engine._live)
                engine.cancel(name)
        ends = [heard.end(str(i)).finish for i in range(200)]
        assert ends.count("cancelled") >= 190 and set(ends) <= {"cancelled", "length"}
        all_blocks_back(engine)
        assert run(engine, greedy("after", models.prompt(20), 5)).tokens == expected(tiny, models.prompt(20), 5)


def test_clients_that_hang_up_leave_nothing(tiny: Transformer) -> None:
    """Streams closed after their first news, as a server does when a client disconnects."""
    with Engine(tiny) as engine:
        for number in range(30):
            stream = engine.stream(greedy(str(number), models.prompt(10 + number), LONG))
            assert next(stream).tokens
            stream.close()
        heard = submit_all(engine, [greedy("after", models.prompt(20), 5)])
        assert heard.end("after").finish == "length"
        all_blocks_back(engine)
