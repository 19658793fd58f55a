"""What every `TokenSource` promises, asked of the engine and of its test double alike."""

import threading
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from typing import Any

import pytest

from karakoram.engine.engine import Engine
from karakoram.engine.request import EngineStopped, News, QueueFull, Request, TokenSource
from karakoram.engine.scripted import ScriptedEngine
from karakoram.errors import InputError
from karakoram.model.transformer import Transformer
from tests.engine import models
from tests.engine.heard import PATIENCE_S, Heard, greedy, run, submit_all

PROMPT = models.prompt(20)
LIVING = 3  # requests that may live at once


def squares(request: Request) -> Iterator[int]:
    """A script that never ends."""
    return ((7 * i * i + len(request.prompt)) % models.VOCABULARY for i in count())


@pytest.fixture(params=["Engine", "ScriptedEngine"])
def source(request: pytest.FixtureRequest, tiny: Transformer) -> Iterator[Any]:
    made: Engine | ScriptedEngine
    if request.param == "Engine":
        made = Engine(tiny, most_running=1, most_waiting=LIVING - 1)
    else:
        made = ScriptedEngine(squares, models.VOCABULARY, models.CONTEXT, LIVING)
    yield made
    made.close()


class Gate:
    """A `stop_when` that holds its request up at its first token, in the source's thread."""

    def __init__(self) -> None:
        self.entered, self.opened = threading.Event(), threading.Event()
        self.thread: threading.Thread | None = None

    def __call__(self, token: int) -> bool:
        self.thread = threading.current_thread()
        self.entered.set()
        assert self.opened.wait(PATIENCE_S)
        return False


@pytest.fixture
def gate() -> Iterator[Gate]:
    made = Gate()
    yield made
    made.opened.set()


def held_up(source: TokenSource, gate: Gate, name: str = "held") -> Heard:
    heard = submit_all(source, [greedy(name, PROMPT, 300, stop_when=gate)])
    assert gate.entered.wait(PATIENCE_S)
    return heard


def test_it_tells_its_limits(source: TokenSource) -> None:
    assert (source.context, source.vocab_size) == (models.CONTEXT, models.VOCABULARY)


def test_tokens_come_as_news_and_end(source: TokenSource) -> None:
    heard = submit_all(source, [greedy("a", PROMPT, 12)])
    result = heard.end("a")
    assert (len(result.tokens), result.finish, result.error) == (12, "length", "")
    assert all(0 <= token < source.vocab_size for token in result.tokens)
    assert all(call for call in heard.calls)
    assert run(source, greedy("a", PROMPT, 12)) == result  # the same question, the same answer; the name is free again
    assert run(source, greedy("a", PROMPT, 1)).tokens == result.tokens[:1]


def test_a_stop_id_is_the_last(source: TokenSource) -> None:
    free = run(source, greedy("a", PROMPT, 12)).tokens
    place = next(i for i in range(2, 12) if free[i] not in free[:i])
    result = run(source, greedy("a", PROMPT, 12, stop_ids=frozenset({free[place]})))
    assert (result.tokens, result.finish) == (free[: place + 1], "stop")


def test_stop_when_is_asked_about_each_token(source: TokenSource) -> None:
    seen: list[int] = []

    def stop(token: int) -> bool:
        seen.append(token)
        return len(seen) == 5

    result = run(source, greedy("a", PROMPT, 12, stop_when=stop))
    assert (list(result.tokens), result.finish) == (seen, "stop") and len(seen) == 5


def test_logprobs_come_with_tokens_where_asked_for(source: TokenSource) -> None:
    for asked in (None, 0, 1):
        result = run(source, greedy("a", PROMPT, 6, logprobs=asked))
        assert [one.token for one in result.logprobs] == ([] if asked is None else list(result.tokens))


def test_a_constraint_is_told_each_token(source: TokenSource) -> None:
    told: list[int] = []

    class Follows:
        def fill(self, row: Any, left: int) -> bool:
            return False

        def accept(self, token: int) -> None:
            told.append(token)

    assert list(run(source, greedy("a", PROMPT, 6, constraint=Follows())).tokens) == told


