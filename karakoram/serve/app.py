"""The application: every path, the key at the door, errors in the shape of the API that was called, /openapi.json.

Routes read their bodies themselves (`answering.read_body`): the size is counted while it arrives, and checking happens
in a worker thread. What FastAPI adds is routing, the document, and the tools around it.
"""

from __future__ import annotations

import asyncio
import json
import re
import secrets
from collections.abc import AsyncIterator, Callable, MutableMapping
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from karakoram.errors import KarakoramError
from karakoram.serve import anthropic, openai, responses
from karakoram.serve.answering import Floor, answering, counting
from karakoram.serve.anthropic.described import ErrorResponse
from karakoram.serve.connection import Receive, Send
from karakoram.serve.openai.answers import Error
from karakoram.serve.pages import add_pages
from karakoram.serve.refusal import Refusal, refusal_of
from karakoram.serve.service import Service
from karakoram.serve.surface import Counter, Surface

SURFACES: tuple[Surface, ...] = (*openai.SURFACES, *anthropic.SURFACES, *responses.SURFACES)
COUNTERS: tuple[Counter, ...] = anthropic.COUNTERS
KEYLESS = ("/health",)
Scope = MutableMapping[str, Any]

_SHAPES: dict[str, Callable[[Refusal, str], dict[str, Any]]] = {
    **{counter.described.path: counter.error for counter in COUNTERS},
    **{surface.described.path: surface.error for surface in SURFACES},
}
_REF = "#/components/schemas/"


