"""Traces: which experts every token visited, in a file. The format, byte for byte, is in docs/expert-traces.md.

    header    magic, version, what is recorded, layers, experts, top_k, the layers' numbers, CRC-32
    block     sizes, CRC-32, then zlib of whole passes; as many as one likes
    pass      tokens, their sequences, ids of every layer, scores and guesses where those are recorded

A pass is written when its last layer has come, a block once a second or when it is large; so a run that is killed
leaves a readable file, short of its last second. Everything read is checked before anything is allocated for it.

Legend: L layers with experts, T tokens of a pass, K experts per token.
"""

import struct
import threading
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from karakoram.errors import FormatError, InputError

MAGIC = b"K2EXPERT"
VERSION = 1
SCORES, GUESSES = 1, 2  # bits of what is recorded

_HEADER = struct.Struct("<8sHHHHHH")  # magic, version, flags, layers, experts, top_k, reserved
_CRC = struct.Struct("<I")
_BLOCK = struct.Struct("<4sIII")  # mark, bytes unpacked, bytes packed, CRC-32 of the packed
_BLOCK_MARK = b"BLK1"
_PASS = struct.Struct("<I")  # tokens

UNKNOWN = -1  # sequence of a token whose writer did not say
MOST_LAYERS, MOST_EXPERTS, MOST_CHOSEN = 1024, 65535, 256
MOST_BLOCK_BYTES = 1 << 28  # a pass of 8,192 tokens over 60 layers of top-8 with scores has 16 MB
MOST_TRACE_BYTES = 1 << 31  # unpacked: two million tokens of that model
_FLUSH_BYTES, _FLUSH_S = 1 << 18, 1.0


@dataclass(frozen=True)
class Pass:
    """One forward pass.

    ids_LTK      uint16, distinct within a token
    sequences_T  int32, `UNKNOWN` where the writer did not say
    positions_T  int32: how many tokens of the same sequence this trace has before this one
    scores_LTK   float16, or None
    guesses      for each layer the experts that were guessed before it ran, uint16; or None
    """

    ids_LTK: np.ndarray
    sequences_T: np.ndarray
    positions_T: np.ndarray
    scores_LTK: np.ndarray | None = None
    guesses: tuple[np.ndarray, ...] | None = None


@dataclass(frozen=True)
class Trace:
    """What a file says. `layers`: the model's numbers of those with experts; `cut`: the file ends within a block."""

    layers: tuple[int, ...]
    experts: int
    top_k: int
    passes: tuple[Pass, ...]
    cut: bool = False

    @property
    def tokens(self) -> int:
        """Over all passes."""
        return sum(one.ids_LTK.shape[1] for one in self.passes)

    def ids_NLK(self) -> np.ndarray:
        """All tokens in order: uint16 [tokens, layers, top_k]."""
        if not self.passes:
            return np.zeros((0, len(self.layers), self.top_k), np.uint16)
        return np.concatenate([one.ids_LTK for one in self.passes], axis=1).transpose(1, 0, 2)


