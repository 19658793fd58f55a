"""Anthropic's Messages API as pydantic models: what `/v1/messages` reads.

Source: the types of the official Python SDK (anthropic 2.13, `types/message_create_params.py` and its neighbours).
Types are strict (a number in quotes is an error, as it is there), fields that are not named here are ignored, and
`cache_control` is one of those: prefixes are cached without being asked.

A union is told apart by a function that names its branch in angle brackets, so that the path of an error can be
printed as the client knows it, `messages.0.content.1.text`, without pydantic's own names for the branches in between.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from karakoram.serve.openai.schemas import (
    MAX_MESSAGES,
    MAX_PARTS,
    MAX_SCHEMA_DEPTH,
    MAX_TOOLS,
    TOOL_NAME,
    StopString,
    Strict,
    TokenCount,
    depth_of,
)
from karakoram.session.chat import MOST_STOPS


def _text_or_blocks(value: object) -> str | None:
    return "<text>" if isinstance(value, str) else "<blocks>" if isinstance(value, list) else None


def _not_too_deep(schema: dict[str, Any]) -> dict[str, Any]:
    if depth_of(schema) > MAX_SCHEMA_DEPTH:
        raise PydanticCustomError("too_deep", "It nests deeper than {most} levels.", {"most": MAX_SCHEMA_DEPTH})
    return schema


_TEXT_OR_BLOCKS = Discriminator(_text_or_blocks, "text_or_blocks", "It is a string or a list of blocks.")
Object = Annotated[dict[str, Any], AfterValidator(_not_too_deep)]


def _named(field: str) -> Callable[[object], str | None]:
    """Tells a union apart by the word in this field."""

    def tag(value: object) -> str | None:
        word = value.get(field) if isinstance(value, dict) else getattr(value, field, None)
        return f"<{word}>" if isinstance(word, str) else None

    return tag


_kind, _role = _named("type"), _named("role")


# ---------------------------------------------------------------------------------------------------- content


class TextBlock(Strict):
    """Text."""

    type: Literal["text"]
    text: str


class ThinkingBlock(Strict):
    """Reasoning of an earlier answer. The signature may be ours, another server's or missing."""

    type: Literal["thinking"]
    thinking: str
    signature: str | None = None


class RedactedThinkingBlock(Strict):
    """Reasoning that only its author can read: passed over."""

    type: Literal["redacted_thinking"]
    data: str = ""


class ToolUseBlock(Strict):
    """A call that an earlier answer made."""

    type: Literal["tool_use"]
    id: str = Field(min_length=1)
    name: str = Field(min_length=1)
    input: Object


Texts = Annotated[
    Annotated[str, Tag("<text>")] | Annotated[list[TextBlock], Field(max_length=MAX_PARTS), Tag("<blocks>")],
    _TEXT_OR_BLOCKS,
]


class ToolResultBlock(Strict):
    """What a call brought. `tool_use_id` is the call's id."""

    type: Literal["tool_result"]
    tool_use_id: str
    content: Texts | None = None
    is_error: bool | None = None


UserBlock = Annotated[
    Annotated[TextBlock, Tag("<text>")] | Annotated[ToolResultBlock, Tag("<tool_result>")],
    Discriminator(
        _kind,
        "block_type",
        "A block of a user message has type text or tool_result; images, documents and search results are not "
        "supported: this model reads text.",
    ),
]
AssistantBlock = Annotated[
    Annotated[TextBlock, Tag("<text>")]
    | Annotated[ThinkingBlock, Tag("<thinking>")]
    | Annotated[RedactedThinkingBlock, Tag("<redacted_thinking>")]
    | Annotated[ToolUseBlock, Tag("<tool_use>")],
    Discriminator(
        _kind,
        "block_type",
        "A block of an assistant message has type text, thinking, redacted_thinking or tool_use; blocks of Anthropic's "
        "own tools are not served here.",
    ),
]


class UserMessage(Strict):
    """What the user says, and what tools have brought."""

    role: Literal["user"]
    content: Annotated[
        Annotated[str, Tag("<text>")] | Annotated[list[UserBlock], Field(max_length=MAX_PARTS), Tag("<blocks>")],
        _TEXT_OR_BLOCKS,
    ]


