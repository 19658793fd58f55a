"""Messages as the API world writes them, checked once and turned into plain records.

Everything above the templates speaks OpenAI's shapes: dicts with `role`, `content` (a string, a list of parts, or
null), `name`, `reasoning_content`, `tool_calls`, `tool_call_id`; tools as `{"type": "function", "function": {…}}`.
This file is the door: whatever is accepted here can be rendered by every dialect, and whatever is refused is named by
its index.

Accepted wherever the official templates accept: any role name, roles in any order, several system messages, null or
empty content. Refused although they would accept it, because the prompt would silently be wrong: no messages at all,
a tool result without a call before it, a part that is neither text nor image nor video, a call without name or
arguments.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NoReturn, cast

from karakoram.errors import ChatError

MAX_NESTING = 128
"""Depth to which tool schemas may nest: far above any real schema, far below Python's recursion limit."""


@dataclass(frozen=True)
class Part:
    """One piece of content, in order. `text` is empty for media."""

    kind: Literal["text", "image", "video"]
    text: str = ""


@dataclass(frozen=True)
class ToolCall:
    """A call made by the assistant. `arguments` is text: as given, or JSON of what was given as an object."""

    id: str | None
    name: str
    arguments: str


@dataclass(frozen=True)
class Message:
    """One checked message. `name` is None where none or an empty one was given."""

    role: str
    name: str | None
    parts: tuple[Part, ...]
    reasoning: str | None
    """`reasoning_content`; None is absent."""
    other_reasoning: str | None
    """`reasoning`, which K2.6 reads first."""
    tool_calls: tuple[ToolCall, ...]
    tool_call_id: str | None


def read_messages(messages: object) -> list[Message]:
    """Check `messages` and turn them into records; ChatError names the index, the value and the fix."""
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes):
        raise ChatError(
            f"Messages must be a list, not {_kind(messages)}.", 'For example [{"role": "user", "content": "Hi"}].'
        )
    raw_messages = cast("Sequence[object]", messages)
    if not raw_messages:
        raise ChatError("There are no messages.", 'Give at least one, for example {"role": "user", "content": "Hi"}.')
    records: list[Message] = []
    called = False
    for index, raw in enumerate(raw_messages):
        record = _read_message(index, raw)
        if record.role == "tool" and not called:
            _refuse(
                index,
                "has role 'tool' but no assistant message with tool_calls before it.",
                "Put the assistant message that made the call before its result.",
            )
        called = called or bool(record.tool_calls)
        records.append(record)
    return records


def _read_message(index: int, raw: object) -> Message:
    if not isinstance(raw, Mapping):
        _refuse(index, f"must be an object, not {_kind(raw)}.", 'For example {"role": "user", "content": "Hi"}.')
    fields = cast("Mapping[str, object]", raw)
    role = fields.get("role")
    if not isinstance(role, str) or not role:
        _refuse(index, f"has role {role!r}.", "Use 'system', 'user', 'assistant' or 'tool'.")
    calls = _read_tool_calls(index, fields.get("tool_calls"))
    if calls and role != "assistant":
        _refuse(index, f"has tool_calls but role {role!r}.", "Only assistant messages make tool calls.")
    return Message(
        role=role,
        name=_optional_text(index, fields, "name") or None,
        parts=_read_content(index, fields.get("content")),
        reasoning=_optional_text(index, fields, "reasoning_content"),
        other_reasoning=_optional_text(index, fields, "reasoning"),
        tool_calls=calls,
        tool_call_id=_optional_text(index, fields, "tool_call_id"),
    )


def _read_content(index: int, content: object) -> tuple[Part, ...]:
    if content is None:
        return ()
    if isinstance(content, str):
        return (Part("text", content),)
    if not isinstance(content, Sequence) or isinstance(content, bytes | bytearray):
        _refuse(index, f"has content of type {_kind(content)}.", "Content is a string, a list of parts, or null.")
    return tuple(_read_part(index, number, part) for number, part in enumerate(cast("Sequence[object]", content)))


def _read_part(index: int, number: int, raw: object) -> Part:
    fix = 'A part is {"type": "text", "text": …}, {"type": "image_url", …} or {"type": "video_url", …}.'
    if not isinstance(raw, Mapping):
        _refuse(index, f"has a content part {number} of type {_kind(raw)}.", fix)
    part = cast("Mapping[str, object]", raw)
    kind = part.get("type")
    if kind in ("image", "image_url"):
        return Part("image")
    if kind in ("video", "video_url"):
        return Part("video")
    if kind in (None, "text"):
        text = part.get("text")
        if isinstance(text, str):
            return Part("text", text)
        if kind is None and ("image" in part or "image_url" in part):
            return Part("image")
    _refuse(index, f"has a content part {number} that is neither text, image nor video (type {kind!r}).", fix)


