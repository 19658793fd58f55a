"""What OpenAI's requests look like, checked field by field: also the source of /openapi.json.

Types are strict (no "1" for 1), bounds are written here once, and fields that nobody here knows are ignored, because
clients send many. A field that is known but does nothing here says so.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, WrapValidator
from pydantic_core import PydanticCustomError

from karakoram.engine.request import MAX_ALTERNATIVES, MAX_LOGIT_BIAS
from karakoram.session.chat import MOST_CHOICES, MOST_STOP_CHARS, MOST_STOPS

MAX_MESSAGES = 10_000
MAX_PARTS = 1_000
MAX_TOOLS = 128
MAX_CALLS = 128  # in one assistant message
MAX_STOP_TOKENS = 128
MAX_SCHEMA_DEPTH = 64  # an object in an object is two levels deeper: `properties` and the name
TOOL_NAME = r"^[A-Za-z_$][A-Za-z0-9_.\-]{0,63}$"


class Strict(BaseModel):
    """Types as they are in JSON; unknown fields are ignored."""

    model_config = ConfigDict(strict=True, extra="ignore", regex_engine="rust-regex", protected_namespaces=())


class TextPart(Strict):
    """A piece of text. Images, audio and files are refused: this model only reads."""

    type: Literal["text"]
    text: str


Content = str | Annotated[list[TextPart], Field(max_length=MAX_PARTS)]
Name = Annotated[str, Field(max_length=256)]


class SystemMessage(Strict):
    """What the assistant shall be."""

    role: Literal["system", "developer"]
    content: Content
    name: Name | None = None


class UserMessage(Strict):
    """What the user says."""

    role: Literal["user"]
    content: Content
    name: Name | None = None


class CalledFunction(Strict):
    """Which tool was called, and with what."""

    name: Annotated[str, Field(min_length=1, max_length=256)]
    arguments: str | dict[str, Any] = "{}"


class MessageCall(Strict):
    """A call that the assistant made."""

    id: Annotated[str, Field(max_length=512)] | None = None
    type: str = "function"
    function: CalledFunction


class ReasoningDetail(Strict):
    """A piece of reasoning as OpenRouter has it; only its text is read."""

    type: str
    text: str | None = None


class AssistantMessage(Strict):
    """What the assistant said, as it was sent out. `reasoning` and `reasoning_content` are the same thing."""

    role: Literal["assistant"]
    content: Content | None = None
    name: Name | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    reasoning_details: Annotated[list[ReasoningDetail], Field(max_length=MAX_PARTS)] | None = None
    tool_calls: Annotated[list[MessageCall], Field(max_length=MAX_CALLS)] | None = None
    partial: bool = Field(False, description="In the last message: go on from here.")


class ToolMessage(Strict):
    """What a tool answered."""

    role: Literal["tool"]
    content: Content
    tool_call_id: Annotated[str, Field(max_length=512)] | None = None
    name: Name | None = None


Message = Annotated[SystemMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")]


class Function(Strict):
    """A tool that the client runs. `strict: false` passes over schema keywords that cannot be enforced."""

    name: Annotated[str, Field(pattern=TOOL_NAME)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Strict):
    """A tool. Kimi's built-in ones (type builtin_function, names with `$`) are passed through."""

    type: Literal["function", "builtin_function"] = "function"
    function: Function


def _as_sent(raw: Any, check: Any) -> Any:
    """A tool is checked and left as it was sent: its fields, in their order, are what the model reads."""
    check(raw)
    if depth_of(raw) > MAX_SCHEMA_DEPTH:
        raise PydanticCustomError("too_deep", "nests deeper than {most} levels", {"most": MAX_SCHEMA_DEPTH})
    return raw


def depth_of(value: Any) -> int:
    """How deep lists and objects nest; stops counting at MAX_SCHEMA_DEPTH + 1."""
    depth, level = 0, [value]
    while level and depth <= MAX_SCHEMA_DEPTH:
        inner = [v.values() if isinstance(v, dict) else v for v in level if isinstance(v, dict | list)]
        level = [item for items in inner for item in items]
        depth += bool(inner)
    return depth


SentSchema = Annotated[dict[str, Any] | bool, WrapValidator(_as_sent)]
SentTool = Annotated[Tool, WrapValidator(_as_sent)]


