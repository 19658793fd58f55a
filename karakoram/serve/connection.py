"""The connections' side of a stream: what has come is encoded and sent, and who has left is noticed.

A connection that nothing was sent on for `Limits.keep_alive_s` gets a ping: one `Pulse` looks after all of them, since
a timer for each wait would cost more than the chunk that ends it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from karakoram.serve.refusal import Refusal
from karakoram.serve.stream import Bell, Exchange
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

    async def open(self, headers: list[tuple[bytes, bytes]]) -> None:
        """Send the status and the headers."""
        self._pulse.add(self)
        await self._send({"type": "http.response.start", "status": 200, "headers": [*SSE_HEADERS, *headers]})

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


async def send_stream(exchange: Exchange, events: Events, line: Line, headers: list[tuple[bytes, bytes]]) -> None:
    """Answer with a stream of events until the answers end or `exchange.gone`."""
    try:
        await line.open(headers)
        started = False
        while not exchange.gone:
            await exchange.bell.wait()
            if exchange.gone:
                return
            over = exchange.over
            if exchange.pending or over:
                body, started = encode(exchange, events, started, over)
            else:
                body = events.ping() if line.quiet else b""
            if body or over:
                await line.write(body, last=over)
            if over:
                return
    finally:
        line.close()


def encode(exchange: Exchange, events: Events, started: bool, over: bool) -> tuple[bytes, bool]:
    """What has come, as events, with the end where it is `over`; and whether the stream has now started."""
    parts: list[bytes] = []
    try:
        taken = exchange.take()
        if not started and (taken or over):
            parts.append(events.start(exchange.answers))
            started = True
        for answer, deltas in taken:
            if deltas or answer.finish_reason is not None:
                parts.append(events.deltas(answer, deltas))
    except Exception:  # a bug in parsing or encoding one answer must not take the others' server down
        log.exception("An answer could not be encoded")
        exchange.refusal = Refusal(503, "The answer could not be encoded; the log says why.", code="internal")
    if over:
        refusal = exchange.refusal
        parts.append(events.finish(exchange.answers) if refusal is None else events.fail(refusal))
    return (parts[0] if len(parts) == 1 else b"".join(parts)), started


async def gather(exchange: Exchange) -> None:
    """Feed the answers until all have ended. Raises the `Refusal` where they will not."""
    while not exchange.gone:
        exchange.take()
        if exchange.over and not exchange.pending:
            break
        await exchange.bell.wait()
    if exchange.refusal is not None:
        raise exchange.refusal
