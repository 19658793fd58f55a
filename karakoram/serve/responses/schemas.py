"""OpenAI's Responses API as pydantic models: what `/v1/responses` reads.

Source: the types of the official Python SDK (openai 3.57, `types/responses/`). Types are strict and fields that are
not named here are ignored; those that would change the answer are named and refused. Unions are told apart as in
`anthropic/schemas.py`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from karakoram.serve.openai.schemas import (
    MAX_MESSAGES,
    MAX_PARTS,
    MAX_SCHEMA_DEPTH,
    MAX_TOOLS,
    TOOL_NAME,
    Effort,
    Strict,
    TokenCount,
    depth_of,
)


def _text_or_parts(value: object) -> str | None:
    return "<text>" if isinstance(value, str) else "<parts>" if isinstance(value, list) else None


def _not_too_deep(schema: dict[str, Any]) -> dict[str, Any]:
    if depth_of(schema) > MAX_SCHEMA_DEPTH:
        raise PydanticCustomError("too_deep", "It nests deeper than {most} levels.", {"most": MAX_SCHEMA_DEPTH})
    return schema


_TEXT_OR_PARTS = Discriminator(_text_or_parts, "text_or_parts", "It is a string or a list.")
Object = Annotated[dict[str, Any], AfterValidator(_not_too_deep)]


def _get(value: object, key: str) -> object:
    return value.get(key) if isinstance(value, dict) else getattr(value, key, None)


def _kind(value: object) -> str | None:
    kind = _get(value, "type")
    return f"<{kind}>" if isinstance(kind, str) else None


def _item_kind(value: object) -> str | None:
    """Messages may leave their type out, and so may references."""
    kind = _get(value, "type")
    if kind is None:
        kind = "message" if _get(value, "role") is not None else "item_reference" if _get(value, "id") else None
    return f"<{kind}>" if isinstance(kind, str) else None


# ---------------------------------------------------------------------------------------------------- input


class TextPart(Strict):
    """Text: read as input, or written by an earlier answer."""

    type: Literal["input_text", "output_text", "text"]
    text: str


class RefusalPart(Strict):
    """What another server's model declined to say: read as text."""

    type: Literal["refusal"]
    refusal: str


Part = Annotated[
    Annotated[TextPart, Tag("<input_text>")]
    | Annotated[TextPart, Tag("<output_text>")]
    | Annotated[TextPart, Tag("<text>")]
    | Annotated[RefusalPart, Tag("<refusal>")],
    Discriminator(
        _kind,
        "part_type",
        "A part has type input_text, output_text or refusal; images and files are not supported: this model reads.",
    ),
]
Content = Annotated[
    Annotated[str, Tag("<text>")] | Annotated[list[Part], Field(max_length=MAX_PARTS), Tag("<parts>")], _TEXT_OR_PARTS
]


class MessageItem(Strict):
    """A message. developer is another word for system."""

    type: Literal["message"] | None = None
    role: Literal["user", "assistant", "system", "developer"]
    content: Content


class FunctionCallItem(Strict):
    """A call that an earlier answer made."""

    type: Literal["function_call"]
    call_id: str = Field(min_length=1)
    name: str = Field(min_length=1)
    arguments: str


class FunctionCallOutputItem(Strict):
    """What a call brought."""

    type: Literal["function_call_output"]
    call_id: str
    output: Content


class ReasoningText(Strict):
    """A piece of reasoning, or of its summary."""

    type: Literal["reasoning_text", "summary_text", "text"]
    text: str


class ReasoningItem(Strict):
    """Reasoning of an earlier answer: `content`, or where that is missing `summary`. `encrypted_content` is passed
    over: what a client cannot send back, the session remembers for a while."""

    type: Literal["reasoning"]
    summary: list[ReasoningText] | None = None
    content: list[ReasoningText] | None = None
    encrypted_content: str | None = None


class ItemReference(Strict):
    """An item of an answer that is still stored."""

    type: Literal["item_reference"] | None = None
    id: str


