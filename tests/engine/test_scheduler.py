"""Who runs: plans that a runner can trust under any pressure, turns between clients, nobody overtaken for ever.

Here no model runs: a pass is played by moving sequences on and appending tokens, so thousands of plans cost nothing.
"""

from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from karakoram.engine.blocks import BLOCK_TOKENS, BlockPool
from karakoram.engine.request import Request
from karakoram.engine.runner import Piece
from karakoram.engine.scheduler import FairQueue, Scheduler
from karakoram.engine.sequence import Sequence, chain
from karakoram.engine.speculate import PassCosts
from tests.engine.test_blocks import nodes_of

MOST_TOKENS = 48


class Fixed:
    """A guesser that always guesses so many tokens."""

    def __init__(self, count: int) -> None:
        self.count = count

    def guess(self, tokens: list[int], most: int, extra_cost: float) -> list[int]:
        return [7] * min(most, self.count)


def sequence(
    name: str, tokens: Iterable[int], new: int = 1, client: str = "", guesses: int = 0, logprobs: bool = False
) -> Sequence:
    request = Request(name, list(tokens), new, client=client, prompt_logprobs=0 if logprobs else None)
    made = Sequence(request, lambda news: None, 0)
    made.tokens = list(made.request.prompt)
    made.prompt_tokens = len(made.tokens)
    made.hashes = chain(made.tokens, len(made.tokens) - 1)
    if guesses:
        made.guesser = Fixed(guesses)  # type: ignore[assignment]
    return made


class Played:
    """A scheduler whose passes are played; every plan is checked."""

    def __init__(self, blocks: int, most_running: int = 8, most_tokens: int = MOST_TOKENS) -> None:
        self.pool, self.blocks = BlockPool(blocks), blocks
        self.copies: list[tuple[int, int, int]] = []
        self.scheduler = Scheduler(self.pool, lambda *copy: self.copies.append(copy), most_running, most_tokens)
        self.order: list[str] = []  # of first pieces
        self.ends: list[str] = []
        for tokens in (1, 2, 4, 8, 16, 32):
            self.scheduler.costs.saw(tokens, 1.0)

    def put(self, *sequences: Sequence) -> None:
        for one in sequences:
            self.scheduler.waiting.put(one)

    def step(self, right: int = 0) -> list[Piece]:
        """One pass in which the first `right` guesses of each sequence are right; prompts cost next to nothing."""
        scheduler = self.scheduler
        pieces = scheduler.plan()
        scheduler.saw(pieces, 1.0)
        self.check(pieces)
        for piece in pieces:
            one = piece.sequence
            if one.request.id not in self.order:
                self.order.append(one.request.id)
            draws = one.computed + piece.count == len(one.tokens)
            if one.request.prompt_logprobs is None:
                assert piece.wanted == (1 + len(piece.guesses) if draws else 0)
            else:
                assert piece.wanted == piece.tokens
            taken = min(right, len(piece.guesses)) + 1 if draws else 0
            one.tokens += [7] * taken
            one.new_tokens += taken
            one.computed += piece.count + max(taken - 1, 0)
            scheduler.advanced(one)
            if one.left <= 0:
                scheduler.remove(one)
                self.ends.append(one.request.id)
        return pieces

    def check(self, pieces: list[Piece]) -> None:
        running = self.scheduler.running
        live = [piece.sequence for piece in pieces]
        assert len(set(map(id, live))) == len(live)
        assert len(running) <= self.scheduler.most_running
        assert bool(pieces) == bool(running or len(self.scheduler.waiting))
        for piece in pieces:
            one, end = piece.sequence, piece.sequence.computed + piece.tokens
            assert one in running
            assert piece.count >= 1 and one.computed + piece.count <= len(one.tokens)
            assert len(one.table) * BLOCK_TOKENS >= end
            # What is written lies in the sequence's own blocks, never in those that others read.
            assert one.computed >= len(one.nodes) * BLOCK_TOKENS
        prompts = [piece.count for piece in pieces if piece.count > 1]
        decoding = sum(piece.tokens for piece in pieces) - sum(prompts)
        assert not prompts or sum(prompts) + decoding <= max(self.scheduler.most_tokens, decoding + 1)
        held = [block for one in running for block in one.private]
        assert sorted([*held, *self.pool._free, *(n.block for n in nodes_of(self.pool))]) == list(range(self.blocks))

    def finish(self, steps: int = 2000) -> None:
        """Until nobody is left; everything is back then."""
        while self.scheduler.running or len(self.scheduler.waiting):
            assert self.step(), "nothing runs, but somebody waits"
            steps -= 1
            assert steps, "this never ends"
        assert self.pool.held == 0 and not self.scheduler._in_flight


