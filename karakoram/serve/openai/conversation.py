"""From OpenAI's fields to what the session understands: messages, tools, thinking, sampling.

What is refused here, with the message's index, would give a prompt that is silently wrong: a result whose call is not
there, two calls or two results under one id, a message that says nothing.

`reasoning_effort` is a budget of reasoning tokens:

| none | minimal | low | medium | high | xhigh, max |
|---|---|---|---|---|---|
| no thinking | 512 | 2,048 | 8,192 | 32,768 | no bound |
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from karakoram.engine.request import Sampling
from karakoram.errors import SchemaError
from karakoram.serve.openai import schemas
from karakoram.serve.refusal import Refusal
from karakoram.serve.service import Service

EFFORT_TOKENS: dict[str, int | None] = {
    "none": 0, "minimal": 512, "low": 2_048, "medium": 8_192, "high": 32_768, "xhigh": None, "max": None,
}  # fmt: skip
_TOOL_NAMED = re.compile(r"Tool '([^']*)'")
_LEAST_TOP_P = 1e-9  # OpenAI allows 0, which means the best token alone


def read_conversation(messages: Sequence[Any]) -> list[dict[str, Any]]:
    """Checked messages as plain ones. `Refusal` 400 names `messages[i]`."""
    plain = [_plain(message) for message in messages]
    check_conversation(plain)
    return plain


def _plain(message: Any) -> dict[str, Any]:
    role = "system" if message.role == "developer" else message.role
    plain: dict[str, Any] = {"role": role, "content": _content(message.content)}
    if message.name:
        plain["name"] = message.name
    if role == "tool" and message.tool_call_id is not None:
        plain["tool_call_id"] = message.tool_call_id
    if role == "assistant":
        reasoning = message.reasoning_content or message.reasoning
        if reasoning is None and message.reasoning_details:
            reasoning = "".join(detail.text or "" for detail in message.reasoning_details) or None
        if reasoning is not None:
            plain["reasoning_content"] = reasoning
        if message.tool_calls:
            plain["tool_calls"] = [_plain_call(call) for call in message.tool_calls]
        if message.partial:
            plain["partial"] = True
    return plain


def _content(content: Any) -> Any:
    return [{"type": "text", "text": part.text} for part in content] if isinstance(content, list) else content


def _plain_call(call: Any) -> dict[str, Any]:
    function = {"name": call.function.name, "arguments": call.function.arguments}
    return {"id": call.id, "type": call.type, "function": function}


def check_conversation(messages: Sequence[Mapping[str, Any]]) -> None:
    """Whether each result has its call, each id is used once, and each message says something. `Refusal` 400."""
    open_calls: dict[str, bool] = {}  # by id of the latest call: whether its result is still to come
    unnamed = 0  # open calls in the latest calling message, for results without an id
    for index, message in enumerate(messages):
        role, calls = message["role"], message.get("tool_calls") or ()
        if role == "tool":
            unnamed -= 1
            _check_result(index, message.get("tool_call_id"), open_calls, unnamed)
        elif calls:
            ids = [call["id"] for call in calls if call.get("id") is not None]
            if len(set(ids)) < len(ids):
                twice = next(name for name in ids if ids.count(name) > 1)
                _refuse(index, "tool_calls", f"has two tool calls with the id {twice!r}. Give each call its own id.")
            open_calls.update(dict.fromkeys(ids, True))
            unnamed = len(calls)
        elif role == "assistant" and not message.get("partial") and _says_nothing(message):
            _refuse(index, "", "is empty. An assistant message has content or tool_calls.")
        if message.get("partial") and index + 1 < len(messages):
            _refuse(index, "partial", "is partial but not the last. Only the last message can be continued.")


def _says_nothing(message: Mapping[str, Any]) -> bool:
    return message.get("content") is None and message.get("reasoning_content") is None


def _check_result(index: int, call_id: str | None, open_calls: dict[str, bool], unnamed: int) -> None:
    if call_id is None:
        if unnamed < 0:
            _refuse(index, "", "is a tool result, but no tool call before it is without one. Give the call first.")
        return
    if call_id not in open_calls:
        what = f"is a result for the tool call {call_id!r}, which no assistant message before it made."
        _refuse(index, "tool_call_id", f"{what} Give the call first.")
    if not open_calls[call_id]:
        _refuse(index, "tool_call_id", f"is a second result for the tool call {call_id!r}. Send one for each call.")
    open_calls[call_id] = False


def _refuse(index: int, field: str, what: str) -> None:
    raise Refusal(400, f"Message {index} {what}", f"messages[{index}]" + (f".{field}" if field else ""))


def tool_choice_of(body: schemas.ChatCompletionRequest) -> tuple[str, str | None]:
    """`tool_choice` and the tool it names."""
    choice = body.tool_choice
    if isinstance(choice, schemas.NamedTool):
        return "named", choice.function.name
    return choice or "auto", None


def thinking_of(body: schemas.ChatCompletionRequest) -> tuple[bool, bool, int | None]:
    """Whether to think, whether earlier turns keep their reasoning, and how many tokens it may take.

    `thinking` counts before `chat_template_kwargs`, and that before `reasoning_effort`.
    """
    options = body.chat_template_kwargs or schemas.TemplateOptions()
    thinks = options.enable_thinking if options.thinking is None else options.thinking
    keeps, budget = bool(options.preserve_thinking), body.thinking_token_budget
    if body.thinking is not None:
        thinks = body.thinking.type == "enabled"
        keeps = keeps or body.thinking.keep == "all"
        budget = body.thinking.budget_tokens or budget
    if body.reasoning_effort is not None:
        allowed = EFFORT_TOKENS[body.reasoning_effort]
        thinks = allowed != 0 if thinks is None else thinks
        budget = budget or allowed or None
    return thinks is not False, keeps, budget


def sampling_of(body: schemas.Drawing, service: Service, thinking: bool) -> Sampling:
    """How tokens are drawn: what the request says, else what the checkpoint's makers recommend."""
    defaults = service.sampling(thinking)
    given = {
        "temperature": defaults["temperature"] if body.temperature is None else body.temperature,
        "top_p": defaults["top_p"] if body.top_p is None else max(body.top_p, _LEAST_TOP_P),
        "top_k": None if body.top_k is None else max(body.top_k, 0),
        "min_p": body.min_p,
        "repetition_penalty": body.repetition_penalty,
        "presence_penalty": body.presence_penalty,
        "frequency_penalty": body.frequency_penalty,
        "logit_bias": {int(token): bias for token, bias in (body.logit_bias or {}).items()},
        "seed": body.seed,
    }
    sampling = Sampling(**{name: value for name, value in given.items() if value is not None})
    sampling.check(service.source.vocab_size)
    return sampling


