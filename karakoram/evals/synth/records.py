"""Experts by chance straight into a file of records (`k2 synth --packed`): what `k2 pack` would make of the checkpoint,
without a second copy on the disk.

Everything is made in a hidden directory beside the target, `.NAME.synth`, and renamed into place; what a killed run
left there, the next one to the same target overwrites.
"""

import hashlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from karakoram.checkpoint import names, write_checkpoint
from karakoram.checkpoint.experts.journal import Journal
from karakoram.checkpoint.experts.layout import FILE_NAME, Layout
from karakoram.checkpoint.experts.source import Extent
from karakoram.checkpoint.experts.writing import RecordFile, write_records
from karakoram.checkpoint.names import PROJECTIONS
from karakoram.checkpoint.save import SPARE_BYTES, check_target, flush_directory
from karakoram.errors import CheckpointError
from karakoram.evals.synth.shape import Shape, Stored
from karakoram.evals.synth.weights import Weights
from karakoram.kernels import ops
from karakoram.kernels.packed import Kind, PackedExperts

Progress = Callable[[int, int], None]
_JOURNAL = "journal"


def write_packed(
    out: Path, shape: Shape, weights: Weights, files: Mapping[str, bytes], progress: Progress
) -> tuple[Path, int]:
    """Write the checkpoint with packed experts to the new directory `out`; returns it and its bytes.

    CheckpointError: `out` exists, or the disk has not enough room.
    """
    out = out.expanduser().resolve()
    check_target(out, overwrite=False)
    rest = [weight for weight in shape.weights() if not names.is_routed_expert(weight.name)]
    rest_bytes = sum(weight.nbytes for weight in rest)
    source = ChanceExperts(shape, weights)
    key = hashlib.sha256(repr((shape.raw, shape.format, weights.chance.seed)).encode()).digest()
    layout = Layout(source.kind, source.layers, source.experts, source.hidden, source.intermediate, key)
    total = rest_bytes + layout.file_bytes
    made = out.with_name(f".{out.name}.synth")
    shutil.rmtree(made, ignore_errors=True)
    _check_free_space(out, total)
    tensors = (tensor for weight in rest for tensor in weights.tensors(weight))
    write_checkpoint(made, shape.raw, tensors, extra_files=files, total_bytes=rest_bytes)
    try:
        _write_records(made, layout, source, key, lambda done: progress(rest_bytes + done * layout.slot_bytes, total))
        made.rename(out)
    finally:
        shutil.rmtree(made, ignore_errors=True)
    flush_directory(out.parent)
    return out, total


def _write_records(
    made: Path, layout: Layout, source: "ChanceExperts", key: bytes, report: Callable[[int], None]
) -> None:
    journal, file = Journal(made / _JOURNAL, key), RecordFile(made / FILE_NAME, layout)
    try:
        write_records(source, file, journal, report)
        file.finish(journal.checksums)
    finally:
        journal.close()
        file.close()
    (made / _JOURNAL).unlink()
    flush_directory(made)


class ChanceExperts:
    """`ExpertSource` of experts that are in no file: a record is drawn and packed when it is asked for."""

    kind: Kind = "int4"
    room_bytes = 0

    def __init__(self, shape: Shape, weights: Weights) -> None:
        c = shape.config
        self.weights = weights
        self.layers = tuple(range(c.first_k_dense_replace, c.num_hidden_layers))
        self.experts, self.hidden, self.intermediate = c.n_routed_experts, c.hidden_size, c.moe_intermediate_size
        layout = Layout(self.kind, self.layers, self.experts, self.hidden, self.intermediate, bytes(32))
        self.record_bytes, self.slot_bytes = layout.record_bytes, layout.slot_bytes

    def extents(self, layer: int, expert: int) -> Sequence[Extent]:
        """None: nothing is read."""
        return ()

    def room(self, slot: Tensor) -> Tensor:
        """See `ExpertSource`."""
        return slot

    def finish(self, layer: int, expert: int, room: Tensor, slot: Tensor) -> None:
        """Draw the expert into the slot."""
        record = slot[: self.record_bytes].view(torch.uint8)[None]
        parts = PackedExperts(record, self.hidden, self.intermediate, self.kind).parts(0)
        for projection, part in zip(PROJECTIONS, parts, strict=True):
            name = names.expert_weight(layer, expert, projection)
            weight = Stored(name, name, (part.outputs, part.inputs), True)
            packed, scale, _ = (tensor for _, tensor in self.weights.tensors(weight))
            ops.pack_int4(packed, scale, part.data)

    def release(self, room: Tensor) -> None:
        """See `ExpertSource`."""

    def check_unchanged(self) -> None:
        """See `ExpertSource`."""

    def close(self) -> None:
        """See `ExpertSource`."""


def _check_free_space(out: Path, total: int) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(out.parent).free
    if total + SPARE_BYTES > free:
        raise CheckpointError(
            f"the disk of {out.parent} is full: {total + SPARE_BYTES:,} bytes needed, {free:,} bytes free.",
            "Free some space or write to another disk; nothing was left behind.",
        )
