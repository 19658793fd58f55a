"""A grammar as a graph of nodes, each of which knows what it costs to finish, and its notation for llguidance.

A text is constrained by two readers of one grammar. llguidance reads `lark(root)` and answers which tokens may come
next, in microseconds and for any vocabulary. The nodes themselves answer what llguidance does not: how many tokens the
shortest end takes from any point (`front.py` walks them). Both see the same language, because both are made here.

    leaves     Words (a finite set of texts) · Auto (an automaton) · Run (one character's automaton, counted)
    branches   Seq · Alt · Repeat                      no node contains itself: recursion is unrolled to a fixed depth

Every node carries, computed bottom-up when it is made:
    cost    tokens of its cheapest text, each leaf spelled on its own: an upper bound, since spelling may join leaves
    text    a short text, as a rule the cheapest when it is spelled as a whole; OPTIONAL stands where a space may be
    jump    by how much the cost can exceed `cost` once the first terminal of another choice has been begun
    most_jump, most_swing   the largest jump, and the largest rise within a leaf (of its cost while it is read), of the
                            node and all below it: what a single token may cost in surprise (see `guided.py`)
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from typing import Any

from karakoram.engine.constrain.automaton import DEAD, DIGITS_FIRST, LETTERS_FIRST, Automaton
from karakoram.engine.constrain.regex import literal, rust
from karakoram.engine.constrain.vocabulary import Vocabulary

# The shortest text of a grammar is kept and spelled as a whole; no output is as long.
MAX_TEXT_BYTES = 32_768


class TextTooLong(ValueError):
    """The shortest text of a grammar exceeds `MAX_TEXT_BYTES`."""


class Node:
    """What leaves and branches share. Immutable once made; compared by identity."""

    __slots__ = ("cost", "jump", "most_jump", "most_swing", "terminal", "text")

    cost: int
    text: bytes
    jump: int
    most_jump: int
    most_swing: int
    terminal: str | None
    """llguidance's terminal for the whole node, where it is one; the nodes below are then not written."""

    def _set(self, cost: int, text: bytes, jump: int, below: Sequence[Node] = ()) -> None:
        if len(text) > MAX_TEXT_BYTES:
            raise TextTooLong(f"The shortest text is longer than {MAX_TEXT_BYTES:,} bytes")
        self.cost, self.text, self.jump = cost, text, jump
        self.most_jump = max([jump, *(node.most_jump for node in below)])
        self.most_swing = max([0, *(node.most_swing for node in below)])
        self.terminal = None


class Leaf(Node):
    """Reads bytes. States are hashable values; `step` gives None where the byte does not fit."""

    __slots__ = ("peak", "quoted", "start")

    start: Any
    peak: int
    """The largest `left` of any state."""
    quoted: bool
    """Plain text cannot pass its end, because a text ends with a quote, or a quote must follow."""

    def step(self, state: Any, byte: int) -> Any | None:
        raise NotImplementedError

    def done(self, state: Any) -> bool:
        """Whether what was read is a whole text."""
        raise NotImplementedError

    def open(self, state: Any) -> bool:
        """Whether more bytes may follow."""
        raise NotImplementedError

    def steady(self, state: Any) -> bool:
        """Whether plain text, if it fits, leads back to `state`."""
        return False

    def rest(self, state: Any) -> bytes:
        """A cheapest way to a whole text."""
        raise NotImplementedError

    def left(self, state: Any) -> int:
        """Its tokens."""
        raise NotImplementedError

    def _leaf(self, start: Any, peak: int, quoted: bool) -> None:
        self.start, self.quoted = start, quoted
        self._set(self.left(start), self.rest(start), 0)
        self.peak = max(peak, self.cost)
        self.most_swing = self.peak - self.cost


