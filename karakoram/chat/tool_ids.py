"""Canonical tool-call ids: `functions.NAME:INDEX`, with one counter over the whole conversation, and the way back.

The models were trained on prompts in which the calls of a conversation are numbered 0, 1, 2, … in order. Clients
bring ids of their own (`call_abc`, UUIDs, `search:0`), and a history with such ids makes the model write malformed
ones. So chat, session and server render canonical ids and keep this map, which leads from each canonical id back to
the client's.

The same client id may come twice (some clients number per message): a result then belongs to the latest call with
that id. A result whose id fits no call, or that has none, belongs to the first call of the latest calling message
still without one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

from karakoram.chat.messages import Message, ToolCall, read_messages
from karakoram.errors import ChatError


@dataclass(frozen=True)
class ToolIds:
    """The ids of one conversation. `to_original` is complete; `to_canonical` leads to the latest call with an id."""

    to_original: Mapping[str, str | None]
    to_canonical: Mapping[str, str]

    @classmethod
    def of(cls, messages: Sequence[Mapping[str, object]]) -> ToolIds:
        """The map of `messages` in OpenAI's shape."""
        return canonical_ids(read_messages(messages))[1]

    @property
    def next_index(self) -> int:
        """The index of the conversation's next call; equals the number of calls so far."""
        return len(self.to_original)


def canonical_ids(messages: Sequence[Message]) -> tuple[list[Message], ToolIds]:
    """`messages` with canonical ids in calls and results, and the map between the ids.

    ChatError if a result belongs to no call.
    """
    to_original: dict[str, str | None] = {}
    to_canonical: dict[str, str] = {}
    waiting: list[str] = []
    renamed: list[Message] = []
    for index, message in enumerate(messages):
        if message.tool_calls:
            calls: list[ToolCall] = []
            for call in message.tool_calls:
                canonical = f"functions.{call.name}:{len(to_original)}"
                to_original[canonical] = call.id
                if call.id is not None:
                    to_canonical[call.id] = canonical
                calls.append(replace(call, id=canonical))
            waiting = [call.id for call in calls if call.id is not None]
            message = replace(message, tool_calls=tuple(calls))
        elif message.role == "tool":
            canonical = to_canonical.get(message.tool_call_id or "") or (waiting[0] if waiting else None)
            if canonical is None:
                raise ChatError(
                    f"Message {index} is a result for {message.tool_call_id!r}, which is no open tool call.",
                    "Give each result the tool_call_id of its call.",
                )
            if canonical in waiting:
                waiting.remove(canonical)
            message = replace(message, tool_call_id=canonical)
        renamed.append(message)
    return renamed, ToolIds(MappingProxyType(to_original), MappingProxyType(to_canonical))
