"""Deterministic automata over bytes: how far a regular expression is from a match, and by which bytes it ends soonest.

llguidance says which tokens may come next; it does not say how many are still needed. For terminals that are regular
expressions this file does: Thompson's construction over UTF-8 bytes, subsets made deterministic, states from which no
match can be reached removed, and for every state the length of the shortest way to a match (a search backwards).

    regex ─ characters to byte sequences ─▶ NFA ─ subsets ─▶ rows[state][class of byte] ─▶ distance[state]

Bytes that no transition tells apart share a class, so a row has a handful of entries and not 256.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import count

from karakoram.engine.constrain.regex import Chars, Either, Join, NothingMatches, PatternError, Regex, read_search

# A pattern that needs more is refused: 4,096 states take about 0.2 s and 1 MB.
MAX_STATES = 4096
MAX_NFA_STATES = 20_000
DEAD = -1

# Bytes that make a readable shortest text; any other byte comes after them in order.
LETTERS_FIRST = bytes(dict.fromkeys(b"ae0A1 -_." + bytes(range(32, 127)) + bytes(range(256))))
DIGITS_FIRST = bytes(dict.fromkeys(b"01aA-_. " + bytes(range(32, 127)) + bytes(range(256))))


class Automaton:
    """Start state 0. Every state reaches a match; `DEAD` is no state. Immutable."""

    __slots__ = ("accepting", "classes", "distance", "open", "rows")

    def __init__(self, classes: bytes, rows: list[tuple[int, ...]], accepting: list[bool]) -> None:
        self.classes = classes
        """The class of each of the 256 bytes: a column of `rows`."""
        self.accepting = accepting
        self.distance = _distances(rows, accepting)
        """Bytes of the shortest way to a match."""
        if self.distance[0] < 0:
            raise NothingMatches
        alive = [distance >= 0 for distance in self.distance]
        self.rows = [tuple(to if to >= 0 and alive[to] else DEAD for to in row) for row in rows]
        self.open = [max(row) >= 0 for row in self.rows]
        """Whether more bytes may follow."""

    def step(self, state: int, byte: int) -> int:
        """The state after one more byte, or `DEAD`."""
        return self.rows[state][self.classes[byte]]

    def shortest(self, state: int, preference: bytes = LETTERS_FIRST) -> bytes:
        """A shortest text that leads from `state` to a match, made of the preferred bytes where there is a choice."""
        out = bytearray()
        while self.distance[state]:
            near = self.distance[state] - 1
            row = self.rows[state]
            for byte in preference:
                to = row[self.classes[byte]]
                if to >= 0 and self.distance[to] == near:
                    break
            else:
                raise AssertionError("an automaton's distances are wrong")
            out.append(byte)
            state = to
        return bytes(out)

    def matches(self, text: bytes) -> bool:
        """Whether the whole text matches."""
        state = 0
        for byte in text:
            state = self.step(state, byte)
            if state == DEAD:
                return False
        return self.accepting[state]


def _distances(rows: Sequence[Sequence[int]], accepting: Sequence[bool]) -> list[int]:
    before: list[set[int]] = [set() for _ in rows]
    for state, row in enumerate(rows):
        for to in row:
            if to >= 0:
                before[to].add(state)
    distance = [0 if accepts else -1 for accepts in accepting]
    queue = deque(state for state, accepts in enumerate(accepting) if accepts)
    while queue:
        state = queue.popleft()
        for origin in before[state]:
            if distance[origin] < 0:
                distance[origin] = distance[state] + 1
                queue.append(origin)
    return distance


# ------------------------------------------------------------------------------------------------ from expressions


class _Nfa:
    """Thompson's automaton: empty moves and moves by byte ranges."""

    def __init__(self) -> None:
        self.empty: list[list[int]] = []
        self.moves: list[list[tuple[int, int, int]]] = []

    def state(self) -> int:
        if len(self.empty) >= MAX_NFA_STATES:
            raise PatternError("it is too long when its repetitions are written out")
        self.empty.append([])
        self.moves.append([])
        return len(self.empty) - 1

    def add(self, regex: Regex, start: int) -> int:
        """Add the expression from `start` on; its end."""
        if isinstance(regex, Chars):
            end = self.state()
            for low, high in regex.ranges:
                for ranges in utf8_ranges(low, high):
                    self._bytes(ranges, start, end)
            return end
        if isinstance(regex, Join):
            for item in regex.items:
                start = self.add(item, start)
            return start
        if isinstance(regex, Either):
            end = self.state()
            for option in regex.options:
                begin = self.state()
                self.empty[start].append(begin)
                self.empty[self.add(option, begin)].append(end)
            return end
        for _ in range(regex.low):
            start = self.add(regex.item, start)
        if regex.high is None:
            loop = self.state()
            self.empty[start].append(loop)
            self.empty[self.add(regex.item, loop)].append(loop)
            return loop
        end = self.state()
        for _ in range(regex.high - regex.low):
            self.empty[start].append(end)
            start = self.add(regex.item, start)
        self.empty[start].append(end)
        return end

    def _bytes(self, ranges: Sequence[tuple[int, int]], start: int, end: int) -> None:
        for low, high in ranges[:-1]:
            between = self.state()
            self.moves[start].append((low, high, between))
            start = between
        self.moves[start].append((*ranges[-1], end))

    def closure(self, states: Iterable[int]) -> frozenset[int]:
        seen = set(states)
        stack = list(seen)
        while stack:
            for to in self.empty[stack.pop()]:
                if to not in seen:
                    seen.add(to)
                    stack.append(to)
        return frozenset(state for state in seen)