REQUESTS = st.lists(
    st.tuples(
        st.integers(0, 2),  # client
        st.integers(0, 2),  # which prefix
        st.integers(0, 60), st.integers(1, 40),  # tokens of the prefix, and of its own
        st.integers(1, 60), st.sampled_from([0, 0, 2, 4]), st.booleans(),  # new tokens, guesses, logprobs of the prompt
    ),
    min_size=1, max_size=8,
)  # fmt: skip


@settings(max_examples=300)
@given(
    REQUESTS, st.integers(10, 24), st.integers(1, 8), st.sampled_from([5, 17, 48, 512]), st.lists(st.integers(0, 4)),
    st.lists(st.tuples(st.integers(0, 40), st.integers(0, 7)), max_size=4),
)  # fmt: skip
def test_any_plan_can_be_run(
    requests: list[tuple[int, ...]], blocks: int, most_running: int, most_tokens: int, right: list[int],
    removals: list[tuple[int, int]],
) -> None:  # fmt: skip
    """A request has 160 tokens at most, the smallest cache as many and a block more: someone is preempted all the time.

    Some are taken out on the way, as cancels do.
    """
    played = Played(blocks + 1, most_running, most_tokens)
    all_of_them = [
        sequence(f"{i}", [prefix] * shared + [10 + i] * own, new, f"client {client}", guesses, logprobs)
        for i, (client, prefix, shared, own, new, guesses, logprobs) in enumerate(requests)
    ]
    played.put(*all_of_them)
    for number in range(200):
        if not (played.scheduler.running or len(played.scheduler.waiting)):
            break
        for when, who in removals:
            one = all_of_them[who % len(all_of_them)]
            if when == number and one.request.id not in played.ends:
                played.scheduler.remove(one)
                played.ends.append(one.request.id)
        played.step(right[number % len(right)] if right else 0)
    played.finish()
    assert sorted(played.ends) == sorted(one.request.id for one in all_of_them)


def test_a_sequence_that_made_room_and_came_back_in_one_plan_runs_once() -> None:
    """A newer sequence is planned with guesses, gives its blocks to an older one's prompt, and what is left suffices
    for coming back without guesses."""
    played = Played(10, most_tokens=512)
    played.put(sequence("old", range(100, 240), logprobs=True), sequence("new", range(200, 229), 20, guesses=4))
    assert [piece.count for piece in played.step()] == [64, 29]
    assert [(piece.sequence.request.id, piece.count) for piece in played.step()] == [("old", 64), ("new", 14)]
    assert played.scheduler.preemptions == 1
    played.finish()


def test_guesses_make_nobody_leave() -> None:
    """The other needs its blocks for one step more; there is no hurry to guess."""
    played = Played(3)
    played.put(sequence("a", [1] * 14, 30, guesses=4), sequence("b", [2] * 30, 2))
    played.finish()
    assert played.scheduler.preemptions == 0


def test_the_newest_makes_room_and_comes_back_first() -> None:
    played = Played(7, most_tokens=512)
    played.put(*(sequence(name, [ord(name)] * 30, 30) for name in "abc"), sequence("late", [1] * 60, 4))
    for _ in range(3):
        played.step()
    assert [one.request.id for one in played.scheduler.running] == ["a", "b", "c"]
    while played.scheduler.preemptions == 0:
        played.step()
    assert [one.request.id for one in played.scheduler.running] == ["a", "b"]
    assert next(iter(played.scheduler.waiting.in_turn())).request.id == "c"
    while "late" not in played.order:
        assert "c" not in played.ends
        played.step()
    assert "c" in [one.request.id for one in played.scheduler.running]  # came back before the late one came
    played.finish()


def test_a_large_request_is_not_overtaken_for_ever() -> None:
    """Small ones that keep coming fit beside each other; the large one needs nearly all blocks. It gets them."""
    played = Played(12, most_running=4, most_tokens=512)
    played.put(*(sequence(f"small {i}", [i] * 30, 20, "small") for i in range(3)))
    played.step()
    played.put(sequence("large", [99] * 150, 3, "large"))
    for number in range(60):
        if len(played.scheduler.waiting) < 3:
            played.put(sequence(f"more {number}", [number] * 30, 20, "small"))
        played.step()
    assert "large" in played.ends


# ------------------------------------------------------------------------------------------------ turns


