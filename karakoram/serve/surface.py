"""What an API surface is: how one dialect of HTTP says a conversation, and how it hears the answer.

A surface holds no connection and knows no event loop. The server reads the body, checks the key, opens the answers,
feeds them with the engine's news and sends what comes out; a surface only translates, in four places:

    body ──Body──▶ checked fields ──parse──▶ Call ──open──▶ answers ──events──▶ bytes of SSE     (stream)
                                                                    └─whole───▶ one JSON object  (not a stream)
    Refusal ──error──▶ the error body of this API

`parse` and `open` run in a worker thread (they may take milliseconds); `Events` and `whole` run in the event loop, for
each step of each stream: keep them quick. Nothing here may keep a reference to a finished call, except what a surface
stores on purpose (and bounds).

A module with surfaces has `SURFACES: tuple[Surface, ...]` and, for those that only count tokens,
`COUNTERS: tuple[Counter, ...]`; `app.py` mounts them. A surface of more than one file is a folder (`serve/openai/`,
`serve/anthropic/`, `serve/responses/`) whose `__init__` has the two tuples, since a folder holds at most 12 files.

The order of calls on one `Events`, all on the same thread:

    start(answers)                       once, when the first news is there: `answer.usage` already has the prompt's
                                         tokens and the cached ones
    deltas(answer, deltas)               any number of times, for one answer each; with the last news of an answer
                                         `answer.finish_reason` is set (deltas may be empty then)
    finish(answers)                      once, when all answers have finished, in none of them with "error"
    fail(refusal)                        instead of `finish`, where the engine has failed in the middle
    ping()                               between any two of these, while nothing was sent for some seconds

Each returns whole SSE events (each ends with an empty line; no line feed inside `data`), b"" for nothing to send. In a
resumable stream the server puts an `id:` line before each event.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from pydantic import BaseModel

from karakoram.serve.refusal import Refusal
from karakoram.serve.service import Service
from karakoram.session.chat import Answer, ChatRequest
from karakoram.session.direct import Delta

KEEP_ALIVE = b": keep-alive\n\n"


@dataclass
class Call:
    """One request, understood. The server sets `id` (the surface's `id_prefix` and 32 hexadecimal digits), `created`
    (seconds since 1970) and `client` before it opens the answers; `model` is what the client asked for.

    extra   the surface's own, from `parse` to `events` and `whole`: the checked body, for example
    """

    chat: ChatRequest
    model: str
    stream: bool = False
    extra: Any = None
    id: str = ""
    created: int = 0


class Events(Protocol):
    """Encodes one streamed answer; see the order of calls above."""

    def start(self, answers: Sequence[Answer]) -> bytes: ...

    def deltas(self, answer: Answer, deltas: Sequence[Delta]) -> bytes: ...

    def finish(self, answers: Sequence[Answer]) -> bytes: ...

    def fail(self, refusal: Refusal) -> bytes: ...

    def ping(self) -> bytes:
        """What keeps the connection alive: `KEEP_ALIVE`, or an event of the API's own."""
        ...


@dataclass(frozen=True)
class Described:
    """What /openapi.json says of a path."""

    path: str
    summary: str
    tag: str
    answer_schema: Mapping[str, Any] = field(default_factory=lambda: {"type": "object"})


class Surface:
    """One path that answers conversations. Stateless, shared by all requests."""

    described: Described
    id_prefix: str
    Body: type[BaseModel]  # checks the JSON body; unknown fields are ignored, wrong ones are a 400 with their path

    def parse(self, body: Any, headers: Mapping[str, str], service: Service) -> Call:
        """The checked `Body` as a call. `headers` has lower-case names. Raises `Refusal` (400 with `param`) or any
        `KarakoramError`. `service` tells defaults: `service.sampling(thinking)`, `service.check_model(name)`."""
        raise NotImplementedError

    def open(self, call: Call, service: Service) -> Sequence[Answer]:
        """The answers to be fed, one for each choice."""
        return service.session.open(call.chat, call.id)

    def events(self, call: Call, service: Service) -> Events:
        """An encoder for a streamed answer."""
        raise NotImplementedError

    def whole(self, call: Call, answers: Sequence[Answer], service: Service) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        raise NotImplementedError

    def error(self, refusal: Refusal, request_id: str) -> dict[str, Any]:
        """The error body."""
        del request_id
        return refusal.openai_body()


class Counter:
    """One path that counts the tokens of a conversation without answering it."""

    described: Described
    Body: type[BaseModel]

    def parse(self, body: Any, headers: Mapping[str, str], service: Service) -> ChatRequest:
        """As `Surface.parse`."""
        raise NotImplementedError

    def whole(self, tokens: int) -> dict[str, Any]:
        """The body of the answer."""
        raise NotImplementedError

    def error(self, refusal: Refusal, request_id: str) -> dict[str, Any]:
        """The error body."""
        del request_id
        return refusal.openai_body()
