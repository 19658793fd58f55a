"""A model's output, piece by piece, back to reasoning, content and tool calls.

Two front doors, one machine. `feed` takes token ids: a marker is a marker only as its special id, so a model that
writes about markers is not misread, and UTF-8 characters split over tokens are held until complete. `feed_text` takes
text, where a marker is its spelling; an unfinished one is held back. Markers that the tokenizer lacks are matched as
text in both. Any chunking gives the same message, and the deltas add up to it.

    reasoning ──</think>──▶ content          either ──section begin──▶ tools ──call begin──▶ header ──argument begin──▶
    arguments ──call end / section end──▶ tools                        ──call begin──▶ header (of the next call)

The rules, from the behaviour of vLLM, SGLang and Moonshot's reference where they agree, else so that no call is lost
and no marker leaks:
1. Reasoning and content are byte-exact. A section or call begin ends reasoning. `<think>` at the start opens
   reasoning (or is swallowed inside it); any other think, tool or frame marker in reasoning or content is dropped.
2. From the first section or call begin on, text outside calls is dropped; further sections and bare calls count.
3. A call is closed by call end, section begin or end, the next call begin, or the end of the output. A header cut off
   by the next begin or by the end is no call; a header closed without arguments has `{}`.
4. Arguments are raw text without surrounding white space, never validated; empty becomes `{}`.
5. `[EOS]` and `<|im_end|>` end the output; whatever follows is ignored.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any

from karakoram.chat import dialects as d
from karakoram.chat.call_headers import Header, read_header, tool_of_arguments, tool_parameters
from karakoram.chat.dialects import Dialect
from karakoram.chat.marker_scanner import MarkerScanner
from karakoram.chat.tokenizer import Tokenizer
from karakoram.errors import ChatError

Delta = dict[str, Any]


class _State(Enum):
    REASONING = auto()
    CONTENT = auto()
    TOOLS = auto()
    HEADER = auto()
    ARGUMENTS = auto()


@dataclass
class _Call:
    """A call whose arguments are being read. Until it is announced, its text waits in `pieces`."""

    header: Header | None
    id: str | None = None
    name: str | None = None
    index: int | None = None
    pieces: list[str] = field(default_factory=list[str])
    """Argument text: all that was sent once announced, else all that was read."""
    spaces: list[str] = field(default_factory=list[str])
    """White space that is part of the arguments only if more follows."""
    incomplete: bool = False


class OutputParser:
    """Parses one assistant turn. Deltas are OpenAI-shaped: `reasoning_content`, `content` or `tool_calls`."""

    def __init__(
        self,
        dialect: Dialect,
        tokenizer: Tokenizer,
        tools: list[dict[str, Any]],
        thinking: bool = True,
        first_index: int = 0,
    ) -> None:
        self._tools = tool_parameters(tools)
        self._tokenizer = tokenizer
        self._first_index = first_index
        self._think_open, self._think_close = dialect.think
        self._markers = {*d.FRAME_MARKERS, *d.TOOL_MARKERS, *d.STOP_MARKERS, self._think_open, self._think_close}
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._scanner: MarkerScanner | None = None
        self._reads_ids = False
        self._state = _State.REASONING if thinking and dialect.starts_in_reasoning else _State.CONTENT
        self._stopped = False
        self._finished = False
        self._reasoning: list[str] = []
        self._content: list[str] = []
        self._answer_begun = False
        self._header: list[str] = []
        self._call: _Call | None = None
        self._calls: list[_Call] = []
        self._ids: set[str] = set()
        self._deltas: list[Delta] = []

    @property
    def stopped(self) -> bool:
        """Whether `[EOS]` or `<|im_end|>` has been seen."""
        return self._stopped

    def feed(self, token_ids: Iterable[int]) -> list[Delta]:
        """Read token ids; the deltas that are certain now. TokenizerError for an id outside the vocabulary."""
        scanner = self._open(reads_ids=True)
        tokenizer = self._tokenizer
        tokens = [(tokenizer.special_name(token_id), tokenizer.token_bytes(token_id)) for token_id in token_ids]
        run: list[bytes] = []
        for name, token in tokens:
            if name is not None and name in self._markers:
                self._scan(scanner, self._decoder.decode(b"".join(run), final=True))
                run.clear()
                self._on_text(scanner.flush())
                self._on_marker(name)
            else:
                run.append(token)
        self._scan(scanner, self._decoder.decode(b"".join(run)))
        return self._take_deltas()

    def feed_text(self, text: str) -> list[Delta]:
        """Read text; the deltas that are certain now."""
        self._scan(self._open(reads_ids=False), text)
        return self._take_deltas()

    def flush(self) -> list[Delta]:
        """The output has ended: the deltas of what was held back. `finish` does this too, without giving the deltas."""
        if not self._finished:
            self._finished = True
            if self._scanner is not None:
                self._scan(self._scanner, self._decoder.decode(b"", final=True))
                self._on_text(self._scanner.flush())
            self._end()
        return self._take_deltas()

    def finish(self, reason: str = "stop") -> dict[str, Any]:
        """The whole assistant message. `finish_reason` is `reason`, or "tool_calls" for "stop" with calls.

        A call that the end of the output cut off carries `"incomplete": True`.
        """
        self.flush()
        calls: list[dict[str, Any]] = []
        for call in self._calls:
            function = {"name": call.name, "arguments": "".join(call.pieces)}
            calls.append({"id": call.id, "type": "function", "function": function})
            if call.incomplete:
                calls[-1]["incomplete"] = True
        return {
            "role": "assistant",
            "reasoning_content": "".join(self._reasoning) or None,
            "content": "".join(self._content) or None,
            "tool_calls": calls,
            "finish_reason": "tool_calls" if calls and reason == "stop" else reason,
        }

    def _open(self, reads_ids: bool) -> MarkerScanner:
        if self._finished:
            raise ChatError("This parser has finished its turn.", "Make a new parser for the next one.")
        if self._scanner is None:
            self._reads_ids = reads_ids
            self._scanner = MarkerScanner(
                marker for marker in self._markers if not reads_ids or marker not in self._tokenizer.special_ids
            )
        elif self._reads_ids != reads_ids:
            raise ChatError("One parser was fed both token ids and text.", "Feed it one kind only.")
        return self._scanner

    def _scan(self, scanner: MarkerScanner, text: str) -> None:
        for piece, is_marker in scanner.feed(text):
            if is_marker:
                self._on_marker(piece)
            else:
                self._on_text(piece)

    def _on_text(self, text: str) -> None:
        if self._stopped or not text:
            return
        if self._state is _State.REASONING:
            self._reasoning.append(text)
            self._answer_begun = True
            self._emit_text("reasoning_content", text)
        elif self._state is _State.CONTENT:
            self._content.append(text)
            self._answer_begun = self._answer_begun or not text.isspace()
            self._emit_text("content", text)
        elif self._state is _State.HEADER:
            self._header.append(text)
        elif self._state is _State.ARGUMENTS:
            self._add_arguments(text)

    def _on_marker(self, marker: str) -> None:
        if self._stopped:
            return
        if marker in d.STOP_MARKERS:
            self._end()
            self._stopped = True
        elif self._state is _State.ARGUMENTS:
            self._on_marker_in_arguments(marker)
        elif self._state is _State.HEADER:
            self._on_marker_in_header(marker)
        elif marker == d.SECTION_BEGIN:
            self._state = _State.TOOLS
        elif marker == d.CALL_BEGIN:
            self._begin_header()
        elif marker == self._think_close and self._state is _State.REASONING:
            self._state = _State.CONTENT
        elif marker == self._think_open and self._state is _State.CONTENT and not self._answer_begun:
            self._state = _State.REASONING

    def _on_marker_in_header(self, marker: str) -> None:
        if marker == d.ARGUMENT_BEGIN:
            self._begin_call()
        elif marker in (d.CALL_END, d.SECTION_END):
            self._begin_call()
            self._close_call(cut_off=False)
        elif marker == d.CALL_BEGIN:
            self._begin_header()
        elif marker == d.SECTION_BEGIN:
            self._state = _State.TOOLS

    def _on_marker_in_arguments(self, marker: str) -> None:
        if marker in (d.CALL_END, d.SECTION_END, d.SECTION_BEGIN):
            self._close_call(cut_off=False)
        elif marker == d.CALL_BEGIN:
            self._close_call(cut_off=False)
            self._begin_header()
        elif marker != d.ARGUMENT_BEGIN:
            self._add_arguments(marker)

    def _begin_header(self) -> None:
        self._header = []
        self._state = _State.HEADER

    def _begin_call(self) -> None:
        self._call = _Call(read_header("".join(self._header), self._tools))
        self._state = _State.ARGUMENTS
        header = self._call.header
        if header is not None and header.name is not None:
            self._announce(self._call, header, header.name)

    def _announce(self, call: _Call, header: Header, name: str) -> None:
        """The call is certain: give it its place and id, and send both with the name."""
        call.name = name
        call.index = len(self._calls)
        call.id = header.id or self._new_id(name, header.counter)
        self._ids.add(call.id)
        self._calls.append(call)
        function = {"name": name, "arguments": ""}
        self._deltas.append(
            {"tool_calls": [{"index": call.index, "id": call.id, "type": "function", "function": function}]}
        )

    def _new_id(self, name: str, counter: int | None) -> str:
        counter = self._first_index + len(self._calls) if counter is None else counter
        while f"functions.{name}:{counter}" in self._ids:
            counter += 1
        return f"functions.{name}:{counter}"

    def _add_arguments(self, text: str) -> None:
        call = self._call
        if call is None or call.header is None:
            return
        if call.index is None:
            call.pieces.append(text)
            return
        if not call.pieces:
            text = text.lstrip()
        kept = text.rstrip()
        if kept:
            self._send_arguments(call, "".join(call.spaces) + kept)
            call.spaces = []
        if call.pieces and len(kept) < len(text):
            call.spaces.append(text[len(kept) :])

    def _send_arguments(self, call: _Call, text: str) -> None:
        call.pieces.append(text)
        last = self._deltas[-1].get("tool_calls") if self._deltas else None
        if last and last[0]["index"] == call.index:
            last[0]["function"]["arguments"] += text
        else:
            self._deltas.append({"tool_calls": [{"index": call.index, "function": {"arguments": text}}]})

    def _close_call(self, cut_off: bool) -> None:
        call, self._call = self._call, None
        self._state = _State.TOOLS
        if call is None or call.header is None:
            return
        if call.index is None:
            arguments = "".join(call.pieces).strip()
            name = tool_of_arguments(arguments, self._tools)
            if name is None:
                return
            call.pieces = []
            self._announce(call, call.header, name)
            if arguments:
                self._send_arguments(call, arguments)
        # A complete JSON text that only lost its end marker can be used: only the others are called incomplete.
        call.incomplete = cut_off and not _is_json("".join(call.pieces))
        if not call.pieces:
            self._send_arguments(call, "{}")

    def _end(self) -> None:
        """The end of the output: an open call is cut off, an open header is no call."""
        if not self._stopped and self._state is _State.ARGUMENTS:
            self._close_call(cut_off=True)

    def _emit_text(self, key: str, text: str) -> None:
        if self._deltas and key in self._deltas[-1]:
            self._deltas[-1][key] += text
        else:
            self._deltas.append({key: text})

    def _take_deltas(self) -> list[Delta]:
        deltas, self._deltas = self._deltas, []
        return deltas


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True
