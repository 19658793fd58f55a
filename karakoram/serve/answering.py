"""One request, from its body to its answer, whichever surface it came through.

    body ──read_body──▶ JSON ──▶ [worker thread: check, parse, open, submit] ──▶ stream · whole · recording

The worker thread keeps rendering and compiling, which can take milliseconds, away from the streams that are running.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, TypeVar

from fastapi import Request, Response
from pydantic import BaseModel, ValidationError
from pydantic_core import from_json

from karakoram.errors import KarakoramError
from karakoram.serve.connection import Line, Pulse, gather, left, send_stream
from karakoram.serve.openai.chat import dumps
from karakoram.serve.refusal import Refusal, refusal_of
from karakoram.serve.resume import Recording, Shelf
from karakoram.serve.service import Service
from karakoram.serve.stream import Exchange, NewsDesk
from karakoram.serve.surface import Counter, Surface

WORKERS = 4  # a schema that takes long to compile holds up one of them
_WHOLE_BATCH_TOKENS = 256  # who waits for the end need not be woken for every token

Endpoint = Callable[[Request], Coroutine[Any, Any, Response]]
T = TypeVar("T")


class Floor:
    """What all requests of a running server share; lives as long as its event loop."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.desk = NewsDesk(service, asyncio.get_running_loop())
        self.pulse = Pulse(service.limits.keep_alive_s)
        self.shelf = Shelf(self.desk, self.pulse, service.limits)
        self._workers = ThreadPoolExecutor(WORKERS, "karakoram-open")

    async def beat(self) -> None:
        """Pings and the end of forsaken recordings; runs until it is cancelled."""
        limits = self.service.limits
        step_s = min(limits.keep_alive_s, limits.resume_s, 4.0) / 4
        while True:
            await asyncio.sleep(step_s)
            self.pulse.tick()
            self.shelf.sweep()

    async def off_loop(self, work: Callable[[], T]) -> T:
        """The result of `work`, done in a worker thread; what a floor below refuses, as `Refusal`."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self._workers, work)
        except KarakoramError as error:
            raise refusal_of(error) from error

    def close(self) -> None:
        """End all answers."""
        self.service.close()
        self.desk.cut_off_all(Refusal(503, "The server is shutting down.", code="engine_stopped"))
        self._workers.shutdown(wait=False, cancel_futures=True)


async def read_body(request: Request, most_bytes: int) -> bytes:
    """The body. `Refusal` 413 as soon as it is known to be too large."""
    length = request.headers.get("content-length", "")
    size = int(length) if length.isascii() and length.isdigit() and len(length) < 20 else 0
    pieces: list[bytes] = []
    if size <= most_bytes:
        size = 0
        async for piece in request.stream():
            size += len(piece)
            if size > most_bytes:
                break
            pieces.append(piece)
    if size > most_bytes:
        raise Refusal(413, f"The request has more than {most_bytes} bytes.", code="request_too_large")
    return b"".join(pieces)


def read_json(raw: bytes) -> dict[str, Any]:
    """A JSON object. `Refusal` 400 for anything else: bad UTF-8, lone surrogates, NaN, nesting without end."""
    try:
        body = from_json(raw, allow_inf_nan=False)
    except ValueError as error:
        raise Refusal(400, f"The body is not valid JSON: {_ascii(str(error))}.", code="invalid_json") from error
    if not isinstance(body, dict):
        raise Refusal(400, f"The body is a JSON {type(body).__name__}, not an object.", code="invalid_json")
    return body


def checked(model: type[BaseModel], body: dict[str, Any]) -> Any:
    """The body's fields. `Refusal` 400 names the path of the first that is wrong."""
    try:
        return model.model_validate(body)
    except ValidationError as error:
        problems = [(_path_of(problem, body), problem["msg"]) for problem in error.errors(include_url=False)]
        path, said = max(
            problems, key=lambda problem: len(problem[0])
        )  # of a union's members, the one that got furthest
        raise Refusal(400, f"{path or 'body'}: {_ascii(said)}.", path or None, "invalid_value") from error


def _path_of(problem: Any, body: Any) -> str:
    path = _path(problem["loc"], body)
    if problem["type"] in ("union_tag_invalid", "union_tag_not_found"):
        path += "." + problem["ctx"]["discriminator"].strip("'")
    return path


