"""The grammar of JSON strings within limits: lengths, patterns and formats, also those of free property names.

Without a pattern a string is a counted run of characters in any spelling. With one it is an automaton over the plain
spelling; several patterns, and a pattern with a length, are the automata's product, and llguidance gets the same as an
intersection. A pattern that is a counted set of characters (`^[a-z]{2,9}$`) is a run as well, whatever its length.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from karakoram.engine.constrain.automaton import (
    MAX_NFA_STATES,
    Automaton,
    automaton,
    combined,
    repeated,
    words_automaton,
)
from karakoram.engine.constrain.grammar import Auto, Node, Run, Seq, Words
from karakoram.engine.constrain.regex import (
    ANY_CHAR,
    QUOTE,
    RAW_CHAR,
    UNIVERSE,
    Chars,
    NothingMatches,
    PatternError,
    Regex,
    Times,
    join,
    literal,
    read_full,
    read_search,
    rust,
    spelled,
    times,
    without,
)
from karakoram.engine.constrain.schema.document import Document
from karakoram.engine.constrain.schema.formats import FORMATS
from karakoram.engine.constrain.schema.kinds import Kind
from karakoram.engine.constrain.vocabulary import FILLERS, Vocabulary
from karakoram.errors import SchemaError

# Least lengths and counts beyond this are refused: no context holds them, and the shortest text is kept in memory.
MAX_LEAST = 4096
# Where a pattern and a length hold together, a longer string is not written.
MAX_COUNTED = 1000

_PLAIN_CHAR = spelled(Chars(UNIVERSE))


class Strings:
    """Makes the nodes of one document's strings."""

    def __init__(self, vocabulary: Vocabulary, document: Document) -> None:
        self._vocabulary = vocabulary
        self._document = document

    def node(self, kind: Kind) -> Node | None:
        """The strings of a kind; None: there are none. SchemaError for what cannot be enforced."""
        low, high = kind.low, kind.high
        if low > MAX_LEAST:
            where = self._document.where(kind.source)
            raise SchemaError(f"minLength {low:,} is more than {MAX_LEAST:,}.", "Lower it.", "minLength", where)
        regexes = self._regexes(kind)
        only = regexes[0] if len(regexes) == 1 else None
        if isinstance(only, Times) and isinstance(only.item, Chars):
            highs = [value for value in (high, only.high) if value is not None]
            return self._run(kind, only.item, max(low, only.low), min(highs) if highs else None)
        if not regexes:
            return self._run(kind, None, low, high)
        try:
            parts, terminals = self._limits(kind, regexes)
            self._document.spend(sum(len(part.rows) for part in parts))
            return self._in_quotes(Auto(self._vocabulary, combined(parts), "", quoted=True), " & ".join(terminals))
        except NothingMatches:
            self._document.note(kind.source, "pattern", "matches nothing of the allowed length")
            return None
        except PatternError as error:
            self._document.spend(MAX_NFA_STATES)
            self._document.refuse(kind.source, "pattern", f"cannot be enforced: {error}")
            return self._run(kind, None, low, high)

    def key(
        self, names: Sequence[Kind], wanted: Sequence[str], unwanted: Sequence[str], taken: Sequence[bytes]
    ) -> Node | None:
        """A free property's name: of the kinds `names` (none: any), matching the patterns `wanted`, none of `unwanted`,
        and none of the names `taken` (as JSON). None: there is none. PatternError where that cannot be enforced.

        No character is escaped, so no other spelling hides a second property of a name that is taken."""
        plain = times(RAW_CHAR, 0, None)
        parts = [automaton(plain)]
        terminals = [f"/{rust(join(QUOTE, plain, QUOTE))}/"]
        if len(names) > 1:
            raise PatternError("names of several kinds are not enforced")
        regexes = [read_search(pattern) for pattern in wanted] + [
            regex for kind in names for regex in self._regexes(kind)
        ]
        more, more_terminals = self._limits(names[0] if names else Kind("string"), regexes)
        barred = [spelled(read_search(pattern)) for pattern in unwanted]
        words = [word[1:-1] for word in taken]
        terminals += more_terminals
        if barred or words:
            inner = [*barred, *(literal(word.decode("utf-8")) for word in words)]
            terminals.append("~(" + " | ".join(f"/{rust(join(QUOTE, regex, QUOTE))}/" for regex in inner) + ")")
        refused: list[Automaton] = [automaton(regex) for regex in barred]
        if words:
            refused.append(words_automaton(words))
        try:
            body = combined([*parts, *more], refused)
        except NothingMatches:
            return None
        return self._in_quotes(Auto(self._vocabulary, body, "", quoted=True), " & ".join(terminals))

    def _limits(self, kind: Kind, regexes: Sequence[Regex]) -> tuple[list[Automaton], list[str]]:
        """Expressions and the kind's lengths, as automata without the quotes and as terminals with them."""
        parts = [automaton(spelled(regex)) for regex in regexes]
        terminals = [f"/{rust(join(QUOTE, spelled(regex), QUOTE))}/" for regex in regexes]
        if kind.low or kind.high is not None:
            high = None if kind.high is None else max(kind.low, min(kind.high, MAX_COUNTED))
            parts.append(repeated(automaton(_PLAIN_CHAR), kind.low, high))
            terminals.append(f"/{rust(join(QUOTE, times(_PLAIN_CHAR, kind.low, high), QUOTE))}/")
        return parts, terminals

    def _regexes(self, kind: Kind) -> list[Regex]:
        regexes = [read_full(FORMATS[name]) for name in dict.fromkeys(kind.formats)]
        for pattern in dict.fromkeys(kind.patterns):
            try:
                regexes.append(read_search(pattern))
            except PatternError as error:
                self._document.refuse(kind.source, "pattern", f"{pattern[:80]!r} cannot be enforced: {error}")
        return regexes

    def _run(self, kind: Kind, chars: Chars | None, low: int, high: int | None) -> Node | None:
        impossible = chars is not None and not chars.ranges and low > 0
        if impossible or (high is not None and low > high):
            self._document.note(kind.source, "pattern", "matches nothing of the allowed length")
            return None
        if high == 0 or (chars is not None and not chars.ranges):
            return Words(self._vocabulary, [b'""'])
        regex = ANY_CHAR if chars is None else spelled(chars)
        fills = chars is None or not without(tuple((byte, byte) for byte in sorted(FILLERS)), chars.ranges)
        unit = _any_char() if chars is None else automaton(regex)
        run = Run(self._vocabulary, unit, low, high, fills)
        return self._in_quotes(run, f"/{rust(join(QUOTE, times(regex, low, high), QUOTE))}/")

    def _in_quotes(self, body: Node, terminal: str) -> Node:
        quote = Words(self._vocabulary, [b'"'])
        node = Seq(quote, body, quote)
        node.terminal = terminal
        return node


@lru_cache(1)
def _any_char() -> Automaton:
    return automaton(ANY_CHAR)
