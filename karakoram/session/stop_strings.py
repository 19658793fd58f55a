"""Stop strings: texts that end the content and are not part of it.

The engine's thread must know at once that one has come (`StopWatch`), and the reader of the stream must not see the
beginning of one (`StopFilter`). Both look at content only: what is said in reasoning or in a call's arguments ends
nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from karakoram.chat.marker_scanner import MarkerScanner


def _scanner(stops: Sequence[str]) -> MarkerScanner:
    """Of two strings of which one begins with the other, the shorter decides."""
    kept = [stop for stop in stops if not any(other != stop and stop.startswith(other) for other in stops)]
    return MarkerScanner(kept)


class StopWatch:
    """Called with each emitted token; True once the content holds a stop string. `parser` is its own."""

    def __init__(self, parser: Any, stops: Sequence[str]) -> None:
        self._parser, self._scanner = parser, _scanner(stops)

    def __call__(self, token: int) -> bool:
        for delta in self._parser.feed([token]):
            if (text := delta.get("content")) and any(is_stop for _, is_stop in self._scanner.feed(text)):
                return True
        return False


class StopFilter:
    """Content piece by piece, up to the first stop string; `found` is the one that came."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._scanner = _scanner(stops)
        self.found: str | None = None

    def feed(self, text: str) -> str:
        """What of this piece, and of what was held back, is certainly content."""
        passed: list[str] = []
        for piece, is_stop in self._scanner.feed(text):
            if self.found is None:
                if is_stop:
                    self.found = piece
                else:
                    passed.append(piece)
        return "".join(passed)

    def flush(self) -> str:
        """The content has ended: what was held back."""
        rest = self._scanner.flush()
        return rest if self.found is None else ""