def _read_tool_calls(index: int, raw: object) -> tuple[ToolCall, ...]:
    if raw is None:
        return ()
    if not isinstance(raw, Sequence) or isinstance(raw, str | bytes):
        _refuse(index, f"has tool_calls of type {_kind(raw)}.", "tool_calls is a list of calls, or null.")
    return tuple(_read_tool_call(index, number, call) for number, call in enumerate(cast("Sequence[object]", raw)))


def _read_tool_call(index: int, number: int, raw: object) -> ToolCall:
    fix = 'A call is {"id": "functions.NAME:0", "type": "function", "function": {"name": "NAME", "arguments": "{}"}}.'
    if not isinstance(raw, Mapping):
        _refuse(index, f"has a tool call {number} of type {_kind(raw)}.", fix)
    fields = cast("Mapping[str, object]", raw)
    function = fields.get("function")
    if not isinstance(function, Mapping):
        _refuse(index, f"has a tool call {number} without a function.", fix)
    body = cast("Mapping[str, object]", function)
    name = body.get("name")
    if not isinstance(name, str) or not name:
        _refuse(index, f"has a tool call {number} whose function name is {name!r}.", fix)
    call_id = fields.get("id")
    if call_id is not None and not isinstance(call_id, str):
        _refuse(index, f"has a tool call {number} whose id is {call_id!r}.", fix)
    return ToolCall(id=call_id or None, name=name, arguments=_arguments_text(index, number, body.get("arguments"), fix))


def _arguments_text(index: int, number: int, arguments: object, fix: str) -> str:
    if isinstance(arguments, str):
        return arguments
    if arguments is None:
        _refuse(index, f"has a tool call {number} without arguments.", fix)
    try:
        # The separators ", " and ": " and unescaped Unicode are those of the official template's `tojson`.
        return json.dumps(arguments, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        _refuse(index, f"has a tool call {number} whose arguments are not JSON ({error}).", fix)


def _optional_text(index: int, fields: Mapping[str, object], key: str) -> str | None:
    value = fields.get(key)
    if value is not None and not isinstance(value, str):
        _refuse(index, f"has {key} of type {_kind(value)}.", f"{key} is a string, or left out.")
    return value


def read_tools(tools: object) -> list[dict[str, Any]]:
    """Check tool declarations (None: none) and return them; ChatError names the index, the value and the fix."""
    if tools is None:
        return []
    if not isinstance(tools, Sequence) or isinstance(tools, str | bytes):
        raise ChatError(f"Tools must be a list, not {_kind(tools)}.", f"For example [{_TOOL_EXAMPLE}].")
    return [_read_tool(index, tool) for index, tool in enumerate(cast("Sequence[object]", tools))]


_TOOL_EXAMPLE = '{"type": "function", "function": {"name": "NAME", "parameters": {"type": "object", "properties": {}}}}'


def _read_tool(index: int, raw: object) -> dict[str, Any]:
    def refuse(what: str) -> NoReturn:
        raise ChatError(f"Tool {index} {what}.", f"A tool is {_TOOL_EXAMPLE}.")

    if not isinstance(raw, dict):
        refuse(f"must be an object, not {_kind(raw)}")
    tool = cast("dict[str, Any]", raw)
    try:
        json.dumps(tool)  # also refuses what contains itself, which would never end below
    except (TypeError, ValueError, RecursionError) as error:
        refuse(f"is not JSON ({error})")
    if _exceeds_nesting(tool):
        refuse(f"nests deeper than {MAX_NESTING}")
    if not isinstance(tool.get("type"), str):
        refuse(f"has type {tool.get('type')!r}")
    if tool["type"] != "function":
        return tool  # built-in tools of the hosted API: declared as they are
    function = tool.get("function")
    if not isinstance(function, dict):
        refuse("has no function")
    body = cast("dict[str, Any]", function)
    name, parameters = body.get("name"), body.get("parameters")
    if not isinstance(name, str) or not name:
        refuse(f"has the function name {name!r}")
    if parameters is None:
        return tool
    if not isinstance(parameters, dict):
        refuse(f"({name}) has parameters of type {_kind(parameters)}")
    kind = cast("dict[str, Any]", parameters).get("type", "object")
    if kind != "object":
        refuse(f"({name}) has parameters of schema type {kind!r}, not 'object'")
    return tool


def _exceeds_nesting(value: object) -> bool:
    """Whether lists and dicts in `value`, which must not contain itself, nest deeper than MAX_NESTING."""
    level = [value]
    for _ in range(MAX_NESTING + 1):
        deeper: list[object] = []
        for item in level:
            if isinstance(item, Mapping):
                deeper.extend(cast("Mapping[object, object]", item).values())
            elif isinstance(item, list | tuple):
                deeper.extend(cast("Sequence[object]", item))
        if not deeper:
            return False
        level = deeper
    return True


def _refuse(index: int, what: str, fix: str) -> NoReturn:
    raise ChatError(f"Message {index} {what}", fix)


def _kind(value: object) -> str:
    return "null" if value is None else type(value).__name__
