"""Listening to an engine, and standing in its way: news by request, and a runner that waits, counts and fails.

No test sleeps: it waits for news or for a pass to begin, at most PATIENCE_S seconds, which only a hang uses up.
"""

import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from karakoram.engine.engine import Engine
from karakoram.engine.request import News, Request, Sampling, TokenLogprob, TokenSource
from karakoram.engine.runner import Piece

PATIENCE_S = 60
GREEDY = Sampling(temperature=0)


def greedy(name: str, prompt: Sequence[int], new: int = 16, **how: Any) -> Request:
    """A request for the best tokens."""
    return Request(name, prompt, new, GREEDY, **how)


def seeded(name: str, prompt: Sequence[int], new: int = 16, seed: int = 7, **how: Any) -> Request:
    """A request for tokens drawn at temperature 1."""
    return Request(name, prompt, new, Sampling(temperature=1.0, seed=seed), **how)


def repetitive(name: str, prompt: Sequence[int], new: int, seed: int | None, **how: Any) -> Request:
    """Tokens among four, drawn with a seed or (None) greedy: what was seen comes again, so guesses are often right."""
    few = dict.fromkeys(range(10, 14), 50.0)
    drawn = Sampling(temperature=0.0 if seed is None else 1.0, seed=seed, logit_bias=few)
    return Request(name, prompt, new, drawn, **how)


class Heard:
    """A listener that keeps everything; one may serve many requests."""

    def __init__(self) -> None:
        self.calls: list[list[News]] = []
        self._changed = threading.Condition()

    def __call__(self, batch: Sequence[News]) -> None:
        with self._changed:
            self.calls.append(list(batch))
            self._changed.notify_all()

    def news(self, name: str) -> list[News]:
        """All there was about a request, in order."""
        with self._changed:
            return [one for call in self.calls for one in call if one.id == name]

    def order(self) -> list[str]:
        """Requests in the order of their first news."""
        with self._changed:
            return list(dict.fromkeys(one.id for call in self.calls for one in call))

    def until(self, condition: Callable[[], bool]) -> None:
        """Wait until something is true of what was heard."""
        with self._changed:
            assert self._changed.wait_for(condition, PATIENCE_S), f"nothing for {PATIENCE_S} s: {self.calls[-3:]}"

    def end(self, name: str) -> "Result":
        """Wait for a request's last news; all its news as one."""
        self.until(lambda: any(one.id == name and one.finish for call in self.calls for one in call))
        return Result.of(self.news(name))

    def begun(self, name: str, tokens: int = 1) -> None:
        """Wait for a request's first tokens."""
        self.until(lambda: sum(len(one.tokens) for call in self.calls for one in call if one.id == name) >= tokens)


@dataclass(frozen=True)
class Result:
    """A request's news put together; equal if tokens, log-probabilities and end are the same bits."""

    tokens: tuple[int, ...]
    finish: str | None
    logprobs: tuple[TokenLogprob, ...]
    prompt_logprobs: tuple[TokenLogprob, ...]
    cached: int = field(compare=False)
    error: str

    @staticmethod
    def of(news: Sequence[News]) -> "Result":
        """The contract on the way: nothing after the end, firsts only in the first."""
        assert all(one.finish is None for one in news[:-1])
        assert all(one.cached_tokens == 0 and not one.prompt_logprobs for one in news[1:])
        return Result(
            tuple(t for one in news for t in one.tokens), news[-1].finish,
            tuple(p for one in news for p in one.logprobs), news[0].prompt_logprobs, news[0].cached_tokens,
            news[-1].error,
        )  # fmt: skip


def submit_all(engine: TokenSource, requests: Iterable[Request]) -> Heard:
    """All requests to one listener."""
    heard = Heard()
    for request in requests:
        engine.submit(request, heard)
    return heard


def run_all(engine: TokenSource, requests: Sequence[Request]) -> list[Result]:
    """The results of requests that are submitted together."""
    heard = submit_all(engine, requests)
    return [heard.end(request.id) for request in requests]


def run(engine: TokenSource, request: Request) -> Result:
    """The result of one request."""
    return run_all(engine, [request])[0]


def gathered(watched: "Watched", requests: Sequence[Request]) -> Heard:
    """As `submit_all`, with all requests in the queue before the first pass of any begins."""
    heard = Heard()
    with watched.held():
        watched.engine.submit(greedy("plug", [2], 1), heard)
        watched.inside()
        for request in requests:
            watched.engine.submit(request, heard)
    return heard


def together(engine: Engine, requests: Sequence[Request]) -> list[Result]:
    """As `run_all`, gathered."""
    watched = Watched(engine)
    heard = gathered(watched, requests)
    results = [heard.end(request.id) for request in requests]
    watched.remove()
    return results


@dataclass(frozen=True)
class Seen:
    """A piece as it was when its pass began."""

    id: str
    computed: int
    count: int
    guesses: int


class Watched:
    """Stands between an engine and its runner: writes down every pass, holds passes up, lets them fail."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.passes = engine, list[list[Seen]]()
        self.most_used_blocks = 0
        self.failure: Callable[[list[Seen]], BaseException | None] = lambda pieces: None
        self._run = engine.runner.run
        self._open, self._entered = threading.Event(), threading.Event()
        self._open.set()
        engine.runner.run = self._watched  # type: ignore[method-assign]

    def _watched(self, pieces: Sequence[Piece]) -> Tensor:
        seen = [Seen(p.sequence.request.id, p.sequence.computed, p.count, len(p.guesses)) for p in pieces]
        self.passes.append(seen)
        self.most_used_blocks = max(self.most_used_blocks, int(self.engine.stats()["cache_used_blocks"]))
        self._entered.set()
        assert self._open.wait(PATIENCE_S)
        if (error := self.failure(seen)) is not None:
            raise error
        return self._run(pieces)

    def remove(self) -> None:
        """The runner as it was."""
        self.engine.runner.run = self._run  # type: ignore[method-assign]

    def held(self) -> "Watched":
        """`with watched.held():` no pass ends in it."""
        self._entered.clear()
        self._open.clear()
        return self

    def __enter__(self) -> "Watched":
        return self

    def __exit__(self, *_: object) -> None:
        self._open.set()

    def inside(self) -> None:
        """Wait until a pass is held up."""
        assert self._entered.wait(PATIENCE_S)

    def tokens(self, name: str = "") -> int:
        """Tokens that were run, guesses included, of one request or of all."""
        return sum(p.count + p.guesses for seen in self.passes for p in seen if name in ("", p.id))


def all_blocks_back(engine: Engine) -> None:
    """Nothing runs, waits or holds a block; and everything remembered can be forgotten."""
    stats = engine.stats()
    assert (stats["running"], stats["waiting"], stats["cache_used_blocks"]) == (0, 0, 0)
    engine.pool.forget_all()
    assert len(engine.pool._free) == engine.pool.blocks
    assert not engine.pool.root.children and not engine._live and not engine.scheduler._in_flight
