"""What OpenAI's answers look like, for /openapi.json. The server builds them as plain dicts: these only describe."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel


class CachedTokens(BaseModel):
    """Of the prompt: taken from the cache."""

    cached_tokens: int


class ReasoningTokens(BaseModel):
    """Of the completion: spent on reasoning."""

    reasoning_tokens: int


class UsageCounts(BaseModel):
    """Tokens in and out."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens
    completion_tokens_details: ReasoningTokens


class AnswerCallFunction(BaseModel):
    """`arguments` is JSON text that satisfies the tool's schema."""

    name: str
    arguments: str


class AnswerCall(BaseModel):
    """A tool call."""

    id: str
    type: str
    function: AnswerCallFunction


class AnswerMessage(BaseModel):
    """What the assistant says; `reasoning` repeats `reasoning_content` under vLLM's newer name."""

    role: Literal["assistant"]
    content: str | None
    reasoning_content: str | None
    reasoning: str | None
    tool_calls: list[AnswerCall] = []


class AnswerLogprobs(BaseModel):
    """One entry for each token."""

    content: list[dict[str, Any]]


class Choice(BaseModel):
    """One of `n` answers."""

    index: int
    message: AnswerMessage
    logprobs: AnswerLogprobs | None
    finish_reason: Literal["stop", "tool_calls", "length"]


class ChatCompletion(BaseModel):
    """A whole answer."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[Choice]
    usage: UsageCounts


class TextLogprobs(BaseModel):
    """One entry for each token; `text_offset` counts characters."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class TextChoice(BaseModel):
    """One continuation."""

    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: Literal["stop", "length"]


class Completion(BaseModel):
    """Whole continuations."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: UsageCounts


class ErrorDetail(BaseModel):
    """What is wrong, and with which field."""

    message: str
    type: str
    param: str | None
    code: str | None


class Error(BaseModel):
    """OpenAI's error body."""

    error: ErrorDetail
