"""One conversation to be answered, as every API surface says it, and what is counted and told about an answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from karakoram.engine.request import Sampling

ToolChoice = Literal["none", "auto", "required", "named"]


@dataclass(frozen=True)
class ChatRequest:
    """One conversation to be answered, as every API surface says it.

    messages            OpenAI's shape; foreign tool-call ids and missing reasoning are fine. A last assistant message
                        with `"partial": True` is continued
    tools               OpenAI's shape; `function.strict` false passes over schema keywords that cannot be enforced
    max_new_tokens      None: what is left of the context
    reasoning_tokens    budget of reasoning; None: no bound
    response_schema     JSON Schema of the content; {"type": "object"} for any object
    stop                strings that end the content and are not part of it
    client              who asks (a digest of the API key, not the key): queues take turns, stores are apart
    ignore_end          go on past the end of turn (benchmarks)
    """

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] = ()
    tool_choice: ToolChoice = "auto"
    named_tool: str | None = None
    parallel_tool_calls: bool = True
    thinking: bool = True
    preserve_thinking: bool = False
    reasoning_tokens: int | None = None
    response_schema: Mapping[str, Any] | bool | None = None
    response_regex: str | None = None
    sampling: Sampling = field(default_factory=Sampling)
    max_new_tokens: int | None = None
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    logprobs: int | None = None
    n: int = 1
    client: str = ""
    ignore_end: bool = False


@dataclass(frozen=True)
class Usage:
    """Tokens of one answer. `cached_tokens` are part of the prompt's, `reasoning_tokens` of the completion's."""

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    reasoning_tokens: int
    approximate_tokens: int | None = None  # of both; None where all are exact by construction


def approximate(usages: Sequence[Usage]) -> dict[str, int]:
    """`approximate_tokens` for an API's usage, where it is known."""
    known = [usage.approximate_tokens for usage in usages if usage.approximate_tokens is not None]
    return {"approximate_tokens": sum(known)} if known else {}


@dataclass(frozen=True)
class TextLogprob:
    """A token as text with its log-probability; `best` holds (text, bytes, logprob, token id)."""

    text: str
    bytes: bytes
    logprob: float
    token: int
    best: tuple[tuple[str, bytes, float, int], ...] = ()
