"""Tensors of a run to and from `model/`, by torch.distributed.checkpoint over its safetensors storage.

Each rank writes the pieces that it holds; who loads says by its own tensors which pieces it wants, so that what 4 ranks
saved goes on on 2 or on 1. No pickle is written or read: of torch's storage only HuggingFaceStorageWriter and -Reader
are used (by `storage.py`), which keep tensors in safetensors and a piece's place in the header's `DCP_SHARDING_INFO`.
(Between ranks plans travel pickled, as everything that torch.distributed gathers; no file does.)

What those two do not do in torch 2.13 is done here:
- a reader copies into whatever dtype it is given, ignores names that nobody asked for, and leaves as it was what no
  piece covers: so dtypes, shapes, names and coverage are checked against `state.json` before a number is read;
- it believes every offset in the header: so headers are parsed and checked by `karakoram.checkpoint.safetensors`;
- pieces without elements (uneven shards) would all claim the same place: they are not written.
"""

import json
import math
import struct
import warnings
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint._hf_utils import CUSTOM_METADATA_KEY, SAVED_OFFSETS_KEY, _HFStorageInfo
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.distributed.tensor import DTensor

from karakoram.checkpoint.safetensors import DTYPE_NAMES, DTYPES, read_header
from karakoram.errors import CheckpointError, TrainingError
from karakoram.train.checkpoints.find import TENSORS_DIR
from karakoram.train.checkpoints.ranks import Ranks, reason_of
from karakoram.train.checkpoints.state import Manifest, Spec, damaged, read_state
from karakoram.train.checkpoints.storage import PieceReader, PieceWriter

FILE_BYTES = 4 << 30  # of whole tensors in a rank's file: a file of a size that disks and copies bear
_READ_BYTES = 16 << 20

# one process is a way to train, not an oversight
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


@dataclass(frozen=True)
class Piece:
    """A rank's part of a tensor: `local` begins at `offsets` in the whole, which has `shape`.

    A whole tensor is one piece at the origin; the same piece on many ranks is written by one of them. What is spread
    without DTensor (an expert bank that holds rows of a stack) is saved and loaded as a Piece.
    """

    local: Tensor
    offsets: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def spec(self) -> Spec:
        """Of the whole tensor."""
        return DTYPE_NAMES[self.local.dtype], self.shape

    def size(self) -> torch.Size:
        """Of the whole tensor; torch's planner compares it."""
        return torch.Size(self.shape)

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        """Torch's protocol: which parts of the whole lie here."""
        chunk = ChunkStorageMetadata(offsets=torch.Size(self.offsets), sizes=self.local.shape)
        return [chunk] if self.local.numel() else []

    def __create_write_items__(self, name: str, _: Any) -> list[WriteItem]:
        """Torch's protocol: what is to be written of it."""
        properties = TensorProperties(dtype=self.local.dtype)
        return [
            WriteItem(
                index=MetadataIndex(name, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk=chunk, properties=properties, size=self.size()),
            )
            for chunk in self.__create_chunk_list__()
        ]


def pieces_of(tensors: Mapping[str, "Tensor | Piece"]) -> dict[str, Piece]:
    """This rank's pieces; they share their memory with `tensors` (DTensors included)."""
    return {name: _piece(name, tensor) for name, tensor in tensors.items()}


def staged(tensors: Mapping[str, "Tensor | Piece"]) -> dict[str, Piece]:
    """This rank's pieces copied to memory of their own on the CPU: what is written is this very moment."""
    copies: dict[str, Piece] = {}
    for name, piece in pieces_of(tensors).items():
        local = torch.empty(piece.local.shape, dtype=piece.local.dtype).copy_(piece.local.detach())
        copies[name] = Piece(local, piece.offsets, piece.shape)
    return copies


def write_tensors(path: Path, pieces: Mapping[str, Piece], ranks: Ranks) -> Manifest:
    """Write `pieces` (contiguous, on the CPU) to PATH/model and flush them; all ranks call it, each with its own.

    Raises OSError, SafetensorError or TrainingError; what was written by then stays, the caller removes it.
    """
    specs: dict[str, Spec] = {}
    for of_rank in ranks.each(lambda: {name: piece.spec for name, piece in pieces.items()}):
        if differing := [name for name in of_rank.keys() & specs.keys() if of_rank[name] != specs[name]]:
            raise TrainingError(f"Ranks disagree about dtype or shape of {min(differing)}.")
        specs |= of_rank
    directory = path / TENSORS_DIR
    ranks.first(lambda: directory.mkdir(exist_ok=True))
    writer = PieceWriter(directory, _file_numbers(specs))
    planner, alone = _SavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False), ranks.group is None
    try:
        with ranks.talking():
            dcp_save(dict(pieces), storage_writer=writer, planner=planner, process_group=ranks.group, no_dist=alone)
    except CheckpointException as error:
        raise _first_failure(error) from error
    files: dict[str, tuple[int, int]] = {}
    for of_rank in ranks.each(lambda: writer.files):
        files |= of_rank
    return Manifest(dict(sorted(specs.items())), files)


