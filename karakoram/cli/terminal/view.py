"""How an answer looks while it arrives.

stdout gets the answer and nothing else, so that it can be piped; notes (model, sampling, counts) go to stderr.
On a terminal the thinking is shown dimmed in the same stream; where stdout is no terminal it goes to stderr.

A model's words are foreign: on a terminal, control characters are replaced, so that no answer can move the cursor,
change the title or hide text. Line feeds and tabs pass. Escape sequences of our own are written only to terminals and
only without NO_COLOR (no-color.org).
"""

import os
import re
import sys
from collections.abc import Mapping
from typing import Any, TextIO

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
_DIM, _BOLD, _RESET = "\x1b[2m", "\x1b[1m", "\x1b[0m"


def printable(text: str) -> str:
    """Text without characters that command a terminal (C0, C1, bidirectional overrides), each shown as �."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text.replace("\r\n", "\n"))


class AnswerView:
    """Shows deltas as they come."""

    def __init__(self, out: TextIO | None = None, err: TextIO | None = None) -> None:
        self.out = out or sys.stdout
        self.err = err or sys.stderr
        self.on_terminal = self.out.isatty()
        self._kind = ""  # of what was written last in this answer: reasoning_content, content, call
        self._at_line_start = True

    def note(self, text: str) -> None:
        """A line for the person, not part of the answer."""
        self.end_line()
        self.err.write(self._style(printable(text), _DIM, self.err) + "\n")
        self.err.flush()

    def delta(self, delta: Mapping[str, Any]) -> None:
        """Show one delta of the session at once."""
        if thinking := delta.get("reasoning_content"):
            self._thinking(thinking)
        if content := delta.get("content"):
            self._content(content)
        for call in delta.get("tool_calls") or ():
            self._call(call)

    def result(self, text: str) -> None:
        """A tool's result, for the person."""
        self.note("  = " + text.replace("\n", "\n    "))

    def end_line(self) -> None:
        """After an answer: put the cursor at the start of a line."""
        if not self._at_line_start:
            self._stream().write("\n")
        self._stream().flush()
        self._at_line_start, self._kind = True, ""

    def _thinking(self, text: str) -> None:
        stream = self.out if self.on_terminal else self.err
        self._begin("reasoning_content", gap=False)
        self._write(stream, text, _DIM)

    def _content(self, text: str) -> None:
        if not self._kind or self._kind == "content":
            self._begin("content", gap=False)
        else:
            if self.on_terminal:
                text = text.lstrip("\n")  # the model's own gap after thinking; ours is one empty line
            if not text:
                return
            self._begin("content", gap=True)
        self._write(self.out, text, "")

    def _call(self, call: Mapping[str, Any]) -> None:
        function = call.get("function") or {}
        stream = self.out if self.on_terminal else self.err
        if name := function.get("name"):
            self.end_line()
            self._begin("call", gap=False)
            self._write(stream, f"→ {name} ", _BOLD)
        if arguments := function.get("arguments"):
            self._write(stream, arguments, "")

    def _begin(self, kind: str, gap: bool) -> None:
        if self._kind not in ("", kind):
            self.end_line()
            if gap and self.on_terminal:
                self.out.write("\n")
        self._kind = kind

    def _stream(self) -> TextIO:
        return self.out if self.on_terminal or self._kind == "content" else self.err

    def _write(self, stream: TextIO, text: str, style: str) -> None:
        shown = printable(text) if stream.isatty() else text
        stream.write(self._style(shown, style, stream))
        stream.flush()
        self._at_line_start = text.endswith("\n")

    def _style(self, text: str, style: str, stream: TextIO) -> str:
        if not style or os.environ.get("NO_COLOR") or not stream.isatty():
            return text
        return f"{style}{text}{_RESET}"