def create_app(service: Service) -> FastAPI:
    """The application over a service; serve it with `listen.run`, or any ASGI server with one process."""
    floors: list[Floor] = []

    def floor_of() -> Floor:
        return floors[-1]

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        floor = Floor(service)
        floors.append(floor)
        app.state.floor = floor
        beat = asyncio.ensure_future(floor.beat())
        try:
            yield
        finally:
            beat.cancel()
            floor.close()

    app = FastAPI(
        title="Karakoram",
        version=service.version or "0",
        lifespan=lifespan,
        docs_url=None,  # both pages load scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.described = {}  # of each path with a body: its model, and the schema of the answer
    for surface in SURFACES:
        _mount(app, surface, answering(surface, floor_of))
    for counter in COUNTERS:
        _mount(app, counter, counting(counter, floor_of))
    add_pages(app, service, floor_of)
    app.add_middleware(Door, service=service)
    _add_handlers(app)
    app.openapi = lambda: _document(app, bool(service.locked))
    return app


def _mount(app: FastAPI, one: Surface | Counter, endpoint: Any) -> None:
    described = one.described
    answers: dict[int | str, dict[str, Any]] = {
        200: {"content": {"application/json": {"schema": {}}}},
        400: {},
        404: {},
        413: {},
    }
    app.state.described[described.path] = (one.Body, dict(described.answer_schema))
    extra: dict[str, Any] = {}
    if isinstance(one, Surface):
        answers[200]["content"]["text/event-stream"] = {}
        answers[429] = {}
        resumable = {"name": "X-Resumable", "in": "header", "required": False, "schema": {"type": "string"}}
        resumable["description"] = "true: a stream goes on when its connection breaks; see /v1/streams"
        extra["parameters"] = [resumable]
    app.add_api_route(
        described.path, endpoint, methods=["POST"], summary=described.summary, tags=[described.tag],
        responses=answers, openapi_extra=extra,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------- errors


def error_response(scope: Scope, refusal: Refusal) -> Response:
    """A refusal in the shape of the API that was called."""
    path, request_id = scope["path"], scope["karakoram.request_id"]
    if path in _SHAPES:
        body = _SHAPES[path](refusal, request_id)
    elif path.startswith("/v1/messages"):
        body = refusal.anthropic_body(request_id)
    else:
        body = refusal.openai_body()
    headers = {}
    if refusal.retry_after_s is not None:
        headers["retry-after"] = str(refusal.retry_after_s)
    if refusal.status == 401:
        headers["www-authenticate"] = "Bearer"
    # Escapes throughout: what the client sent may stand in the message.
    return Response(json.dumps(body), refusal.status, headers, "application/json")


def _add_handlers(app: FastAPI) -> None:
    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, Refusal)
        return error_response(request.scope, error)

    async def below(request: Request, error: Exception) -> Response:
        assert isinstance(error, KarakoramError)
        return error_response(request.scope, refusal_of(error))

    async def invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        param = str(first["loc"][-1])
        return error_response(request.scope, Refusal(400, f"{param}: {first['msg']}.", param))

    async def routed(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        what = f"{request.method} {request.url.path}: {error.detail}."
        response = error_response(request.scope, Refusal(error.status_code, what))
        response.headers.update(error.headers or {})
        return response

    async def vanished(request: Request, error: Exception) -> Response:
        return Response(status_code=400)  # the client has gone before its body was complete

    async def broken(request: Request, error: Exception) -> Response:
        response = error_response(request.scope, Refusal(500, "This is a bug; the server's log has the traceback."))
        # This answer does not come through the door, and uvicorn closes the connection after it: clients must know.
        response.raw_headers += [*_id_headers(request.scope), (b"connection", b"close")]
        return response

    app.add_exception_handler(Refusal, refused)
    app.add_exception_handler(KarakoramError, below)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, routed)
    app.add_exception_handler(ClientDisconnect, vanished)
    app.add_exception_handler(Exception, broken)


class Door:
    """Asks for the key, on every path but `KEYLESS`; whoever comes in is known by a digest of it.

    Gives each request an id, which stands in the headers of its answer. One that a model answers is known by its
    answer's id from then on (`answering`)."""

    def __init__(self, app: Any, service: Service) -> None:
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope["karakoram.request_id"] = "req_" + secrets.token_hex(16)

        async def send_with_id(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *_id_headers(scope)]
            await send(message)

        await self._enter(scope, receive, send_with_id)

    async def _enter(self, scope: Scope, receive: Receive, send: Send) -> None:
        sent = {name: value.decode("utf-8", "surrogateescape") for name, value in scope["headers"]}
        try:
            scope["karakoram.client"] = self._service.admit(lambda name: sent.get(name.encode()))
        except Refusal as refusal:
            if scope["path"] not in KEYLESS:
                await error_response(scope, refusal)(scope, receive, send)
                return
            scope["karakoram.client"] = ""
        await self._app(scope, receive, send)


def _id_headers(scope: Scope) -> list[tuple[bytes, bytes]]:
    """The request's id under OpenAI's name and under Anthropic's."""
    request_id = scope["karakoram.request_id"].encode()
    return [(b"x-request-id", request_id), (b"request-id", request_id)]


# ---------------------------------------------------------------------------------------------------- the document


def _document(app: FastAPI, locked: bool) -> dict[str, Any]:
    """/openapi.json: the routes, with the bodies and answers that surfaces describe, and errors that all have."""
    if app.openapi_schema is not None:
        return app.openapi_schema
    document = get_openapi(title=app.title, version=app.version, routes=app.routes)
    components: dict[str, Any] = {}
    openai_error = _hoisted(Error.model_json_schema(), "", components)
    anthropic_error = _hoisted(ErrorResponse.model_json_schema(), "Messages", components)
    for path, item in document["paths"].items():
        for operation in item.values():
            if path in app.state.described:
                body, answer = app.state.described[path]
                _describe(path, operation, body, answer, components)
            error = anthropic_error if path.startswith("/v1/messages") else openai_error
            _complete(path, operation, {"application/json": {"schema": error}}, locked)
    document["components"] = {"schemas": components}
    if locked:
        bearer, key = {"type": "http", "scheme": "bearer"}, {"type": "apiKey", "in": "header", "name": "x-api-key"}
        document["components"]["securitySchemes"] = {"bearer": bearer, "key": key}
    app.openapi_schema = document
    return document


def _describe(
    path: str, operation: dict[str, Any], body: Any, answer: dict[str, Any], components: dict[str, Any]
) -> None:
    prefix = "".join(part.capitalize() for part in re.split(r"\W|_", path.removeprefix("/v1")))  # surfaces share names
    schema = _hoisted(body.model_json_schema(), prefix, components)
    operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    operation["responses"].setdefault("413", {})
    operation["responses"]["200"]["content"]["application/json"]["schema"] = _hoisted(answer, prefix, components)


def _complete(path: str, operation: dict[str, Any], error: dict[str, Any], locked: bool) -> None:
    operation["responses"].pop("422", None)
    if path not in KEYLESS:
        operation["responses"].setdefault("503", {})
        if locked:
            operation["responses"]["401"] = {}
            operation["security"] = [{"bearer": []}, {"key": []}]
    for status, answer in operation["responses"].items():
        answer["description"] = _SAID.get(status) or answer.get("description") or "An answer"
        if status != "200":
            answer.setdefault("content", error)
            if status in ("429", "503"):
                answer["headers"] = {"Retry-After": {"schema": {"type": "string"}}}


_SAID = {
    "400": "The request is wrong; `param` names the field",
    "401": "A key is needed",
    "404": "There is no such thing",
    "410": "These events have been dropped",
    "413": "Too large: the body, or the conversation for the context",
    "429": "The queue is full",
    "503": "The model is loading, or the engine has stopped",
}


def _hoisted(schema: dict[str, Any], prefix: str, components: dict[str, Any]) -> dict[str, Any]:
    """The schema with its `$defs` moved among the components, under names with a prefix; a reference to it."""

    def moved(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: moved(item) for key, item in value.items() if key != "$defs"} | _mapped(value)
        return [moved(item) for item in value] if isinstance(value, list) else value

    def _mapped(value: dict[str, Any]) -> dict[str, Any]:
        reference = value.get("$ref")
        if isinstance(reference, str) and reference.startswith("#/$defs/"):
            return {"$ref": _REF + prefix + reference.removeprefix("#/$defs/")}
        mapping = value.get("mapping")
        if isinstance(mapping, dict) and all(isinstance(item, str) for item in mapping.values()):
            return {"mapping": {key: item.replace("#/$defs/", _REF + prefix) for key, item in mapping.items()}}
        return {}

    for name, inner in schema.get("$defs", {}).items():
        components[prefix + name] = moved(inner)
    if "title" not in schema:
        return moved(schema)
    components[prefix + schema["title"]] = moved(schema)
    return {"$ref": _REF + prefix + schema["title"]}