def _path(location: tuple[int | str, ...], body: Any) -> str:
    """`messages[3].content` of Pydantic's location, which also names the members of unions that were tried."""
    path, value = "", body
    for place, step in enumerate(location):
        if isinstance(value, dict) and (step in value or place + 1 == len(location)):
            path += f".{step}" if path else str(step)
            value = value.get(step)
        elif isinstance(value, list) and isinstance(step, int) and step < len(value):
            path += f"[{step}]"
            value = value[step]
    return path


def _ascii(text: str) -> str:
    return text.encode("ascii", "backslashreplace").decode().rstrip(".")


def answering(surface: Surface, floor_of: Callable[[], Floor]) -> Endpoint:
    """The endpoint of a surface."""

    async def answer(request: Request) -> Response:
        arrived = time.perf_counter()
        floor = floor_of()
        limits = floor.service.limits
        raw = await read_body(request, limits.request_bytes)
        client, headers = request.scope["karakoram.client"], dict(request.headers)
        exchange = await floor.off_loop(lambda: _open(surface, floor, raw, headers, client, arrived))
        request.scope["karakoram.request_id"] = exchange.call.id
        if not exchange.call.stream:
            return await _whole(surface, floor, exchange, request)
        events = surface.events(exchange.call, floor.service)
        if headers.get("x-resumable", "").lower() == "true":
            try:
                recording = floor.shelf.record(exchange, events, client)
            except Refusal:
                floor.desk.drop(exchange)
                raise
            return Replay(floor, recording, 0)
        return EventStream(floor, exchange, events)

    return answer


def _open(surface: Surface, floor: Floor, raw: bytes, headers: dict[str, str], client: str, arrived: float) -> Exchange:
    """From bytes to answers that the engine is writing; runs in a worker thread."""
    service = floor.service
    _ = service.opened  # 503 comes before 400
    call = surface.parse(checked(surface.Body, read_json(raw)), headers, service)
    call.chat = replace(call.chat, client=client)
    call.id, call.created = surface.id_prefix + secrets.token_hex(16), int(time.time())
    answers = surface.open(call, service)
    exchange = Exchange(call, answers, arrived, 1 if call.stream else _WHOLE_BATCH_TOKENS)
    floor.desk.submit(exchange)
    return exchange


async def _whole(surface: Surface, floor: Floor, exchange: Exchange, request: Request) -> Response:
    watch = asyncio.ensure_future(left(request.receive))
    watch.add_done_callback(lambda done: None if done.cancelled() else floor.desk.drop(exchange))
    try:
        await gather(exchange)
        if exchange.gone:
            return Response(status_code=503)  # nobody will read it
        body = surface.whole(exchange.call, exchange.answers, floor.service)
    finally:
        watch.cancel()
        floor.desk.drop(exchange)
    return json_response(body)


class EventStream(Response):
    """A stream of events on one connection; when that breaks, the answers are cancelled."""

    def __init__(self, floor: Floor, exchange: Exchange, events: Any) -> None:
        super().__init__()
        self._floor, self._exchange, self._events = floor, exchange, events

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        exchange, desk = self._exchange, self._floor.desk
        watch = asyncio.ensure_future(left(receive))
        watch.add_done_callback(lambda done: None if done.cancelled() else desk.drop(exchange))
        line = Line(send, exchange.bell, self._floor.pulse)
        try:
            await send_stream(exchange, self._events, line)
        finally:
            watch.cancel()
            desk.drop(exchange)


class Replay(Response):
    """A recording from some event on; when the connection breaks, it goes on."""

    def __init__(self, floor: Floor, recording: Recording, start: int) -> None:
        super().__init__()
        self._floor, self._recording, self._start = floor, recording, start

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await self._floor.shelf.play(self._recording, self._start, receive, send)


def counting(counter: Counter, floor_of: Callable[[], Floor]) -> Endpoint:
    """The endpoint of a counter."""

    async def count(request: Request) -> Response:
        floor = floor_of()
        service = floor.service
        raw = await read_body(request, service.limits.request_bytes)
        headers = dict(request.headers)

        def work() -> int:
            _ = service.opened
            chat = counter.parse(checked(counter.Body, read_json(raw)), headers, service)
            return len(service.session.encode(replace(chat, client=request.scope["karakoram.client"])))

        return json_response(counter.whole(await floor.off_loop(work)))

    return count


def json_response(body: dict[str, Any], status: int = 200) -> Response:
    """A JSON body in UTF-8."""
    raw = dumps(body).encode("utf-8", "replace")
    return Response(raw, status, media_type="application/json")
