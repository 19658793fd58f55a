"""Records into a file at its disk's speed: some threads that each read an expert, pack it and write it.

Reading, packing and writing overlap because the threads are at different steps. Each holds one record, and one
expert's tensors: memory is bounded by their number. Writes go past the page cache where the file system can.
"""

import errno
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from karakoram.checkpoint.experts.direct import DirectFile, aligned_bytes, view_of
from karakoram.checkpoint.experts.journal import Journal
from karakoram.checkpoint.experts.layout import Layout, checksum, front
from karakoram.checkpoint.experts.source import ExpertSource, read_record
from karakoram.errors import CheckpointError

THREADS = 4  # of K2's records, 2 wrote 1,210 MB/s on a disk that reads 3,500, 4 1,550, 6 1,450
_FLUSH_BYTES = 256 << 20  # where O_DIRECT is refused: what may wait in the page cache

Report = Callable[[int], None]  # records that are there


class RecordFile:
    """A file of records in the making: what was begun there before is kept."""

    def __init__(self, path: Path, layout: Layout) -> None:
        self.path, self.layout = path, layout
        flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC
        self._plain = os.open(path, flags, 0o666)
        os.ftruncate(self._plain, layout.file_bytes)
        try:
            self._direct = os.open(path, flags | os.O_DIRECT) if hasattr(os, "O_DIRECT") else None
        except OSError:
            self._direct = None
        self._descriptors = [self._plain] if self._direct is None else [self._plain, self._direct]
        self._lock = threading.Lock()
        self._unflushed = 0

    def write(self, number: int, slot: Tensor) -> None:
        """A record with its padding to its place."""
        view, offset = view_of(slot), self.layout.offset(number)
        while len(view):
            descriptor = self._plain if self._direct is None else self._direct
            try:
                count = os.pwrite(descriptor, view, offset)
            except OSError as error:
                if error.errno != errno.EINVAL or self._direct is None:
                    raise
                self._direct = None  # the descriptor stays open: other threads may be using it
                continue
            if count % 4096 and count < len(view):
                count -= count % 4096  # O_DIRECT goes on at a page
                if not count:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            view, offset = view[count:], offset + count
        if self._direct is None:
            self._flush_sometimes(len(slot))

    def finish(self, checksums: dict[int, int]) -> None:
        """Header and index, and everything to the disk."""
        in_order = np.array([checksums[number] for number in range(self.layout.records)], dtype=np.uint64)
        view = memoryview(front(self.layout, in_order))
        done = 0
        while done < len(view):
            done += os.pwrite(self._plain, view[done:], done)
        os.fsync(self._plain)

    def close(self) -> None:
        """Let go of the file."""
        for descriptor in self._descriptors:
            os.close(descriptor)

    def _flush_sometimes(self, written: int) -> None:
        with self._lock:
            self._unflushed += written
            if self._unflushed < _FLUSH_BYTES:
                return
            self._unflushed = 0
        os.fsync(self._plain)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._plain, 0, 0, os.POSIX_FADV_DONTNEED)


def verified(path: Path, layout: Layout, checksums: dict[int, int], report: Report) -> dict[int, int]:
    """Those of the records that a journal claims which are there, as it claims. Reads all of them."""
    file, found, lock = DirectFile(path), {}, threading.Lock()

    def check(number: int, slot: Tensor) -> None:
        view = view_of(slot)
        try:
            file.read([view], layout.offset(number), len(view))
        except CheckpointError:
            return  # it is written again
        right = checksum(number, view[: layout.record_bytes]) == checksums[number]
        with lock:
            if right:
                found[number] = checksums[number]

    try:
        _in_threads(check, [n for n in checksums if n < layout.records], layout.slot_bytes, report)
    finally:
        file.close()
    return found


def write_records(source: ExpertSource, file: RecordFile, journal: Journal, report: Report) -> None:
    """All records that the journal lacks. Raises the first error; the journal is right then, too."""
    lock, layout = threading.Lock(), file.layout

    def pack(number: int, slot: Tensor) -> None:
        read_record(source, *layout.address(number), slot)
        found = checksum(number, view_of(slot)[: layout.record_bytes])
        file.write(number, slot)
        with lock:
            journal.add(number, found)

    left = [number for number in range(layout.records) if number not in journal.checksums]
    there = len(journal.checksums)
    _in_threads(pack, left, layout.slot_bytes, lambda done: report(there + done))


def _in_threads(work: Callable[[int, Tensor], None], numbers: Sequence[int], slot_bytes: int, report: Report) -> None:
    """`work` on every number, in order as far as threads can; reports from this thread. The first error ends all."""
    todo, errors, done = iter(numbers), list[BaseException](), 0
    news = threading.Condition()

    def run() -> None:
        nonlocal done
        slot = aligned_bytes(slot_bytes)  # zeros: padding, and what rests between the parts of an fp8 record
        while True:
            with news:
                number = None if errors else next(todo, None)
            if number is None:
                return
            try:
                work(number, slot)
            except BaseException as error:  # noqa: BLE001  carried to the calling thread, whatever it is
                with news:
                    errors.append(error)
                    news.notify()
                return
            with news:
                done += 1
                news.notify()

    threads = [threading.Thread(target=run, daemon=True) for _ in range(min(THREADS, len(numbers)))]
    for thread in threads:
        thread.start()
    try:
        told = -1
        while told < len(numbers) and not errors:
            with news:
                while done == told and not errors:
                    news.wait()
                told = done
            report(told)
    except BaseException as error:
        errors.append(error)
        raise
    finally:
        for thread in threads:
            thread.join()
    if errors:
        raise errors[0]
