"""The header of a call, `functions.NAME:INDEX`: one of a few known texts, spelled in any tokens.

No grammar is compiled for it, since the index changes with every call: the tokens that may come next are the prefixes
of what is left of each header that still fits, looked up in the vocabulary. A header is offered only while the shortest
arguments of its tool fit the budget.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from karakoram.engine.constrain.vocabulary import Vocabulary


@dataclass(frozen=True)
class Header:
    """A header's text, the name of its tool, and the tokens of the tool's shortest arguments."""

    text: bytes
    tool: str
    arguments: int


class HeaderText:
    """One header being written."""

    def __init__(self, vocabulary: Vocabulary, headers: Sequence[Header]) -> None:
        self._vocabulary = vocabulary
        self._headers = list(headers)
        self._read = 0

    @property
    def tool(self) -> str | None:
        """The tool whose header has been written, once it is whole."""
        return next((header.tool for header in self._headers if len(header.text) == self._read), None)

    def tokens(self, left: int) -> list[int]:
        """The tokens that may come next, so that header and shortest arguments take at most `left`; if none fits, the
        next of the cheapest."""
        fitting = {token for token, cost in self._offered() if cost <= left}
        if not fitting and self.tool is None:
            fitting = {min(self._offered(), key=lambda pair: pair[1])[0]}
        return list(fitting)

    def _offered(self) -> Iterator[tuple[int, int]]:
        """(token, tokens from it on to the end of the shortest arguments) for every token that fits a header."""
        ids = self._vocabulary.ids
        for header in self._headers:
            rest = header.text[self._read :]
            costs = self._vocabulary.costs(rest)
            for end in range(1, len(rest) + 1):
                token = ids.get(rest[:end])
                if token is not None:
                    yield token, 1 + costs[end] + header.arguments

    def accept(self, token: int) -> bool:
        """This token comes next; False if it was not among `tokens`."""
        spellings = self._vocabulary.spellings
        if token >= len(spellings):
            return False
        spelling = spellings[token]
        self._headers = [header for header in self._headers if header.text.startswith(spelling, self._read)]
        self._read += len(spelling)
        return bool(self._headers)
