"""Memory for expert records: slots of equal size on page boundaries, so that the disk can write into them directly.

One anonymous mapping, whose pages are taken from the system when they are first written; slots that are given back for
good return theirs. Nothing is ever copied from slot to slot.
"""

import mmap
from contextlib import suppress

import torch
from torch import Tensor

from karakoram.errors import InputError

_LARGE = 2 << 20  # a large page of x86 and Arm


class Arena:
    """`slots` slots of `slot_bytes` (a multiple of the page) each; of a slot, `record_bytes` are the record."""

    def __init__(self, slots: int, slot_bytes: int, record_bytes: int) -> None:
        if slots < 1 or slot_bytes % mmap.PAGESIZE or not 0 < record_bytes <= slot_bytes:
            raise InputError(
                f"{slots} slots of {slot_bytes} bytes for records of {record_bytes} are no arena.",
                f"At least one slot, a multiple of {mmap.PAGESIZE} bytes.",
            )
        self.slot_bytes = slot_bytes
        # Large pages triple the disk's speed (docs/decisions/expert-reading.md), and only private memory gets them.
        self._memory = mmap.mmap(-1, slots * slot_bytes + _LARGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with suppress(AttributeError, OSError):  # Linux alone
            self._memory.madvise(mmap.MADV_HUGEPAGE)
        memory = torch.frombuffer(self._memory, dtype=torch.uint8)
        self._first = -memory.data_ptr() % _LARGE
        whole = memory[self._first : self._first + slots * slot_bytes].view(slots, slot_bytes)
        self._slots: list[Tensor] = list(whole)
        self._records: list[Tensor] = list(whole[:, :record_bytes])
        self._free = list(range(slots - 1, -1, -1))

    @property
    def free(self) -> int:
        """How many slots can be taken."""
        return len(self._free)

    def take(self) -> int:
        """The number of a free slot. Raises InputError where there is none: its caller has lost count."""
        if not self._free:
            raise InputError("There is no free slot.", "Give one back first.")
        return self._free.pop()

    def give(self, slot: int) -> None:
        """A slot that nobody reads or writes any more."""
        self._free.append(slot)

    def slot(self, number: int) -> Tensor:
        """Where a read goes: uint8 [slot_bytes]."""
        return self._slots[number]

    def record(self, number: int) -> Tensor:
        """What the kernels take: uint8 [record_bytes]."""
        return self._records[number]

    def retire(self, count: int) -> int:
        """Give up to `count` free slots' memory back to the system for good; returns how many."""
        gone = 0
        while gone < count and self._free:
            slot = self._free.pop()
            with suppress(AttributeError, OSError, ValueError):
                self._memory.madvise(mmap.MADV_DONTNEED, self._first + slot * self.slot_bytes, self.slot_bytes)
            gone += 1
        return gone