def test_listeners_are_called_from_another_thread(source: TokenSource, gate: Gate) -> None:
    heard = held_up(source, gate)  # `submit` came back while the request is held up
    assert gate.thread is not threading.current_thread()
    assert heard.calls == []
    gate.opened.set()
    heard.begun("held")


def test_a_cancel_ends_a_request_and_frees_its_place(source: TokenSource, gate: Gate) -> None:
    heard = held_up(source, gate)
    for name in "ab":
        source.submit(greedy(name, PROMPT, 4), heard)
    source.cancel("held")
    gate.opened.set()
    result = heard.end("held")
    assert result.finish == "cancelled" and len(result.tokens) <= 1
    assert {heard.end(name).finish for name in "ab"} == {"length"}
    assert run(source, greedy("held", PROMPT, 4)).finish == "length"


def test_cancels_of_the_unknown_and_the_finished_are_passed_over(source: TokenSource) -> None:
    source.cancel("nobody")
    result = run(source, greedy("a", PROMPT, 4))
    source.cancel("a")
    assert run(source, greedy("a", PROMPT, 4)) == result


def test_too_many_are_refused(source: TokenSource, gate: Gate) -> None:
    heard = held_up(source, gate)
    for number in range(LIVING - 1):
        source.submit(greedy(str(number), PROMPT, 4, stop_when=gate), heard)
    with pytest.raises(QueueFull, match=r"waiting already\. Try again in a second"):
        source.submit(greedy("more", PROMPT, 4), heard)
    assert heard.news("more") == []
    source.cancel("held")
    gate.opened.set()
    assert heard.end("held").finish == "cancelled"
    for number in range(LIVING - 1):
        assert heard.end(str(number)).finish == "length"
    assert run(source, greedy("more", PROMPT, 4)).finish == "length"


def test_a_name_lives_once(source: TokenSource, gate: Gate) -> None:
    heard = held_up(source, gate)
    with pytest.raises(InputError, match=r"A request 'held' is running already\. Give each its own id"):
        source.submit(greedy("held", [5], 4), Heard())
    source.cancel("held")
    gate.opened.set()
    assert heard.end("held").finish == "cancelled"


def test_closing_cancels_and_refuses(source: Any, gate: Gate) -> None:
    heard = held_up(source, gate)
    closer = threading.Thread(target=source.close)
    closer.start()
    gate.opened.set()
    assert heard.end("held").finish in ("cancelled", "length")  # the double may have ended it by itself
    closer.join(PATIENCE_S)
    assert not closer.is_alive()
    with pytest.raises(EngineStopped, match="has been closed"):
        source.submit(greedy("late", PROMPT, 4), Heard())
    source.close()


# ------------------------------------------------------------------------------------------------ the double alone


def scripted(script: Callable[..., Any], **how: Any) -> ScriptedEngine:
    return ScriptedEngine(script, models.VOCABULARY, **how)


def test_a_script_that_ends_stops_and_one_that_breaks_is_an_error() -> None:
    def breaks(_: object) -> Iterator[int]:
        yield 5
        raise ValueError("torn")

    result = run(scripted(lambda request: [1, 2]), greedy("a", PROMPT, 9))
    assert (result.tokens, result.finish) == ((1, 2), "stop")
    broken = run(scripted(breaks), greedy("a", PROMPT, 9))
    assert (broken.tokens, broken.finish, broken.error) == ((5,), "error", "torn")


def test_a_script_sees_its_request_and_the_double_keeps_them() -> None:
    source = scripted(lambda request: list(request.prompt)[::-1])
    assert run(source, greedy("a", [1, 2, 3], 9)).tokens == (3, 2, 1)
    assert [request.id for request in source.requests] == ["a"] and source.live == 0


def test_one_news_a_token() -> None:
    calls: list[Sequence[News]] = []
    ended = threading.Event()

    def listen(batch: Sequence[News]) -> None:
        calls.append(batch)
        if batch[-1].finish:
            ended.set()

    scripted(lambda request: [4, 5, 6]).submit(greedy("a", PROMPT, 3), listen)
    assert ended.wait(PATIENCE_S)
    assert [[news.tokens for news in batch] for batch in calls] == [[(4,)], [(5,)], [(6,)]]
