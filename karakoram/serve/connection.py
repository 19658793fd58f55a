"""The connections' side of a stream: what has come is encoded and sent, and who has left is noticed.

A connection that nothing was sent on for `Limits.keep_alive_s` gets a ping: one `Pulse` looks after all of them, since
a timer for each wait would cost more than the chunk that ends it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from karakoram.serve.refusal import Refusal
from karakoram.serve.stream import MOST_TAKEN, Bell, Exchange
from karakoram.serve.surface import Events

Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]

log = logging.getLogger("karakoram.serve")

_CLOCK = time.perf_counter


class Pulse:
    """Rings the bells of connections in which nothing was sent for a while."""

    def __init__(self, interval_s: float) -> None:
        self.interval_s = interval_s
        self._lines: set[Line] = set()
        self.add, self.remove = self._lines.add, self._lines.discard

    def tick(self) -> None:
        """Ring where it is time; to be called a few times in each interval."""
        late = _CLOCK() - self.interval_s
        for line in self._lines:
            if line.sent_at < late:
                line.bell.ring()


class Line:
    """One connection that is being streamed to."""

    def __init__(self, send: Send, bell: Bell, pulse: Pulse) -> None:
        self._send, self.bell, self._pulse = send, bell, pulse
        self.sent_at = _CLOCK()

    async def open(self) -> None:
        """Send the status and the headers."""
        self._pulse.add(self)
        await self._send({"type": "http.response.start", "status": 200, "headers": SSE_HEADERS})

    async def write(self, body: bytes, last: bool = False) -> None:
        """Send a piece of the body. Waits while the reader is slow."""
        await self._send({"type": "http.response.body", "body": body, "more_body": not last})
        self.sent_at = _CLOCK()

    @property
    def quiet(self) -> bool:
        """Whether it is time for a ping."""
        return _CLOCK() - self.sent_at >= self._pulse.interval_s

    def close(self) -> None:
        """Forget this connection."""
        self._pulse.remove(self)


SSE_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would hold events back
]


async def left(receive: Receive) -> None:
    """Until the client has closed the connection. The body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def send_stream(exchange: Exchange, events: Events, line: Line) -> None:
    """Answer with a stream of events until the answers end or `exchange.gone`."""
    try:
        await line.open()
        encoder = Encoder(exchange, events)
        while not (encoder.ended or exchange.gone):
            await exchange.bell.wait()
            body = await encoder.next()
            if not body and not encoder.ended and line.quiet:
                body = events.ping()
            if (body or encoder.ended) and not exchange.gone:
                exchange.writing = True
                await line.write(body, last=encoder.ended)
                exchange.writing = False
    finally:
        line.close()


class Encoder:
    """One exchange as events. `ended` after the last ones."""

    def __init__(self, exchange: Exchange, events: Events) -> None:
        self.ended = False
        self._exchange, self._events = exchange, events
        self._started = False

    async def next(self) -> bytes:
        """What has come since the last time, b"" for nothing. Lets others run first where much has come."""
        exchange = self._exchange
        if len(exchange.pending) > MOST_TAKEN:
            await asyncio.sleep(0)
        if not exchange.pending and not exchange.over:
            return b""
        parts: list[bytes] = []
        try:
            self._encode(parts)
            if exchange.over and exchange.refusal is None:
                parts.append(self._events.finish(exchange.answers))
        except Exception:  # a bug in parsing or encoding one answer must not take the others' server down
            log.exception("An answer could not be encoded")
            exchange.pending = []
            exchange.refusal = Refusal(503, "The answer could not be encoded; the log says why.", code="internal")
        self.ended = exchange.over
        if exchange.refusal is not None and self.ended:
            parts.append(self._events.fail(exchange.refusal))
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _encode(self, parts: list[bytes]) -> None:
        exchange, events = self._exchange, self._events
        taken = exchange.take()
        if not self._started:
            self._started = True
            parts.append(events.start(exchange.answers))
        for answer, deltas in taken:
            if deltas or answer.finish_reason is not None:
                parts.append(events.deltas(answer, deltas))


async def gather(exchange: Exchange) -> None:
    """Feed the answers until all have ended. Raises the `Refusal` where they will not."""
    while not exchange.gone:
        exchange.take()
        if exchange.over:
            break
        await asyncio.sleep(0)
        await exchange.bell.wait()
    if exchange.refusal is not None:
        raise exchange.refusal