class AssistantMessage(Strict):
    """What the model said. As the last message it is continued."""

    role: Literal["assistant"]
    content: Annotated[
        Annotated[str, Tag("<text>")] | Annotated[list[AssistantBlock], Field(max_length=MAX_PARTS), Tag("<blocks>")],
        _TEXT_OR_BLOCKS,
    ]


class SystemMessage(Strict):
    """Instructions in the middle of a conversation."""

    role: Literal["system"]
    content: Texts


InputMessage = Annotated[
    Annotated[UserMessage, Tag("<user>")]
    | Annotated[AssistantMessage, Tag("<assistant>")]
    | Annotated[SystemMessage, Tag("<system>")],
    Discriminator(_role, "message_role", "A message has role user, assistant or system."),
]

# ---------------------------------------------------------------------------------------------------- tools, thinking


class Tool(Strict):
    """A tool that the client runs. `strict` true refuses schemas that cannot be enforced to the letter."""

    name: str = Field(pattern=TOOL_NAME)
    input_schema: Object
    description: str | None = None
    strict: bool | None = None
    type: Literal["custom"] | None = None

    @model_validator(mode="before")
    @classmethod
    def _is_run_by_the_client(cls, value: Any) -> Any:
        kind = value.get("type") if isinstance(value, dict) else None
        if isinstance(kind, str) and kind != "custom":
            raise PydanticCustomError(
                "server_tool",
                "{kind} is one of Anthropic's own tools, which this server does not have. "
                "Declare a tool with name and input_schema, and run it yourself.",
                {"kind": kind[:64]},
            )
        return value


class ToolChoiceAuto(Strict):
    """The model decides."""

    type: Literal["auto"]
    disable_parallel_tool_use: bool | None = None


class ToolChoiceAny(Strict):
    """At least one call."""

    type: Literal["any"]
    disable_parallel_tool_use: bool | None = None


class ToolChoiceTool(Strict):
    """A call of this tool."""

    type: Literal["tool"]
    name: str
    disable_parallel_tool_use: bool | None = None


class ToolChoiceNone(Strict):
    """No call."""

    type: Literal["none"]


ToolChoice = Annotated[
    Annotated[ToolChoiceAuto, Tag("<auto>")]
    | Annotated[ToolChoiceAny, Tag("<any>")]
    | Annotated[ToolChoiceTool, Tag("<tool>")]
    | Annotated[ToolChoiceNone, Tag("<none>")],
    Discriminator(_kind, "tool_choice_type", "tool_choice has type auto, any, tool or none."),
]


class Thinking(Strict):
    """How to think. `budget_tokens` bounds enabled thinking; adaptive thinking is bounded by `output_config.effort`.

    `between_tools` is disabled thinking: the model has no mode in which it reports progress. With display "omitted"
    thinking blocks hold their signature only.
    """

    type: Literal["enabled", "disabled", "adaptive", "between_tools"]
    budget_tokens: TokenCount | None = None
    display: Literal["summarized", "omitted"] | None = None


class JsonFormat(Strict):
    """The answer's text is JSON of this schema."""

    type: Literal["json_schema"]
    schema_: Object = Field(alias="schema")


class OutputConfig(Strict):
    """Shape of the answer, and how hard to think for it."""

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: JsonFormat | None = None


class Metadata(Strict):
    """Read and ignored: who asks is told by the API key."""

    user_id: str | None = None


# ---------------------------------------------------------------------------------------------------- requests


class CountTokensRequest(Strict):
    """Body of `/v1/messages/count_tokens`, and what a request for an answer shares with it."""

    model: str
    messages: list[InputMessage] = Field(min_length=1, max_length=MAX_MESSAGES)
    system: Texts | None = None
    tools: list[Tool] | None = Field(None, max_length=MAX_TOOLS)
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: JsonFormat | None = None
    mcp_servers: list[Any] | None = Field(None, max_length=0, description="Not served here: must be empty.")


class MessagesRequest(CountTokensRequest):
    """Body of `/v1/messages`. `output_format` is the older name of `output_config.format`."""

    max_tokens: TokenCount
    stream: bool | None = None
    stop_sequences: list[StopString] | None = Field(None, max_length=MOST_STOPS)
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0, lt=2**31)
    metadata: Metadata | None = None