def utf8_ranges(low: int, high: int) -> list[list[tuple[int, int]]]:
    """Byte ranges, one list per sequence, that spell exactly the characters `low` to `high` (no surrogates)."""
    out: list[list[tuple[int, int]]] = []
    for first, last in ((0, 0x7F), (0x80, 0x7FF), (0x800, 0xFFFF), (0x10000, 0x10FFFF)):
        start, end = max(low, first), min(high, last)
        if start <= end:
            out += _same_length(chr(start).encode("utf-8"), chr(end).encode("utf-8"))
    return out


def _same_length(low: bytes, high: bytes) -> list[list[tuple[int, int]]]:
    if len(low) == 1:
        return [[(low[0], high[0])]]
    head = [(low[0], low[0])]
    if low[0] == high[0]:
        return [head + tail for tail in _same_length(low[1:], high[1:])]
    least, most = b"\x80" * (len(low) - 1), b"\xbf" * (len(low) - 1)
    first, last, out = low[0], high[0], []
    if low[1:] != least:
        out += [head + tail for tail in _same_length(low[1:], most)]
        first += 1
    ends = []
    if high[1:] != most:
        ends = [[(high[0], high[0]), *tail] for tail in _same_length(least, high[1:])]
        last -= 1
    if first <= last:
        out.append([(first, last), *([(0x80, 0xBF)] * (len(low) - 1))])
    return out + ends


@lru_cache(64)
def automaton(regex: Regex) -> Automaton:
    """The automaton of an expression. PatternError if it is too large, or matches nothing."""
    nfa = _Nfa()
    start = nfa.state()
    end = nfa.add(regex, start)
    used = {bound for moves in nfa.moves for low, high, _ in moves for bound in (low, high + 1)}
    cuts = sorted({0, *used} - {256})
    classes = bytes(sum(1 for cut in cuts if cut <= byte) - 1 for byte in range(256))
    column = {cut: number for number, cut in enumerate(cuts)}
    column[256] = len(cuts)
    first = nfa.closure([start])
    known = {first: 0}
    queue = [first]
    rows: list[tuple[int, ...]] = []
    for subset in queue:
        targets: list[set[int]] = [set() for _ in cuts]
        for state in subset:
            for low, high, to in nfa.moves[state]:
                for number in range(column[low], column[high + 1]):
                    targets[number].add(to)
        closed: dict[frozenset[int], int] = {}
        row: list[int] = []
        for target in targets:
            key = frozenset(target)
            if key not in closed:
                closed[key] = _number(nfa.closure(key), known, queue) if key else DEAD
            row.append(closed[key])
        rows.append(tuple(row))
    return Automaton(classes, rows, [end in subset for subset in queue])