class Words(Leaf):
    """One of a finite set of texts. State: (from, to, bytes read), a range of the sorted texts that begin so."""

    __slots__ = ("_best", "_vocabulary", "words")

    # Beyond these the peak is bounded by bytes, and the best of so many short texts is good enough.
    _MAX_BYTES = 8192
    _MAX_COMPARED = 64

    def __init__(self, vocabulary: Vocabulary, words: Sequence[bytes]) -> None:
        self.words = sorted(set(words))
        self._vocabulary = vocabulary
        self._best: dict[tuple[int, int, int], tuple[int, bytes]] = {}
        peak = max(map(len, self.words))
        if sum(map(len, self.words)) <= self._MAX_BYTES:
            peak = max(max(vocabulary.costs(word)) for word in self.words)
        quoted = all(word.rstrip(b":").endswith(b'"') for word in self.words)
        self._leaf((0, len(self.words), 0), peak, quoted)
        self.terminal = "/" + "|".join(rust(literal(word.decode("utf-8"))) for word in self.words) + "/"

    def step(self, state: tuple[int, int, int], byte: int) -> tuple[int, int, int] | None:
        low, high, read = state
        if high - low == 1:
            word = self.words[low]
            return (low, high, read + 1) if read < len(word) and word[read] == byte else None

        def letter(word: bytes) -> int:
            return word[read] if read < len(word) else -1

        low = bisect_left(self.words, byte, low, high, key=letter)
        high = bisect_right(self.words, byte, low, high, key=letter)
        return (low, high, read + 1) if low < high else None

    def done(self, state: tuple[int, int, int]) -> bool:
        return len(self.words[state[0]]) == state[2]

    def open(self, state: tuple[int, int, int]) -> bool:
        return state[1] - state[0] > 1 or len(self.words[state[0]]) > state[2]

    def steady(self, state: tuple[int, int, int]) -> bool:
        return state == (0, 1, 0) and self.words[0].startswith(b'"')

    def rest(self, state: tuple[int, int, int]) -> bytes:
        return self._cheapest(state)[1]

    def left(self, state: tuple[int, int, int]) -> int:
        return self._cheapest(state)[0]

    def _cheapest(self, state: tuple[int, int, int]) -> tuple[int, bytes]:
        found = self._best.get(state)
        if found is None:
            low, high, read = state
            words = self.words[low:high]
            if len(words) > self._MAX_COMPARED:
                words = sorted(words, key=len)[: self._MAX_COMPARED]
            cost = self._vocabulary.cost
            found = min(((cost(word[read:]), word[read:]) for word in words), key=lambda pair: (pair[0], len(pair[1])))
            self._best[state] = found
        return found


class Auto(Leaf):
    """A regular expression. State: that of the automaton."""

    __slots__ = ("_best", "_vocabulary", "automaton")

    def __init__(self, vocabulary: Vocabulary, automaton: Automaton, terminal: str, quoted: bool = False) -> None:
        """`terminal` says the same to llguidance as `automaton` here."""
        self.automaton = automaton
        self._vocabulary = vocabulary
        self._best: dict[int, tuple[int, bytes]] = {}
        self._leaf(0, max(automaton.distance), quoted)
        self.terminal = terminal

    def step(self, state: int, byte: int) -> int | None:
        to = self.automaton.step(state, byte)
        return None if to == DEAD else to

    def done(self, state: int) -> bool:
        return self.automaton.accepting[state]

    def open(self, state: int) -> bool:
        return self.automaton.open[state]

    def rest(self, state: int) -> bytes:
        return self._cheapest(state)[1]

    def left(self, state: int) -> int:
        return self._cheapest(state)[0]

    def _cheapest(self, state: int) -> tuple[int, bytes]:
        found = self._best.get(state)
        if found is None:
            texts = [self.automaton.shortest(state, preference) for preference in (LETTERS_FIRST, DIGITS_FIRST)]
            found = self._best[state] = min((self._vocabulary.cost(text), text) for text in texts)
        return found


class Run(Leaf):
    """`low` to `high` characters, each of which the automaton `unit` spells. State: (characters read, unit's state)."""

    __slots__ = ("_fillings", "high", "low", "unit")

    def __init__(self, vocabulary: Vocabulary, unit: Automaton, low: int, high: int | None, anything: bool) -> None:
        """`anything`: every character is in the unit, so the cheapest filler is taken, else its first character."""
        self.unit, self.low, self.high = unit, low, high
        letter = unit.shortest(0)
        own = ((count * len(letter), letter) for count in range(low + 1))
        self._fillings = [vocabulary.filler(count) for count in range(low + 1)] if anything else list(own)
        self._leaf((0, 0), max(self._fillings)[0] + max(unit.distance), True)

    def step(self, state: tuple[int, int], byte: int) -> tuple[int, int] | None:
        read, inner = state
        if read == self.high:
            return None
        to = self.unit.step(inner, byte)
        if to == DEAD:
            return None
        if not self.unit.accepting[to]:
            return (read, to)
        return (read + 1, 0) if self.high is not None or read < self.low else (read, 0)

    def done(self, state: tuple[int, int]) -> bool:
        return state[1] == 0 and state[0] >= self.low

    def open(self, state: tuple[int, int]) -> bool:
        return state[0] != self.high

    def steady(self, state: tuple[int, int]) -> bool:
        return self.high is None and state == (self.low, 0)

    def rest(self, state: tuple[int, int]) -> bytes:
        lack = self._lack(state)
        return (self.unit.shortest(state[1]) if state[1] else b"") + self._fillings[lack][1] * lack

    def left(self, state: tuple[int, int]) -> int:
        return (self.unit.distance[state[1]] if state[1] else 0) + self._fillings[self._lack(state)][0]

    def _lack(self, state: tuple[int, int]) -> int:
        """Characters that must follow the one being read."""
        return max(0, self.low - state[0] - (1 if state[1] else 0))


