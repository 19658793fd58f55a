"""A file of packed experts: its records for the expert store, and its tensors under their stored names for the rest.

`PackedRecords` reads records into slots, each verified by its checksum. `PackedTensors` lets the same file stand for
the tensors that it was made from: every `weight_packed`, `weight_scale`, `weight` … of a routed expert has an entry
with its true shape and dtype, and reading one unpacks it, bit for bit. So whatever works on a checkpoint works on a
packed one.
"""

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from karakoram.checkpoint import names
from karakoram.checkpoint.experts.direct import DirectFile, Preadv, aligned_bytes, view_of
from karakoram.checkpoint.experts.layout import checksum, read_front
from karakoram.checkpoint.experts.source import Extent, WrongRecord, check_address, read_record
from karakoram.checkpoint.safetensors import DTYPE_NAMES, TensorEntry
from karakoram.errors import CheckpointError
from karakoram.formats import fp8_block, int4_group
from karakoram.kernels.packed import Kind, PackedExperts, PackedMatrix, unpack_fp8, unpack_int4


class PackedRecords:
    """See `ExpertSource`. Bytes go straight into the slot."""

    room_bytes = 0

    def __init__(self, path: Path, preadv: Preadv | None = None, direct: bool = True) -> None:
        """Raises CheckpointError for what is no such file, damaged, or of another version."""
        self.file = DirectFile(path, preadv, direct)
        try:
            self.layout, self._checksums = read_front(path)
            self.file.check_unchanged()
        except CheckpointError:
            self.file.close()
            raise
        self.kind: Kind = self.layout.kind
        self.layers, self.experts = self.layout.layers, self.layout.experts
        self.hidden, self.intermediate = self.layout.hidden, self.layout.intermediate
        self.record_bytes, self.slot_bytes = self.layout.record_bytes, self.layout.slot_bytes

    def extents(self, layer: int, expert: int) -> Sequence[Extent]:
        """See `ExpertSource`."""
        check_address(self, layer, expert)
        size = self.slot_bytes
        return (Extent(self.file, self.layout.offset(self.layout.number(layer, expert)), size, size, 0),)

    def room(self, slot: Tensor) -> Tensor:
        """See `ExpertSource`."""
        return slot

    def finish(self, layer: int, expert: int, room: Tensor, slot: Tensor) -> None:
        """See `ExpertSource`."""
        number = self.layout.number(layer, expert)
        if checksum(number, view_of(slot)[: self.record_bytes]) != int(self._checksums[number]):
            raise WrongRecord("its checksum is another")

    def release(self, room: Tensor) -> None:
        """See `ExpertSource`."""

    def check_unchanged(self) -> None:
        """See `ExpertSource`."""
        self.file.check_unchanged()

    def close(self) -> None:
        """See `ExpertSource`."""
        self.file.close()


class PackedTensors:
    """The tensors that a file was made from. Keeps the record read last: an expert's tensors are asked for in a row."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.layout, _ = read_front(path)
        self._lock = threading.Lock()
        self._records: PackedRecords | None = None
        self._last: tuple[int, int] | None = None
        self._slot = torch.empty(0, dtype=torch.uint8)

    def entries(self) -> Iterator[TensorEntry]:
        """One per stored tensor. Those of an expert have the place of its record."""
        layout = self.layout
        wide = _tensors(layout.kind, layout.intermediate, layout.hidden)
        narrow = _tensors(layout.kind, layout.hidden, layout.intermediate)
        file = str(self.path)
        for number in range(layout.records):
            layer, expert = layout.address(number)
            offset = layout.offset(number)
            for projection in names.PROJECTIONS:
                stem = names.expert_weight(layer, expert, projection)
                for suffix, dtype, shape, nbytes in narrow if projection == "down_proj" else wide:
                    yield TensorEntry(file, dtype, shape, offset, nbytes, stem + suffix, self)

    def read(self, entry: TensorEntry) -> Tensor:
        """The tensor of one of the entries, in memory of its own."""
        layer, expert, projection, suffix = names.parse_expert(entry.stored_name)
        with self._lock:
            matrix = self._matrix(layer, expert, projection)
            if matrix.kind == "bf16":
                return matrix.dense()
            if suffix == "_shape":
                return torch.tensor([matrix.outputs, matrix.inputs], dtype=torch.int32)
            weight, scale = unpack_int4(matrix) if matrix.kind == "int4" else unpack_fp8(matrix)
            return scale.clone() if suffix.startswith("_scale") else weight

    def matrix(self, name: str, out: Tensor | None = None) -> PackedMatrix:
        """One projection as panels, in the bytes `out` if given. `name` is that of its weight."""
        layer, expert, projection, _ = names.parse_expert(name)
        with self._lock:
            found = self._matrix(layer, expert, projection)
            room = torch.empty_like(found.data) if out is None else out
            matrix = PackedMatrix(room, found.kind, found.outputs, found.inputs)
            # NumPy's copy is one thread; torch's waits for another core: 9.9 s for 4.8 GB on a busy machine, this 2.5
            np.copyto(matrix.data.numpy(), found.data.numpy())
            return matrix

    def _matrix(self, layer: int, expert: int, projection: str) -> PackedMatrix:
        layout = self.layout
        if self._records is None:
            self._records = PackedRecords(self.path)
            if self._records.layout != layout:
                raise CheckpointError(f"{self.path} was replaced.", "Open the checkpoint again.")
            self._slot = aligned_bytes(layout.slot_bytes)
        if self._last != (layer, expert):
            self._last = None
            read_record(self._records, layer, expert, self._slot)
            self._last = layer, expert
        record = self._slot[: layout.record_bytes].view(1, -1)
        parts = PackedExperts(record, layout.hidden, layout.intermediate, layout.kind).parts(0)
        return parts[names.PROJECTIONS.index(projection)]


def _tensors(kind: Kind, outputs: int, inputs: int) -> list[tuple[str, str, tuple[int, ...], int]]:
    """(what follows the weight's name, dtype, shape, bytes) of the tensors that one projection is stored as."""
    shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]]
    if kind == "int4":
        words, groups = inputs // int4_group.CODES_PER_WORD, inputs // int4_group.GROUP
        shapes = {
            "_packed": (torch.int32, (outputs, words)),
            "_scale": (torch.bfloat16, (outputs, groups)),
            "_shape": (torch.int32, (2,)),
        }
    elif kind == "fp8":
        shapes = {
            "": (torch.float8_e4m3fn, (outputs, inputs)),
            "_scale_inv": (torch.float32, fp8_block.scale_shape(outputs, inputs)),
        }
    else:
        shapes = {"": (torch.bfloat16, (outputs, inputs))}
    return [
        (suffix, DTYPE_NAMES[dtype], shape, dtype.itemsize * torch.Size(shape).numel())
        for suffix, (dtype, shape) in shapes.items()
    ]
