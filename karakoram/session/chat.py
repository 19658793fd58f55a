"""Messages in, message parts out, through an engine: what servers talk to.

`ChatSession.open` renders a conversation into one engine request per choice and returns an `Answer` for each; whoever
submits the request feeds the answer with the engine's news and gets deltas in OpenAI's shape back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from karakoram.engine.request import News, Request, Sampling
from karakoram.session.direct import Delta

FinishReason = Literal["stop", "tool_calls", "length", "cancelled", "error"]
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


@dataclass(frozen=True)
class TextLogprob:
    """A token as text with its log-probability; `best` holds (text, bytes, logprob, token id)."""

    text: str
    bytes: bytes
    logprob: float
    token: int
    best: tuple[tuple[str, bytes, float, int], ...] = ()


class Answer:
    """One choice of one conversation. Not thread-safe: feed it from one thread."""

    index: int  # of the choice, from 0
    request: Request  # to be submitted by whoever opened this
    finish_reason: FinishReason | None  # None while it runs
    error: str  # what happened where finish_reason is "error"
    token_ids: list[int]

    def feed(self, news: News) -> list[Delta]:
        """Deltas that this step makes certain: {"reasoning_content": …}, {"content": …} or {"tool_calls": [{"index",
        "id", "type", "function"}]}. The last news closes the answer: `finish_reason` and `message` are there then."""
        raise NotImplementedError

    @property
    def message(self) -> dict[str, Any]:
        """The assistant message so far: role, content, reasoning_content, tool_calls (absent where empty)."""
        raise NotImplementedError

    @property
    def usage(self) -> Usage:
        """Counts so far."""
        raise NotImplementedError

    def take_logprobs(self) -> list[TextLogprob]:
        """Log-probabilities of the content's tokens since the last call; empty where none were asked for."""
        raise NotImplementedError


class ChatSession:
    """Joins an engine and a chat format. Thread-safe; keeps what was emitted, for the next turn."""

    def open(self, chat: ChatRequest, request_id: str) -> list[Answer]:
        """The answers (n of them) to be fed. ChatError, InputError, ContextOverflow (both numbers), SchemaError (which
        keyword) for what cannot be done. Rendering and compiling happen here: call it off an event loop."""
        raise NotImplementedError

    def encode(self, chat: ChatRequest) -> list[int]:
        """The prompt's token ids."""
        raise NotImplementedError
