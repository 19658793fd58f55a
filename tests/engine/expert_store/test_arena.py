"""Slots: aligned, disjoint, counted, given back to the system."""

import mmap

import pytest

from karakoram.engine.expert_store.arena import Arena
from karakoram.env import resident_bytes
from karakoram.errors import InputError


def test_slots_lie_on_pages_and_do_not_overlap() -> None:
    arena = Arena(5, 8192, 5000)
    taken = [arena.take() for _ in range(5)]
    assert sorted(taken) == list(range(5))
    assert arena.free == 0
    for number in taken:
        slot, record = arena.slot(number), arena.record(number)
        assert slot.data_ptr() % mmap.PAGESIZE == 0
        assert (slot.data_ptr(), slot.numel(), record.numel()) == (record.data_ptr(), 8192, 5000)
        slot.fill_(number)
    assert [int(arena.slot(number).unique()) for number in taken] == taken


def test_taking_more_than_there_are_is_an_error() -> None:
    arena = Arena(1, 4096, 4096)
    arena.take()
    with pytest.raises(InputError, match="no free slot"):
        arena.take()


@pytest.mark.parametrize(("slots", "slot_bytes", "record_bytes"), [(0, 4096, 1), (1, 4000, 1), (1, 4096, 5000)])
def test_impossible_sizes_are_refused(slots: int, slot_bytes: int, record_bytes: int) -> None:
    with pytest.raises(InputError, match="no arena"):
        Arena(slots, slot_bytes, record_bytes)


def test_retired_slots_return_their_memory_and_the_others_keep_theirs() -> None:
    size = 4 << 20
    arena = Arena(16, size, size)
    taken = [arena.take() for _ in range(16)]
    for number in taken:
        arena.slot(number).fill_(number + 1)
    before = resident_bytes()
    for number in taken[:12]:
        arena.give(number)
    assert arena.retire(100) == 12
    assert arena.free == 0
    after = resident_bytes()
    if before is not None and after is not None:
        assert before - after > 8 * size  # the kernel may keep a huge page that two slots share
    for number in taken[12:]:
        assert arena.slot(number).unique().tolist() == [number + 1]
