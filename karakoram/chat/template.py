"""Messages to prompt: the chat templates of all dialects as one page of Python.

A prompt is a list of segments, each either a control marker or ordinary text. Joined they are the text that the
official Jinja template prints; encoded one by one (see `format.py`) they are its token ids, except that text which a
user wrote can never become a control token, whatever it spells.

    tool declaration    <|im_system|>tool_declare<|im_middle|>TOOLS<|im_end|>   first, before any system message
    message             <|im_user|>NAME<|im_middle|>CONTENT<|im_end|>           NAME: name, else role
    tool call           <|tool_call_begin|>ID<|tool_call_argument_begin|>ARGUMENTS<|tool_call_end|>
    tool result         ## Return of ID\\nCONTENT
    generation prompt   <|im_assistant|>assistant<|im_middle|>[<think>[</think>]]

An assistant message that the model wrote here can be given as the token ids it wrote (`Written`): they stand in the
place of its rendering, so that a conversation goes on from the very tokens that are in the cache.

Reasoning is kept only inside the current chain of tool calls: messages up to the last assistant message without tool
calls are history, where the think block is rendered empty; assistant messages after it keep theirs. K2.6's
`preserve_thinking` keeps all of it. Which dialect does what is `dialects.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from karakoram.chat import dialects as d
from karakoram.chat.dialects import Dialect
from karakoram.chat.messages import Message
from karakoram.chat.tool_declarations import declare_tools
from karakoram.errors import ChatError


class Segment(NamedTuple):
    """A piece of a prompt: a control marker, or text that must stay text."""

    text: str
    is_marker: bool
    token_ids: tuple[int, ...] = ()
    """Of text that must not be encoded anew; `text` is empty then."""


@dataclass(frozen=True)
class Written:
    """What a model wrote as one assistant message, without the stop id.

    in_reasoning    the prompt had opened reasoning for it
    content_at      where in `token_ids` the reasoning and its closing marker end
    """

    token_ids: tuple[int, ...]
    in_reasoning: bool
    content_at: int


class Prompt(list[Segment]):
    """The segments of one prompt, with two words to write them."""

    def mark(self, *markers: str) -> None:
        self.extend(Segment(marker, True) for marker in markers)

    def write(self, text: str) -> None:
        if text:
            self.append(Segment(text, False))

    def insert_ids(self, token_ids: Sequence[int]) -> None:
        if token_ids:
            self.append(Segment("", False, tuple(token_ids)))


def build_prompt(
    dialect: Dialect,
    messages: Sequence[Message],
    tools: list[dict[str, Any]],
    thinking: bool = True,
    preserve_thinking: bool = False,
    add_generation_prompt: bool = True,
    written: Mapping[int, Written] | None = None,
) -> Prompt:
    """The prompt for checked `messages` and `tools`. Dialects without thinking ignore the switches for it.

    `written`: by index, the tokens of assistant messages that stand for their rendering.
    """
    preserve = preserve_thinking and dialect.preserves_thinking
    shows_reasoning = preserve or thinking or not dialect.think_prefill
    history_end = -1 if preserve else last_plain_answer(messages)
    prompt = Prompt()
    if tools:
        _open_frame(prompt, d.IM_SYSTEM, "tool_declare")
        prompt.write(declare_tools(tools, dialect.tools_as))
        prompt.mark(d.IM_END)
    if dialect.default_system is not None and messages[0].role != "system":
        _open_frame(prompt, d.IM_SYSTEM, "system")
        prompt.write(dialect.default_system)
        prompt.mark(d.IM_END)
    for index, message in enumerate(messages):
        reasoning = shows_reasoning and index > history_end
        if written is not None and index in written:
            _write_again(prompt, dialect, message, written[index], reasoning)
        else:
            _write_message(prompt, dialect, index, message, reasoning)
    if add_generation_prompt:
        _open_frame(prompt, d.IM_ASSISTANT, "assistant")
        if dialect.think_prefill:
            _write_think(prompt, dialect, None if thinking else "")
    return prompt


def last_plain_answer(messages: Sequence[Message]) -> int:
    """Index of the last assistant message without tool calls, -1 if there is none."""
    for index in range(len(messages) - 1, -1, -1):
        if messages[index].role == "assistant" and not messages[index].tool_calls:
            return index
    return -1


def _open_frame(prompt: Prompt, marker: str, name: str) -> None:
    prompt.mark(marker)
    prompt.write(name)
    prompt.mark(d.IM_MIDDLE)


def _write_message(prompt: Prompt, dialect: Dialect, index: int, message: Message, reasoning: bool) -> None:
    marker = {"user": d.IM_USER, "assistant": d.IM_ASSISTANT}.get(message.role, d.IM_SYSTEM)
    _open_frame(prompt, marker, (message.name if dialect.frame_names else None) or message.role)
    if message.role == "assistant":
        if dialect.think_in_prompt:
            _write_think(prompt, dialect, (reasoning_of(dialect, message) or "") if reasoning else "")
        _write_content(prompt, dialect, index, message)
        _write_tool_calls(prompt, index, message)
    else:
        if message.role == "tool":
            if message.tool_call_id is None:
                raise ChatError(
                    f"Message {index} is a tool result without tool_call_id.",
                    'Give it the id of its call, or render with tool_ids="canonical".',
                )
            prompt.write(f"## Return of {message.tool_call_id}\n")
        _write_content(prompt, dialect, index, message)
    prompt.mark(d.IM_END)


def _write_again(prompt: Prompt, dialect: Dialect, message: Message, written: Written, reasoning: bool) -> None:
    """A message as the tokens that the model wrote; where reasoning is history, those after it."""
    _open_frame(prompt, d.IM_ASSISTANT, (message.name if dialect.frame_names else None) or message.role)
    if reasoning or not dialect.think_in_prompt:
        if dialect.think_prefill:
            _write_think(prompt, dialect, None if written.in_reasoning else "")
        prompt.insert_ids(written.token_ids)
    else:
        _write_think(prompt, dialect, "")
        prompt.insert_ids(written.token_ids[written.content_at :])
    prompt.mark(d.IM_END)


def reasoning_of(dialect: Dialect, message: Message) -> str | None:
    """The reasoning that this dialect's template reads from a message."""
    if dialect.preserves_thinking and message.other_reasoning is not None:
        return message.other_reasoning
    return message.reasoning