def read_tensors(path: Path, tensors: Mapping[str, "Tensor | Piece"], ranks: Ranks | None = None) -> None:
    """Fill `tensors` from PATH/model in place; all ranks call it, each with what it wants to have.

    `ranks` None: this process alone, whatever others do. All names of the checkpoint must be wanted by some rank, with
    their dtype and shape. Raises TrainingError where they are not, or where the checkpoint is damaged; every file is
    read and its CRC compared before the first tensor changes.
    """
    ranks = ranks or Ranks(alone=True)
    manifest = ranks.first(lambda: read_state(path)[1])
    pieces: dict[str, Piece] = {}

    def wanted_here() -> dict[str, Spec]:
        pieces.update(pieces_of(tensors))
        return {name: piece.spec for name, piece in pieces.items()}

    _compare(path, manifest, ranks.each(wanted_here))
    metadata = ranks.first(lambda: _metadata(path, manifest))
    ranks.each(lambda: _verify(path, manifest, sorted(manifest.files)[ranks.rank :: ranks.world]))
    reader = PieceReader(path / TENSORS_DIR, metadata)
    planner, alone = _LoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False), ranks.group is None
    wanted = {name: piece for name, piece in pieces.items() if piece.local.numel()}
    try:
        with ranks.talking():
            dcp_load(dict(wanted), storage_reader=reader, planner=planner, process_group=ranks.group, no_dist=alone)
    except CheckpointException as error:
        raise damaged(path, reason_of(_first_failure(error))) from error


class _SavePlanner(DefaultSavePlanner):
    def lookup_object(self, index: MetadataIndex) -> Any:
        return self.state_dict[index.fqn].local


class _LoadPlanner(DefaultLoadPlanner):
    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        self.state_dict, self.metadata, self.is_coordinator = state_dict, metadata, is_coordinator

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self.state_dict[index.fqn].local.detach()


def _piece(name: str, tensor: "Tensor | Piece") -> Piece:
    if isinstance(tensor, Piece):
        piece = tensor
    elif isinstance(tensor, DTensor):
        if any(placement.is_partial() for placement in tensor.placements):
            raise TrainingError(f"{name} is a sum over ranks that was not taken yet.", "Reduce it before it is saved.")
        local = tensor.to_local()
        if tensor.device_mesh.get_coordinate() is None:  # this rank is not in its mesh
            return Piece(local.new_empty(0), (0,) * tensor.dim(), tuple(tensor.shape))
        (chunk,) = tensor.__create_chunk_list__()
        if tuple(chunk.sizes) != tuple(local.shape):
            raise TrainingError(f"{name} is no single piece here.", "Shard it without strides, or give it as a Piece.")
        piece = Piece(local, tuple(chunk.offsets), tuple(tensor.shape))
    else:
        piece = Piece(tensor, (0,) * tensor.dim(), tuple(tensor.shape))
    if piece.local.dtype not in DTYPE_NAMES:
        raise TrainingError(f"{name} has dtype {piece.local.dtype}.", f"Known are {', '.join(DTYPES)}.")
    return piece


def _file_numbers(specs: Mapping[str, Spec]) -> dict[str, int]:
    """By tensor the number of its file, from 1: the same on all ranks."""
    numbers: dict[str, int] = {}
    number, filled_bytes = 1, 0
    for name, (dtype, shape) in sorted(specs.items()):
        tensor_bytes = math.prod(shape) * DTYPES[dtype].itemsize
        if filled_bytes and filled_bytes + tensor_bytes > FILE_BYTES:
            number, filled_bytes = number + 1, 0
        numbers[name] = number
        filled_bytes += tensor_bytes
    return numbers or {"": 1}  # torch asks for the highest of them


def _bytes_and_crc(file: Path) -> tuple[int, int]:
    """Bytes and CRC-32 of a file, read back."""
    crc, size = 0, 0
    with open(file, "rb", buffering=0) as opened:
        while block := opened.read(_READ_BYTES):
            crc, size = zlib.crc32(block, crc), size + len(block)
    return size, crc


def _verify(path: Path, manifest: Manifest, files: list[str]) -> None:
    for name in files:
        file = path / TENSORS_DIR / name
        try:
            found = _bytes_and_crc(file)
        except OSError as error:
            raise damaged(path, f"{TENSORS_DIR}/{name} cannot be read: {error.strerror}") from error
        if found != manifest.files[name]:
            raise damaged(path, f"{TENSORS_DIR}/{name} is not what was written (its CRC differs)")


def _compare(path: Path, manifest: Manifest, of_ranks: list[dict[str, Spec]]) -> None:
    """Raises TrainingError unless the ranks together want just the tensors that are there."""
    wanted: dict[str, Spec] = {}
    differing: set[str] = set()
    for specs in of_ranks:
        differing |= {name for name in specs.keys() & wanted.keys() if specs[name] != wanted[name]}
        wanted |= specs
    stored = manifest.tensors
    differing |= {name for name in stored.keys() | wanted.keys() if stored.get(name) != wanted.get(name)}
    if differing:
        first = min(differing)
        raise TrainingError(
            f"{path} is of another model: {len(differing)} tensors differ, the first is {first}: "
            f"{_told(stored.get(first))} there, {_told(wanted.get(first))} here.",
            "Resume with the configuration that it was trained with, or train in another directory (--out DIR).",
        )