class NamedFunction(Strict):
    """A tool's name."""

    name: Annotated[str, Field(min_length=1, max_length=64)]


class NamedTool(Strict):
    """This tool must be called."""

    type: Literal["function"] = "function"
    function: NamedFunction


class JsonSchema(Strict):
    """A schema that the content satisfies by construction."""

    name: Annotated[str, Field(max_length=256)] = "answer"
    description: str | None = None
    schema_: SentSchema = Field(alias="schema")
    strict: bool | None = None


class TextFormat(Strict):
    """Anything."""

    type: Literal["text"]


class JsonObjectFormat(Strict):
    """Any JSON object."""

    type: Literal["json_object"]


class JsonSchemaFormat(Strict):
    """JSON that satisfies a schema."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]


class StreamOptions(Strict):
    """`include_usage`: a last chunk with the counts."""

    include_usage: bool | None = None


class Thinking(Strict):
    """Kimi's switch. `keep: "all"` leaves the reasoning of earlier turns in the prompt; `budget_tokens` bounds it."""

    type: Literal["enabled", "disabled"]
    keep: Literal["all"] | None = None
    budget_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None


class TemplateOptions(Strict):
    """Arguments of the chat template, where other servers have them."""

    thinking: bool | None = None
    enable_thinking: bool | None = None
    preserve_thinking: bool | None = None


class StructuredOutputs(Strict):
    """What vLLM calls structured outputs; one of the three."""

    json_: SentSchema | None = Field(None, alias="json")
    regex: Annotated[str, Field(min_length=1, max_length=4096)] | None = None
    choice: Annotated[list[str], Field(min_length=1, max_length=1024)] | None = None


Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
StopString = Annotated[str, Field(min_length=1, max_length=MOST_STOP_CHARS)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
TokenCount = Annotated[int, Field(ge=1, lt=2**31)]
Penalty = Annotated[float, Field(ge=-2, le=2)]


class Drawing(Strict):
    """How tokens are drawn and when to stop: the same for chat and for text."""

    model: Annotated[str, Field(max_length=256)] | None = Field(None, description="Left out: the model there is.")
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = Field(None, description="0 and -1: all tokens.")
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: (
        Annotated[
            dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], Annotated[float, Field(ge=-100, le=100)]],
            Field(max_length=MAX_LOGIT_BIAS),
        ]
        | None
    ) = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=MOST_STOPS)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_STOP_TOKENS)] | None = None
    ignore_eos: bool | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None
    user: str | None = Field(None, description="Ignored.")


class ChatCompletionRequest(Drawing):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    tools: Annotated[list[SentTool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    max_tokens: TokenCount | None = None
    max_completion_tokens: TokenCount | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_ALTERNATIVES)] | None = None
    thinking: Thinking | None = None
    chat_template_kwargs: TemplateOptions | None = None
    reasoning_effort: Effort | None = None
    thinking_token_budget: TokenCount | None = None
    prompt_cache_key: str | None = Field(None, description="Ignored: prefixes are found by their tokens.")


Prompt = Annotated[list[TokenId], Field(min_length=1)]


class CompletionRequest(Drawing):
    """POST /v1/completions."""

    prompt: (
        str
        | Prompt
        | Annotated[list[str], Field(min_length=1, max_length=MOST_CHOICES)]
        | Annotated[list[Prompt], Field(min_length=1, max_length=MOST_CHOICES)]
    )
    max_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = Field(16, description="0 only with echo.")
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_ALTERNATIVES)] | None = None
    best_of: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = Field(None, description="Must be n.")
    suffix: None = Field(None, description="Not supported.")


class TokenizeRequest(Strict):
    """POST /tokenize: a prompt or a conversation."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)] | None = None
    tools: Annotated[list[SentTool], Field(max_length=MAX_TOOLS)] | None = None
    chat_template_kwargs: TemplateOptions | None = None
    add_special_tokens: bool = Field(True, description="Ignored: Kimi's tokenizer adds none.")
    add_generation_prompt: bool = True
    return_token_strs: bool | None = None


class DetokenizeRequest(Strict):
    """POST /detokenize."""

    model: str | None = None
    tokens: list[TokenId]
