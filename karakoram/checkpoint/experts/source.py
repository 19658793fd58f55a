"""What a source of experts is: which there are, where their bytes lie, and what makes them a record in a slot.

Reading is split so that a pool of readers (`engine/expert_store/readers.py`) can cut, join and order it: `extents` says
which bytes of which file go where in the room that `room` gives; when they are there, `finish` verifies them and leaves
the record in the slot. `read_record` is the plain twin: one expert, one thread.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

from karakoram.checkpoint.experts.direct import PAGE, DirectFile, view_of
from karakoram.errors import CheckpointError, InputError
from karakoram.kernels.packed import Kind


class Extent(NamedTuple):
    """Bytes of a file that belong together: `offset`, `length` and `at`, the place in the room, are multiples of 4096.

    The last bytes beyond `needed` lie behind the tensor, perhaps behind the end of the file.
    """

    file: DirectFile
    offset: int
    length: int
    needed: int
    at: int


class WrongRecord(Exception):
    """What was read is not what was written: `finish` says so, and the reader reads it once more."""


class ExpertSource(Protocol):
    """The routed experts of a checkpoint, each an address (layer, expert). Thread-safe."""

    @property
    def layers(self) -> tuple[int, ...]:
        """Numbers of the layers with routed experts, ascending."""
        ...

    @property
    def experts(self) -> int:
        """How many each of them has."""
        ...

    @property
    def hidden(self) -> int: ...

    @property
    def intermediate(self) -> int: ...

    @property
    def kind(self) -> Kind: ...

    @property
    def record_bytes(self) -> int:
        """Of one expert: `packed.record_bytes(hidden, intermediate, kind)`."""
        ...

    @property
    def slot_bytes(self) -> int:
        """Memory to give for one record: `record_bytes` rounded up to 4096. Slots begin at multiples of 4096."""
        ...

    @property
    def room_bytes(self) -> int:
        """Memory that a read takes beside its slot while it is under way; 0 where bytes go straight into the slot."""
        ...

    def extents(self, layer: int, expert: int) -> Sequence[Extent]:
        """Where the bytes lie, in order of file and offset. InputError for an expert that is not there."""
        ...

    def room(self, slot: Tensor) -> Tensor:
        """Memory for the extents: the slot, or `room_bytes` beside it."""
        ...

    def finish(self, layer: int, expert: int, room: Tensor, slot: Tensor) -> None:
        """Verify what was read into `room` and leave the record in `slot`. WrongRecord says what is wrong with it."""
        ...

    def release(self, room: Tensor) -> None:
        """The room is not needed any more."""
        ...

    def check_unchanged(self) -> None:
        """Raises CheckpointError when a file was replaced, cut short or written to since it was opened."""
        ...

    def close(self) -> None:
        """Let go of the files. No read may be under way."""
        ...


def check_slot(source: ExpertSource, slot: Tensor) -> None:
    """Raises InputError for memory that a record cannot be read into."""
    if slot.numel() != source.slot_bytes or slot.itemsize != 1 or not slot.is_contiguous() or slot.data_ptr() % PAGE:
        raise InputError(
            f"A slot of {slot.numel():,} bytes at {slot.data_ptr():#x} takes no record.",
            f"Give {source.slot_bytes:,} contiguous bytes at a multiple of {PAGE}, e.g. of `aligned_bytes`.",
        )


def read_record(source: ExpertSource, layer: int, expert: int, slot: Tensor) -> None:
    """One expert into `slot`, in this thread. Raises CheckpointError naming file, layer and expert."""
    check_slot(source, slot)
    room = source.room(slot)
    try:
        extents = source.extents(layer, expert)
        read_extents(extents, room, layer, expert)
        finish_or_reread(source, extents, layer, expert, room, slot)
    finally:
        source.release(room)


def read_extents(extents: Sequence[Extent], room: Tensor, layer: int, expert: int) -> None:
    """All of them, one after another."""
    memory = view_of(room)
    for extent in extents:
        try:
            extent.file.read([memory[extent.at : extent.at + extent.length]], extent.offset, extent.needed)
        except CheckpointError as error:
            raise of_expert(error, layer, expert) from error


def finish_or_reread(
    source: ExpertSource, extents: Sequence[Extent], layer: int, expert: int, room: Tensor, slot: Tensor
) -> bool:
    """`finish`; what is wrong is read once more, and what stays wrong is a CheckpointError. Whether it was reread."""
    try:
        source.finish(layer, expert, room, slot)
        return False
    except WrongRecord:
        read_extents(extents, room, layer, expert)
    try:
        source.finish(layer, expert, room, slot)
        return True
    except WrongRecord as error:
        files = ", ".join(dict.fromkeys(str(extent.file.path) for extent in extents))
        raise CheckpointError(
            f"Layer {layer}, expert {expert} in {files} is damaged: {error}. It was read twice.",
            "Copy the file again, or pack it again: k2 pack SRC DST.",
        ) from error


def of_expert(error: CheckpointError, layer: int, expert: int) -> CheckpointError:
    """The same error, saying whose bytes they were."""
    return CheckpointError(f"Layer {layer}, expert {expert}: {error.what}", error.fix)


def check_address(source: ExpertSource, layer: int, expert: int) -> None:
    """Raises InputError for an expert that is not there."""
    if layer not in source.layers or not 0 <= expert < source.experts:
        raise InputError(
            f"There is no expert {expert} in layer {layer}.",
            f"Layers {source.layers[0]} to {source.layers[-1]} have experts 0 to {source.experts - 1}.",
        )