def stops_of(body: schemas.Drawing) -> tuple[str, ...]:
    """`stop`, one or many."""
    return (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())


def schema_of(body: schemas.ChatCompletionRequest) -> tuple[Mapping[str, Any] | bool | None, str | None]:
    """The schema and the regular expression that the content must satisfy, None where there is none."""
    asked = body.response_format
    schema: Mapping[str, Any] | bool | None = None
    if isinstance(asked, schemas.JsonObjectFormat):
        schema = {"type": "object"}
    elif isinstance(asked, schemas.JsonSchemaFormat):
        schema = asked.json_schema.schema_
    more = body.structured_outputs
    if more is None:
        return schema, None
    given = [value for value in (schema, more.json_, more.regex, more.choice) if value is not None]
    if len(given) > 1:
        what = "Only one of response_format and structured_outputs' json, regex and choice can hold."
        raise Refusal(400, what, "structured_outputs")
    if more.choice is not None:
        return None, "|".join(_literal(choice) for choice in more.choice)
    return (more.json_ if schema is None else schema), more.regex


def schema_path(error: SchemaError, tools: Sequence[Mapping[str, Any]]) -> str:
    """Where in the request a schema cannot be enforced: `tools[1].function.parameters.properties.city.pattern`."""
    named = _TOOL_NAMED.match(str(error))
    index = next((i for i, tool in enumerate(tools) if named and tool["function"]["name"] == named[1]), None)
    root = "response_format.json_schema.schema" if index is None else f"tools[{index}].function.parameters"
    return ".".join([root, *(step for step in error.where.split("/") if step), error.keyword])


def _literal(text: str) -> str:
    """A regular expression for just this text."""
    return "(" + "".join(c if c.isalnum() or c in " _" else f"\\x{{{ord(c):x}}}" for c in text) + ")"
