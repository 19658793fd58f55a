"""One safetensors file: 8 bytes header length (little-endian), a JSON header, then the tensors' bytes back to back.

The parser is our own because every number in a header is a claim by whoever wrote the file. Each is checked against the
size of the file before anything is allocated: length of the header, JSON, dtype and shape of every tensor against its
byte range, ranges that start at 0, follow one another without hole or overlap, and end with the file.
Reading is one `preadv` into fresh memory: no mapping that counts as resident, no copy besides the tensor itself.
Source: huggingface/safetensors README, section Format; its limit of 100 MB for a header is kept.
"""

import json
import math
import os
import struct
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from karakoram.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000
MAX_DIMENSIONS = 8
READ_BYTES = 1 << 30  # Linux transfers at most 2^31 - 4096 bytes per call

DTYPES: dict[str, torch.dtype] = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ITEM_BYTES = {name: dtype.itemsize for name, dtype in DTYPES.items()}

_DAMAGED = "The file is damaged or was not written by safetensors; copy or download it again."


class TensorEntry(NamedTuple):
    """Where one tensor lies: `offset` counts from the start of `file`, `dtype` is a key of `DTYPES`.

    `container` reads it where its bytes do not lie there as they are (packed experts).
    """

    file: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    stored_name: str
    container: "Container | None" = None


class Container(Protocol):
    """A file that holds tensors in another order of bytes."""

    def read(self, entry: TensorEntry) -> Tensor:
        """One of its tensors as it was stored."""
        ...


def read_header(path: Path) -> list[TensorEntry]:
    """All tensors of one file in the order of their bytes. CheckpointError names the file and what is wrong with it."""
    try:
        with open(path, "rb", buffering=0) as file:
            file_bytes = os.fstat(file.fileno()).st_size
            raw = file.read(8)
            if len(raw) < 8:
                raise CheckpointError(f"{path} has {file_bytes} bytes, too few for a safetensors file.", _DAMAGED)
            (header_bytes,) = struct.unpack("<Q", raw)
            if header_bytes > min(MAX_HEADER_BYTES, file_bytes - 8):
                raise CheckpointError(
                    f"{path} announces a header of {header_bytes} bytes, but the file has {file_bytes}"
                    f" (and {MAX_HEADER_BYTES} is the limit).",
                    _DAMAGED,
                )
            text = file.read(header_bytes)
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read: {error.strerror}.", "Check the path and its permissions."
        ) from error
    return _entries(path, _parse(path, text), data_start=8 + header_bytes, file_bytes=file_bytes)


def read_tensor(entry: TensorEntry) -> Tensor:
    """The tensor as stored, on the CPU, in memory of its own."""
    if entry.container is not None:
        return entry.container.read(entry)
    buffer = torch.empty(entry.nbytes, dtype=torch.uint8)
    view = buffer.numpy().data
    done = 0
    try:
        descriptor = os.open(entry.file, os.O_RDONLY)
        try:
            while done < entry.nbytes:
                count = os.preadv(descriptor, [view[done : done + READ_BYTES]], entry.offset + done)
                if count == 0:
                    raise CheckpointError(f"{entry.file} ends inside {entry.stored_name}.", _DAMAGED)
                done += count
        finally:
            os.close(descriptor)
    except OSError as error:
        raise CheckpointError(
            f"{entry.stored_name} cannot be read from {entry.file}: {error.strerror}.", "Check the file and the disk."
        ) from error
    return buffer.view(DTYPES[entry.dtype]).view(entry.shape)


def header_of(entries: list[tuple[str, str, tuple[int, ...]]], pad_to: int = 0) -> bytes:
    """Length and JSON header for (name, dtype, shape) in the order of their bytes, filled up to `pad_to`."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, dtype, shape in entries:
        start, end = end, end + math.prod(shape) * _ITEM_BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    length = max(-(-(8 + len(text)) // 8) * 8, pad_to)  # 8-byte aligned data, as safetensors itself writes
    return struct.pack("<Q", length - 8) + text.ljust(length - 8)


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    try:
        if not text.startswith(b"{"):
            raise ValueError("it does not start with '{'")
        header = json.loads(text, object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} has no valid safetensors header: {error}.", _DAMAGED) from error
    return header


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)!r} appears twice")
    return result


def _entries(path: Path, header: dict[str, Any], data_start: int, file_bytes: int) -> list[TensorEntry]:
    header.pop("__metadata__", None)
    file = str(path)
    shapes: dict[tuple[int, ...], tuple[int, ...]] = {}  # one tuple per distinct shape: K2.5 has 25 for 208,550 tensors
    entries = [_entry(file, name, claim, data_start, shapes) for name, claim in header.items()]
    entries.sort(key=_place)
    end = data_start
    for entry in entries:
        if entry.offset != end:
            kind = "overlaps the tensor before it" if entry.offset < end else "leaves a hole before it"
            raise CheckpointError(
                f"{path}: {entry.stored_name} {kind} (byte {entry.offset}, expected {end}).", _DAMAGED
            )
        end += entry.nbytes
    if end != file_bytes:
        raise CheckpointError(f"{path} has {file_bytes} bytes, but its tensors end at byte {end}.", _DAMAGED)
    return entries


def _place(entry: TensorEntry) -> tuple[int, int]:
    return entry.offset, entry.nbytes


def _entry(
    file: str, name: str, claim: Any, data_start: int, shapes: dict[tuple[int, ...], tuple[int, ...]]
) -> TensorEntry:
    try:
        dtype, shape, (start, end) = claim["dtype"], tuple(claim["shape"]), claim["data_offsets"]
    except (TypeError, KeyError, ValueError) as error:
        raise CheckpointError(f"{file}: {name} lacks dtype, shape or data_offsets.", _DAMAGED) from error
    known = shapes.get(shape) if isinstance(dtype, str) and _whole(*shape, start, end) else None
    if known is None:
        if not isinstance(dtype, str) or len(shape) > MAX_DIMENSIONS or not _whole(*shape, start, end):
            raise CheckpointError(
                f"{file}: {name} claims dtype {dtype!r}, shape {list(shape)!r}, bytes {start!r} to {end!r}.", _DAMAGED
            )
        known = shapes.setdefault(shape, shape)
    if dtype not in _ITEM_BYTES:
        raise CheckpointError(f"{file}: {name} has dtype {dtype!r}.", f"Known are {', '.join(_ITEM_BYTES)}.")
    if end - start != math.prod(known) * _ITEM_BYTES[dtype]:
        raise CheckpointError(
            f"{file}: {name}, {dtype} {list(known)}, takes {math.prod(known) * _ITEM_BYTES[dtype]} bytes,"
            f" but its offsets give {end - start}.",
            _DAMAGED,
        )
    return TensorEntry(file, dtype, known, data_start + start, end - start, name)


def _whole(*numbers: Any) -> bool:
    return all(type(number) is int and number >= 0 for number in numbers)
