"""Positioned reads past the page cache.

O_DIRECT wants offset, length and memory in multiples of the device's block; 4096 serves every device. Where a file
system refuses it (some network and memory file systems; macOS has F_NOCACHE instead), plain reads serve, and what they
left in the page cache is given back: experts that are kept are kept in memory of our own, not twice.

A read that fails is tried once more; then the error names the file and the place. Who reads is replaceable (`Preadv`),
so that tests can let reads fail.
"""

import errno
import math
import mmap
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from karakoram.errors import CheckpointError

PAGE = 4096
LARGE_PAGE = 2 << 20
# (descriptor, memory in order, offset) -> bytes read, as os.preadv
Preadv = Callable[[int, Sequence[memoryview], int], int]

_INTERRUPTIONS = 100  # in a row; a signal a read is normal, more are not
_REFUSED = (errno.EINVAL, errno.EOPNOTSUPP)  # what O_DIRECT answers where it is not served
_F_NOCACHE = 48  # fcntl.h of macOS
_REPLACED = "Put the file back as it was, or start again with the one that is there."


def up(size: int) -> int:
    """Rounded up to a page."""
    return -(-size // PAGE) * PAGE


def aligned_bytes(*shape: int) -> Tensor:
    """Zeros, uint8, that begin at a multiple of 4096, as slots and scratch must; large ones on large pages.

    A disk's request has at most some hundred segments, and scattered pages of 4 KiB are one each: reading into large
    pages took 3,800 MB/s, into small ones 1,200 (docs/decisions/expert-reading.md). Private, because shared memory,
    which is what Python's `mmap` takes by itself, gets no large pages.
    """
    count = math.prod(shape)
    if count < LARGE_PAGE:
        room = torch.zeros(count + PAGE, dtype=torch.uint8)
        first = -room.data_ptr() % PAGE
    else:
        mapped = mmap.mmap(-1, count + LARGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with suppress(AttributeError, OSError):  # Linux alone; not everywhere allowed
            mapped.madvise(mmap.MADV_HUGEPAGE)
        room = torch.frombuffer(mapped, dtype=torch.uint8)  # keeps the mapping
        first = -room.data_ptr() % LARGE_PAGE
    return room[first : first + count].view(shape)


def view_of(memory: Tensor) -> memoryview:
    """The bytes of a contiguous uint8 tensor, to be written to."""
    return memory.numpy().data


class DirectFile:
    """A file of known size, read at positions from several threads."""

    def __init__(self, path: Path, preadv: Preadv | None = None, direct: bool = True) -> None:
        """`direct` False asks for plain reads. Raises CheckpointError for what cannot be opened."""
        self.path = path
        self._preadv: Preadv = preadv or os.preadv
        self._plain: int
        self._direct: int | None
        self._plain, self._direct = -1, None
        try:
            self._plain = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise CheckpointError(
                f"{path} cannot be read: {error.strerror}.", "Check the path and its permissions."
            ) from error
        if direct and hasattr(os, "O_DIRECT"):
            try:
                self._direct = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
            except OSError:  # a file system without it
                self._direct = None
        elif direct and sys.platform == "darwin":
            import fcntl

            fcntl.fcntl(self._plain, _F_NOCACHE, 1)
        self._identity = _identity(os.fstat(self._plain))
        self.bytes = os.fstat(self._plain).st_size

    @property
    def is_direct(self) -> bool:
        """Whether reads go past the page cache."""
        return self._direct is not None

    def check_unchanged(self) -> None:
        """Raises CheckpointError if the path no longer leads to the file that was opened, or that was written to."""
        try:
            same = _identity(os.stat(self.path)) == self._identity == _identity(os.fstat(self._plain))
        except OSError as error:
            raise CheckpointError(f"{self.path} is gone: {error.strerror}.", _REPLACED) from error
        if not same:
            raise CheckpointError(f"{self.path} was replaced or changed while it was in use.", _REPLACED)

    def read(self, views: Sequence[memoryview], offset: int, needed: int) -> None:
        """Fill `views` one after another from `offset`; the last bytes beyond `needed` need not be there.

        `offset` and all lengths are multiples of 4096. Raises CheckpointError, after a second attempt.
        """
        try:
            self._fill(views, offset, needed)
        except (OSError, CheckpointError):
            try:
                self._fill(views, offset, needed)
            except OSError as error:
                raise CheckpointError(
                    f"{self.path} cannot be read at byte {offset:,}: {error.strerror or error}.",
                    "Check the disk; a file that cannot be read anywhere must be copied or packed again.",
                ) from error

    def close(self) -> None:
        """Let go of the file; again does nothing."""
        descriptors, self._plain, self._direct = (self._plain, self._direct), -1, None
        for descriptor in descriptors:
            if descriptor is not None and descriptor >= 0:
                os.close(descriptor)

    def __del__(self) -> None:
        self.close()

    def _fill(self, views: Sequence[memoryview], offset: int, needed: int) -> None:
        done, direct = 0, self._direct
        while done < needed:
            rest = _after(views, done)
            descriptor = self._plain if direct is None else direct
            try:
                count = self._uninterrupted(descriptor, rest, offset + done)
            except OSError as error:
                if direct is None or error.errno not in _REFUSED:
                    raise
                direct = None  # this extent, this file system or this memory: not with O_DIRECT
                continue
            if count <= 0 or count > sum(map(len, rest)):
                raise CheckpointError(
                    f"{self.path} ends at byte {offset + done:,}, where a tensor or record goes on.", _REPLACED
                )
            if descriptor == self._plain and hasattr(os, "posix_fadvise"):
                os.posix_fadvise(descriptor, offset + done, count, os.POSIX_FADV_DONTNEED)
            done += count
            if done < needed and done % PAGE:
                direct = None  # a short read has left the grid
        if direct is None and self._direct is not None and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._plain, offset, needed, os.POSIX_FADV_DONTNEED)

    def _uninterrupted(self, descriptor: int, views: Sequence[memoryview], offset: int) -> int:
        for _ in range(_INTERRUPTIONS):
            try:
                return self._preadv(descriptor, views, offset)
            except InterruptedError:
                continue
        return self._preadv(descriptor, views, offset)


def _identity(status: os.stat_result) -> tuple[int, int, int, int]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _after(views: Sequence[memoryview], done: int) -> Sequence[memoryview]:
    """What is left of `views` after `done` bytes."""
    if not done:
        return views
    left = []
    for view in views:
        if done < len(view):
            left.append(view[done:])
        done = max(0, done - len(view))
    return left
