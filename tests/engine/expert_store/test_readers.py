"""The pool of readers: every expert arrives whole or with an error, needed before guessed, and slots are let go."""

import errno
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from karakoram.checkpoint import open_checkpoint, pack_checkpoint
from karakoram.checkpoint.experts import (
    ExpertSource,
    PackedRecords,
    ShardRecords,
    aligned_bytes,
    open_expert_source,
    read_record,
)
from karakoram.checkpoint.experts.layout import FILE_NAME
from karakoram.engine.expert_store.readers import Read, Readers
from karakoram.errors import CheckpointError, InputError
from tests.checkpoint import small_experts
from tests.checkpoint.small_experts import EXPERTS, LAYERS, Faulty, flip

ALL = [(layer, expert) for layer in LAYERS for expert in range(EXPERTS)]
PAGE = 4096


@pytest.fixture(scope="module")
def src(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_experts.write(tmp_path_factory.mktemp("experts") / "src")


@pytest.fixture(scope="module")
def packed(src: Path) -> Path:
    return pack_checkpoint(src, src.parent / "packed") / FILE_NAME


@pytest.fixture(scope="module")
def expected(packed: Path) -> dict[tuple[int, int], Tensor]:
    """Every record, read alone."""
    source = PackedRecords(packed)
    found = {address: aligned_bytes(source.slot_bytes) for address in ALL}
    for address, slot in found.items():
        read_record(source, *address, slot)
    source.close()
    return found


Make = Callable[..., Readers]


@pytest.fixture
def make(packed: Path) -> Iterator[Make]:
    """Makes pools over the packed file, and closes them."""
    pools: list[Readers] = []

    def pool(preadv=None, threads: int = 4, piece_bytes: int = 4 << 20) -> Readers:
        pools.append(Readers(PackedRecords(packed, preadv), threads, piece_bytes))
        return pools[-1]

    yield pool
    for found in pools:
        found.close()
        found.source.close()


def slots(source: ExpertSource, addresses: Sequence[tuple[int, int]]) -> list[tuple[int, int, Tensor]]:
    """What to submit for them, each slot in a memory of its own."""
    return [(*address, aligned_bytes(source.slot_bytes).zero_()) for address in addresses]


def wait_for_all(readers: Readers, reads: Sequence[Read]) -> None:
    left = list(reads)
    while left:
        assert readers.wait(left)
        left = [read for read in left if not read.finished]


class Gate:
    """A `preadv` that waits for `open` at each call, and remembers the places asked for."""

    def __init__(self, then: Callable[..., int] = os.preadv) -> None:
        self.then, self.places, self.lengths = then, list[int](), list[int]()
        self.arrived, self.open = threading.Semaphore(0), threading.Semaphore(0)

    def __call__(self, descriptor: int, views: Sequence[memoryview], offset: int) -> int:
        self.places.append(offset)
        self.lengths.append(sum(map(len, views)))
        self.arrived.release()
        assert self.open.acquire(timeout=60)
        return self.then(descriptor, views, offset)

    def open_wide(self) -> None:
        self.open.release(10_000)


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("piece_bytes", [PAGE, 3 * PAGE, 4 << 20])
def test_all_experts_arrive_whole(make: Make, expected: dict, threads: int, piece_bytes: int) -> None:
    readers = make(None, threads, piece_bytes)
    reads = readers.submit(slots(readers.source, ALL), urgent=True)
    wait_for_all(readers, reads)
    assert {read.state for read in reads} == {"done"}
    assert all(torch.equal(read.slot, expected[read.layer, read.expert]) for read in reads)
    assert readers.idle() and readers.done == len(ALL)
    assert readers.bytes_read == len(ALL) * readers.source.slot_bytes
    assert readers.seconds_busy > 0 and all(read.seconds > 0 for read in reads)


@pytest.mark.parametrize("piece_bytes", [PAGE, 4 << 20])
def test_shards_are_read_in_place(src: Path, expected: dict, piece_bytes: int) -> None:
    source = open_expert_source(open_checkpoint(src))
    assert isinstance(source, ShardRecords)
    readers = Readers(source, 3, piece_bytes)
    reads = readers.submit(slots(source, ALL), urgent=True)
    wait_for_all(readers, reads)
    readers.close()
    source.close()
    assert all(torch.equal(read.slot, expected[read.layer, read.expert]) for read in reads)


def test_one_expert_is_read_by_all_threads_at_once(make: Make, expected: dict) -> None:
    gate = Gate()
    readers = make(gate, 3, PAGE)
    (read,) = readers.submit(slots(readers.source, [(1, 2)]), urgent=True)
    for _ in range(3):
        assert gate.arrived.acquire(timeout=60)  # three preadv, none of which has returned
    assert len(set(gate.places)) == 3 and read.state == "reading"
    gate.open_wide()
    wait_for_all(readers, [read])
    assert torch.equal(read.slot, expected[1, 2])


def test_neighbours_that_are_wanted_together_are_one_read(make: Make, expected: dict) -> None:
    """Whatever the order in which they are given: each begins with the first one that waits, and takes what follows."""
    gate = Gate()
    readers = make(gate, 1)
    gate.open_wide()
    reads = readers.submit(slots(readers.source, [(1, 0), (1, 2), (1, 1), (2, 1), (2, 3)]), urgent=True)
    wait_for_all(readers, reads)
    size = readers.source.slot_bytes
    assert gate.lengths == [3 * size, size, size] and readers.joined == 3
    assert all(torch.equal(read.slot, expected[read.layer, read.expert]) for read in reads)


def test_guesses_wait_for_what_is_needed(make: Make) -> None:
    """Even one that has begun gives way, between pieces."""
    gate = Gate()
    readers = make(gate, 1, PAGE)
    source = readers.source
    assert isinstance(source, PackedRecords)
    begun, other = readers.submit(slots(source, [(1, 0), (1, 2)]), urgent=False)
    assert gate.arrived.acquire(timeout=60)
    (needed,) = readers.submit(slots(source, [(2, 3)]), urgent=True)
    assert not readers.idle()
    gate.open_wide()
    wait_for_all(readers, [begun, other, needed])
    of = [source.layout.address((place - source.layout.first) // source.slot_bytes) for place in gate.places]
    pieces = source.slot_bytes // PAGE
    assert of == [(1, 0)] + [(2, 3)] * pieces + [(1, 0)] * (pieces - 1) + [(1, 2)] * pieces


def test_a_promoted_guess_overtakes_the_others(make: Make) -> None:
    gate = Gate()
    readers = make(gate, 1, PAGE)
    source = readers.source
    assert isinstance(source, PackedRecords)
    reads = readers.submit(slots(source, [(1, 0), (1, 2), (2, 0), (2, 2)]), urgent=False)
    assert gate.arrived.acquire(timeout=60)
    assert readers.idle()
    readers.promote([reads[3], reads[0]])  # one that waits, one under way
    assert not readers.idle() and reads[3].urgent
    gate.open_wide()
    wait_for_all(readers, reads)
    of = [source.layout.address((place - source.layout.first) // source.slot_bytes) for place in gate.places]
    assert list(dict.fromkeys(of)) == [(1, 0), (2, 2), (1, 2), (2, 0)]
    readers.promote(reads)  # too late: nothing happens
    assert readers.idle()


def test_a_read_that_has_not_begun_never_begins(make: Make) -> None:
    gate = Gate()
    readers = make(gate, 1, PAGE)
    first, second = readers.submit(slots(readers.source, [(1, 0), (2, 0)]), urgent=True)
    assert gate.arrived.acquire(timeout=60)
    readers.cancel([second])
    assert readers.wait([first, second]) == [second]
    assert second.state == "cancelled"
    gate.open_wide()
    wait_for_all(readers, [first])
    assert first.state == "done" and not bool(second.slot.any())


def test_a_cancelled_read_stops_between_pieces_and_leaves_its_slot_alone(make: Make) -> None:
    gate = Gate()
    readers = make(gate, 2, PAGE)
    (read,) = readers.submit(slots(readers.source, [(1, 1)]), urgent=False)
    assert gate.arrived.acquire(timeout=60)
    assert gate.arrived.acquire(timeout=60)  # both threads are in the middle of it
    readers.cancel([read])
    assert read.state == "reading"  # the slot is still theirs
    gate.open.release(1)
    (other,) = readers.submit(slots(readers.source, [(2, 0)]), urgent=True)
    assert gate.arrived.acquire(timeout=60)
    assert read.state == "reading"
    gate.open.release(1)
    assert gate.arrived.acquire(timeout=60)
    assert readers.wait([read]) == [read]
    assert read.state == "cancelled" and readers.cancelled == 1
    read.slot.fill_(0xAB)
    gate.open_wide()
    wait_for_all(readers, [other])
    readers.close()
    assert bool((read.slot == 0xAB).all()) and other.state == "done"
    assert len(gate.places) == 2 + readers.source.slot_bytes // PAGE


def test_a_wrong_record_is_read_again_and_a_lasting_one_fails_alone(make: Make, expected: dict) -> None:
    readers = make(Faulty(flip), 1)
    reads = readers.submit(slots(readers.source, [(1, 1), (2, 1)]), urgent=True)
    wait_for_all(readers, reads)
    assert [read.state for read in reads] == ["done", "done"] and readers.reread == 1
    assert torch.equal(reads[0].slot, expected[1, 1])

    source = readers.source
    assert isinstance(source, PackedRecords)
    bad = source.layout.offset(source.layout.number(1, 1))

    def damaged(descriptor: int, views: Sequence[memoryview], offset: int) -> int:
        count = os.preadv(descriptor, views, offset)
        if offset <= bad < offset + count:
            view = views[(bad - offset) // len(views[0])]
            view[7] ^= 1
        return count

    readers = make(damaged, 2)
    reads = readers.submit(slots(readers.source, ALL), urgent=True)  # joined: its neighbours are not harmed
    wait_for_all(readers, reads)
    (failed,) = (read for read in reads if read.state == "failed")
    assert (failed.layer, failed.expert) == (1, 1)
    assert isinstance(failed.error, CheckpointError) and "Layer 1, expert 1" in str(failed.error)
    right = [read for read in reads if read is not failed]
    assert {read.state for read in right} == {"done"}
    assert all(torch.equal(read.slot, expected[read.layer, read.expert]) for read in right)


def test_an_io_error_takes_no_neighbour_along(make: Make, expected: dict, packed: Path) -> None:
    source = PackedRecords(packed)
    bad = source.layout.offset(source.layout.number(1, 2))
    source.close()

    def broken(descriptor: int, views: Sequence[memoryview], offset: int) -> int:
        if offset <= bad < offset + sum(map(len, views)):
            raise OSError(errno.EIO, "Input/output error")
        return os.preadv(descriptor, views, offset)

    readers = make(broken, 1)
    reads = readers.submit(slots(readers.source, ALL), urgent=True)
    wait_for_all(readers, reads)
    assert readers.failed == 1 and readers.done == len(ALL) - 1
    (failed,) = (read for read in reads if read.state == "failed")
    assert f"Layer 1, expert 2: {packed} cannot be read at byte {bad:,}" in str(failed.error)
    assert all(torch.equal(r.slot, expected[r.layer, r.expert]) for r in reads if r is not failed)


def test_one_failed_piece_stops_the_others_of_its_expert(make: Make) -> None:
    readers = make(Faulty(OSError(errno.EIO, "EIO"), always=True), 3, PAGE)
    reads = readers.submit(slots(readers.source, ALL), urgent=True)
    wait_for_all(readers, reads)
    assert {read.state for read in reads} == {"failed"} and readers.idle()
    assert readers.bytes_read == 0


def test_whatever_goes_wrong_in_a_thread_reaches_the_one_who_waits(make: Make) -> None:
    readers = make(Faulty(ZeroDivisionError("a bug")), 1, PAGE)
    bad, good = readers.submit(slots(readers.source, [(1, 0), (2, 0)]), urgent=True)
    wait_for_all(readers, [bad, good])
    assert (bad.state, good.state) == ("failed", "done") and isinstance(bad.error, ZeroDivisionError)


@pytest.mark.parametrize("piece_bytes", [PAGE, 4 << 20])
def test_closing_ends_what_is_under_way(make: Make, piece_bytes: int) -> None:
    gate = Gate()
    readers = make(gate, 2, piece_bytes)
    reads = readers.submit(slots(readers.source, ALL), urgent=False)
    assert gate.arrived.acquire(timeout=60)
    waiting = threading.Thread(target=wait_for_all, args=(readers, reads))
    waiting.start()
    gate.open_wide()
    readers.close()
    waiting.join(60)
    assert not waiting.is_alive() and all(read.finished for read in reads)
    readers.close()
    assert readers.idle()
    with pytest.raises(InputError, match="closed"):
        readers.submit(slots(readers.source, [(1, 0)]), urgent=True)


def test_nothing_begins_where_one_cannot(make: Make) -> None:
    readers = make()
    good = slots(readers.source, [(1, 0)])
    with pytest.raises(InputError, match="no expert"):
        readers.submit([*good, (1, EXPERTS, good[0][2])], urgent=True)
    with pytest.raises(InputError, match="takes no record"):
        readers.submit([*good, (1, 1, good[0][2][:-1])], urgent=True)
    assert readers.idle() and readers.wait([]) == [] and not bool(good[0][2].any())


@pytest.mark.parametrize(("threads", "piece_bytes"), [(0, PAGE), (1, 0), (1, PAGE + 1)])
def test_pools_that_cannot_be(packed: Path, threads: int, piece_bytes: int) -> None:
    source = PackedRecords(packed)
    with pytest.raises(InputError, match="cannot read"):
        Readers(source, threads, piece_bytes)
    source.close()


def test_several_threads_use_one_pool(make: Make, expected: dict) -> None:
    """Each submits, promotes and cancels its own; what it did not cancel is right."""
    readers = make(None, 3, 2 * PAGE)
    wrong: list[str] = []

    def use(number: int) -> None:
        for turn in range(20):
            reads = readers.submit(slots(readers.source, ALL), urgent=(number + turn) % 2 == 0)
            unwanted = reads[number :: 3 + turn % 3]
            readers.cancel(unwanted)
            readers.promote(reads[::2])
            wait_for_all(readers, reads)
            for read in reads:
                allowed = {"done", "cancelled"} if read in unwanted else {"done"}
                if read.state not in allowed:
                    wrong.append(f"{read}")
                elif read.state == "done" and not torch.equal(read.slot, expected[read.layer, read.expert]):
                    wrong.append(f"{read} is not what was packed")

    users = [threading.Thread(target=use, args=(number,)) for number in range(3)]
    for user in users:
        user.start()
    for user in users:
        user.join(120)
    assert not wrong and readers.idle() and readers.failed == 0


def test_two_processes_read_one_file(make: Make, expected: dict, packed: Path, project_root: Path) -> None:
    """The other one with a pool that it never closes: it ends all the same."""
    script = f"""
import sys, torch
from karakoram.checkpoint.experts import PackedRecords, aligned_bytes
from karakoram.engine.expert_store.readers import Readers
from pathlib import Path
readers = Readers(PackedRecords(Path(sys.argv[1])), 2, {PAGE})
size = readers.source.slot_bytes
for _ in range(5):
    left = readers.submit([(l, e, aligned_bytes(size)) for l in {LAYERS} for e in range({EXPERTS})], True)
    while left:
        readers.wait(left)
        assert not [read.error for read in left if read.error]
        left = [read for read in left if not read.finished]
print(readers.done)
"""
    other = subprocess.Popen(
        [sys.executable, "-c", script, packed], cwd=project_root, stdout=subprocess.PIPE, text=True
    )
    readers = make(None, 2, PAGE)
    while other.poll() is None:
        reads = readers.submit(slots(readers.source, ALL), urgent=True)
        wait_for_all(readers, reads)
        assert all(torch.equal(read.slot, expected[read.layer, read.expert]) for read in reads)
    assert other.returncode == 0 and other.communicate()[0].strip() == str(5 * len(ALL))