def test_clients_take_turns_and_keep_their_own_order() -> None:
    played = Played(64, most_running=1)
    played.put(*(sequence(f"a{i}", [i], client="a") for i in range(20)))
    played.put(sequence("b0", [1], client="b"), *(sequence(f"c{i}", [i], client="c") for i in range(3)))
    played.put(sequence("b1", [1], client="b"))
    played.finish()
    assert played.order[:9] == ["a0", "b0", "c0", "a1", "b1", "c1", "a2", "c2", "a3"]
    assert played.order[9:] == [f"a{i}" for i in range(4, 20)]


def test_a_flood_is_admitted_in_turn_too_when_many_run() -> None:
    played = Played(64, most_running=4)
    played.put(*(sequence(f"a{i}", [i], client="a") for i in range(20)))
    played.put(sequence("b0", [1], client="b"), sequence("c0", [1], client="c"))
    played.step()
    assert played.order == ["a0", "b0", "c0", "a1"]


def test_a_queue_counts_and_forgets_clients() -> None:
    queue = FairQueue()
    a, b, c = (sequence(name, [1], client=name) for name in "abc")
    for one in (a, b, c):
        queue.put(one)
    assert len(queue) == 3 and list(queue.in_turn()) == [a, b, c]
    queue.took(a)
    queue.put(a)
    assert list(queue.in_turn()) == [b, c, a]
    queue.put(first := sequence("first", [1], client="c"), first=True)
    assert list(queue.in_turn()) == [first, a, b, c] or list(queue.in_turn()) == [first, b, a, c]
    for one in (a, b, c, first):
        queue.took(one)
    assert len(queue) == 0 and not queue._by_client and list(queue.in_turn()) == []


# ------------------------------------------------------------------------------------------------ pieces of prompts


@pytest.mark.parametrize("most_tokens", [16, 48, 512])
def test_a_prompt_comes_in_pieces_that_fit(most_tokens: int) -> None:
    played = Played(64, most_tokens=most_tokens)
    played.put(sequence("a", range(200)))
    counts = []
    while not played.ends:
        counts += [piece.count for piece in played.step()]
    full, rest = divmod(200, most_tokens)
    assert counts == [most_tokens] * full + [rest] * (rest > 0)


def test_prompts_share_a_pass_and_decoding_goes_first() -> None:
    played = Played(64, most_tokens=64)
    played.put(sequence("a", [1] * 10, 50), sequence("b", [2] * 40), sequence("c", [3] * 40, 5), sequence("d", [4] * 9))
    first = [(piece.sequence.request.id, piece.count) for piece in played.step()]
    assert first == [("a", 10), ("b", 40), ("c", 14)]
    second = [(piece.sequence.request.id, piece.count) for piece in played.step()]
    assert second == [("a", 1), ("c", 26), ("d", 9)]


def test_beside_decoding_a_prompts_pieces_are_as_long_as_time_allows() -> None:
    """A pass of one decoding token takes 20 ms, so 30 ms may be added: 64 tokens have taken 24 and 128 took 48; where
    512 took 24, all of the prompt goes."""
    for seen, took, expected in ((64, 24.0, 64), (512, 24.0, 400), (512, 4000.0, 32)):
        played = Played(64, most_tokens=512)
        played.put(sequence("a", [1] * 10, 50))
        played.step()
        played.scheduler.costs, played.scheduler._prompt_costs = PassCosts(), PassCosts()
        played.scheduler.costs.saw(1, 20.0)
        played.scheduler._prompt_costs.saw(seen, took)
        if seen == 64:
            played.scheduler._prompt_costs.saw(128, 48.0)
        played.put(sequence("b", [2] * 400))
        counts = {piece.sequence.request.id: piece.count for piece in played.scheduler.plan()}
        assert counts == {"a": 1, "b": expected}


def test_costs_are_learnt_from_passes() -> None:
    played = Played(64)
    played.scheduler.costs = PassCosts()
    decoding, prompt = sequence("a", [1] * 20, 5), sequence("b", [2] * 40)
    one, forty = Piece(decoding, 1, (), 1), Piece(prompt, 40, (), 1)
    played.scheduler.saw([one], 2.0)
    assert played.scheduler.costs.ms(1) == 2.0
    played.scheduler.saw([one, forty], 10.0)
    assert played.scheduler._prompt_costs.ms(40) == pytest.approx(8)  # the decoding token's share is known
    played.scheduler.saw([forty], 18.0)
    assert 8 < (played.scheduler._prompt_costs.ms(40) or 0) < 18


def test_what_was_not_seen_is_estimated_in_proportion() -> None:
    costs = PassCosts()
    assert costs.estimate(100) == 0.0
    costs.saw(256, 8.0)
    assert costs.estimate(64) == 2.0 and costs.estimate(512) == 16.0 and costs.estimate(300) == 8.0
