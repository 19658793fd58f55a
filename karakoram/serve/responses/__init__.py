"""OpenAI's Responses API: `/v1/responses`.

`schemas` and `described` are the wire, `requests` is the way in, `answers` the way out, `store` what can be named by
`previous_response_id`: answers are kept in memory for a while, unless the request says `store: false`.

Refused, each with its path: images, files, custom and hosted tools and their items, background responses, stored
prompts, conversations, truncation "auto".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from karakoram.serve.openai.chat import dumps
from karakoram.serve.refusal import Refusal
from karakoram.serve.responses import schemas
from karakoram.serve.responses.answers import ID_PREFIX, Item, ResponseEvents, finished, items_of
from karakoram.serve.responses.described import Response
from karakoram.serve.responses.requests import Message, echo_of, read_input, read_request
from karakoram.serve.responses.store import ResponseStore, Stored
from karakoram.serve.service import Service
from karakoram.serve.surface import Call, Described, Surface
from karakoram.session.chat import Answer


@dataclass
class _Extra:
    """From `parse` to the end: the body, what the response repeats of it, and the size of the conversation."""

    body: schemas.ResponsesRequest
    echo: dict[str, Any]
    messages: tuple[Message, ...] = ()
    size_bytes: int = 0


class Responses(Surface):
    """`/v1/responses`. `store` keeps finished answers."""

    described = Described(
        "/v1/responses",
        "Answer a conversation (OpenAI, Responses)",
        "responses",
        Response.model_json_schema(),
    )
    id_prefix = ID_PREFIX
    Body = schemas.ResponsesRequest

    def __init__(self, store: ResponseStore | None = None) -> None:
        self.store = ResponseStore() if store is None else store

    def parse(self, body: schemas.ResponsesRequest, headers: Mapping[str, str], service: Service) -> Call:
        model = service.check_model(body.model)
        chat = read_request(body, service)
        return Call(chat, model, bool(body.stream), _Extra(body, echo_of(body, chat)))

    def open(self, call: Call, service: Service) -> Sequence[Answer]:
        extra, client = call.extra, call.chat.client
        messages = read_input(extra.body, lambda response_id: self.store.get(client, response_id))
        if extra.body.store is not False:
            extra.messages = tuple(messages)
            extra.size_bytes = len(dumps(messages))
        if extra.body.instructions is not None:
            messages.insert(0, {"role": "system", "content": extra.body.instructions})
        call.chat = replace(call.chat, messages=messages)
        return super().open(call, service)

    def events(self, call: Call, service: Service) -> ResponseEvents:
        return ResponseEvents(call, call.extra.echo, lambda answer, items: self._keep(call, answer, items))

    def whole(self, call: Call, answers: Sequence[Answer], service: Service) -> dict[str, Any]:
        answer = answers[0]
        items = items_of(call.id, answer)
        self._keep(call, answer, items)
        return finished(call, call.extra.echo, answer, items)

    def error(self, refusal: Refusal, request_id: str) -> dict[str, Any]:
        del request_id
        return _renamed(refusal).openai_body()

    def _keep(self, call: Call, answer: Answer, items: list[Item]) -> None:
        extra = call.extra
        if extra.body.store is False or answer.finish_reason not in ("stop", "tool_calls", "length"):
            return
        message = {key: value for key, value in answer.message.items() if value}
        size = extra.size_bytes + 2 * len(dumps(message))
        self.store.put(call.chat.client, call.id, Stored(extra.messages, message, tuple(items), size))


_FIELD_NAMES = {"max_tokens": "max_output_tokens", "messages": "input"}
"""What floors below call a field, and this API's name for it."""


def _renamed(refusal: Refusal) -> Refusal:
    param = refusal.param
    if param not in _FIELD_NAMES:
        return refusal
    ours = _FIELD_NAMES[param]
    message = refusal.message.replace(f"{param} is ", f"{ours} is ", 1)
    return Refusal(refusal.status, message, ours, refusal.code, refusal.retry_after_s)


SURFACES = (Responses(),)
COUNTERS = ()
