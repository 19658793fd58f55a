"""One shard: the tokens and weights of many samples in one file, mapped into memory.

    64 bytes   magic, version, bytes per id (2 or 4), samples S, tokens N; little-endian like all that follows
    8 (S + 1)  offsets, int64: sample s is ids[offsets[s] : offsets[s + 1]]
    2 N or 4 N ids
    N          weights, hundredths

The size of a shard follows from its header, so a file that was cut off is known before anything of it is used.
"""

import mmap
import os
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import xxhash

from karakoram.errors import TrainingError

MAGIC = b"K2TOKENS"
VERSION = 1
HEADER = struct.Struct("<8sIIQQ32x")
HASH_CHUNK_BYTES = 16 << 20
REBUILD = "Remove its folder; the next run builds it again."


def id_bytes(vocab_size: int) -> int:
    """Bytes per token id."""
    return 2 if vocab_size <= 1 << 16 else 4


def write_shard(
    path: Path, id_width: int, ids: Sequence[np.ndarray], weights: Sequence[np.ndarray], lengths: np.ndarray
) -> str:
    """Writes a shard under another name, brings it to the disk and then renames it; returns its xxh3-64 checksum."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype("<i8")
    hasher = xxhash.xxh3_64()
    part = path.with_suffix(".part")
    with open(part, "wb") as file:
        header = HEADER.pack(MAGIC, VERSION, id_width, len(lengths), int(offsets[-1]))
        pieces = [np.frombuffer(header, np.uint8), offsets]
        pieces += [np.ascontiguousarray(piece, f"<u{id_width}") for piece in ids]
        pieces += [np.ascontiguousarray(piece, np.uint8) for piece in weights]
        for piece in pieces:
            hasher.update(piece.data)
            file.write(piece.data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
    return hasher.hexdigest()


class Shard:
    """A shard opened and checked: header, size, offsets. `ids`, `weights` and `offsets` are views of the file.

    Raises TrainingError where the file is missing, cut off, or no shard.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with open(path, "rb") as file:
                self.size_bytes = os.fstat(file.fileno()).st_size
                head = file.read(HEADER.size)
                if len(head) < HEADER.size:
                    raise self._damaged(f"has only {self.size_bytes:,} bytes")
                magic, version, width, self.samples, self.tokens = HEADER.unpack(head)
                if magic != MAGIC or version != VERSION or width not in (2, 4):
                    raise self._damaged("does not begin as a shard of this version does")
                wanted = HEADER.size + 8 * (self.samples + 1) + (width + 1) * self.tokens
                if self.size_bytes != wanted:
                    raise self._damaged(f"has {self.size_bytes:,} bytes where its header promises {wanted:,}")
                view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise TrainingError(f"The shard {path} cannot be opened ({error.strerror}).", REBUILD) from error
        self.offsets = np.frombuffer(view, "<i8", self.samples + 1, HEADER.size)
        ids_at = HEADER.size + self.offsets.nbytes
        self.ids = np.frombuffer(view, f"<u{width}", self.tokens, ids_at)
        self.weights = np.frombuffer(view, np.uint8, self.tokens, ids_at + self.ids.nbytes)
        self._check_offsets()

    def _check_offsets(self) -> None:
        offsets = self.offsets
        if offsets[0] != 0 or offsets[-1] != self.tokens or (self.samples and np.diff(offsets).min() < 1):
            raise self._damaged("has offsets that do not rise from 0 to its number of tokens")

    def check_unchanged(self) -> None:
        """Raises TrainingError where the file is gone or has another size: reading past its end would kill the process.

        A few microseconds; a file that shrinks between this and the read is not noticed.
        """
        try:
            size = os.stat(self.path).st_size
        except OSError as error:
            raise TrainingError(f"The shard {self.path} vanished ({error.strerror}).", REBUILD) from error
        if size != self.size_bytes:
            raise self._damaged(f"went from {self.size_bytes:,} to {size:,} bytes")

    def verify(self, checksum: str) -> None:
        """Reads all of it; raises TrainingError where a bit is not as it was written."""
        self.check_unchanged()
        hasher = xxhash.xxh3_64()
        with open(self.path, "rb") as file:
            while chunk := file.read(HASH_CHUNK_BYTES):
                hasher.update(chunk)
        if hasher.hexdigest() != checksum:
            raise self._damaged(f"has the checksum {hasher.hexdigest()} instead of {checksum}")

    def _damaged(self, what: str) -> TrainingError:
        return TrainingError(f"The shard {self.path} {what}.", REBUILD)