class TraceWriter:
    """Records passes as they run; a few µs a layer. One model's passes, one after another, from any thread."""

    def __init__(self, path: Path | str, layers: Sequence[int], experts: int, top_k: int, scores: bool = False) -> None:
        """Begins the file anew. Raises InputError for a model that the format cannot hold, OSError of the file."""
        if problem := _problem(tuple(layers), experts, top_k):
            raise InputError(f"A trace cannot be recorded: {problem}.", "Leave the trace out for this model.")
        self._index = {layer: index for index, layer in enumerate(layers)}
        self._experts, self._top_k, self._scores = experts, top_k, scores
        self._lock = threading.Lock()
        self._ids: list[np.ndarray] = []  # of the pass that runs, layer by layer
        self._scores_of: list[np.ndarray] = []
        self._guesses: dict[int, np.ndarray] = {}
        self._sequences = b""
        self._buffer = bytearray()
        self._flushed_s = time.monotonic()
        self._file: BinaryIO = open(path, "wb")  # noqa: SIM115
        self._file.write(_header(tuple(layers), experts, top_k, (SCORES if scores else 0) | GUESSES))
        self._file.flush()

    def __enter__(self) -> "TraceWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def record(
        self,
        layer: int,
        ids_TK: np.ndarray,
        scores_TK: np.ndarray | None = None,
        sequences_T: np.ndarray | None = None,
    ) -> None:
        """The experts of one layer (the model's number), once per layer and pass, layers in order.

        sequences_T is heard at the first layer. A pass that does not reach its last layer is forgotten.
        """
        index = self._index[layer]
        ids = np.ascontiguousarray(ids_TK, np.uint16)
        if ids.ndim != 2 or ids.shape[1] != self._top_k or not len(ids):
            raise ValueError(f"ids of shape {ids.shape} for a trace of {self._top_k} experts per token")
        if self._scores and (scores_TK is None or scores_TK.shape != ids.shape):
            raise ValueError("this trace has scores: give them for every layer, in the ids' shape")
        with self._lock:
            if index == 0:
                self._begin(len(ids), sequences_T)
            if index != len(self._ids) or len(ids) != len(self._ids[0] if self._ids else ids):
                self._forget()  # the beginning of this pass was lost, or it went on without some of its rows
                return
            self._ids.append(ids)
            if self._scores:
                self._scores_of.append(np.ascontiguousarray(scores_TK, np.float16))
            if len(self._ids) == len(self._index):
                self._end()

    def guess(self, layer: int, experts_G: np.ndarray) -> None:
        """Experts that were guessed for a layer (the model's number) which has not run yet in this pass."""
        with self._lock:
            self._guesses[self._index[layer]] = np.ascontiguousarray(experts_G[:MOST_EXPERTS], np.uint16)

    def close(self) -> None:
        """Write what is complete, and close the file."""
        with self._lock:
            if not self._file.closed:
                self._flush()
                self._file.close()

    def _begin(self, tokens: int, sequences_T: np.ndarray | None) -> None:
        self._forget()
        sequences = np.full(tokens, UNKNOWN, np.int32) if sequences_T is None else sequences_T
        self._sequences = np.ascontiguousarray(sequences, np.int32).tobytes()
        if len(self._sequences) != 4 * tokens:
            raise ValueError(f"{tokens} tokens have {len(self._sequences) // 4} sequences")

    def _forget(self) -> None:
        self._ids, self._scores_of, self._guesses = [], [], {}

    def _end(self) -> None:
        none = np.empty(0, np.uint16)
        guesses = [self._guesses.get(index, none) for index in range(len(self._index))]
        parts = [_PASS.pack(len(self._ids[0])), self._sequences]
        parts += [array.tobytes() for array in (*self._ids, *self._scores_of)]
        parts += [np.array([len(one) for one in guesses], np.uint16).tobytes(), *(one.tobytes() for one in guesses)]
        self._forget()
        size = sum(map(len, parts))
        if size > MOST_BLOCK_BYTES:
            return  # no pass of a real model; the format's readers would refuse it
        if len(self._buffer) + size > MOST_BLOCK_BYTES:
            self._flush()
        for part in parts:
            self._buffer += part
        if len(self._buffer) >= _FLUSH_BYTES or time.monotonic() - self._flushed_s >= _FLUSH_S:
            self._flush()

    def _flush(self) -> None:
        if self._buffer:
            packed = zlib.compress(self._buffer, 6)
            self._file.write(_BLOCK.pack(_BLOCK_MARK, len(self._buffer), len(packed), zlib.crc32(packed)) + packed)
            self._file.flush()
            self._buffer.clear()
        self._flushed_s = time.monotonic()


def read_trace(path: Path | str) -> Trace:
    """A trace from its file. Raises FormatError for what is no trace, damaged, or absurdly large; OSError of the file.

    A file that ends in the middle of a block is read up to there.
    """
    with open(path, "rb") as file:
        head = _Head.read(file, path)
        passes: list[Pass] = []
        seen: dict[int, int] = {}
        cut, total = False, 0
        while block := file.read(_BLOCK.size):
            raw = _read_block(file, block, path)
            if raw is None:
                cut = True
                break
            total += len(raw)
            if total > MOST_TRACE_BYTES:
                raise FormatError(f"{path} has more than {MOST_TRACE_BYTES >> 30} GiB.", "Record a shorter trace.")
            passes += _passes(raw, head, seen, path)
    return Trace(head.layers, head.experts, head.top_k, tuple(passes), cut)


# ---------------------------------------------------------------------------------------------------- the format


@dataclass(frozen=True)
class _Head:
    layers: tuple[int, ...]
    experts: int
    top_k: int
    flags: int

    @staticmethod
    def read(file: BinaryIO, path: Path | str) -> "_Head":
        fixed = file.read(_HEADER.size)
        if len(fixed) < _HEADER.size or fixed[: len(MAGIC)] != MAGIC:
            raise FormatError(f"{path} is no trace of experts.", "Record one with --trace FILE.")
        _, version, flags, count, experts, top_k, _ = _HEADER.unpack(fixed)
        if version != VERSION or flags & ~(SCORES | GUESSES):
            raise FormatError(
                f"{path} has version {version}, flags {flags:#x} of the format.", "Use a newer karakoram."
            )
        if not 0 < count <= MOST_LAYERS:
            raise FormatError(f"{path} is damaged: {count} layers.", "Record it again.")
        rest = file.read(2 * count + _CRC.size)
        if len(rest) < 2 * count + _CRC.size or _CRC.unpack(rest[-4:])[0] != zlib.crc32(fixed + rest[:-4]):
            raise FormatError(f"{path} is damaged: its header fails its checksum.", "Record it again.")
        layers = tuple(np.frombuffer(rest[:-4], "<u2").tolist())
        if problem := _problem(layers, experts, top_k):
            raise FormatError(f"{path} is damaged: {problem}.", "Record it again.")
        return _Head(layers, experts, top_k, flags)


