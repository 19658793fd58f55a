"""A parser's deltas as an answer: with our ids for tool calls, and at the end whatever the parser had held back."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from karakoram.chat.dialects import STOP_MARKERS, TOOL_MARKERS
from karakoram.chat.format import ChatFormat

Message = Mapping[str, Any]
Delta = dict[str, Any]
FinishReason = Literal["stop", "tool_calls", "length", "interrupted"]


class CallIds:
    """Issues `functions.NAME:INDEX` for the calls of one answer, INDEX going on from the calls in the history."""

    def __init__(self, messages: Sequence[Message]) -> None:
        calls = [call for message in messages for call in message.get("tool_calls") or ()]
        self._taken = {call.get("id") for call in calls}
        self._first = len(calls)
        self._issued: dict[int, str] = {}

    def issue(self, position: int, name: str) -> str:
        """The id of the answer's call number `position` (from 0); the same position always gets the same id."""
        if position not in self._issued:
            index = self._first + position
            while f"functions.{name}:{index}" in self._taken:
                index += 1  # a foreign id in the history happens to look like this one
            self._issued[position] = f"functions.{name}:{index}"
            self._taken.add(self._issued[position])
        return self._issued[position]


def unspoken(fmt: ChatFormat) -> frozenset[int]:
    """Special tokens that mean nothing in an answer: of images, of other formats, reserved ones."""
    heard = {*TOOL_MARKERS, *STOP_MARKERS, *fmt.facts.think}
    return frozenset(token for name, token in fmt.tokenizer.special_ids.items() if name not in heard)


class SpokenParser:
    """A parser that never hears the `unspoken` tokens, whose names it would take for text. Trained models do not draw
    them; random or damaged weights do, and no marker may leak into a text."""

    def __init__(self, parser: Any, unspoken: frozenset[int]) -> None:
        self._parser, self._unspoken = parser, unspoken

    def feed(self, tokens: Sequence[int]) -> list[Delta]:
        """As the parser's."""
        return self._parser.feed([token for token in tokens if token not in self._unspoken])

    def finish(self, reason: str) -> dict[str, Any]:
        """As the parser's."""
        return self._parser.finish(reason)


class Parts:
    """A parser's deltas with our call ids, and at the end whatever the parser had held back."""

    def __init__(self, parser: Any, call_ids: CallIds) -> None:
        self._parser = parser
        self._call_ids = call_ids
        self._sent = {"reasoning_content": "", "content": ""}
        self._sent_arguments: dict[int, str] = {}
        self._message: dict[str, Any] | None = None

    def feed(self, token: int) -> Iterator[Delta]:
        for delta in self._parser.feed([token]):
            yield self._with_our_ids(delta)

    def finish(self, reason: str) -> Iterator[Delta]:
        """Close the parser; yield the tail that no delta has shown yet."""
        message = self._finished(reason)
        for key, sent in self._sent.items():
            whole = message.get(key) or ""
            if len(whole) > len(sent) and whole.startswith(sent):
                yield {key: whole[len(sent) :]}
        for position, call in enumerate(message.get("tool_calls") or ()):
            function, sent = call["function"], self._sent_arguments.get(position)
            tail = function["arguments"][len(sent or "") :]
            if sent is None:
                yield {"tool_calls": [{"index": position, **call}]}
            elif tail:
                yield {"tool_calls": [{"index": position, "function": {"arguments": tail}}]}

    def message(self, reason: FinishReason) -> tuple[dict[str, Any], FinishReason]:
        """The whole assistant message and why it ended. "interrupted" keeps what was said until then."""
        message = dict(self._finished("length" if reason == "interrupted" else reason))
        parsed: FinishReason = message.pop("finish_reason", reason)
        return message, "interrupted" if reason == "interrupted" else parsed

    def _finished(self, reason: str) -> dict[str, Any]:
        if self._message is None:
            message = {"role": "assistant", **self._parser.finish(reason)}
            if calls := message.get("tool_calls"):
                message["tool_calls"] = [
                    {**call, "id": self._call_ids.issue(position, call["function"]["name"])}
                    for position, call in enumerate(calls)
                ]
            self._message = message
        return self._message

    def _with_our_ids(self, delta: Delta) -> Delta:
        for key in self._sent:
            self._sent[key] += delta.get(key) or ""
        if not delta.get("tool_calls"):
            return delta
        calls = [self._with_our_id(dict(call)) for call in delta["tool_calls"]]
        return {**delta, "tool_calls": calls}

    def _with_our_id(self, call: dict[str, Any]) -> dict[str, Any]:
        position, function = call["index"], call.get("function") or {}
        if call.get("id") is not None:
            call["id"] = self._call_ids.issue(position, function["name"])
        self._sent_arguments[position] = self._sent_arguments.get(position, "") + (function.get("arguments") or "")
        return call
