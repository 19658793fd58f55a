"""The file of packed experts: a page of header, an index, and a record per expert. `docs/expert-file.md` has the bytes.

A record is what the kernels read (`kernels/packed.py`: gate, up, down as panels), padded to 4096 bytes, layers in
ascending order and experts within them. The index holds a checksum per record (xxh3_64, its seed the record's number,
so that a record in another's place is noticed), the header a checksum of the index and one of itself.

Nothing in a file is believed: header and index are checked against their checksums and the size of the file before
anything is allocated by their numbers.
"""

import os
import struct
from dataclasses import dataclass
from functools import cached_property
from io import RawIOBase
from pathlib import Path

import numpy as np
import xxhash

from karakoram.checkpoint.experts.direct import PAGE, up
from karakoram.errors import CheckpointError
from karakoram.kernels.packed import LAYOUT_VERSION, Kind, record_bytes

FILE_NAME = "experts.k2experts"
VERSION = 1
MAGIC = b"K2EXPERT"
KINDS: tuple[Kind, ...] = ("int4", "bf16", "fp8")  # by number in the header

_HEADER = struct.Struct("<8s8I4Q32sQ")  # magic … checksum of the index; its own checksum follows
_MOST = 1 << 20  # layers, experts, sizes: K2 has 61, 384 and 7,168
_AGAIN = "Pack it again: k2 pack SRC DST."


@dataclass(frozen=True)
class Layout:
    """What a file holds, and where: everything else follows from these numbers."""

    kind: Kind
    layers: tuple[int, ...]
    experts: int
    hidden: int
    intermediate: int
    digest: bytes  # 32 bytes that name the source, see `pack.py`

    @cached_property
    def record_bytes(self) -> int:
        """Of one expert, as the kernels read it."""
        return record_bytes(self.hidden, self.intermediate, self.kind)

    @cached_property
    def slot_bytes(self) -> int:
        """From one record to the next."""
        return up(self.record_bytes)

    @property
    def records(self) -> int:
        """How many experts all layers have together."""
        return len(self.layers) * self.experts

    @property
    def checksums_at(self) -> int:
        """Where the checksums begin, after the header and the layers' numbers."""
        return PAGE + -(-4 * len(self.layers) // 8) * 8

    @property
    def first(self) -> int:
        """Where the first record begins."""
        return up(self.checksums_at + 8 * self.records)

    @property
    def file_bytes(self) -> int:
        """Size of the file."""
        return self.first + self.records * self.slot_bytes

    @cached_property
    def _place(self) -> dict[int, int]:
        return {layer: place for place, layer in enumerate(self.layers)}

    def number(self, layer: int, expert: int) -> int:
        """Of a record, counted from 0. KeyError for a layer without routed experts."""
        return self._place[layer] * self.experts + expert

    def address(self, number: int) -> tuple[int, int]:
        """(layer, expert) of a record."""
        place, expert = divmod(number, self.experts)
        return self.layers[place], expert

    def offset(self, number: int) -> int:
        """Where a record begins."""
        return self.first + number * self.slot_bytes


def checksum(number: int, record: memoryview) -> int:
    """Of a record without its padding."""
    return xxhash.xxh3_64_intdigest(record, seed=number)


def front(layout: Layout, checksums: np.ndarray) -> bytes:
    """Header and index of a file whose records have these checksums (uint64, in the records' order)."""
    index = np.array(layout.layers, dtype="<u4").tobytes().ljust(layout.checksums_at - PAGE, b"\0")
    index = (index + checksums.astype("<u8").tobytes()).ljust(layout.first - PAGE, b"\0")
    header = _HEADER.pack(
        MAGIC, VERSION, LAYOUT_VERSION, KINDS.index(layout.kind), len(layout.layers), layout.experts, layout.hidden,
        layout.intermediate, 0, layout.record_bytes, layout.slot_bytes, layout.first, layout.file_bytes, layout.digest,
        xxhash.xxh3_64_intdigest(index),
    )  # fmt: skip
    header += struct.pack("<Q", xxhash.xxh3_64_intdigest(header))
    return header.ljust(PAGE, b"\0") + index


def read_front(path: Path) -> tuple[Layout, np.ndarray]:
    """Layout and checksums of a file. Raises CheckpointError for a damaged one, or another version."""
    try:
        with open(path, "rb", buffering=0) as file:
            layout, index_sum = _layout(path, file.read(PAGE), os.fstat(file.fileno()).st_size)
            index = _read_all(file, layout.first - PAGE)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.", "Check the path and the disk.") from error
    if len(index) != layout.first - PAGE or xxhash.xxh3_64_intdigest(index) != index_sum:
        raise CheckpointError(f"The index of {path} is damaged.", _AGAIN)
    count = len(layout.layers)
    numbers = tuple(np.frombuffer(index, dtype="<u4", count=count).tolist())
    if list(numbers) != sorted(set(numbers)) or numbers[-1] > _MOST:
        raise CheckpointError(f"The index of {path} names layers {list(numbers)[:5]}.", _AGAIN)
    checksums = np.frombuffer(index, dtype="<u8", count=layout.records, offset=layout.checksums_at - PAGE)
    return Layout(layout.kind, numbers, layout.experts, layout.hidden, layout.intermediate, layout.digest), checksums


def _read_all(file: RawIOBase, count: int) -> bytes:
    parts = []
    while count and (part := file.read(count)):
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def _layout(path: Path, head: bytes, file_bytes: int) -> tuple[Layout, int]:
    """From the header, layers still unnumbered; and the checksum of the index."""
    if not head.startswith(MAGIC):
        raise CheckpointError(f"{path} holds no packed experts.", _AGAIN)
    if len(head) < PAGE:
        raise CheckpointError(f"{path} has {file_bytes:,} bytes: it was cut short.", _AGAIN)
    _, version, packing, kind, layers, experts, hidden, intermediate, spare, *places, digest, index_sum = (
        _HEADER.unpack_from(head)
    )
    if (version, packing) != (VERSION, LAYOUT_VERSION):
        raise CheckpointError(
            f"{path} has version {version} with layout {packing}; this program reads version {VERSION} with layout "
            f"{LAYOUT_VERSION}.",
            _AGAIN,
        )
    (own_sum,) = struct.unpack_from("<Q", head, _HEADER.size)
    if own_sum != xxhash.xxh3_64_intdigest(head[: _HEADER.size]) or any(head[_HEADER.size + 8 :]):
        raise CheckpointError(f"The header of {path} is damaged.", _AGAIN)
    sizes = (layers, experts, hidden, intermediate)
    if kind >= len(KINDS) or spare or not all(0 < size <= _MOST for size in sizes):
        raise CheckpointError(f"The header of {path} claims kind {kind} and sizes {sizes}.", _AGAIN)
    layout = Layout(KINDS[kind], tuple(range(layers)), experts, hidden, intermediate, digest)
    stated = (layout.record_bytes, layout.slot_bytes, layout.first, layout.file_bytes)
    if tuple(places) != stated:
        raise CheckpointError(f"The header of {path} claims sizes {tuple(places)}, but they are {stated}.", _AGAIN)
    if file_bytes != layout.file_bytes:
        raise CheckpointError(
            f"{path} has {file_bytes:,} bytes, not {layout.file_bytes:,}: it was cut short or added to.", _AGAIN
        )
    return layout, index_sum