def _header(layers: tuple[int, ...], experts: int, top_k: int, flags: int) -> bytes:
    head = _HEADER.pack(MAGIC, VERSION, flags, len(layers), experts, top_k, 0) + np.array(layers, "<u2").tobytes()
    return head + _CRC.pack(zlib.crc32(head))


def _problem(layers: tuple[int, ...], experts: int, top_k: int) -> str:
    """What the format cannot hold; "" if nothing."""
    if not 0 < len(layers) <= MOST_LAYERS or any(b <= a for a, b in zip(layers, layers[1:])):
        return f"{len(layers)} layers, or not in order"
    if not (layers[0] >= 0 and layers[-1] <= MOST_EXPERTS and 0 < experts <= MOST_EXPERTS):
        return f"{experts} experts in layers up to {layers[-1]}"
    if not 0 < top_k <= min(experts, MOST_CHOSEN):
        return f"{top_k} of {experts} experts per token"
    return ""


def _read_block(file: BinaryIO, fixed: bytes, path: Path | str) -> bytes | None:
    """The unpacked bytes of a block; None where the file ends before it does."""
    if len(fixed) < _BLOCK.size:
        return None
    mark, size, packed_size, crc = _BLOCK.unpack(fixed)
    if mark != _BLOCK_MARK or size > MOST_BLOCK_BYTES or packed_size > MOST_BLOCK_BYTES:
        raise _damaged(path, file.tell())
    packed = file.read(packed_size)
    if len(packed) < packed_size:
        return None
    if zlib.crc32(packed) != crc:
        raise _damaged(path, file.tell())
    unpacking = zlib.decompressobj()
    try:
        raw = unpacking.decompress(packed, size)  # never more than was announced, whatever the bytes say
    except zlib.error as error:
        raise _damaged(path, file.tell()) from error
    if len(raw) != size or unpacking.unconsumed_tail:
        raise _damaged(path, file.tell())
    return raw


def _passes(raw: bytes, head: _Head, seen: dict[int, int], path: Path | str) -> Iterator[Pass]:
    """The passes of a block; `seen` counts the tokens of each sequence so far."""
    layers, at = len(head.layers), 0

    def take(count: int, dtype: str) -> np.ndarray:
        nonlocal at
        begin, at = at, at + count * np.dtype(dtype).itemsize
        if at > len(raw):
            raise _damaged(path)
        return np.frombuffer(raw, dtype, count, begin)

    while at < len(raw):
        tokens = int(take(1, "<u4")[0])
        sequences_T = take(tokens, "<i4")
        ids_LTK = take(layers * tokens * head.top_k, "<u2").reshape(layers, tokens, head.top_k)
        scores_LTK = None
        if head.flags & SCORES:
            scores_LTK = take(ids_LTK.size, "<f2").reshape(ids_LTK.shape)
        guesses = None
        if head.flags & GUESSES:
            guesses = tuple(take(int(count), "<u2") for count in take(layers, "<u2"))
        _check_ids(ids_LTK, guesses, head.experts, path)
        yield Pass(ids_LTK, sequences_T, _positions(sequences_T, seen), scores_LTK, guesses)


def _check_ids(ids_LTK: np.ndarray, guesses: tuple[np.ndarray, ...] | None, experts: int, path: Path | str) -> None:
    ordered = np.sort(ids_LTK, axis=-1)
    if not ids_LTK.size or ordered[..., -1].max() >= experts or (ordered[..., 1:] == ordered[..., :-1]).any():
        raise _damaged(path)
    if any(len(one) and one.max() >= experts for one in guesses or ()):
        raise _damaged(path)


def _positions(sequences_T: np.ndarray, seen: dict[int, int]) -> np.ndarray:
    positions_T = np.empty(len(sequences_T), np.int32)
    for sequence in np.unique(sequences_T).tolist():
        of_this = np.flatnonzero(sequences_T == sequence)
        before = seen.get(sequence, 0)
        positions_T[of_this] = before + np.arange(len(of_this))
        seen[sequence] = before + len(of_this)
    return positions_T


def _damaged(path: Path | str, near: int | None = None) -> FormatError:
    where = "" if near is None else f" near byte {near:,}"
    return FormatError(f"{path} is damaged{where}.", "Record it again.")
