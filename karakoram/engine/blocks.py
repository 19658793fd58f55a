"""Blocks of the latent cache: who holds which, and what they remember from earlier requests.

The cache is cut into blocks of BLOCK_TOKENS tokens. A block is free, or private to one sequence (its last, unfinished
one), or a node of the prefix tree, where any number of sequences may read it. The tree is a radix tree over token ids
whose edges are one block long: a path from the root spells a prefix, and its nodes hold that prefix's latents. A block
enters the tree as soon as it is full, so sequences that run at the same time share it too.

A node is `used` by the sequences that read it. Nobody's leaves are evicted when blocks run out, the least recently used
first; a parent becomes a leaf when its last child is gone. The last node of a finished sequence may be shorter than a
block; whoever continues it copies (copy on write), as does whoever parts ways inside a block.

16 tokens a block: a prefix is reused to the token (the rest of a block is copied), so small blocks would only save
memory at the end of sequences, and large ones would only save table entries (4 bytes for 16 tokens).
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence as Ids
from dataclasses import dataclass, field

BLOCK_TOKENS = 16


@dataclass(eq=False, slots=True)
class Node:
    """One block of a remembered prefix; `tokens` are those whose latents it holds, in order."""

    parent: Node | None
    tokens: tuple[int, ...]
    block: int
    children: dict[tuple[int, ...], Node] = field(default_factory=dict["tuple[int, ...]", "Node"])
    users: int = 0
    last_used: int = 0
    alive: bool = True


@dataclass(frozen=True, slots=True)
class Match:
    """What is remembered of a prompt: whole blocks, and the first `shared` tokens of one more."""

    nodes: list[Node]
    partial: Node | None = None
    shared: int = 0

    @property
    def tokens(self) -> int:
        """How many tokens of the prompt that are."""
        return len(self.nodes) * BLOCK_TOKENS + self.shared


class BlockPool:
    """All blocks of one cache with the prefix tree over them. Not thread-safe: the engine's thread owns it."""

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks
        self.root = Node(None, (), -1, users=1)
        self.idle = 0  # nodes without users, parents included: all of them can be evicted in turn
        self._free = list(range(blocks - 1, -1, -1))
        self._leaves: list[tuple[int, int, Node]] = []  # candidates for eviction, oldest first; stale ones are skipped
        self._clock = 0

    @property
    def available(self) -> int:
        """Blocks that can be taken now, remembered ones that nobody uses included."""
        return len(self._free) + self.idle

    @property
    def held(self) -> int:
        """Blocks that sequences are using."""
        return self.blocks - self.available

    def take(self) -> int | None:
        """A block, private to the caller; None if every block is in use."""
        if not self._free and not self._evict():
            return None
        return self._free.pop()

    def give_back(self, block: int) -> None:
        """A private block is free again."""
        self._free.append(block)

    def match(self, tokens: Ids[int], limit: int) -> Match:
        """The longest remembered prefix of `tokens[:limit]`. Nothing is held yet: see `hold`."""
        node, nodes, at = self.root, list[Node](), 0
        while at + BLOCK_TOKENS <= limit:
            child = node.children.get(tuple(tokens[at : at + BLOCK_TOKENS]))
            if child is None:
                break
            nodes.append(child)
            node, at = child, at + BLOCK_TOKENS
        rest = tuple(tokens[at : min(at + BLOCK_TOKENS, limit)])
        best, shared = None, 0
        for child in node.children.values() if rest else ():
            common = _common(child.tokens, rest)
            if common > shared:
                best, shared = child, common
        return Match(nodes, best, shared)

    def hold(self, nodes: Ids[Node]) -> None:
        """These are being read and must stay."""
        self._clock += 1
        for node in nodes:
            self.idle -= node.users == 0
            node.users += 1
            node.last_used = self._clock

    def release(self, nodes: Ids[Node]) -> None:
        """One reader less; what nobody reads may be evicted."""
        self._clock += 1
        for node in nodes:
            node.users -= 1
            node.last_used = self._clock
            if node.users == 0:
                self.idle += 1
                self._offer(node)

    def remember(self, parent: Node, tokens: tuple[int, ...], block: int) -> Node:
        """The caller's private block becomes a node, held by the caller; its rows are `tokens` after `parent`'s path.

        If that is remembered already, the block is freed and the older node is held instead.
        """
        known = parent.children.get(tokens)
        if known is None:
            known = parent.children[tokens] = Node(parent, tokens, block, users=1)
            self._clock += 1
            known.last_used = self._clock
        else:
            self.give_back(block)
            self.hold((known,))
        return known

    def forget_all(self) -> None:
        """Evict everything that nobody uses."""
        while self._evict():
            pass

    def _offer(self, node: Node) -> None:
        if node.children or node.users or node.parent is None:
            return
        heapq.heappush(self._leaves, (node.last_used, id(node), node))
        if len(self._leaves) > 64 + 4 * self.blocks:  # read again and again without anyone running out of blocks
            self._leaves = [entry for entry in self._leaves if _is_current(entry)]
            heapq.heapify(self._leaves)

    def _evict(self) -> bool:
        """Free the block of the least recently used leaf that nobody uses."""
        while self._leaves:
            entry = heapq.heappop(self._leaves)
            if not _is_current(entry):
                continue
            node = entry[2]
            parent = node.parent
            assert parent is not None
            del parent.children[node.tokens]
            node.alive = False
            self.idle -= 1
            self._free.append(node.block)
            self._offer(parent)
            return True
        return False


def _is_current(entry: tuple[int, int, Node]) -> bool:
    """Whether a candidate is still a leaf that nobody has used since it was noted."""
    last_used, _, node = entry
    return node.alive and not node.users and not node.children and node.last_used == last_used


def _common(a: Ids[int], b: Ids[int]) -> int:
    count = 0
    for x, y in zip(a, b):
        if x != y:
            break
        count += 1
    return count
