"""Markers in a stream of text whose pieces end anywhere.

A marker may be split over any number of pieces, so the longest end of the text so far that could still grow into one is
held back until it does or cannot. Everything else passes at once. Any way of cutting a text gives the same events.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator


class MarkerScanner:
    """Splits text into `(text, False)` and `(marker, True)`. No marker may be a prefix of another."""

    def __init__(self, markers: Iterable[str]) -> None:
        ordered = sorted(set(markers))
        self._pattern = re.compile("|".join(map(re.escape, ordered))) if ordered else None
        self._beginnings = frozenset(marker[:length] for marker in ordered for length in range(1, len(marker)))
        self._longest = max(map(len, ordered), default=1) - 1
        self._held = ""

    def feed(self, text: str) -> Iterator[tuple[str, bool]]:
        """The events that are certain now. Consume it before the next call."""
        text = self._held + text
        self._held = ""
        position = 0
        if self._pattern is not None:
            for match in self._pattern.finditer(text):
                if match.start() > position:
                    yield text[position : match.start()], False
                yield match.group(), True
                position = match.end()
        end = len(text) - self._unfinished(text, position)
        self._held = text[end:]
        if end > position:
            yield text[position:end], False

    def _unfinished(self, text: str, start: int) -> int:
        """Length of the longest end of `text[start:]` that begins a marker."""
        for length in range(min(self._longest, len(text) - start), 0, -1):
            if text[-length:] in self._beginnings:
                return length
        return 0

    def flush(self) -> str:
        """The text that was held back and now is no marker."""
        held, self._held = self._held, ""
        return held
