"""What breaks ends those it concerns, with a word about it, and nobody else; what is full or closed says so."""

import threading
from collections.abc import Sequence
from typing import Any

import pytest

from karakoram.engine import engine as engine_module
from karakoram.engine.engine import Engine
from karakoram.engine.request import EngineStopped, News, QueueFull
from karakoram.errors import InputError
from karakoram.model.generate import generate
from karakoram.model.transformer import Transformer
from tests.engine import models
from tests.engine.heard import PATIENCE_S, Heard, Seen, Watched, all_blocks_back, gathered, greedy, run, submit_all

DIES = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
PROMPT = models.prompt(20)


def expected(model: Transformer, prompt: list[int], new: int) -> tuple[int, ...]:
    return tuple(generate(model, prompt, new, stop_ids=()))


def failing_with(error: BaseException, name: str, computed: int = 0) -> Any:
    """The first pass with this request and so many tokens computed fails."""
    left = [error]

    def failure(pieces: list[Seen]) -> BaseException | None:
        there = any(piece.id == name and piece.computed >= computed for piece in pieces)
        return left.pop() if there and left else None

    return failure


# ------------------------------------------------------------------------------------------------ a pass that fails


@pytest.mark.parametrize("computed", [0, 25], ids=["in the prompt", "while decoding"])
@pytest.mark.parametrize("deterministic", [False, True])
def test_a_pass_that_fails_ends_the_requests_in_it(tiny: Transformer, computed: int, deterministic: bool) -> None:
    with Engine(tiny, most_running=2, deterministic=deterministic) as engine:
        watched = Watched(engine)
        watched.failure = failing_with(RuntimeError("out of luck"), "a", computed)
        heard = gathered(watched, [greedy("a", PROMPT, 30), greedy("b", PROMPT[:9], 30), greedy("c", PROMPT, 9)])
        for name, prompt in (("a", PROMPT), ("b", PROMPT[:9])):
            result = heard.end(name)
            assert (result.finish, result.error) == ("error", "The forward pass failed: RuntimeError: out of luck")
            assert result.tokens == expected(tiny, prompt, 30)[: len(result.tokens)]
        assert heard.end("c").tokens == expected(tiny, PROMPT, 9)  # it waited, and runs on what a left behind
        assert run(engine, greedy("a", PROMPT, 9)).tokens == expected(tiny, PROMPT, 9)
        all_blocks_back(engine)


def test_who_is_not_in_the_pass_goes_on(tiny: Transformer) -> None:
    """Two prompts at 64 tokens a pass: the second is not reached when the first one's pass fails."""
    with Engine(tiny, most_batch_tokens=64) as engine:
        watched = Watched(engine)
        watched.failure = failing_with(ValueError("no"), "a", 64)
        heard = gathered(watched, [greedy("a", models.prompt(150), 3), greedy("b", models.prompt(150, 1), 3)])
        assert heard.end("a").finish == "error"
        assert heard.end("b").tokens == expected(tiny, models.prompt(150, 1), 3)
        all_blocks_back(engine)


def test_generate_raises_what_went_wrong(tiny: Transformer) -> None:
    with Engine(tiny) as engine:
        Watched(engine).failure = failing_with(RuntimeError("oh"), "a")
        with pytest.raises(EngineStopped, match="The forward pass failed: RuntimeError: oh"):
            engine.generate(greedy("a", PROMPT, 3))