def _write_think(prompt: Prompt, dialect: Dialect, reasoning: str | None) -> None:
    """A whole think block, or, for None, only its opening."""
    opening, closing = dialect.think
    prompt.mark(opening)
    if reasoning is not None:
        prompt.write(reasoning)
        prompt.mark(closing)


def _write_content(prompt: Prompt, dialect: Dialect, index: int, message: Message) -> None:
    for number, part in enumerate(message.parts):
        if part.kind == "text":
            prompt.write(part.text)
        elif part.kind == "image":
            opening, after = dialect.image
            prompt.mark(opening)
            prompt.write("image")
            prompt.mark(d.MEDIA_CONTENT, d.MEDIA_PAD, d.MEDIA_END)
            prompt.write(after)
        elif dialect.video is not None:
            prompt.write(dialect.video)
        else:
            raise ChatError(
                f"Message {index} has a video (content part {number}), which the dialect {dialect.name} does not know.",
                "Videos need the dialect kimi-k2.5 or kimi-k2.6.",
            )


def _write_tool_calls(prompt: Prompt, index: int, message: Message) -> None:
    if not message.tool_calls:
        return
    prompt.mark(d.SECTION_BEGIN)
    for number, call in enumerate(message.tool_calls):
        if call.id is None:
            raise ChatError(
                f"Message {index} has a tool call {number} ({call.name}) without an id.",
                'Give it one, or render with tool_ids="canonical".',
            )
        prompt.mark(d.CALL_BEGIN)
        prompt.write(call.id)
        prompt.mark(d.ARGUMENT_BEGIN)
        prompt.write(call.arguments)
        prompt.mark(d.CALL_END)
    prompt.mark(d.SECTION_END)
