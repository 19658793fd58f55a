"""The pages that answer no conversation: models, tokens, health, metrics, version, and streams to come back to.

`/tokenize`, `/detokenize` and `/tokenizer_info` have vLLM's shapes: lm-eval finds them by itself. `/v1/models` has the
fields of OpenAI's list and of Anthropic's in one object.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Annotated, Any

from fastapi import FastAPI, Header, Request, Response

from karakoram.chat import Tokenizer
from karakoram.serve.answering import Floor, Replay, checked, json_response, read_body, read_json
from karakoram.serve.metrics import CONTENT_TYPE
from karakoram.serve.openai import schemas
from karakoram.serve.openai.conversation import read_conversation
from karakoram.serve.refusal import Refusal
from karakoram.serve.service import Service

FloorOf = Callable[[], Floor]
Responses = dict[int | str, dict[str, Any]]
_ANY = {"type": "object"}


def add_pages(app: FastAPI, service: Service, floor_of: FloorOf) -> None:
    """Mount them all. `app.py` adds to /openapi.json what all paths have in common."""
    _add_states(app, service)
    _add_models(app, service)
    _add_tokens(app, service, floor_of)
    _add_streams(app, floor_of)


def _add_states(app: FastAPI, service: Service) -> None:
    async def health() -> Response:
        """200 when requests are answered, 503 before and after. Needs no key."""
        state = service.state
        return json_response({"status": state}, 200 if state == "ready" else 503)

    async def metrics() -> Response:
        """Prometheus text, with vLLM's names where they exist."""
        return Response(service.metrics.page(), media_type=CONTENT_TYPE)

    async def version() -> Response:
        """The version of this server."""
        return json_response({"version": service.version})

    text: Responses = {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}
    _get(app, "/health", health, "Whether requests are answered", "operation", {503: _described(_ANY)})
    app.add_api_route(
        "/metrics", metrics, methods=["GET"], summary="Counts and times", tags=["operation"], responses=text,
        response_class=Response,
    )  # fmt: skip
    _get(app, "/version", version, "Version", "operation")


def _add_models(app: FastAPI, service: Service) -> None:
    async def models() -> Response:
        """Each name that the model has."""
        entries = [_model(service, name) for name in service.names]
        ends = {"first_id": entries[0]["id"], "last_id": entries[-1]["id"], "has_more": False}
        return json_response({"object": "list", "data": entries, **ends})

    async def model(model_id: str) -> Response:
        """One name."""
        return json_response(_model(service, service.check_model(model_id)))

    _get(app, "/v1/models", models, "Models", "openai")
    _get(app, "/v1/models/{model_id:path}", model, "One model", "openai", {404: {}})