class Seq(Node):
    """One after the other; no items: the empty text."""

    __slots__ = ("items",)

    def __init__(self, *items: Node) -> None:
        self.items = items
        jump = 0
        for item in items:
            jump = max(jump, item.jump)
            if item.cost:  # what costs nothing may be left out
                break
        self._set(sum(item.cost for item in items), b"".join(item.text for item in items), jump, items)


class Alt(Node):
    """Any one of the options."""

    __slots__ = ("options",)

    def __init__(self, *options: Node) -> None:
        self.options = options
        best = min(options, key=lambda option: (option.cost, len(option.text)))
        jump = max(option.cost - best.cost + option.jump for option in options)
        self._set(best.cost, best.text, jump, options)


class Repeat(Node):
    """`item` at least `low` and at most `high` times (None: without end); an item is never empty."""

    __slots__ = ("_next", "high", "item", "low")

    def __init__(self, item: Node, low: int, high: int | None) -> None:
        self.item, self.low, self.high = item, low, high
        self._next: Repeat | None = None
        jump = item.jump if low == high else item.cost + item.jump
        self._set(item.cost * low, item.text * min(low, MAX_TEXT_BYTES), jump, [item])

    def next(self) -> Repeat:
        """What may follow one item; itself where that changes nothing."""
        if self.low == 0 and self.high is None:
            return self
        if self._next is None:
            self._next = Repeat(self.item, max(self.low - 1, 0), None if self.high is None else self.high - 1)
        return self._next


EMPTY = Seq()


def repeat(item: Node, low: int, high: int | None) -> Node:
    """The item `low` to `high` times."""
    return EMPTY if high == 0 else Repeat(item, low, high)


def optional(node: Node) -> Alt:
    """The node or nothing."""
    return Alt(node, EMPTY)


def lark(root: Node) -> str:
    """The grammar for llguidance, one rule for each branch and one terminal for each different leaf.

    `no_forcing`: any tokenization may be chosen, also where the bytes are certain; else the shortest end might be
    forbidden for not being the tokenizer's own spelling."""
    lines = ['%llguidance {"no_forcing": true}']
    names: dict[int, str] = {}
    terminals: dict[str, str] = {}
    stack = [root]
    order: list[Node] = []
    while stack:
        node = stack.pop()
        if id(node) in names:
            continue
        if node.terminal is not None:
            name = terminals.setdefault(node.terminal, f"T{len(terminals)}")
            # What llguidance makes itself from a schema is a rule, not a terminal.
            names[id(node)] = name.lower() if node.terminal.startswith("%json") else name
            continue
        names[id(node)] = f"r{len(names)}"
        order.append(node)
        if isinstance(node, Repeat):
            stack.append(node.item)
        else:
            stack += node.items if isinstance(node, Seq) else node.options if isinstance(node, Alt) else ()
    lines.append(f"start: {names[id(root)]}")
    for node in order:
        lines.append(f"{names[id(node)]}: {_body(node, names)}")
    for text, name in terminals.items():
        lines.append(f"{name.lower() if text.startswith('%json') else name}: {text}")
    return "\n".join(lines) + "\n"


def _body(node: Node, names: dict[int, str]) -> str:
    if isinstance(node, Seq):
        return " ".join(names[id(item)] for item in node.items)
    if isinstance(node, Alt):
        return " | ".join(names[id(option)] for option in node.options)
    if isinstance(node, Repeat):
        high = "" if node.high is None else node.high
        return f"{names[id(node.item)]}{{{node.low},{high}}}"
    raise AssertionError("a leaf without a terminal stands outside one")
