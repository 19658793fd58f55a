"""From the engine's thread to the connections.

    engine's thread                  event loop
    ───────────────                  ────────────────────────────────────────────────────────────────
    one step ──listener──▶ inbox ──▶ NewsDesk ──▶ Exchange (one for each HTTP request) ──▶ its consumer
                    one wake-up a step            news that its consumer has not taken yet

One listener serves all requests: however many sequences a step has, the loop is woken once. Steps that follow one
another within `GATHER_S` do not wake it at all: the loop looks for them in that rhythm until they become rarer. (nano
has a step every 0.4 ms; waking another thread costs the engine 15 to 80 µs and the interpreter lock.)

The desk hands each piece of news to its exchange and rings the exchange's bell; the consumer (a stream, a whole answer,
a recording) takes what has gathered. While a consumer writes, news gathers and becomes one chunk: under load chunks
grow and their number does not. A consumer whose reader has stopped reading is cut off after `Limits.pending_tokens`.

Everything but `NewsDesk.listener` runs in the event loop, so nothing here needs a lock.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Sequence
from json.encoder import encode_basestring
from typing import Any

from karakoram.engine.request import News, TokenSource
from karakoram.errors import KarakoramError
from karakoram.serve.metrics import Metrics
from karakoram.serve.refusal import Refusal
from karakoram.serve.service import Service
from karakoram.serve.surface import Call
from karakoram.session.chat import Answer
from karakoram.session.parts import Delta

MOST_TAKEN = 512  # at once: others wait meanwhile, 3 µs for each token and up to 20 with log-probabilities
GATHER_S = 0.002  # nobody reads 500 events a second; the first token after a pause is sent at once

_CLOCK = time.perf_counter


def json_text(text: str) -> bytes:
    """A JSON string, quotes included, in UTF-8: what is escaped for each chunk of a stream."""
    return encode_basestring(text).encode("utf-8", "replace")


def sse_event(kind: str, data: bytes) -> bytes:
    """One named event; `data` is JSON without line feeds."""
    return b"event: %b\ndata: %b\n\n" % (kind.encode(), data)


class Bell:
    """Wakes the one who waits; rung before anybody waits, it wakes the next one. Half the price of asyncio.Event."""

    __slots__ = ("_future", "_rung")

    def __init__(self) -> None:
        self._future: asyncio.Future[None] | None = None
        self._rung = False

    def ring(self) -> None:
        """Wake who waits."""
        future = self._future
        if future is None:
            self._rung = True
        elif not future.done():
            future.set_result(None)

    async def wait(self) -> None:
        """Until the next ring."""
        if self._rung:
            self._rung = False
            return
        self._future = asyncio.get_running_loop().create_future()
        try:
            await self._future
        finally:
            self._future = None


class Exchange:
    """One HTTP request's answers while the engine writes them, and what has come and was not yet taken.

    `bell` rings when there is something to take, when the answers have ended, when `refusal` says why they will not
    (nothing is brought from then on), and when `gone` says that nobody waits for them. `writing`: the consumer waits
    for a reader to take what was sent.
    """

    def __init__(self, call: Call, answers: Sequence[Answer], arrived: float, at_least: int = 1) -> None:
        self.call, self.answers, self.arrived = call, answers, arrived
        self.bell = Bell()
        self.refusal: Refusal | None = None
        self.gone = self.writing = False
        self.unfinished = len(answers)
        self.pending: list[tuple[Answer, News]] = []
        self.pending_tokens = 0
        self._at_least = at_least

    def bring(self, answer: Answer, news: News) -> None:
        """News of one answer, from the desk."""
        self.pending.append((answer, news))
        self.pending_tokens += len(news.tokens)
        if news.finish is not None:
            self.unfinished -= 1
        if self.pending_tokens >= self._at_least or not self.unfinished:
            self.bell.ring()

    def take(self) -> list[tuple[Answer, list[Delta]]]:
        """Feed the answers with what has come, or the first `MOST_TAKEN` pieces of it; the deltas, in order."""
        taken = self.pending
        if len(taken) > MOST_TAKEN:
            taken, self.pending = taken[:MOST_TAKEN], taken[MOST_TAKEN:]
            self.pending_tokens -= sum(len(news.tokens) for _, news in taken)
            self.bell.ring()
        else:
            self.pending, self.pending_tokens = [], 0
        if len(taken) > 1:
            taken = _joined(taken)
        return [(answer, merged(answer.feed(news))) for answer, news in taken]

    @property
    def over(self) -> bool:
        """Whether everything has been taken and nothing more will come."""
        return not self.pending and (not self.unfinished or self.refusal is not None)


def _joined(taken: list[tuple[Answer, News]]) -> list[tuple[Answer, News]]:
    """Each answer's news as one."""
    pieces: dict[int, tuple[Answer, list[News]]] = {}
    for answer, news in taken:
        pieces.setdefault(answer.index, (answer, []))[1].append(news)
    return [(answer, one[0] if len(one) == 1 else _whole(one)) for answer, one in pieces.values()]


