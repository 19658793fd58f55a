"""Safetensors shards in place: the tensors of one expert, read together and packed for the kernels.

An expert of an int4 or fp8 checkpoint is six tensors, of a bf16 one three. safetensors sorts a file by dtype, then by
name: codes lie side by side, scales too, so an expert is two reads (bf16: one). What lies apart by less than
`GAP_BYTES` is read with what is between. Packing costs the processor about as much as reading costs the disk; `k2 pack`
does it once and for all.
"""

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from karakoram.checkpoint import names
from karakoram.checkpoint.experts.direct import PAGE, DirectFile, Preadv, aligned_bytes, up
from karakoram.checkpoint.experts.source import Extent, WrongRecord, check_address
from karakoram.checkpoint.safetensors import DTYPES, TensorEntry
from karakoram.config import ModelConfig
from karakoram.errors import CheckpointError, FormatError
from karakoram.kernels import ops
from karakoram.kernels.packed import Kind, PackedExperts, record_bytes

GAP_BYTES = 64 << 10  # at 2 GB/s, 32 µs of reading: less than another read costs
_PARTS: dict[Kind, tuple[str, ...]] = {
    "int4": ("_packed", "_scale"), "fp8": ("", "_scale_inv"), "bf16": ("",)
}  # fmt: skip
_ROOMS_KEPT = 4  # of reads that ended, for those that begin next


