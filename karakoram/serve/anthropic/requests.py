"""Anthropic's requests as conversations in OpenAI's shape.

    system                         a system message; Claude Code's billing header, which changes with every request and
                                   would spoil the cached prefix, is dropped
    neighbours of one role         one message, as Anthropic reads them
    user blocks                    tool results first, each a message of role tool; then the text
    assistant blocks               reasoning_content, content, tool_calls of one message
    last message of the assistant  is continued

Texts of several blocks are joined by a line feed, except in assistant messages, where they are what the model wrote.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from karakoram.serve.anthropic import schemas
from karakoram.serve.anthropic.answers import call_id_of
from karakoram.serve.openai.conversation import EFFORT_TOKENS
from karakoram.serve.refusal import Refusal
from karakoram.session.chat import ChatRequest

BILLING_HEADER = "x-anthropic-billing-header"
"""How the system block begins that Claude Code changes with every request (vLLM, integrations/claude_code.md)."""

# ---------------------------------------------------------------------------------------------------- messages

_Block = Any  # of the unions `schemas.UserBlock` and `schemas.AssistantBlock`


def read_messages(body: schemas.CountTokensRequest) -> list[dict[str, Any]]:
    """The conversation in OpenAI's shape. Refusal names the block at fault."""
    messages: list[dict[str, Any]] = []
    if system := _system_text(body.system):
        messages.append({"role": "system", "content": system})
    answered: dict[str, bool] = {}  # of each call
    turns = list(_turns(body.messages))
    for number, (role, blocks) in enumerate(turns):
        if role == "user":
            messages.extend(_read_user(blocks, answered))
        elif role == "system":
            messages.append({"role": "system", "content": _joined(block.text for _, block in blocks)})
        else:
            message = _read_assistant(blocks)
            answered.update((call["id"], False) for call in message.get("tool_calls", ()))
            if number == len(turns) - 1 and "tool_calls" not in message:
                message["partial"] = True
            messages.append(message)
    return messages


def _system_text(system: str | list[schemas.TextBlock] | None) -> str:
    if system is None or isinstance(system, str):
        return system or ""
    return _joined([block.text for block in system if not block.text.startswith(BILLING_HEADER)])


def _turns(messages: Sequence[schemas.InputMessage]) -> Iterator[tuple[str, list[tuple[str, _Block]]]]:
    """Neighbouring messages of one role as one, and every block with its path."""
    role, blocks = "", list[tuple[str, _Block]]()
    for index, message in enumerate(messages):
        if message.role != role:
            if role:
                yield role, blocks
            role, blocks = message.role, []
        path = f"messages[{index}].content"
        if isinstance(message.content, str):
            blocks.append((path, schemas.TextBlock(type="text", text=message.content)))
        else:
            blocks.extend((f"{path}[{place}]", block) for place, block in enumerate(message.content))
    yield role, blocks


def _read_user(blocks: Sequence[tuple[str, _Block]], answered: dict[str, bool]) -> Iterator[dict[str, Any]]:
    texts: list[str] = []
    for path, block in blocks:
        if isinstance(block, schemas.ToolResultBlock):
            yield _read_result(path, block, answered)
        else:
            texts.append(block.text)
    if texts or not blocks:
        yield {"role": "user", "content": _joined(texts)}


def _read_result(path: str, block: schemas.ToolResultBlock, answered: dict[str, bool]) -> dict[str, Any]:
    call_id = call_id_of(block.tool_use_id)
    if answered.get(call_id) is not False:
        what = "there is a result already for" if call_id in answered else "no tool_use before it has"
        raise Refusal(400, f"{what} the id {block.tool_use_id!r}", f"{path}.tool_use_id")
    answered[call_id] = True
    content = block.content if isinstance(block.content, str) else _joined(part.text for part in block.content or ())
    if block.is_error and not content.lower().startswith("error"):
        content = f"Error: {content}"
    return {"role": "tool", "tool_call_id": call_id, "content": content}


def _read_assistant(blocks: Sequence[tuple[str, _Block]]) -> dict[str, Any]:
    reasoning: list[str] = []
    content: list[str] = []
    calls: dict[str, dict[str, Any]] = {}
    for path, block in blocks:
        if isinstance(block, schemas.TextBlock):
            content.append(block.text)
        elif isinstance(block, schemas.ThinkingBlock):
            reasoning.append(block.thinking)
        elif isinstance(block, schemas.ToolUseBlock):
            call = _read_call(block)
            if call["id"] in calls:
                raise Refusal(400, f"two calls of one message have the id {block.id!r}", f"{path}.id")
            calls[call["id"]] = call
    message: dict[str, Any] = {"role": "assistant", "content": "".join(content)}
    if any(reasoning):
        message["reasoning_content"] = "".join(reasoning)
    if calls:
        message["tool_calls"] = list(calls.values())
    return message


def _read_call(block: schemas.ToolUseBlock) -> dict[str, Any]:
    function = {"name": block.name, "arguments": json.dumps(block.input, ensure_ascii=False)}
    return {"id": call_id_of(block.id), "type": "function", "function": function}


def _joined(texts: Iterable[str]) -> str:
    return "\n".join(texts)


# ---------------------------------------------------------------------------------------------------- the rest


def read_tools(tools: Sequence[schemas.Tool] | None) -> list[dict[str, Any]]:
    """Declarations in OpenAI's shape."""
    return [
        {
            "type": "function",
            "function": {
                "name": tool.name,
                **({} if tool.description is None else {"description": tool.description}),
                "parameters": tool.input_schema,
                "strict": bool(tool.strict),
            },
        }
        for tool in tools or ()
    ]


def read_request(body: schemas.CountTokensRequest) -> ChatRequest:
    """What a request for tokens and one for an answer have in common."""
    output = body.output_config or schemas.OutputConfig()
    shape = output.format or body.output_format
    thinking = body.thinking is not None and body.thinking.type in ("enabled", "adaptive")
    choice = body.tool_choice
    kind = "auto" if choice is None else choice.type
    budget = None
    if body.thinking is not None and thinking:
        budget = body.thinking.budget_tokens
        if budget is None and output.effort is not None:
            budget = EFFORT_TOKENS[output.effort]
    return ChatRequest(
        messages=read_messages(body),
        tools=read_tools(body.tools),
        tool_choice={"any": "required", "tool": "named"}.get(kind, kind),  # pyright: ignore[reportArgumentType]
        named_tool=choice.name if isinstance(choice, schemas.ToolChoiceTool) else None,
        parallel_tool_calls=not getattr(choice, "disable_parallel_tool_use", None),
        thinking=thinking,
        reasoning_tokens=budget,
        response_schema=None if shape is None else shape.schema_,
    )
