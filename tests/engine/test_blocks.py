"""Blocks: none is ever in two places or in none, what is read stays, the oldest goes first, and a match is the longest.

The machine plays the engine's part with real `Sequence`s over a small alphabet, so that prefixes meet and part.
"""

from collections import Counter

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from karakoram.engine.blocks import BLOCK_TOKENS, BlockPool, Node
from karakoram.engine.request import Request
from karakoram.engine.sequence import Sequence, chain

BLOCKS = 12


def sequence(tokens: list[int]) -> Sequence:
    made = Sequence(Request("x", tokens, 1), lambda news: None, 0)
    made.tokens = list(tokens)
    return made


def nodes_of(pool: BlockPool) -> list[Node]:
    """Every node of the tree, parents first."""
    found, todo = list[Node](), list(pool.root.children.values())
    while todo:
        found.append(node := todo.pop())
        todo.extend(node.children.values())
    return found


def path(node: Node) -> tuple[int, ...]:
    """The tokens from the root to a node's end."""
    return () if node.parent is None else path(node.parent) + node.tokens


def paths(pool: BlockPool) -> set[tuple[int, ...]]:
    return {path(node) for node in nodes_of(pool)}


def common(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


class Blocks(RuleBasedStateMachine):
    """Sequences come with what is remembered, compute on, and leave; blocks run out all the time."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(BLOCKS)
        self.live: list[Sequence] = []
        self.last_touched: dict[Node, int] = {}  # by our own clock, one tick a rule
        self.now = 0

    # Runs of two tokens: matches of many blocks and partings inside a block are both common.
    prompts = st.lists(st.tuples(st.integers(0, 1), st.integers(1, 24)), min_size=1, max_size=4).map(
        lambda runs: [token for token, count in runs for _ in range(count)]
    )

    @rule(tokens=prompts, cut=st.integers(0, 3))
    def comes(self, tokens: list[int], cut: int) -> None:
        limit = max(len(tokens) - cut, 0)
        match = self.pool.match(tokens, limit)
        everything = [path(node) for node in nodes_of(self.pool)]
        assert match.tokens == max((common(tuple(tokens[:limit]), known) for known in everything), default=0)
        assert [path(node) for node in match.nodes] == [
            tuple(tokens[: (i + 1) * BLOCK_TOKENS]) for i in range(len(match.nodes))
        ]
        new = sequence(tokens)
        self.pool.hold(match.nodes)
        new.nodes, new.computed = list(match.nodes), len(match.nodes) * BLOCK_TOKENS
        self.touch(match.nodes)
        if match.partial is not None:
            self.pool.hold((match.partial,))
            self.touch((match.partial,))
            if self.take_for(new, new.computed + 1):
                new.computed += match.shared
            assert match.partial.alive  # what is copied from must stay
            self.pool.release((match.partial,))
            self.touch((match.partial,))
        self.live.append(new)

    def take_for(self, seq: Sequence, tokens: int) -> bool:
        """`room`, one block at a time, checking what is evicted."""
        while (len(seq.nodes) + len(seq.private)) * BLOCK_TOKENS < tokens:
            idle = [n for n in nodes_of(self.pool) if not n.children and n.users == 0]
            was_free, before = len(self.pool._free), set(nodes_of(self.pool))
            have = (len(seq.nodes) + len(seq.private)) * BLOCK_TOKENS
            got = seq.room(self.pool, min(tokens, have + BLOCK_TOKENS))
            gone = before - set(nodes_of(self.pool))
            if was_free:
                assert got and not gone
            elif not idle:
                assert not got and not gone
                return False
            else:
                (victim,) = gone
                assert got and victim in idle and not victim.alive
                assert self.last_touched[victim] == min(self.last_touched[n] for n in idle)
        return True

    def touch(self, nodes: object) -> None:
        self.now += 1
        for node in nodes:  # type: ignore[attr-defined]
            self.last_touched[node] = self.now

    @precondition(lambda self: self.live)
    @rule(data=st.data(), count=st.integers(1, 40))
    def computes(self, data: st.DataObject, count: int) -> None:
        seq = data.draw(st.sampled_from(self.live))
        target = min(seq.computed + count, len(seq.tokens))
        if self.take_for(seq, target):
            seq.computed = target
        before = set(seq.nodes)
        known = {path(n): n for n in nodes_of(self.pool)}
        seq.remember(self.pool)
        for node in seq.nodes:
            if node not in before:
                assert known.get(path(node), node) is node  # a prefix that was remembered is not remembered twice
                self.touch((node,))

    @precondition(lambda self: self.live)
    @rule(data=st.data(), token=st.integers(0, 1), count=st.integers(1, 20))
    def grows(self, data: st.DataObject, token: int, count: int) -> None:
        data.draw(st.sampled_from(self.live)).tokens += [token] * count

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def leaves(self, data: st.DataObject) -> None:
        seq = self.live.pop(data.draw(st.integers(0, len(self.live) - 1)))
        computed = tuple(seq.tokens[: seq.computed])
        held = seq.nodes  # `leave` adds the unfinished block to this list
        seq.leave(self.pool)
        assert (seq.nodes, seq.private, seq.computed) == ([], [], 0)
        # Whatever it had computed is there for the next one, the unfinished block included.
        match = self.pool.match(computed, len(computed))
        assert match.tokens == len(computed)
        self.touch(held)

    @rule()
    def forgets(self) -> None:
        self.pool.forget_all()
        assert all(node.users for node in nodes_of(self.pool))
        assert self.pool.idle == 0

    @invariant()
    def every_block_is_in_one_place(self) -> None:
        nodes = nodes_of(self.pool)
        places = [*self.pool._free, *(n.block for n in nodes), *(b for s in self.live for b in s.private)]
        assert sorted(places) == list(range(BLOCKS))

    @invariant()
    def counts_add_up(self) -> None:
        nodes, users = nodes_of(self.pool), Counter(n for s in self.live for n in s.nodes)
        assert all(n.alive and n.users == users[n] for n in nodes)
        assert set(users) <= set(nodes)  # what is read is never evicted
        assert all(n.parent is self.pool.root or n.parent.users >= n.users for n in nodes if n.parent)
        assert self.pool.idle == sum(n.users == 0 for n in nodes)
        assert self.pool.available == len(self.pool._free) + self.pool.idle
        private = sum(len(s.private) for s in self.live)
        assert self.pool.held == private + sum(n.users > 0 for n in nodes)

    @invariant()
    def children_follow_whole_blocks(self) -> None:
        for node in nodes_of(self.pool):
            assert 0 < len(node.tokens) <= BLOCK_TOKENS
            assert len(node.tokens) == BLOCK_TOKENS or not node.children

    def teardown(self) -> None:
        for seq in self.live:
            seq.leave(self.pool)
        self.pool.forget_all()
        assert sorted(self.pool._free) == list(range(BLOCKS)) and not self.pool.root.children


TestBlocks = Blocks.TestCase
TestBlocks.settings = settings(max_examples=80, stateful_step_count=40)


def remembered(pool: BlockPool, tokens: list[int]) -> None:
    """A sequence came, computed everything and left."""
    seq = sequence(tokens)
    assert seq.room(pool, len(tokens))
    seq.computed = len(tokens)
    seq.leave(pool)


def test_a_known_prefix_frees_the_second_block() -> None:
    pool = BlockPool(4)
    one, two = sequence([1] * 16), sequence([1] * 16)
    for seq in (one, two):
        assert seq.room(pool, 16)
        seq.computed = 16
    assert pool.held == 2
    one.remember(pool)
    two.remember(pool)
    assert one.nodes == two.nodes and one.nodes[0].users == 2
    assert (pool.held, len(pool._free)) == (1, 3)


def test_a_match_ends_at_its_limit_and_inside_a_block() -> None:
    pool = BlockPool(8)
    tokens = list(range(40))
    remembered(pool, tokens)  # 16, 16 and 8
    assert pool.match(tokens, 40).tokens == 40
    assert [pool.match(tokens, limit).tokens for limit in (0, 1, 16, 17, 31, 32, 39)] == [0, 1, 16, 17, 31, 32, 39]
    assert pool.match(tokens + [7], 41).tokens == 40
    parted = tokens[:20] + [99] + tokens[21:]
    match = pool.match(parted, 40)
    assert (len(match.nodes), match.shared) == (1, 4)
    assert pool.match([99], 1) == pool.match([], 0)


def test_the_longest_of_several_parts_is_shared() -> None:
    pool = BlockPool(8)
    for end in (3, 9, 6):
        remembered(pool, [5] * end + [end + 10])
    match = pool.match([5] * 16, 16)
    assert match.partial is not None and match.partial.tokens == (*[5] * 9, 19) and match.shared == 9


def test_the_oldest_goes_first_and_a_parent_after_its_last_child() -> None:
    pool = BlockPool(5)
    for tokens in ([1] * 32, [2] * 16, [1] * 16 + [3] * 16):
        remembered(pool, tokens)
    while pool._free:  # and the block that the third computed a second time
        pool.take()
    gone: list[tuple[int, ...]] = []
    for _ in range(4):
        before = paths(pool)
        assert pool.take() is not None
        gone += before - paths(pool)
    assert gone == [(1,) * 32, (2,) * 16, (1,) * 16 + (3,) * 16, (1,) * 16]
    assert pool.take() is None


def test_used_last_is_left_last() -> None:
    """What counts is when a prefix was last read, not when somebody began to read it."""
    pool = BlockPool(2)
    for token in (1, 2):
        remembered(pool, [token] * 16)
    first, second = (pool.match([token] * 16, 16).nodes for token in (1, 2))
    pool.hold(first)
    pool.hold(second)
    pool.release(second)
    pool.release(first)
    pool.take()
    assert first[0].alive and not second[0].alive


def test_bookkeeping_does_not_grow_with_use() -> None:
    """The same prefix read again and again: as many notes of it as there are blocks, give or take a factor."""
    pool = BlockPool(8)
    remembered(pool, [1] * 48)
    for _ in range(2000):
        match = pool.match([1] * 48, 48)
        pool.hold(match.nodes)
        pool.release(match.nodes)
    assert len(pool._leaves) <= 64 + 8 * pool.blocks


def test_a_chain_of_hashes_tells_prefixes_apart() -> None:
    base = list(range(64))
    assert chain(base, 63) == chain(base, 64)[:3]
    other = [99, *base[1:]]
    assert all(a != b for a, b in zip(chain(base, 64), chain(other, 64)))
    assert chain(base[:48] + other[48:], 64) == chain(base, 64)
    assert chain(base, 15) == []
