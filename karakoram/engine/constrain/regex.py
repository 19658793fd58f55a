"""Regular expressions as values: from a JSON Schema `pattern`, through JSON spelling, to llguidance's notation.

A pattern is read twice in the life of a call, by the grammar that writes the string and by the validator that checks
it, and must mean the same to both. So it is parsed by the parser of Python's own `re` (`re._parser`, which `jsonschema`
uses through `re.search`), and where Python, ECMA 262 and Rust disagree, the language that is written here is the part
on which they agree:
  \\d \\w \\s   are ASCII only;  \\D stops at U+065F (the first foreign digits follow), \\W is ASCII only
  .           excludes U+000A, U+000D, U+2028 and U+2029;  $ is the very end, not before a last line break
Look-around, back references, flags, word boundaries, and anchors that are not at the outside are refused.

A pattern speaks of characters, a JSON text spells some of them with a backslash: `spelled` turns the one into the
other. A character with a short escape has that one spelling, other control characters cannot be written.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from re import _parser as sre  # type: ignore[attr-defined]
from typing import Any

Ranges = tuple[tuple[int, int], ...]
"""Sorted code point ranges, both ends included, without gaps of zero between them."""


@dataclass(frozen=True)
class Chars:
    """One character out of `ranges`; none at all matches where there are no ranges."""

    ranges: Ranges


@dataclass(frozen=True)
class Join:
    """One after the other; nothing: the empty string."""

    items: tuple[Regex, ...]


@dataclass(frozen=True)
class Either:
    """Any one of the options."""

    options: tuple[Regex, ...]


@dataclass(frozen=True)
class Times:
    """`low` to `high` times, without end where `high` is None."""

    item: Regex
    low: int
    high: int | None


Regex = Chars | Join | Either | Times

EMPTY = Join(())
NOTHING = Chars(())
UNIVERSE: Ranges = ((0, 0xD7FF), (0xE000, 0x10FFFF))
"""All characters that UTF-8 can spell: surrogates are none."""


class PatternError(ValueError):
    """A regular expression that cannot be read, or says something that cannot be enforced."""


class NothingMatches(PatternError):
    """It can be enforced, but no text satisfies it."""

    def __init__(self) -> None:
        super().__init__("nothing matches it")


# ------------------------------------------------------------------------------------------------ sets of characters


def merged(ranges: Iterable[tuple[int, int]]) -> Ranges:
    """The union, in normal form."""
    out: list[tuple[int, int]] = []
    for low, high in sorted(ranges):
        if out and low <= out[-1][1] + 1:
            out[-1] = (out[-1][0], max(out[-1][1], high))
        elif low <= high:
            out.append((low, high))
    return tuple(out)


def without(ranges: Ranges, taken: Ranges) -> Ranges:
    """The characters of `ranges` that are not in `taken`."""
    out = list(ranges)
    for low, high in taken:
        rest: list[tuple[int, int]] = []
        for start, end in out:
            rest += [(start, min(end, low - 1)), (max(start, high + 1), end)]
        out = [(start, end) for start, end in rest if start <= end]
    return merged(out)


def _ascii(pattern: str) -> Ranges:
    return merged((code, code) for code in range(128) if re.fullmatch(pattern, chr(code), re.ASCII))


_SPACES = merged([
    (0x09, 0x0D), (0x1C, 0x20), (0x85, 0x85), (0xA0, 0xA0), (0x1680, 0x1680), (0x2000, 0x200A), (0x2028, 0x2029),
    (0x202F, 0x202F), (0x205F, 0x205F), (0x3000, 0x3000), (0xFEFF, 0xFEFF),
])  # fmt: skip
_FOREIGN = ((0x80, 0x10FFFF),)
# category -> (what it means to every engine, what it means to at least one): the second is taken away when negated.
_CATEGORIES: dict[Any, tuple[Ranges, Ranges]] = {
    sre.CATEGORY_DIGIT: (_ascii(r"\d"), merged([*_ascii(r"\d"), (0x660, 0x10FFFF)])),
    sre.CATEGORY_NOT_DIGIT: (without(((0, 0x65F),), _ascii(r"\d")), without(UNIVERSE, _ascii(r"\d"))),
    sre.CATEGORY_WORD: (_ascii(r"\w"), merged([*_ascii(r"\w"), *_FOREIGN])),
    sre.CATEGORY_NOT_WORD: (_ascii(r"\W"), without(UNIVERSE, _ascii(r"\w"))),
    sre.CATEGORY_SPACE: (_ascii(r"[ \t\n\r\f\v]"), _SPACES),
    sre.CATEGORY_NOT_SPACE: (without(UNIVERSE, _SPACES), without(UNIVERSE, _ascii(r"[ \t\n\r\f\v]"))),
}
_LINE_ENDS: Ranges = ((0x0A, 0x0A), (0x0D, 0x0D), (0x2028, 0x2029))

# ------------------------------------------------------------------------------------------------ building


def literal(text: str) -> Regex:
    """Exactly this text."""
    return Join(tuple(Chars(((ord(char), ord(char)),)) for char in text))


def join(*items: Regex) -> Regex:
    """One after the other, flattened; nothing at all if one of them matches nothing."""
    flat: list[Regex] = []
    for item in items:
        flat += item.items if isinstance(item, Join) else [item]
    if NOTHING in flat:
        return NOTHING
    return flat[0] if len(flat) == 1 else Join(tuple(flat))


def either(*options: Regex) -> Regex:
    """Any of the options; single characters are joined to one set, options that match nothing are dropped."""
    chars = merged(pair for option in options if isinstance(option, Chars) for pair in option.ranges)
    rest = tuple(dict.fromkeys(option for option in options if not isinstance(option, Chars)))
    kept: tuple[Regex, ...] = (*((Chars(chars),) if chars else ()), *rest)
    return kept[0] if len(kept) == 1 else Either(kept) if kept else NOTHING


def times(item: Regex, low: int, high: int | None) -> Regex:
    """Repetition, without the trivial ones."""
    if high == 0 or item == EMPTY:
        return EMPTY
    if item == NOTHING:
        return EMPTY if low == 0 else NOTHING
    return item if low == high == 1 else Times(item, low, high)


# ------------------------------------------------------------------------------------------------ reading


def read_full(pattern: str) -> Regex:
    """The regular expression `pattern` as one that matches whole strings. PatternError says what cannot be enforced."""
    return either(*(join(*_all(items)) for _, items, _ in _sides(_parse(pattern), False, False)))


def read_search(pattern: str) -> Regex:
    """The strings in which `pattern` occurs, as JSON Schema means it: unanchored unless it says ^ and $."""
    anything = times(Chars(UNIVERSE), 0, None)
    options = [
        join(EMPTY if begins else anything, *_all(items), EMPTY if ends else anything)
        for begins, items, ends in _sides(_parse(pattern), False, False)
    ]
    return either(*options)


def _parse(pattern: str) -> list[Any]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            tree = sre.parse(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise PatternError(f"it is no regular expression ({error})") from error
    if tree.state.flags & ~re.UNICODE:
        raise PatternError("it sets flags")
    return list(tree)


def _sides(items: list[Any], begins: bool, ends: bool) -> list[tuple[bool, list[Any], bool]]:
    """The alternatives of a pattern with the anchors around them taken off: (begins with ^, items, ends with $)."""
    while items and items[0][0] is sre.AT and items[0][1] in (sre.AT_BEGINNING, sre.AT_BEGINNING_STRING):
        items, begins = items[1:], True
    while items and items[-1][0] is sre.AT and items[-1][1] in (sre.AT_END, sre.AT_END_STRING):
        items, ends = items[:-1], True
    if len(items) == 1 and items[0][0] is sre.BRANCH:
        return [side for branch in items[0][1][1] for side in _sides(list(branch), begins, ends)]
    if len(items) == 1 and items[0][0] is sre.SUBPATTERN and not (items[0][1][1] or items[0][1][2]):
        return _sides(list(items[0][1][3]), begins, ends)
    return [(begins, items, ends)]


def _all(items: Iterable[Any]) -> list[Regex]:
    return [_one(kind, value) for kind, value in items]


def _one(kind: Any, value: Any) -> Regex:
    if kind is sre.LITERAL:
        return Chars(without(((value, value),), ((0xD800, 0xDFFF),)))
    if kind is sre.NOT_LITERAL:
        return Chars(without(UNIVERSE, ((value, value),)))
    if kind is sre.ANY:
        return Chars(without(UNIVERSE, _LINE_ENDS))
    if kind is sre.IN:
        return Chars(_set(value))
    if kind is sre.BRANCH:
        return either(*(join(*_all(branch)) for branch in value[1]))
    if kind is sre.SUBPATTERN and not (value[1] or value[2]):
        return join(*_all(value[3]))
    if kind in (sre.MAX_REPEAT, sre.MIN_REPEAT):
        low, high, inner = value
        return times(join(*_all(inner)), int(low), None if high is sre.MAXREPEAT else int(high))
    raise PatternError(f"it uses {str(kind).lower().replace('_', ' ')}, or an anchor inside")


def _set(items: Sequence[Any]) -> Ranges:
    negated = bool(items) and items[0][0] is sre.NEGATE
    found: list[tuple[int, int]] = []
    for kind, value in items[1:] if negated else items:
        if kind is sre.LITERAL:
            found.append((value, value))
        elif kind is sre.RANGE:
            found.append((value[0], value[1]))
        elif kind is sre.CATEGORY and value in _CATEGORIES:
            found += _CATEGORIES[value][1 if negated else 0]
        else:
            raise PatternError(f"it uses {str(kind).lower().replace('_', ' ')}")
    return without(UNIVERSE, merged(found)) if negated else without(merged(found), ((0xD800, 0xDFFF),))


# ------------------------------------------------------------------------------------------------ JSON spelling

_SHORT = {0x22: '\\"', 0x5C: "\\\\", 0x08: "\\b", 0x0C: "\\f", 0x0A: "\\n", 0x0D: "\\r", 0x09: "\\t"}
_ESCAPED: Ranges = ((0, 0x1F), (0x22, 0x22), (0x5C, 0x5C))
QUOTE = literal('"')
RAW_CHAR = Chars(without(UNIVERSE, _ESCAPED))
"""A character of a JSON string that stands for itself."""
ANY_CHAR = read_full(
    r'[^"\\\x00-\x1f]|\\(?:["\\/bfnrt]|u(?:[0-9a-ce-fA-CE-F][0-9a-fA-F]{3}|[dD][0-7][0-9a-fA-F]{2}'
    r"|[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}))"
)
"""A character of a JSON string in any spelling: also escaped, where two surrogates are one character and one alone is
none. No character's spelling is the beginning of another's."""


def spelled(regex: Regex) -> Regex:
    """The JSON spellings, quotes not included, of what `regex` matches."""
    if isinstance(regex, Chars):
        short = [literal(text) for code, text in _SHORT.items() if any(a <= code <= b for a, b in regex.ranges)]
        return either(Chars(without(regex.ranges, _ESCAPED)), *short)
    if isinstance(regex, Join):
        return join(*map(spelled, regex.items))
    if isinstance(regex, Either):
        return either(*map(spelled, regex.options))
    return times(spelled(regex.item), regex.low, regex.high)


def quoted(regex: Regex) -> Regex:
    """The JSON strings, quotes included, whose value `regex` matches."""
    return join(QUOTE, spelled(regex), QUOTE)


# ------------------------------------------------------------------------------------------------ writing


def rust(regex: Regex) -> str:
    """The same in the notation of Rust's regex crate, which llguidance reads; it has no unescaped slash."""
    if isinstance(regex, Chars):
        if not regex.ranges:
            raise NothingMatches
        if len(regex.ranges) == 1 and regex.ranges[0][0] == regex.ranges[0][1]:
            return _char(regex.ranges[0][0])
        return "[" + "".join(_char(a) if a == b else f"{_char(a)}-{_char(b)}" for a, b in regex.ranges) + "]"
    if isinstance(regex, Join):
        return "".join(f"(?:{rust(item)})" if isinstance(item, Either) else rust(item) for item in regex.items)
    if isinstance(regex, Either):
        return "|".join(map(rust, regex.options))
    count = {(0, None): "*", (1, None): "+", (0, 1): "?"}.get((regex.low, regex.high))
    if count is None:
        high = "" if regex.high is None else regex.high
        count = f"{{{regex.low}}}" if regex.low == regex.high else f"{{{regex.low},{high}}}"
    inner = rust(regex.item)
    return (inner if isinstance(regex.item, Chars) else f"(?:{inner})") + count


def _char(code: int) -> str:
    char = chr(code)
    return char if char.isascii() and char.isalnum() else f"\\x{{{code:X}}}"
