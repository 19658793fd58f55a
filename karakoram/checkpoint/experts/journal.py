"""Which records of a file in the making are there: one line of 16 bytes each, appended after the record is written.

A line is (number, check, checksum of the record); the check covers the other two, so that a line cut short by a kill
ends the journal. Its head names what is being packed: the journal of another source, or of the same one before it was
changed, is not continued. What the journal says is a claim: whoever continues reads the records again.
"""

import os
import struct
from pathlib import Path

import xxhash

_LINE = struct.Struct("<IIQ")
_MAGIC = b"K2PACK01"


class Journal:
    """Opened for appending. `key`: 32 bytes that name what is packed, how."""

    def __init__(self, path: Path, key: bytes) -> None:
        """Continue the journal of this key, else begin an empty one: `checksums` has what was written before."""
        head = _MAGIC + key
        content = path.read_bytes() if path.is_file() else b""
        self.continued = content.startswith(head)
        self.checksums = _lines(content[len(head) :]) if self.continued else {}
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, head, 0)
        self._end = len(head)
        for number, found in self.checksums.items():
            self._append(number, found)

    def add(self, number: int, checksum: int) -> None:
        """A record is written. One thread at a time."""
        self._append(number, checksum)
        self.checksums[number] = checksum

    def close(self) -> None:
        """Let go of the file."""
        os.close(self._file)

    def _append(self, number: int, checksum: int) -> None:
        self._end += os.pwrite(self._file, _LINE.pack(number, _check(number, checksum), checksum), self._end)


def _check(number: int, checksum: int) -> int:
    return xxhash.xxh32_intdigest(struct.pack("<IQ", number, checksum))


def _lines(content: bytes) -> dict[int, int]:
    found = {}
    for number, check, checksum in _LINE.iter_unpack(content[: len(content) // _LINE.size * _LINE.size]):
        if check != _check(number, checksum):
            break
        found[number] = checksum
    return found