def _model(service: Service, name: str) -> dict[str, Any]:
    started = int(service.started_at)
    return {
        "id": name,
        "object": "model",
        "type": "model",
        "created": started,
        "created_at": datetime.fromtimestamp(started, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "owned_by": "karakoram",
        "display_name": name,
        "root": service.names[0],
        "parent": None,
        "max_model_len": service.source.context,
    }


def _add_tokens(app: FastAPI, service: Service, floor_of: FloorOf) -> None:
    async def tokenize(request: Request) -> Response:
        """Token ids of a prompt, or of a conversation with its frame."""
        raw = await read_body(request, service.limits.request_bytes)

        def work() -> dict[str, Any]:
            body = checked(schemas.TokenizeRequest, read_json(raw))
            service.check_model(body.model)
            ids = _tokens_of(body, service)
            tokenizer = service.fmt.tokenizer
            strings = [tokenizer.decode([token]) for token in ids] if body.return_token_strs else None
            context = service.source.context
            return {"count": len(ids), "max_model_len": context, "tokens": ids, "token_strs": strings}

        return json_response(await floor_of().off_loop(work))

    async def detokenize(request: Request) -> Response:
        """The text of token ids."""
        raw = await read_body(request, service.limits.request_bytes)

        def work() -> dict[str, Any]:
            body = checked(schemas.DetokenizeRequest, read_json(raw))
            service.check_model(body.model)
            return {"prompt": service.fmt.tokenizer.decode(body.tokens)}

        return json_response(await floor_of().off_loop(work))

    async def tokenizer_info() -> Response:
        """What the tokenizer is, in the words of a `tokenizer_config.json`."""
        return json_response(_info(service.fmt.tokenizer, service.source.context))

    _post(app, "/tokenize", tokenize, "Text or messages to token ids", schemas.TokenizeRequest)
    _post(app, "/detokenize", detokenize, "Token ids to text", schemas.DetokenizeRequest)
    _get(app, "/tokenizer_info", tokenizer_info, "The tokenizer", "tokens")


def _tokens_of(body: schemas.TokenizeRequest, service: Service) -> list[int]:
    tokenizer = service.fmt.tokenizer
    if (body.prompt is None) == (body.messages is None):
        raise Refusal(400, "Give either prompt or messages.", "prompt")
    if body.prompt is not None:
        # lm-eval asks for the id of "[EOS]" in this way; inside a longer text such a name is text.
        special = tokenizer.special_ids.get(body.prompt)
        return tokenizer.encode(body.prompt) if special is None else [special]
    options = body.chat_template_kwargs or schemas.TemplateOptions()
    tools: Any = body.tools or None  # as they were sent: plain objects
    return service.fmt.encode(
        read_conversation(body.messages or ()),
        tools,
        options.thinking is not False,
        bool(options.preserve_thinking),
        body.add_generation_prompt,
        "canonical",
    )


def _info(tokenizer: Tokenizer, context: int) -> dict[str, Any]:
    names = {name: name for name in ("[BOS]", "[EOS]", "[PAD]") if name in tokenizer.special_ids}
    return {
        "tokenizer_class": "TikTokenTokenizer",
        "bos_token": names.get("[BOS]"),
        "eos_token": names.get("[EOS]"),
        "pad_token": names.get("[PAD]"),
        "vocab_size": tokenizer.n_vocab,
        "model_max_length": context,
        "added_tokens_decoder": {
            str(token): {"content": name, "special": True} for name, token in tokenizer.special_ids.items()
        },
    }


def _add_streams(app: FastAPI, floor_of: FloorOf) -> None:
    async def stream(
        request: Request,
        request_id: str,
        last_event_id: Annotated[str | None, Header(description="Go on after this event; left out: from 0.")] = None,
    ) -> Response:
        """Go on reading a stream that was begun with `X-Resumable: true`, with the same key."""
        floor = floor_of()
        client = request.scope["karakoram.client"]
        recording, start = floor.shelf.find(request_id, client, last_event_id)
        request.scope["karakoram.request_id"] = request_id
        return Replay(floor, recording, start)

    event_stream = {"content": {"text/event-stream": {}}}
    events: Responses = {200: event_stream, 400: {}, 404: {}, 410: {}}
    app.add_api_route(
        "/v1/streams/{request_id}", stream, methods=["GET"], summary="Go on with a stream", tags=["streams"],
        responses=events, response_class=Response,
    )  # fmt: skip


def _described(schema: dict[str, Any]) -> dict[str, Any]:
    return {"content": {"application/json": {"schema": schema}}}


def _get(app: FastAPI, path: str, endpoint: Any, summary: str, tag: str, more: Responses | None = None) -> None:
    responses: Responses = {200: _described(_ANY), **(more or {})}
    app.add_api_route(path, endpoint, methods=["GET"], summary=summary, tags=[tag], responses=responses)


def _post(app: FastAPI, path: str, endpoint: Any, summary: str, model: Any) -> None:
    app.state.described[path] = (model, _ANY)
    responses: Responses = {200: _described(_ANY), 400: {}, 404: {}}
    app.add_api_route(path, endpoint, methods=["POST"], summary=summary, tags=["tokens"], responses=responses)