class ShardRecords:
    """See `ExpertSource`. Raises CheckpointError where a layer mixes formats, or layers differ."""

    def __init__(
        self,
        tensors: Mapping[str, TensorEntry],
        config: ModelConfig,
        preadv: Preadv | None = None,
        direct: bool = True,
    ) -> None:
        self._tensors = tensors
        self.layers = tuple(range(config.first_k_dense_replace, config.num_hidden_layers))
        self.experts = config.n_routed_experts
        self.hidden, self.intermediate = config.hidden_size, config.moe_intermediate_size
        self.kind: Kind = self._one_kind()
        self.record_bytes = record_bytes(self.hidden, self.intermediate, self.kind)
        self.slot_bytes = up(self.record_bytes)
        self._check_groups()
        self._places = {(layer, e): self._stretches(layer, e) for layer in self.layers for e in range(self.experts)}
        self.room_bytes = max(
            sum(up(end - start // PAGE * PAGE) for _, start, end in stretches) for stretches in self._places.values()
        )
        self._files: dict[str, DirectFile] = {}
        try:
            for file in sorted({file for stretches in self._places.values() for file, _, _ in stretches}):
                self._files[file] = DirectFile(Path(file), preadv, direct)
            self._check_sizes()
        except CheckpointError:
            self.close()
            raise
        self._rooms: list[Tensor] = []
        self._lock = threading.Lock()

    def extents(self, layer: int, expert: int) -> Sequence[Extent]:
        """See `ExpertSource`."""
        check_address(self, layer, expert)
        found, at = [], 0
        for file, start, end in self._places[layer, expert]:
            first = start // PAGE * PAGE
            length = up(end - first)
            found.append(Extent(self._files[file], first, length, end - first, at))
            at += length
        return found

    def room(self, slot: Tensor) -> Tensor:
        """See `ExpertSource`."""
        with self._lock:
            if self._rooms:
                return self._rooms.pop()
        return aligned_bytes(self.room_bytes)

    def release(self, room: Tensor) -> None:
        """See `ExpertSource`."""
        with self._lock:
            if len(self._rooms) < _ROOMS_KEPT:
                self._rooms.append(room)

    def finish(self, layer: int, expert: int, room: Tensor, slot: Tensor) -> None:
        """See `ExpertSource`. The shards have no checksums: scales that are not finite tell of damage."""
        record = slot[: self.record_bytes].view(1, -1)
        places = self.extents(layer, expert)
        for projection, part in zip(
            names.PROJECTIONS, PackedExperts(record, self.hidden, self.intermediate, self.kind).parts(0), strict=True
        ):
            stored = [self._tensor(entry, places, room) for entry in self._parts(layer, expert, projection)]
            try:
                match self.kind:
                    case "int4":
                        ops.pack_int4(stored[0], stored[1].to(torch.bfloat16), part.data)
                    case "fp8":
                        ops.pack_fp8(stored[0], stored[1], part.data)
                    case _:
                        ops.pack_bf16(stored[0].to(torch.bfloat16), part.data)
            except FormatError as error:
                raise WrongRecord(f"{projection}: {error.what.rstrip('.')}") from error

    def check_unchanged(self) -> None:
        """See `ExpertSource`."""
        for file in self._files.values():
            file.check_unchanged()

    def close(self) -> None:
        """See `ExpertSource`."""
        for file in self._files.values():
            file.close()

    # ------------------------------------------------------------------------------------------ where tensors lie

    def _parts(self, layer: int, expert: int, projection: str) -> list[TensorEntry]:
        stem = names.expert_weight(layer, expert, projection)
        return [self._tensors[stem + suffix] for suffix in _PARTS[self.kind]]

    def _stretches(self, layer: int, expert: int) -> list[tuple[str, int, int]]:
        """(file, first byte, behind the last one) of what is read at once."""
        parts = [entry for projection in names.PROJECTIONS for entry in self._parts(layer, expert, projection)]
        found: list[tuple[str, int, int]] = []
        for entry in sorted(parts, key=lambda entry: (entry.file, entry.offset)):
            end = entry.offset + entry.nbytes
            if found and found[-1][0] == entry.file and entry.offset - found[-1][2] <= GAP_BYTES:
                found[-1] = entry.file, found[-1][1], end
            else:
                found.append((entry.file, entry.offset, end))
        return found

    @staticmethod
    def _tensor(entry: TensorEntry, places: Sequence[Extent], room: Tensor) -> Tensor:
        """One tensor as stored, a view of the room where its bytes lie aligned."""
        for place in places:
            begin = entry.offset - place.offset
            if str(place.file.path) == entry.file and begin >= 0 and begin + entry.nbytes <= place.needed:
                data = room[place.at + begin : place.at + begin + entry.nbytes]
                dtype = DTYPES[entry.dtype]
                return (data if data.data_ptr() % dtype.itemsize == 0 else data.clone()).view(dtype).view(entry.shape)
        raise AssertionError(f"{entry.stored_name} lies in no extent")

    # ------------------------------------------------------------------------------------------ checks on opening

    def _one_kind(self) -> Kind:
        kinds: set[Kind] = set()
        for layer in self.layers:
            for expert in range(self.experts):
                for projection in names.PROJECTIONS:
                    name = names.expert_weight(layer, expert, projection)
                    entry = self._tensors.get(name)
                    if f"{name}_packed" in self._tensors:
                        kinds.add("int4")
                    elif entry is None:
                        raise CheckpointError(f"{name} is missing.", "Download the shards again.")
                    else:
                        kinds.add("fp8" if entry.dtype == "F8_E4M3" else "bf16")
        if len(kinds) != 1:
            raise CheckpointError(
                f"The routed experts are stored in {' and '.join(sorted(kinds)) or 'no format'}.",
                "Experts of one format are read one by one: `k2 convert` writes them so.",
            )
        return kinds.pop()

    def _check_groups(self) -> None:
        if self.kind == "int4" and (self.hidden % 32 or self.intermediate % 32):
            raise CheckpointError(
                f"Experts of {self.hidden} by {self.intermediate} do not divide into groups of 32.",
                "The kernels do not run this model in int4.",
            )

    def _check_sizes(self) -> None:
        """Each tensor lies in its file: headers were checked when the checkpoint was opened, files may have changed."""
        for (layer, expert), stretches in self._places.items():
            for file, _, end in stretches:
                if end > self._files[file].bytes:
                    raise CheckpointError(f"{file} ends inside layer {layer}, expert {expert}.", "Copy the file again.")