def _told(spec: Spec | None) -> str:
    return "absent" if spec is None else f"{spec[0]} {list(spec[1])}"


def _metadata(path: Path, manifest: Manifest) -> Metadata:
    """Where each piece of each tensor lies, out of the files' headers. Raises TrainingError unless they hold it all."""
    tensors: dict[str, Any] = {
        name: TensorStorageMetadata(TensorProperties(dtype=DTYPES[dtype]), torch.Size(shape), [])
        for name, (dtype, shape) in manifest.tensors.items()
    }
    places: dict[MetadataIndex, _HFStorageInfo] = {}
    for file_name, (file_bytes, _) in manifest.files.items():
        file = path / TENSORS_DIR / file_name
        try:
            if file.stat().st_size != file_bytes:
                raise ValueError(f"it has {file.stat().st_size} bytes, written were {file_bytes}")
            for name, dtype, offsets, shape in _pieces_in(file):
                spec = manifest.tensors.get(name)
                if spec is None or spec[0] != dtype or not _inside(offsets, shape, spec[1]):
                    raise ValueError(f"{name}, {dtype} {list(shape)} at {list(offsets)}, is not in {_told(spec)}")
                chunk = ChunkStorageMetadata(torch.Size(offsets), torch.Size(shape))
                tensors[name].chunks.append(chunk)
                places[MetadataIndex(name, chunk.offsets)] = _HFStorageInfo(str(file), chunk.sizes, DTYPES[dtype])
        except (OSError, ValueError, CheckpointError) as error:
            raise damaged(path, f"{TENSORS_DIR}/{file_name} cannot be used: {reason_of(error)}") from error
    for name, tensor in tensors.items():
        if not _covered(tensor):
            raise damaged(path, f"the pieces of {name} do not make up its {_told(manifest.tensors[name])}")
    return Metadata(state_dict_metadata=tensors, storage_data=places)


def _pieces_in(file: Path) -> list[tuple[str, str, tuple[int, ...], tuple[int, ...]]]:
    """(name, dtype, offsets, shape) of each piece in a file. Raises CheckpointError, OSError or ValueError."""
    entries = read_header(file)  # lengths, shapes and byte ranges are sound after this
    with open(file, "rb", buffering=0) as opened:
        (header_bytes,) = struct.unpack("<Q", opened.read(8))
        notes = json.loads(opened.read(header_bytes)).get("__metadata__")
    try:
        info = json.loads(notes[CUSTOM_METADATA_KEY])
        offsets = {entry.stored_name: info[entry.stored_name][SAVED_OFFSETS_KEY] for entry in entries}
    except (TypeError, KeyError, ValueError, RecursionError) as error:
        raise ValueError(f"its header does not say where its pieces belong ({type(error).__name__})") from error
    for name, places in offsets.items():
        if not isinstance(places, list) or not all(type(place) is int and 0 <= place < 2**63 for place in places):
            raise ValueError(f"{name} begins at {places!r}")
    return [(e.stored_name, e.dtype, tuple(offsets[e.stored_name]), e.shape) for e in entries]


def _inside(offsets: tuple[int, ...], shape: tuple[int, ...], whole: tuple[int, ...]) -> bool:
    fits = len(offsets) == len(shape) == len(whole)
    return fits and all(start + length <= size for start, length, size in zip(offsets, shape, whole, strict=True))


def _covered(tensor: TensorStorageMetadata) -> bool:
    """Whether the pieces fill the whole and do not overlap: their volumes add up, and no two meet."""
    if sum(math.prod(chunk.sizes) for chunk in tensor.chunks) != math.prod(tensor.size):
        return False
    boxes = sorted((tuple(c.offsets), tuple(c.sizes)) for c in tensor.chunks)
    split = [d for d in range(len(tensor.size)) if len({(o[d], s[d]) for o, s in boxes}) > 1]
    if len(boxes) > 1 and len(split) == 1:  # cut along one dimension, as most are: neighbours suffice
        return all(a[0][split[0]] + a[1][split[0]] <= b[0][split[0]] for a, b in pairwise(boxes))
    return not any(_meet(a, b) for a, b in combinations(boxes, 2))


def _meet(a: tuple[tuple[int, ...], tuple[int, ...]], b: tuple[tuple[int, ...], tuple[int, ...]]) -> bool:
    return all(max(o, p) < min(o + s, p + t) for o, s, p, t in zip(*a, *b, strict=True))


def _first_failure(error: CheckpointException) -> Exception:
    """What went wrong on the first rank where something did."""
    rank, (first, _) = min(error.failures.items(), key=lambda failure: failure[0])
    if isinstance(first, OSError | SafetensorError | TrainingError):
        return first
    return TrainingError(f"Rank {rank} failed: {reason_of(first)}.")