def _number(subset: frozenset[int], known: dict[frozenset[int], int], queue: list[frozenset[int]]) -> int:
    number = known.get(subset)
    if number is None:
        if len(known) >= MAX_STATES:
            raise PatternError(f"it needs more than {MAX_STATES} states")
        number = known[subset] = len(known)
        queue.append(subset)
    return number


def occurs(pattern: str, text: str) -> bool:
    """Whether `pattern` matches somewhere in `text`, in time linear in the text. PatternError as for `automaton`."""
    return automaton(read_search(pattern)).matches(text.encode("utf-8", "surrogatepass"))


# ------------------------------------------------------------------------------------------------ from automata


def words_automaton(words: Sequence[bytes]) -> Automaton:
    """Exactly these words: their tree."""
    letters = sorted(set(b"".join(words)))
    column = {letter: number for number, letter in enumerate(letters)}
    classes = bytes(column.get(byte, len(letters)) for byte in range(256))
    width = len(letters) + (1 if len(letters) < 256 else 0)
    rows: list[list[int]] = [[DEAD] * width]
    accepting = [False]
    for word in words:
        state = 0
        for byte in word:
            if rows[state][column[byte]] == DEAD:
                rows[state][column[byte]] = len(rows)
                rows.append([DEAD] * width)
                accepting.append(False)
            state = rows[state][column[byte]]
        accepting[state] = True
    return Automaton(classes, [tuple(row) for row in rows], accepting)


def repeated(unit: Automaton, low: int, high: int | None) -> Automaton:
    """`unit` at least `low` and at most `high` times, where no match of `unit` begins another."""
    size, last = len(unit.rows), low if high is None else high
    if size * (last + 1) > MAX_NFA_STATES:
        raise PatternError("it is too long when its repetitions are written out")
    rows: list[tuple[int, ...]] = []
    for done in range(last + 1):
        after = min(done + 1, last) * size
        for row in unit.rows:
            moved = (to if to == DEAD else after if unit.accepting[to] else done * size + to for to in row)
            rows.append(tuple(moved) if done < last or high is None else (DEAD,) * len(row))
    accepting = [state % size == 0 and low <= state // size for state in range(len(rows))]
    return Automaton(unit.classes, rows, accepting)


def combined(wanted: Sequence[Automaton], unwanted: Sequence[Automaton] = ()) -> Automaton:
    """What all of `wanted` match and none of `unwanted`. PatternError if that is nothing, or too large."""
    if len(wanted) == 1 and not unwanted:
        return wanted[0]
    parts = [*wanted, *unwanted]
    numbers = count()
    columns: dict[tuple[int, ...], int] = {}
    classes = bytes(
        columns.setdefault(key, len(columns)) for key in zip(*(part.classes for part in parts), strict=True)
    )
    start: tuple[int, ...] = (0,) * len(parts)
    known: dict[tuple[int, ...], int] = {start: next(numbers)}
    queue: list[tuple[int, ...]] = [start]
    rows: list[tuple[int, ...]] = []
    for states in queue:
        row: list[int] = []
        for key in columns:
            to = tuple(DEAD if s == DEAD else part.rows[s][k] for part, s, k in zip(parts, states, key))
            if DEAD in to[: len(wanted)]:
                row.append(DEAD)
                continue
            if to not in known:
                if len(known) >= 4 * MAX_STATES:
                    raise PatternError(f"together with the other keywords it needs more than {4 * MAX_STATES} states")
                known[to] = next(numbers)
                queue.append(to)
            row.append(known[to])
        rows.append(tuple(row))
    accepting = [
        all(part.accepting[s] for part, s in zip(wanted, states))
        and not any(s != DEAD and part.accepting[s] for part, s in zip(unwanted, states[len(wanted) :]))
        for states in queue
    ]
    return Automaton(classes, rows, accepting)
