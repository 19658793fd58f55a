"""How long experts take from disk: asked of the store's own readers (`engine/expert_store/readers.py`), with their
threads, pieces and checksums, past the page cache, and while the kernels compute as they do in decoding: readers and
kernels share the processor, and a reader that is woken while all cores compute begins late.

Of a model's own experts where they are there; else of a file that is written to the disk in question and removed. What
counts in decoding is a burst: a layer misses one or two records and waits for them, so seconds are taken by the number
of records asked for at once, with the disk idle before.
"""

import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import Tensor

from karakoram import env
from karakoram.checkpoint.experts import ExpertSource
from karakoram.checkpoint.experts.direct import DirectFile, aligned_bytes, up, view_of
from karakoram.checkpoint.experts.layout import checksum
from karakoram.checkpoint.experts.source import Extent
from karakoram.engine.expert_store.readers import Readers
from karakoram.errors import InputError
from karakoram.evals.plan.kernels import quarter
from karakoram.kernels.packed import Kind

BURSTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)  # records asked for at once
MOST_BYTES = 256 << 20  # of one burst
BURST_S, LEAST_BURSTS = 0.5, 8  # of each size, at least so many
DEPTHS = (1, 2, 4, 8)  # threads of readers
FILE_BYTES = 1 << 30
SPARE_BYTES = 1 << 30  # that stay free on the disk


class TemporaryRecords:
    """An `ExpertSource` over one file of bytes by chance: one layer, verified as packed records are."""

    room_bytes = 0
    kind: Kind = "int4"
    layers = (0,)
    hidden = intermediate = 0  # nobody computes with them

    def __init__(self, path: Path, record_bytes: int, experts: int) -> None:
        self.record_bytes, self.slot_bytes, self.experts = record_bytes, up(record_bytes), experts
        self.file = DirectFile(path)

    def extents(self, layer: int, expert: int) -> Sequence[Extent]:
        """See `ExpertSource`."""
        return (Extent(self.file, expert * self.slot_bytes, self.slot_bytes, self.slot_bytes, 0),)

    def room(self, slot: Tensor) -> Tensor:
        """See `ExpertSource`."""
        return slot

    def finish(self, layer: int, expert: int, room: Tensor, slot: Tensor) -> None:
        """Takes the time of a checksum; any is right."""
        checksum(expert, view_of(slot)[: self.record_bytes])

    def release(self, room: Tensor) -> None:
        """See `ExpertSource`."""

    def check_unchanged(self) -> None:
        """See `ExpertSource`."""
        self.file.check_unchanged()

    def close(self) -> None:
        """See `ExpertSource`."""
        self.file.close()


@contextmanager
def temporary_records(folder: Path, record_bytes: int) -> Iterator[TemporaryRecords]:
    """A file of at least `FILE_BYTES` in `folder`, removed afterwards. InputError where it cannot be written."""
    count = max(8, -(-FILE_BYTES // up(record_bytes)))
    wanted = count * up(record_bytes)
    disk = env.disk(folder)
    if disk is not None and disk.free_bytes < wanted + SPARE_BYTES:
        raise InputError(
            f"{folder} has {disk.free_bytes / 1e9:.1f} GB free; measuring its disk writes {wanted / 1e9:.1f} GB.",
            "Free some space, or name another folder: --disk PATH.",
        )
    path, source = None, None
    try:
        path = _write(folder, up(record_bytes), count)
        source = TemporaryRecords(path, record_bytes, count)
        yield source
    finally:
        if source is not None:
            source.close()
        if path is not None:
            path.unlink(missing_ok=True)


def _write(folder: Path, slot_bytes: int, count: int) -> Path:
    """Bytes by chance, on the disk when this returns; nothing is left behind where it fails."""
    path = None
    try:
        descriptor, name = tempfile.mkstemp(prefix=".k2-plan-", dir=folder)
        path = Path(name)
        try:
            chance = torch.randint(0, 256, (slot_bytes,), dtype=torch.uint8)
            for number in range(count):
                chance[:8] = number % 256  # no two records in a row alike
                view = view_of(chance)
                while view:
                    view = view[os.write(descriptor, view) :]
            os.fsync(descriptor)
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
    except OSError as error:
        if path is not None:
            with suppress(OSError):
                path.unlink()
        raise InputError(
            f"{folder} cannot be written to, to measure its disk: {error.strerror or error}.",
            "Free some space, or name another folder: --disk PATH.",
        ) from error
    return path


Meanwhile = Callable[[], object]  # what the kernels do after reads were asked for: a layer's experts on one token


def burst_seconds(
    source: ExpertSource, meanwhile: Meanwhile = lambda: None, budget_s: float = BURST_S
) -> list[tuple[float, float]]:
    """(records asked for at once, seconds until all are there), the disk idle before."""
    everything = len(source.layers) * source.experts
    sizes = [n for n in BURSTS if n <= everything and (n == 1 or n * source.slot_bytes <= MOST_BYTES)]
    slots = list(aligned_bytes(sizes[-1], source.slot_bytes))
    for slot in slots:
        slot.zero_()  # its pages are there
    readers = Readers(source)
    try:
        return [(float(n), _burst_s(source, readers, slots[:n], meanwhile, budget_s)) for n in sizes]
    finally:
        readers.close()


def depth_bytes_per_s(source: ExpertSource, budget_s: float = BURST_S) -> list[tuple[float, float]]:
    """(readers at work, bytes/s) of a long burst."""
    everything = len(source.layers) * source.experts
    count = max(1, min(16, everything, MOST_BYTES // source.slot_bytes))
    slots = list(aligned_bytes(count, source.slot_bytes))
    found = []
    for depth in DEPTHS:
        readers = Readers(source, threads=depth)
        try:
            seconds = _burst_s(source, readers, slots, lambda: None, budget_s)
        finally:
            readers.close()
        found.append((float(depth), count * source.record_bytes / seconds))
    return found


def _burst_s(
    source: ExpertSource, readers: Readers, slots: list[Tensor], meanwhile: Meanwhile, budget_s: float
) -> float:
    chance = random.Random(len(slots))
    everything = len(source.layers) * source.experts
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < LEAST_BURSTS or time.perf_counter() - began < budget_s:
        numbers = chance.sample(range(everything), len(slots))
        wanted = [
            (source.layers[number // source.experts], number % source.experts, slot)
            for number, slot in zip(numbers, slots, strict=True)
        ]
        meanwhile()  # the kernels' threads are awake, as they are where a layer begins
        began_burst = time.perf_counter()
        _read_all(readers, wanted, meanwhile)
        times.append(time.perf_counter() - began_burst)
    return quarter(times)


def _read_all(readers: Readers, wanted: list[tuple[int, int, Tensor]], meanwhile: Meanwhile) -> None:
    left = readers.submit(wanted, urgent=True)
    meanwhile()
    while left:
        finished = set(map(id, readers.wait(left)))
        for read in left:
            if id(read) in finished and read.error is not None:
                raise read.error
        left = [read for read in left if id(read) not in finished]