def test_a_draw_that_fails_ends_its_pass(tiny: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also beside a request that had ended in the same pass already, for a reason of its own."""

    def broken(*_: object) -> None:
        raise ZeroDivisionError("drawn badly")

    with Engine(tiny) as engine:
        watched = Watched(engine)
        watched.failure = lambda pieces: monkeypatch.setattr(engine_module, "draw", broken) if len(pieces) > 1 else None
        heard = gathered(watched, [greedy("a", PROMPT, 3, constraint=Raising("fill")), greedy("b", PROMPT[:7], 3)])
        assert "constraint failed" in heard.end("a").error
        assert "ZeroDivisionError: drawn badly" in heard.end("b").error
        monkeypatch.undo()
        assert run(engine, greedy("c", PROMPT, 3)).tokens == expected(tiny, PROMPT, 3)
        all_blocks_back(engine)


# ------------------------------------------------------------------------------------------------ a request's own code


class Raising:
    """A constraint that allows all and raises in one of its methods, from the third token on."""

    def __init__(self, where: str) -> None:
        self.where, self.accepted = where, 0

    def fill(self, row: Any, left: int) -> bool:
        if self.where == "fill":
            raise KeyError("in fill")
        return False

    def accept(self, token: int) -> None:
        self.accepted += 1
        if self.where == "accept" and self.accepted == 3:
            raise KeyError("in accept")


class StopsBadly:
    """Raises when asked about the third token."""

    def __init__(self) -> None:
        self.asked = 0

    def __call__(self, token: int) -> bool:
        self.asked += 1
        if self.asked == 3:
            raise KeyError("in stop_when")
        return False


@pytest.mark.parametrize("where", ["fill", "accept", "stop_when"])
def test_a_requests_own_code_ends_it_alone(tiny: Transformer, where: str) -> None:
    """The neighbours in its pass lose nothing, one that ends in that very pass included."""
    own = {"stop_when": StopsBadly()} if where == "stop_when" else {"constraint": Raising(where)}
    with Engine(tiny, speculate=False) as engine:
        requests = [greedy("ends", PROMPT[:12], 3), greedy("bad", PROMPT, 9, **own), greedy("goes on", PROMPT, 9)]
        heard = gathered(Watched(engine), [*requests, greedy("ends too", PROMPT[:11], 3)])
        bad = heard.end("bad")
        assert bad.finish == "error" and f"in {where}" in bad.error
        assert bad.tokens == expected(tiny, PROMPT, 9)[: 0 if where == "fill" else 3]
        assert heard.end("goes on").tokens == expected(tiny, PROMPT, 9)
        for name, prompt in (("ends", PROMPT[:12]), ("ends too", PROMPT[:11])):
            assert heard.end(name).tokens == expected(tiny, prompt, 3)
        all_blocks_back(engine)


# ------------------------------------------------------------------------------------------------ a thread that dies


@DIES
@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt, GeneratorExit])
def test_a_dead_thread_ends_everything_and_says_so(tiny: Transformer, kind: type[BaseException]) -> None:
    engine = Engine(tiny, most_running=2)
    watched = Watched(engine)
    watched.failure = failing_with(kind("killed"), "a", 22)
    with watched.held():
        heard = submit_all(engine, [greedy(name, PROMPT, 40) for name in "abcd"])
    text = f"The engine's thread has died: {kind.__name__}: killed."
    assert [heard.end(name).error for name in "abcd"] == [text] * 4
    assert [heard.end(name).finish for name in "abcd"] == ["error"] * 4
    with pytest.raises(EngineStopped, match=r"has died.*Start it again"):
        engine.submit(greedy("e", PROMPT, 3), Heard())
    with pytest.raises(EngineStopped, match="has died"):
        next(engine.stream(greedy("e", PROMPT, 3)))
    engine.cancel("a")
    engine.close()
    engine.close()
    assert not engine._thread.is_alive()


@DIES
def test_a_listener_that_raises_takes_nobody_along_in_silence(tiny: Transformer) -> None:
    """A listener must not raise; if one does, the others hear that it is over."""
    engine, heard, raised = Engine(tiny), Heard(), threading.Event()

    def bad(batch: Sequence[News]) -> None:
        raised.set()
        raise RuntimeError("deaf")

    watched = Watched(engine)
    with watched.held():
        engine.submit(greedy("bad", PROMPT, 40), bad)
        watched.inside()
        engine.submit(greedy("other", PROMPT, 40), heard)
    assert raised.wait(PATIENCE_S)
    assert "RuntimeError: deaf" in heard.end("other").error
    engine.close()


# ------------------------------------------------------------------------------------------------ closing


def test_closing_cancels_what_lives(tiny: Transformer) -> None:
    engine = Engine(tiny, most_running=2, most_batch_tokens=16)
    watched = Watched(engine)
    with watched.held():
        heard = submit_all(engine, [greedy(name, PROMPT, 400) for name in "abcd"])
        watched.inside()
        closer = threading.Thread(target=engine.close)
        closer.start()
    closer.join(PATIENCE_S)
    assert not closer.is_alive() and not engine._thread.is_alive()
    assert [heard.end(name).finish for name in "abcd"] == ["cancelled"] * 4
    assert len([call for call in heard.calls if call[-1].finish]) == 1  # one call for all of a listener's requests
    engine.close()
    with pytest.raises(EngineStopped, match=r"The engine has been closed\. Start it again"):
        engine.submit(greedy("e", PROMPT, 3), Heard())
    assert not [thread for thread in threading.enumerate() if thread in engine._fillers._threads]


def test_a_context_manager_closes(tiny: Transformer) -> None:
    with Engine(tiny) as engine:
        heard = submit_all(engine, [greedy("a", PROMPT, 400)])
        heard.begun("a")
    assert heard.end("a").finish == "cancelled" and not engine._thread.is_alive()
    with pytest.raises(EngineStopped), Engine(tiny) as engine:  # noqa: PT012  the error passes through
        engine.close()
        engine.submit(greedy("a", PROMPT, 3), Heard())


def test_a_listener_may_close(tiny: Transformer) -> None:
    engine, heard = Engine(tiny), Heard()

    def listen(batch: Sequence[News]) -> None:
        heard(batch)
        engine.close()

    engine.submit(greedy("a", PROMPT, 40), listen)
    assert heard.end("a").finish == "cancelled"
    engine._thread.join(PATIENCE_S)
    assert not engine._thread.is_alive()


# ------------------------------------------------------------------------------------------------ at the door


def test_a_full_queue_refuses_and_takes_again(tiny: Transformer) -> None:
    with Engine(tiny, most_running=1, most_waiting=3) as engine:
        watched = Watched(engine)
        with watched.held():
            heard = submit_all(engine, [greedy("runs", PROMPT, 3)])
            watched.inside()
            for name in "abc":
                engine.submit(greedy(name, PROMPT, 3), heard)
            with pytest.raises(QueueFull, match=r"3 requests are waiting already\. Try again in a second") as caught:
                engine.submit(greedy("d", PROMPT, 3), heard)
            assert caught.value.retry_after_s == 1
            assert engine.stats()["waiting"] == 3
            engine.cancel("a")
        assert heard.end("a").finish == "cancelled"
        assert {heard.end(name).finish for name in ("runs", "b", "c")} == {"length"}
        assert run(engine, greedy("d", PROMPT, 3)).finish == "length"
        all_blocks_back(engine)


def test_a_name_is_taken_while_it_lives(tiny: Transformer) -> None:
    with Engine(tiny) as engine:
        watched = Watched(engine)
        with watched.held():
            heard = submit_all(engine, [greedy("a", PROMPT, 3)])
            with pytest.raises(InputError, match=r"A request 'a' is running already\. Give each its own id"):
                engine.submit(greedy("a", [5], 3), Heard())
        assert heard.end("a").tokens == expected(tiny, PROMPT, 3)
        assert run(engine, greedy("a", PROMPT, 3)).finish == "length"
