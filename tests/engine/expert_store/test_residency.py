"""Bookkeeping: what may never happen, whatever is asked in whatever order."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from karakoram.engine.expert_store.policy import POLICIES, policy_named
from karakoram.engine.expert_store.residency import REFUSED, Residency
from karakoram.errors import InputError

LAYERS, EXPERTS = 3, 6


def new(capacity: int, policy: str = "lru", floor: int = 0, pins: tuple[int, ...] = ()) -> Residency:
    return Residency(LAYERS, EXPERTS, capacity, policy_named(policy, LAYERS, EXPERTS), floor, pins)


def turn(memory: Residency, layer: int, *experts: int) -> tuple[list[int], list[int]]:
    """A whole turn of a layer: hits, and the keys that left."""
    here, missing = memory.demand(layer, np.array(experts))
    gone = [memory.admit(key) for key in missing]
    memory.release(layer)
    return here, [key for key in gone if key is not None]


@given(st.data())
def test_what_holds_always(data: st.DataObject) -> None:
    floor = data.draw(st.integers(0, 2))
    capacity = data.draw(st.integers(max(5, floor * LAYERS), LAYERS * EXPERTS))
    pins = tuple(data.draw(st.sets(st.integers(0, LAYERS * EXPERTS - 1), max_size=2)))
    memory = new(capacity, data.draw(st.sampled_from(list(POLICIES))), floor, pins)
    demanded = evicted = read = guesses = 0
    for step in range(data.draw(st.integers(1, 25))):
        layer = step % LAYERS
        wanted = np.array(sorted(data.draw(st.sets(st.integers(0, EXPERTS - 1), min_size=1, max_size=EXPERTS))))
        here, missing = memory.demand(layer, wanted)
        assert sorted(here + missing) == (wanted + layer * EXPERTS).tolist()
        demanded += len(wanted)
        locked = set(here)
        for key in missing:
            before = np.bincount(np.flatnonzero(memory.resident) // EXPERTS, minlength=LAYERS)
            victim = memory.admit(key)
            if victim == REFUSED:
                assert not memory.resident[key]
                memory.release(layer, locked)
                locked.clear()
                victim = memory.admit(key)
                if victim == REFUSED:  # pins and floors of other layers
                    continue
            read += 1
            locked.add(key)
            if victim is not None:
                evicted += 1
                assert victim not in locked
                assert victim not in pins
                assert before[victim // EXPERTS] > floor or victim // EXPERTS == layer
        for expert in data.draw(st.lists(st.integers(0, EXPERTS - 1), max_size=3, unique=True)):
            guess = (layer + 1) % LAYERS * EXPERTS + expert
            if not memory.resident[guess]:
                victim = memory.admit(guess, guessed=True)
                assert victim is None or victim == REFUSED or victim not in locked
                guesses += victim != REFUSED
                evicted += victim is not None and victim != REFUSED
        memory.release(layer)
        assert len(memory) == memory.resident.sum() <= capacity
    assert memory.hits + memory.misses == demanded
    assert memory.evictions == evicted == read + guesses - len(memory)
    assert memory.guessed_useful + memory.guessed_wasted <= guesses


def test_the_oldest_leaves_and_floors_hold() -> None:
    assert turn(new(2), 0, 1, 2) == ([], [])
    memory = new(4, floor=1)
    turn(memory, 0, 0)
    turn(memory, 1, 0, 1)
    turn(memory, 2, 5)
    assert turn(memory, 2, 4) == ([], [EXPERTS])  # the oldest is layer 0's only one
    assert turn(memory, 0, 1) == ([], [0])  # a layer may replace its own
    assert turn(memory, 0, 1) == ([1], [])


def test_pins_stay() -> None:
    memory = new(3, pins=(0,))
    turn(memory, 0, 0)
    for expert in range(EXPERTS):
        turn(memory, 1, expert)
    assert turn(memory, 0, 0) == ([0], [])


def test_a_batch_larger_than_memory_runs_in_rounds() -> None:
    memory = new(2)
    _, missing = memory.demand(0, np.arange(4))
    assert [memory.admit(key) for key in missing[:3]] == [None, None, REFUSED]
    memory.release(0, [missing[1]])
    assert memory.admit(missing[2]) == missing[1]
    assert memory.admit(missing[3]) == REFUSED
    memory.release(0, [missing[0], missing[2]])
    assert memory.admit(missing[3]) in (missing[0], missing[2])


def test_guesses_are_counted_and_stay_until_their_layer_runs() -> None:
    memory = new(3)
    turn(memory, 0, 0)
    assert memory.admit(EXPERTS + 1, guessed=True) is None
    assert memory.admit(EXPERTS + 2, guessed=True) is None
    assert memory.admit(EXPERTS + 3, guessed=True) == 0
    assert memory.admit(EXPERTS + 4, guessed=True) == REFUSED  # a guess is not given up for another
    assert turn(memory, 1, 1, 5) == ([EXPERTS + 1], [EXPERTS + 2])  # by the time layer 1 runs, the others were wrong
    assert (memory.guessed_useful, memory.guessed_wasted) == (1, 2)
    assert memory.admit(2 * EXPERTS, guessed=True) is not None
    memory.demand(0, np.array([1, 2]))
    assert [memory.admit(1), memory.admit(2)].count(2 * EXPERTS) == 0  # others could leave
    memory.demand(0, np.array([3]))
    assert memory.admit(3) == 2 * EXPERTS  # nobody else can: all others are locked
    assert memory.guessed_wasted == 3


def test_a_policy_may_keep_what_it_has() -> None:
    memory = new(1, "hybrid")
    for _ in range(30):
        turn(memory, 0, 0)
    assert memory.admit(EXPERTS, guessed=True) == REFUSED
    assert memory.admit(EXPERTS) == 0


def test_what_was_not_read_is_dropped() -> None:
    memory = new(3)
    turn(memory, 0, 0)
    memory.drop(0)
    memory.drop(0)
    assert len(memory) == 0
    assert memory.evictions == 0
    assert turn(memory, 0, 0) == ([], [])


def test_shrinking_gives_up_the_oldest_and_keeps_locks() -> None:
    memory = new(4)
    turn(memory, 0, 0, 1)
    memory.demand(1, np.array([0]))
    memory.admit(EXPERTS)
    assert memory.shrink(1) == [0, 1]
    assert memory.shrink(0) == []
    assert len(memory) == 1


def test_twice_is_a_mistake() -> None:
    memory = new(3)
    turn(memory, 0, 0)
    with pytest.raises(ValueError, match="resident already"):
        memory.admit(0)


@pytest.mark.parametrize(
    ("capacity", "floor", "pins", "match"),
    [(0, 0, (), "cannot keep"), (5, 2, (), "cannot keep"), (3, -1, (), "cannot keep"),
     (4, 0, (18,), "none of the 18"), (4, 0, (-1,), "none of the 18"), (2, 0, (0, 1), "fill a memory")],
)  # fmt: skip
def test_impossible_memories_are_refused(capacity: int, floor: int, pins: tuple[int, ...], match: str) -> None:
    with pytest.raises(InputError, match=match):
        new(capacity, floor=floor, pins=pins)
