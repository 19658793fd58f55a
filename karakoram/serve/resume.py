"""Streams that outlive their connection.

A request with `X-Resumable: true` writes into a recording: its events, numbered from 0, as many of the latest as fit
in `Limits.replay_bytes`. The connection that asked is the recording's first reader; when it breaks, the model goes on
for `Limits.resume_s`, and whoever comes back with the same key and `Last-Event-ID: n` reads from event n + 1. Several
may read at once. A recording that nobody has read for that long is dropped, finished or not.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque

from karakoram.serve.connection import Encoder, Line, Pulse, Receive, Send, left
from karakoram.serve.refusal import Refusal
from karakoram.serve.service import Limits
from karakoram.serve.stream import Bell, Exchange, NewsDesk
from karakoram.serve.surface import KEEP_ALIVE, Events


class Recording:
    """The events of one stream. `first` is the number of the oldest one kept; `done` when no more will come."""

    def __init__(self, exchange: Exchange, client: str, most_bytes: int) -> None:
        self.exchange, self.client = exchange, client
        self.first = 0
        self.done = False
        self.readers: set[Bell] = set()
        self.left_at = time.monotonic()
        self._events: deque[bytes] = deque()
        self._bytes, self._most_bytes = 0, most_bytes

    @property
    def end(self) -> int:
        """The number that the next event will have."""
        return self.first + len(self._events)

    def add(self, body: bytes) -> None:
        """Number and keep the events in `body`; wake the readers."""
        for event in body.split(b"\n\n"):
            if not event:
                continue
            numbered = b"id: %d\n%b\n\n" % (self.end, event)
            self._events.append(numbered)
            self._bytes += len(numbered)
        while self._bytes > self._most_bytes and len(self._events) > 1:
            self._bytes -= len(self._events.popleft())
            self.first += 1
        self._wake()

    def finish(self) -> None:
        """No more events will come."""
        self.done = True
        self._wake()

    def since(self, number: int) -> bytes:
        """The events from `number` on, which must not be below `first`."""
        skipped = number - self.first
        return b"".join(self._events if not skipped else list(self._events)[skipped:])

    def _wake(self) -> None:
        for bell in self.readers:
            bell.ring()


class Shelf:
    """The recordings of a server, by the id of their request."""

    def __init__(self, desk: NewsDesk, pulse: Pulse, limits: Limits) -> None:
        self._desk, self._pulse, self._limits = desk, pulse, limits
        self._recordings: dict[str, Recording] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def record(self, exchange: Exchange, events: Events, client: str) -> Recording:
        """Start to record. `Refusal` 429 where as many as may be are running already."""
        if len(self._recordings) >= self._limits.recordings:
            over = [name for name, recording in self._recordings.items() if recording.done and not recording.readers]
            if not over:
                what = f"{self._limits.recordings} resumable streams are kept already."
                raise Refusal(429, f"{what} Leave out X-Resumable, or try again.", code="queue_full", retry_after_s=5)
            del self._recordings[over[0]]
        recording = Recording(exchange, client, self._limits.replay_bytes)
        self._recordings[exchange.call.id] = recording
        task = asyncio.get_running_loop().create_task(_record(exchange, events, recording))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(lambda _: self._desk.drop(exchange))
        return recording

    def find(self, name: str, client: str, last_event_id: str | None) -> tuple[Recording, int]:
        """A recording of this client and the number of the event to go on from. `Refusal` 400, 404 or 410."""
        recording = self._recordings.get(name)
        if recording is None or recording.client != client:
            raise Refusal(404, f"There is no stream {name!r} to go on with.", "request_id", "stream_not_found")
        if last_event_id is None:
            start = 0
        elif last_event_id.isascii() and last_event_id.isdigit() and len(last_event_id) < 16:
            start = int(last_event_id) + 1
        else:
            raise Refusal(400, "Last-Event-ID is not the number of an event.", "Last-Event-ID")
        if start > recording.end:
            raise Refusal(400, f"Last-Event-ID is above {recording.end - 1}, the last event.", "Last-Event-ID")
        if start < recording.first:
            what = f"Events before {recording.first} have been dropped."
            raise Refusal(410, f"{what} Ask again from the start.", "Last-Event-ID", "events_dropped")
        return recording, start

    async def play(self, recording: Recording, start: int, receive: Receive, send: Send) -> None:
        """Stream a recording from event `start` on until it ends or the reader leaves."""
        line = Line(send, Bell(), self._pulse)
        watch = asyncio.get_running_loop().create_task(_mark_left(receive, line.bell))
        recording.readers.add(line.bell)
        try:
            await line.open()
            await _read(recording, start, line, watch)
        finally:
            line.close()
            watch.cancel()
            recording.readers.discard(line.bell)
            recording.left_at = time.monotonic()

    def sweep(self) -> None:
        """Drop what nobody has read for too long."""
        late = time.monotonic() - self._limits.resume_s
        for name, recording in list(self._recordings.items()):
            if not recording.readers and recording.left_at < late:
                del self._recordings[name]
                if not recording.done:
                    self._desk.drop(recording.exchange)


async def _record(exchange: Exchange, events: Events, recording: Recording) -> None:
    encoder = Encoder(exchange, events)
    try:
        while not (encoder.ended or exchange.gone):
            await exchange.bell.wait()
            recording.add(await encoder.next())
    finally:
        recording.finish()


async def _mark_left(receive: Receive, bell: Bell) -> None:
    await left(receive)
    bell.ring()


async def _read(recording: Recording, position: int, line: Line, watch: asyncio.Task[None]) -> None:
    while not watch.done():
        if position < recording.first:
            await line.write(b": events have been dropped\n\n", last=True)  # it fell behind by all that is kept
            return
        if position < recording.end:
            body, position = recording.since(position), recording.end
            await line.write(body)
        elif recording.done:
            await line.write(b"", last=True)
            return
        elif line.quiet:
            await line.write(KEEP_ALIVE)
        else:
            await line.bell.wait()