def _whole(pieces: list[News]) -> News:
    first, last = pieces[0], pieces[-1]
    return News(
        first.id,
        tuple(token for news in pieces for token in news.tokens),
        last.finish,
        tuple(item for news in pieces for item in news.logprobs),
        first.prompt_logprobs,
        first.cached_tokens,
        last.error,
    )


def merged(deltas: list[Delta]) -> list[Delta]:
    """Neighbours of one kind as one: what came together is sent together."""
    if len(deltas) < 2:
        return deltas
    kept = [deltas[0]]
    for delta in deltas[1:]:
        before = kept[-1]
        if len(delta) == 1 == len(before):
            (kind, more), (last_kind, said) = *delta.items(), *before.items()
            if kind == last_kind and isinstance(more, str):
                kept[-1] = {kind: said + more}
                continue
            if kind == last_kind == "tool_calls" and (whole := _one_call(said, more)) is not None:
                kept[-1] = {kind: [whole]}
                continue
        kept.append(delta)
    return kept


def _one_call(said: list[dict[str, Any]], more: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The call with the further arguments in `more`; None where that is something else."""
    if len(said) != 1 or len(more) != 1 or "id" in more[0] or more[0].get("index") != said[0].get("index"):
        return None
    call, added = said[0], more[0]["function"]
    if set(added) != {"arguments"}:
        return None
    function = call["function"]
    return {**call, "function": {**function, "arguments": (function.get("arguments") or "") + added["arguments"]}}


class _Run:
    """What the desk knows of one sequence."""

    __slots__ = ("answer", "exchange", "first", "last", "source", "tokens")

    def __init__(self, exchange: Exchange, answer: Answer, source: TokenSource) -> None:
        self.exchange, self.answer, self.source = exchange, answer, source
        self.first = self.last = 0.0
        self.tokens = 0


class NewsDesk:
    """Submits exchanges to the engine, and brings them its news. One for each server; lives in its event loop."""

    def __init__(self, service: Service, loop: asyncio.AbstractEventLoop) -> None:
        self._service, self._loop = service, loop
        self._runs: dict[str, _Run] = {}
        self._exchanges: set[Exchange] = set()
        self._inbox: deque[tuple[float, Sequence[News]]] = deque()
        self._awake = False  # the loop will look into the inbox without being woken
        self._last_step = 0.0
        self._listener = self.listener  # one object: engines group news by listener
        self._most_pending = service.limits.pending_tokens

    def listener(self, news: Sequence[News]) -> None:
        """The engine's listener, in the engine's thread: remember, and wake the loop unless it is awake already."""
        self._inbox.append((_CLOCK(), news))
        if not self._awake:
            self._awake = True
            try:
                self._loop.call_soon_threadsafe(self._dispatch)
            except RuntimeError:  # the loop is closed: the server has ended, nobody waits for this
                self._inbox.clear()

    def submit(self, exchange: Exchange) -> None:
        """Hand all answers to the engine, or none. QueueFull, EngineStopped, InputError. May run in another thread."""
        source = self._service.source
        self._exchanges.add(exchange)
        for answer in exchange.answers:
            self._runs[answer.request.id] = _Run(exchange, answer, source)
        try:
            for answer in exchange.answers:
                source.submit(answer.request, self._listener)
        except KarakoramError:
            exchange.gone = True
            self._cancel(exchange)
            for answer in exchange.answers:
                self._runs.pop(answer.request.id, None)
            raise

    def drop(self, exchange: Exchange) -> None:
        """Nobody waits for these answers any more: cancel what still runs."""
        exchange.gone = True
        self._cancel(exchange)
        exchange.bell.ring()

    def cut_off(self, exchange: Exchange, refusal: Refusal) -> None:
        """End these answers with `refusal`, and cancel what still runs."""
        if exchange.refusal is None:
            exchange.refusal = refusal
        self._cancel(exchange)
        exchange.bell.ring()

    def cut_off_all(self, refusal: Refusal) -> None:
        """End all answers: the server is shutting down."""
        for exchange in list(self._exchanges):
            self.cut_off(exchange, refusal)

    def _cancel(self, exchange: Exchange) -> None:
        self._exchanges.discard(exchange)
        for answer in exchange.answers:
            run = self._runs.get(answer.request.id)
            if run is not None:
                run.source.cancel(answer.request.id)

    def _dispatch(self) -> None:
        inbox, runs, metrics = self._inbox, self._runs, self._service.metrics
        fast = False
        for _ in range(len(inbox)):
            at, step = inbox.popleft()
            fast, self._last_step = at - self._last_step < GATHER_S, at
            for news in step:
                run = runs.get(news.id)
                if run is None:
                    continue
                if news.tokens:
                    _observe(metrics, run, at, news)
                if news.finish is not None:
                    del runs[news.id]
                    self._end(run, news, at)
                exchange = run.exchange
                if exchange.refusal is None and not exchange.gone:
                    exchange.bring(run.answer, news)
                    if exchange.writing and exchange.pending_tokens > self._most_pending:
                        self._overrun(exchange)
        if fast:
            self._loop.call_later(GATHER_S, self._dispatch)
            return
        self._awake = False
        if inbox:  # came in before the flag fell, so nobody has been woken for it
            self._awake = True
            self._loop.call_soon(self._dispatch)

    def _overrun(self, exchange: Exchange) -> None:
        exchange.pending, exchange.pending_tokens = [], 0
        what = f"The reader has fallen behind by more than {self._most_pending} tokens."
        self.cut_off(exchange, Refusal(408, f"{what} Read faster.", code="slow_reader"))

    def _end(self, run: _Run, news: News, at: float) -> None:
        metrics, answer = self._service.metrics, run.answer
        metrics.finish(news.finish or "error", len(answer.request.prompt))
        metrics.whole.observe(at - run.exchange.arrived)
        if run.tokens > 1:
            metrics.per_token.observe((run.last - run.first) / (run.tokens - 1))
        exchange = run.exchange
        if exchange.unfinished <= 1:
            self._exchanges.discard(exchange)
        if exchange.gone or exchange.refusal is not None:
            return
        if news.finish == "error":
            self.cut_off(
                exchange, Refusal(503, f"The engine has failed: {news.error or 'no reason given'}.", code="engine")
            )
        elif news.finish == "cancelled":
            self.cut_off(exchange, Refusal(503, "The engine has been stopped.", code="engine_stopped"))


def _observe(metrics: Metrics, run: _Run, at: float, news: News) -> None:
    tokens = len(news.tokens)
    if run.tokens:
        metrics.between.observe((at - run.last) / tokens, tokens)
    else:
        metrics.first_token.observe(at - run.exchange.arrived)
        metrics.queued.observe(news.queued_s)
        run.first = at
    run.last = at
    run.tokens += tokens
    metrics.generation_tokens += tokens
