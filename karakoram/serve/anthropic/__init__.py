"""Anthropic's Messages API: `/v1/messages` and `/v1/messages/count_tokens`.

`schemas` and `described` are the wire, `requests` is the way in, `answers` the way out. What is decided here:

Thinking is off unless asked for, as it is at Anthropic: clients that never heard of thinking take the first block for
the answer. Tools are not strict unless they say so, again as there: keywords of a schema that cannot be enforced are
passed over, the others hold by construction.

Refused, each with its path: images, documents, Anthropic's own tools (web search and the like) and their blocks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from karakoram.engine.request import Sampling
from karakoram.serve.anthropic import schemas
from karakoram.serve.anthropic.answers import MessageEvents, Signer, blocks_of, error_body, message_of, stop_of
from karakoram.serve.anthropic.described import Message, TokensCount
from karakoram.serve.anthropic.requests import read_request
from karakoram.serve.refusal import Refusal
from karakoram.serve.service import Service
from karakoram.serve.surface import Call, Counter, Described, Surface
from karakoram.session.chat import Answer, ChatRequest


@dataclass(frozen=True)
class _Extra:
    shows_thinking: bool


class Messages(Surface):
    """`/v1/messages`. `signer` signs thinking blocks."""

    described = Described("/v1/messages", "Answer a conversation (Anthropic)", "anthropic", Message.model_json_schema())
    id_prefix = "msg_"
    Body = schemas.MessagesRequest

    def __init__(self, signer: Signer | None = None) -> None:
        self.signer = signer or Signer()

    def parse(self, body: schemas.MessagesRequest, headers: Mapping[str, str], service: Service) -> Call:
        model = service.check_model(body.model)
        chat = read_request(body)
        if chat.messages[-1].get("tool_calls"):
            what = "it makes calls that have no tool_result yet"
            raise Refusal(400, what, f"messages[{len(body.messages) - 1}]")
        sampling: dict[str, Any] = {**service.sampling(chat.thinking)}
        given = {name: getattr(body, name) for name in ("temperature", "top_p", "top_k")}
        sampling |= {name: value for name, value in given.items() if value is not None}
        stop = tuple(body.stop_sequences or ())
        chat = replace(chat, sampling=Sampling(**sampling), max_new_tokens=body.max_tokens, stop=stop)
        shows = body.thinking is None or body.thinking.display != "omitted"
        return Call(chat, model, bool(body.stream), _Extra(shows))

    def events(self, call: Call, service: Service) -> MessageEvents:
        return MessageEvents(call.id, call.model, self.signer, call.extra.shows_thinking)

    def whole(self, call: Call, answers: Sequence[Answer], service: Service) -> dict[str, Any]:
        answer = answers[0]
        blocks = blocks_of(answer.message, self.signer, call.extra.shows_thinking)
        return {**message_of(call.id, call.model, blocks, answer.usage), **stop_of(answer)}

    def error(self, refusal: Refusal, request_id: str) -> dict[str, Any]:
        return error_body(refusal, request_id)


class CountTokens(Counter):
    """`/v1/messages/count_tokens`."""

    described = Described(
        "/v1/messages/count_tokens",
        "Count the tokens of a conversation (Anthropic)",
        "anthropic",
        TokensCount.model_json_schema(),
    )
    Body = schemas.CountTokensRequest

    def parse(self, body: schemas.CountTokensRequest, headers: Mapping[str, str], service: Service) -> ChatRequest:
        service.check_model(body.model)
        return read_request(body)

    def whole(self, tokens: int) -> dict[str, Any]:
        return {"input_tokens": tokens}

    def error(self, refusal: Refusal, request_id: str) -> dict[str, Any]:
        return error_body(refusal, request_id)


SURFACES = (Messages(),)
COUNTERS = (CountTokens(),)
