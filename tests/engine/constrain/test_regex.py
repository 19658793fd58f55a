"""Patterns: what they mean here is what Python and ECMA 262 agree on, and automata know the shortest way to an end."""

import json
import re
from random import Random

import pytest

from karakoram.engine.constrain.automaton import (
    Automaton,
    automaton,
    combined,
    occurs,
    repeated,
    utf8_ranges,
    words_automaton,
)
from karakoram.engine.constrain.regex import (
    UNIVERSE,
    Chars,
    NothingMatches,
    PatternError,
    merged,
    quoted,
    read_full,
    read_search,
    rust,
    spelled,
    without,
)

PATTERNS = [
    r"^[A-Z]{3}-[0-9]{4}$", r"^\S+@\S+\.com$", "a|b", "^a|b$", "^(a|b)$", "(^a$)|(^b$)", r"^(?:x|yy)*?z+$",
    r"^[^\W_]+$", r"\d{2,}\.", r"^\D\W\S$", r"^[^\d\s]{2}$", "^.$", "^[^a]$", "^é+[à-ü]?$", r"^\x41\u0042$", "", "^$",
    r"^\.\*\+\\$", "^(?P<name>a)b$", r"^[\w.-]+$", r"^(?:\+49)?[ /0-9]+$", r"^[一-龥]{2,4}$",
    r'^"\\[\n]?$', r"^\/\*$", r"^a{0}b{1,1}$",
]  # fmt: skip
LETTERS = 'abxyzABC019_-.@ \n\t"\\/*+éà日一😀٣\u2028\u00a0\x1c'


def _random_text(random: Random) -> str:
    return "".join(random.choice(LETTERS) for _ in range(random.randint(0, 6)))


def _member(machine: Automaton, random: Random) -> bytes:
    """A random walk that ends in a match."""
    out, state = bytearray(), 0
    while not (machine.accepting[state] and (random.random() < 0.3 or not machine.open[state])):
        moves = [byte for byte in range(256) if machine.step(state, byte) >= 0]
        byte = random.choice(moves) if len(out) < 30 else machine.shortest(state)[0]
        state = machine.step(state, byte)
        out.append(byte)
    return bytes(out)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_members_match_in_python_too(pattern: str) -> None:
    random = Random(pattern)
    machine = automaton(quoted(read_search(pattern)))
    for text in [machine.shortest(0), *(_member(machine, random) for _ in range(60))]:
        assert machine.matches(text)
        assert re.search(pattern, json.loads(text)), text


@pytest.mark.parametrize("pattern", PATTERNS)
def test_what_python_does_not_match_is_no_member(pattern: str) -> None:
    random = Random(pattern)
    for _ in range(200):
        text = _random_text(random)
        if occurs(pattern, text):
            assert re.search(pattern, text), text


@pytest.mark.parametrize(("pattern", "text"), [
    ("^a|b$", "xb"), ("^a|b$", "ax"), ("a.c", "--abc--"), ("^.$", "é"), ("^[^a]$", "日"), (r"^\w+$", "a_9"), ("x*", ""),
    (r"^\S$", "日"), (r"^[^\d]$", "é"), ("^(a|b[0-9]{30})$", "b" + "1" * 30), (r"^\d{3}(-\d{2})?$", "123-45"),
])  # fmt: skip
def test_members_by_hand(pattern: str, text: str) -> None:
    assert occurs(pattern, text)


@pytest.mark.parametrize(
    "pattern",
    [
        "(?=a)", "(?!a)b", "(?<=a)b", r"(a)\1", r"\bword\b", "a^b", "(?i)a", "(?i:a)", "a++", "(?>a)", r"\p{L}", "(",
        "[b-a]", "a{2,1}",
    ],
)  # fmt: skip
def test_what_is_not_regular_or_not_common_is_refused(pattern: str) -> None:
    with pytest.raises(PatternError):
        read_search(pattern)


@pytest.mark.parametrize("pattern", ["[a-z]{50000}", "(?:[a-z]{900}){900}", "(?:(?:.{90}){90}){90}", "(?:.*a.{16})"])
def test_what_is_too_large_is_refused_soon(pattern: str) -> None:
    with pytest.raises(PatternError, match=r"repetitions|states"):
        automaton(read_search(pattern))


def test_a_pattern_that_python_would_backtrack_on_for_ever() -> None:
    assert not occurs("^(a+)+$", "a" * 5000 + "!")
    assert occurs("^(a+)+$", "a" * 5000)


def test_what_matches_nothing() -> None:
    with pytest.raises(NothingMatches):
        automaton(read_full(r"[^\x00-\U0010ffff]"))
    with pytest.raises(NothingMatches):
        combined([automaton(read_full("a+")), automaton(read_full("b+"))])
    with pytest.raises(NothingMatches):
        combined([automaton(read_full("a"))], [automaton(read_full("a|b"))])


def test_combinations() -> None:
    random = Random(3)
    both = combined(
        [automaton(read_full("[ab]*a[ab]*")), automaton(read_full("[abc]{2,4}"))], [words_automaton([b"ab", b"aa"])]
    )
    for _ in range(500):
        text = "".join(random.choice("abc") for _ in range(random.randint(0, 5)))
        matches = re.fullmatch("[ab]*a[ab]*", text) and 2 <= len(text) <= 4 and text not in ("ab", "aa")
        assert both.matches(text.encode()) == bool(matches), text
    assert len(both.shortest(0)) == 2


@pytest.mark.parametrize(("low", "high"), [(0, 0), (0, 3), (2, 2), (2, 5), (0, None), (3, None)])
def test_repetitions_count_characters(low: int, high: int | None) -> None:
    counted = repeated(automaton(spelled(Chars(UNIVERSE))), low, high)
    for text in ("", "a", "é", "😀a", "ab\\n", "\\\\\\\\", "abcd", "日本語日本"):
        count = len(json.loads(f'"{text}"'))
        assert counted.matches(text.encode()) == (low <= count and (high is None or count <= high)), text
    assert not counted.matches(b"\\") and not counted.matches("é".encode()[:1])


def test_utf8_ranges_spell_exactly_the_characters() -> None:
    random = Random(5)
    for _ in range(60):
        low = random.choice([random.randint(0, 0x7FF), random.randint(0, 0xD7FF), random.randint(0xE000, 0x10FFFF)])
        high = min(low + random.choice([0, 5, 70, 5000, 300_000]), 0xD7FF if low <= 0xD7FF else 0x10FFFF)
        machine = automaton(Chars(((low, high),)))
        for code in {low, high, (low + high) // 2, max(0, low - 1), min(0x10FFFF, high + 1)}:
            if not 0xD800 <= code <= 0xDFFF:
                assert machine.matches(chr(code).encode()) == (low <= code <= high), hex(code)
    assert utf8_ranges(0x41, 0x41) == [[(0x41, 0x41)]]


def test_sets_of_characters() -> None:
    assert merged([(5, 6), (1, 2), (3, 3), (9, 8)]) == ((1, 3), (5, 6))
    assert without(((0, 9),), ((3, 4), (7, 20))) == ((0, 2), (5, 6))
    assert without(((0, 9),), ((0, 9),)) == ()


def test_the_notation_has_no_slash_to_trip_over() -> None:
    assert rust(read_full("a/b|[/x]{2}é")) == r"a\x{2F}b|[\x{2F}x]{2}\x{E9}"
