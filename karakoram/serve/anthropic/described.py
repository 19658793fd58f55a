"""What Anthropic's answers look like, for /openapi.json. The server builds them as plain dicts: these only describe."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field


class OutputTokensDetails(BaseModel):
    """Part of the output tokens that was thinking."""

    thinking_tokens: int


class MessageUsage(BaseModel):
    """Tokens. The prompt is `input_tokens + cache_read_input_tokens`."""

    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int
    output_tokens_details: OutputTokensDetails


class TextOut(BaseModel):
    """Text of the answer."""

    type: Literal["text"]
    text: str
    citations: None = None


class ThinkingOut(BaseModel):
    """Reasoning, with a signature to be sent back with it."""

    type: Literal["thinking"]
    thinking: str
    signature: str


class ToolUseOut(BaseModel):
    """A call, to be answered by a `tool_result` block."""

    type: Literal["tool_use"]
    id: str = Field(pattern="^[a-zA-Z0-9_-]+$")
    name: str
    input: dict[str, Any]


class Message(BaseModel):
    """An answer."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[Annotated[TextOut | ThinkingOut | ToolUseOut, Field(discriminator="type")]]
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]
    stop_sequence: str | None
    usage: MessageUsage


class TokensCount(BaseModel):
    """Tokens of the prompt."""

    input_tokens: int


class ErrorDetail(BaseModel):
    """What went wrong."""

    type: Literal[
        "invalid_request_error",
        "authentication_error",
        "permission_error",
        "not_found_error",
        "request_too_large",
        "rate_limit_error",
        "timeout_error",
        "api_error",
        "overloaded_error",
    ]
    message: str


class ErrorResponse(BaseModel):
    """An error; over SSE the same in an event named "error"."""

    type: Literal["error"]
    error: ErrorDetail
    request_id: str
