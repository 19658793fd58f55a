"""Where in a grammar a text stands, what may complete it, and at what cost.

A front is the set of all readings of the text so far. A reading is a leaf, its state, and the cell of what follows;
cells are linked lists, shared between readings, so equal readings are one. Reading a byte steps every reading, drops
those it does not fit, and where a leaf is complete adds the leaves that may follow. Deterministic schemas keep one to
three readings; an `anyOf` whose options begin alike keeps one for each.

    cost of a reading = left(leaf, state) + cost(cell)        cost of a front = the smallest of them

which is an upper bound of the tokens that a shortest end takes, exact within a leaf.
"""

from __future__ import annotations

from collections.abc import Iterable

from karakoram.engine.constrain.grammar import Alt, Leaf, Node, Repeat, Seq

Reading = tuple[Leaf, object, "Cell | None"]


class Cell:
    """`node`, then `rest` (None: the end)."""

    __slots__ = ("_first", "cost", "node", "rest")

    def __init__(self, node: Node, rest: Cell | None) -> None:
        self.node, self.rest = node, rest
        self.cost: int = node.cost + (rest.cost if rest is not None else 0)
        self._first: tuple[tuple[Reading, ...], bool] | None = None

    def first(self) -> tuple[tuple[Reading, ...], bool]:
        """The readings with which this may begin, and whether it may be empty to the end."""
        if self._first is None:
            readings: dict[Reading, None] = {}
            ends = False
            stack: list[tuple[Node, Cell | None]] = [(self.node, self.rest)]
            while stack:
                node, rest = stack.pop()
                if isinstance(node, Alt):
                    stack += [(option, rest) for option in node.options]
                    continue
                if isinstance(node, Seq) and node.items:
                    for item in reversed(node.items[1:]):
                        rest = Cell(item, rest)
                    stack.append((node.items[0], rest))
                    continue
                if isinstance(node, Leaf):
                    readings[(node, node.start, rest)] = None
                    passes = node.done(node.start)
                elif isinstance(node, Repeat) and node.high != 0:
                    own = self if node is self.node and rest is self.rest else Cell(node, rest)
                    stack.append((node.item, own if node.next() is node else Cell(node.next(), rest)))
                    passes = node.low == 0
                else:
                    passes = True
                if passes and rest is None:
                    ends = True
                elif passes and rest is not None:
                    more, end = rest.first()
                    readings.update(dict.fromkeys(more))
                    ends |= end
            self._first = (tuple(readings), ends)
        return self._first


class Front:
    """All readings of one text. Immutable; remembers what its next bytes lead to, so each text starts its own."""

    __slots__ = ("_ceiling", "_cost", "_next", "_steady", "complete", "readings")

    def __init__(self, readings: Iterable[Reading], complete: bool) -> None:
        self.readings = tuple(readings)
        self.complete = complete
        """The text so far is whole; where no reading is left, nothing may follow."""
        self._cost = self._ceiling = -1
        self._steady: bool | None = None
        self._next: dict[int, Front | None] = {}

    @classmethod
    def of(cls, root: Node) -> Front:
        """Before the first byte."""
        return cls(*Cell(root, None).first())

    def after(self, text: bytes) -> Front | None:
        """The front after more bytes; None if they do not fit."""
        front: Front | None = self
        for byte in text:
            if byte not in front._next:
                front._next[byte] = front._step(byte)
            front = front._next[byte]
            if front is None:
                return None
        return front

    def _step(self, byte: int) -> Front | None:
        readings: dict[Reading, None] = {}
        complete = False
        for leaf, state, rest in self.readings:
            reached = leaf.step(state, byte)
            if reached is None:
                continue
            if leaf.open(reached):
                readings[(leaf, reached, rest)] = None
            if leaf.done(reached):
                if rest is None:
                    complete = True
                else:
                    more, ends = rest.first()
                    readings.update(dict.fromkeys(more))
                    complete |= ends
        return Front(readings, complete) if readings or complete else None

    @property
    def cost(self) -> int:
        """Tokens that suffice to make the text whole."""
        if self._cost < 0:
            self._cost = 0 if self.complete else min(map(_cost, self.readings))
        return self._cost

    @property
    def ceiling(self) -> int:
        """The cost can become this while the leaves that are being read now go on, whatever is written in them."""
        if self._ceiling < 0:
            costs = (leaf.peak + (rest.cost if rest is not None else 0) for leaf, _, rest in self.readings)
            self._ceiling = max(costs, default=0)
        return self._ceiling

    @property
    def quoted(self) -> bool:
        """Plain text stays within the leaves that are being read now (or does not fit)."""
        return all(leaf.quoted for leaf, _, _ in self.readings)

    @property
    def steady(self) -> bool:
        """Plain text that the grammar allows changes nothing: it goes on in a string that has its least length."""
        if self._steady is None:
            self._steady = all(leaf.steady(state) for leaf, state, _ in self.readings)
        return self._steady

    def cheapest(self) -> bytes:
        """Text that leads towards the shortest end: the share of the first leaf. Empty where the text is whole."""
        if self.complete:
            return b""
        texts = ((_cost(reading), reading[0].rest(reading[1])) for reading in self.readings)
        return min((cost, len(text), text) for cost, text in texts if text)[2]


def _cost(reading: Reading) -> int:
    leaf, state, rest = reading
    return leaf.left(state) + (rest.cost if rest is not None else 0)