Item = Annotated[
    Annotated[MessageItem, Tag("<message>")]
    | Annotated[FunctionCallItem, Tag("<function_call>")]
    | Annotated[FunctionCallOutputItem, Tag("<function_call_output>")]
    | Annotated[ReasoningItem, Tag("<reasoning>")]
    | Annotated[ItemReference, Tag("<item_reference>")],
    Discriminator(
        _item_kind,
        "item_type",
        "An item has type message, function_call, function_call_output, reasoning or item_reference; the items of "
        "OpenAI's hosted tools and of custom tools are not served here.",
    ),
]
Input = Annotated[
    Annotated[str, Tag("<text>")] | Annotated[list[Item], Field(max_length=MAX_MESSAGES), Tag("<parts>")],
    _TEXT_OR_PARTS,
]

# ---------------------------------------------------------------------------------------------------- tools, text


class FunctionTool(Strict):
    """A function that the client runs. `strict` false passes over keywords of its schema that cannot be enforced."""

    type: Literal["function"]
    name: str = Field(pattern=TOOL_NAME)
    description: str | None = None
    parameters: Object | None = None
    strict: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _is_a_function(cls, value: Any) -> Any:
        kind = value.get("type") if isinstance(value, dict) else None
        if isinstance(kind, str) and kind != "function":
            raise PydanticCustomError(
                "hosted_tool",
                "Tools of type {kind} are not served here: custom tools have no schema, and hosted ones run at OpenAI. "
                "Declare a function, and run it yourself.",
                {"kind": kind[:64]},
            )
        return value


class NamedTool(Strict):
    """A call of this function."""

    type: Literal["function"]
    name: str


class AllowedTools(Strict):
    """Only some of the declared functions."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: list[NamedTool] = Field(min_length=1, max_length=MAX_TOOLS)


def _choice_kind(value: object) -> str | None:
    return "<word>" if isinstance(value, str) else _kind(value)


ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("<word>")]
    | Annotated[NamedTool, Tag("<function>")]
    | Annotated[AllowedTools, Tag("<allowed_tools>")],
    Discriminator(
        _choice_kind, "tool_choice", "tool_choice is none, auto, required, a function or a list of allowed functions."
    ),
]


class TextFormat(Strict):
    """Free text."""

    type: Literal["text"]


class JsonObjectFormat(Strict):
    """Any JSON object."""

    type: Literal["json_object"]


class JsonSchemaFormat(Strict):
    """JSON of this schema."""

    type: Literal["json_schema"]
    name: str
    schema_: Object = Field(alias="schema")
    description: str | None = None
    strict: bool | None = None


Format = Annotated[
    Annotated[TextFormat, Tag("<text>")]
    | Annotated[JsonObjectFormat, Tag("<json_object>")]
    | Annotated[JsonSchemaFormat, Tag("<json_schema>")],
    Discriminator(_kind, "text_format", "A format has type text, json_object or json_schema."),
]


class TextConfig(Strict):
    """Shape of the answer's text; `verbosity` is ignored."""

    format: Format | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class Reasoning(Strict):
    """How hard to think. Summaries are not made: reasoning is given whole, as `content` of its item."""

    effort: Effort | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None
    generate_summary: Literal["auto", "concise", "detailed"] | None = None


# ---------------------------------------------------------------------------------------------------- request

Include = Literal[
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "message.input_image.image_url",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
    "reasoning.encrypted_content",
    "message.output_text.logprobs",
]


class ResponsesRequest(Strict):
    """Body of `/v1/responses`."""

    model: str
    input: Input
    instructions: str | None = None
    tools: list[FunctionTool] | None = Field(None, max_length=MAX_TOOLS)
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    reasoning: Reasoning | None = None
    max_output_tokens: TokenCount | None = None
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    top_logprobs: int | None = Field(None, ge=0, le=20)
    stream: bool | None = None
    store: bool | None = Field(None, description="False: previous_response_id cannot name this answer.")
    previous_response_id: str | None = None
    include: list[Include] | None = None
    metadata: dict[str, str] | None = Field(None, max_length=16)
    truncation: Literal["disabled"] | None = Field(None, description="auto is not served.")
    background: Literal[False] | None = Field(None, description="true is not served.")
    conversation: None = Field(None, description="Not served: use previous_response_id.")
    prompt: None = Field(None, description="Not served: prompts are not stored here.")
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
