"""What responses look like, for /openapi.json. The server builds them as plain dicts: these only describe."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

Status = Literal["in_progress", "completed", "incomplete"]


class TopLogprob(BaseModel):
    """One of the likeliest tokens."""

    token: str
    bytes: list[int]
    logprob: float


class Logprob(TopLogprob):
    """A token of the text."""

    top_logprobs: list[TopLogprob]


class OutputText(BaseModel):
    """Text of the answer."""

    type: Literal["output_text"]
    text: str
    annotations: list[Any]
    logprobs: list[Logprob]


class OutputMessage(BaseModel):
    """A message."""

    type: Literal["message"]
    id: str
    role: Literal["assistant"]
    status: Status
    content: list[OutputText]


class ReasoningOut(BaseModel):
    """A piece of reasoning."""

    type: Literal["reasoning_text"]
    text: str


class OutputReasoning(BaseModel):
    """Reasoning, to be sent back with the calls that follow it."""

    type: Literal["reasoning"]
    id: str
    summary: list[Any]
    content: list[ReasoningOut]
    encrypted_content: None
    status: Status


class OutputCall(BaseModel):
    """A call, to be answered by a `function_call_output` item."""

    type: Literal["function_call"]
    id: str
    call_id: str
    name: str
    arguments: str
    status: Status


class InputTokensDetails(BaseModel):
    """Part of the prompt that was computed before."""

    cached_tokens: int
    cache_write_tokens: int


class OutputTokensDetails(BaseModel):
    """Part of the answer that was thinking."""

    reasoning_tokens: int


class ResponseUsage(BaseModel):
    """Tokens."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class ResponseError(BaseModel):
    """Why an answer failed in the middle."""

    code: str
    message: str


class IncompleteDetails(BaseModel):
    """Why an answer is not complete."""

    reason: Literal["max_output_tokens"]


class Response(BaseModel):
    """An answer, with the fields of the request that shaped it."""

    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    status: Literal["completed", "failed", "in_progress", "incomplete"]
    error: ResponseError | None
    incomplete_details: IncompleteDetails | None
    model: str
    output: list[Annotated[OutputMessage | OutputReasoning | OutputCall, Field(discriminator="type")]]
    usage: ResponseUsage | None
