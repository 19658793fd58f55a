"""Documents from JSON lines and plain text, packed by gzip or not.

Files are taken in the order of their names, sizes and times are written down before the first byte is read, and a file
that is another by the time its turn comes, or while it is read, is an error: half a data set would train to the end
and nobody would know.
"""

import gzip
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, cast

from karakoram.errors import TrainingError
from karakoram.train.data.corpus.records import (
    BEGINNING,
    MAX_RECORD_BYTES,
    BadRecord,
    Fields,
    Position,
    Record,
    decode_json,
    decode_text,
)
from karakoram.train.data.documents import Document

Paths = str | Path | Sequence[str | Path]
_TOO_LONG = f"it is longer than {MAX_RECORD_BYTES:,} bytes"
_BROKEN_GZIP = (EOFError, zlib.error, gzip.BadGzipFile)


class SourceFile(NamedTuple):
    """A file as it was when the source was made; `name` is its path below the folder that was given."""

    path: Path
    name: str
    size_bytes: int
    changed_ns: int


def list_files(paths: Paths, suffixes: tuple[str, ...]) -> list[SourceFile]:
    """The files named, and all below the folders named whose names end so; TrainingError where there is none."""
    found: list[SourceFile] = []
    for path in [Path(paths)] if isinstance(paths, str | Path) else [Path(p) for p in paths]:
        if path.is_dir():
            inside = sorted(file for file in path.rglob("*") if file.name.endswith(suffixes) and file.is_file())
            if not inside:
                raise TrainingError(f"{path} holds no file ending in {', '.join(suffixes)}.", "Check the path.")
            found += [_stat(file, file.relative_to(path).as_posix()) for file in inside]
        else:
            found.append(_stat(path, path.name))
    if not found:
        raise TrainingError("No file with training data is named.", "Give at least one file or folder.")
    names = Counter(file.name for file in found)
    return [file if names[file.name] == 1 else file._replace(name=file.path.as_posix()) for file in found]


def _stat(path: Path, name: str) -> SourceFile:
    try:
        stat = path.stat()
    except OSError as error:
        raise TrainingError(f"There is no training data {path} ({error.strerror}).", "Check the path.") from error
    return SourceFile(path, name, stat.st_size, stat.st_mtime_ns)


def changed(file: SourceFile, what: str) -> TrainingError:
    """The error for a file that is not what it was."""
    return TrainingError(
        f"{file.path} {what} while training data was read from it.",
        "Put the file back, or leave it alone until the shards are built, and start again.",
    )


def check_unchanged(file: SourceFile) -> None:
    """Raises TrainingError where the file is gone or has another size."""
    try:
        size = file.path.stat().st_size
    except OSError as error:
        raise changed(file, f"vanished ({error.strerror})") from error
    if size != file.size_bytes:
        raise changed(file, f"went from {file.size_bytes:,} to {size:,} bytes")


@dataclass(frozen=True)
class _Files:
    """What the sources of this file share: their files, and how far one has come."""

    paths: Paths

    suffixes = ("",)

    @cached_property
    def files(self) -> list[SourceFile]:
        """The files, in order."""
        return list_files(self.paths, self.suffixes)

    @cached_property
    def before_bytes(self) -> list[int]:
        """Bytes of the files before each, and of all."""
        sums = [0]
        for file in self.files:
            sums.append(sums[-1] + file.size_bytes)
        return sums

    @property
    def total(self) -> int:
        """Bytes of all files, compressed where they are."""
        return self.before_bytes[-1]

    def lines(self, index: int, start: Position) -> Iterator[Record]:
        """The lines of file `index` as records; a broken gzip ends them with one that has an error."""
        file = self.files[index]
        offset, number = start[1:] if start[0] == index else (0, 0)
        check_unchanged(file)
        try:
            with open(file.path, "rb") as raw:
                stream = cast("BinaryIO", gzip.GzipFile(fileobj=raw)) if _packed(file) else raw
                stream.seek(offset)
                while True:
                    line, length, error = _line(stream)
                    offset += length
                    number += 1
                    done = self.before_bytes[index] + min(raw.tell(), file.size_bytes)
                    if error is not None and not length:
                        yield Record(b"", file.name, number, (index + 1, 0, 0), done, error)
                        break
                    if not length:
                        break
                    yield Record(line, file.name, number, (index, offset, number), done, error)
        except (OSError, *_BROKEN_GZIP) as error:  # not of a line, which `_line` tells: of opening, or of going on
            raise changed(file, f"could not be read ({error})") from error
        check_unchanged(file)
        if not _packed(file) and offset != file.size_bytes:
            raise changed(file, f"went from {file.size_bytes:,} to {offset:,} bytes")


def _packed(file: SourceFile) -> bool:
    return file.name.endswith(".gz")


def _line(stream: BinaryIO) -> tuple[bytes, int, str | None]:
    """The next line, its length in bytes (0 at the end of what can be read), and why it is none."""
    try:
        line = stream.readline(MAX_RECORD_BYTES)
        length = len(line)
        if length < MAX_RECORD_BYTES or line.endswith(b"\n"):
            return line, length, None
        while line and not line.endswith(b"\n"):
            line = stream.readline(1 << 20)
            length += len(line)
    except _BROKEN_GZIP as error:
        return b"", 0, f"the gzip file is cut off or damaged here, and its rest is lost ({error})"
    return b"", length, _TOO_LONG


@dataclass(frozen=True)
class JsonLines(_Files):
    """A JSON object per line, with a text or a conversation; `*.jsonl` and `*.jsonl.gz` below folders."""

    fields: Fields = field(default_factory=Fields)

    suffixes = (".jsonl", ".jsonl.gz", ".ndjson", ".ndjson.gz")

    def describe(self) -> dict[str, Any]:
        return {"kind": "json lines", "fields": vars(self.fields), "files": [list(f[1:]) for f in self.files]}

    def records(self, start: Position = BEGINNING) -> Iterator[Record]:
        for index in range(start[0], len(self.files)):
            yield from self.lines(index, start)

    def document(self, raw: bytes) -> Document | None:
        if not raw.strip():
            return None
        record = decode_json(raw)
        if not isinstance(record, dict):
            raise BadRecord(f"it is a JSON {type(record).__name__}, not an object")
        return self.fields.document(record)


@dataclass(frozen=True)
class TextFiles(_Files):
    """Plain text: each file one document, or one between each two blank lines; `*.txt` and `*.md` below folders."""

    split: Literal["file", "blank_lines"] = "file"

    suffixes = (".txt", ".txt.gz", ".md", ".md.gz")

    def __post_init__(self) -> None:
        if self.split not in ("file", "blank_lines"):
            raise TrainingError(f"Unknown split {self.split!r} of text files.", "Use 'file' or 'blank_lines'.")

    def describe(self) -> dict[str, Any]:
        return {"kind": "text", "split": self.split, "files": [list(f[1:]) for f in self.files]}

    def records(self, start: Position = BEGINNING) -> Iterator[Record]:
        for index in range(start[0], len(self.files)):
            lines = self.lines(index, start)
            yield from _joined(lines) if self.split == "file" else _paragraphs(lines)

    def document(self, raw: bytes) -> Document | None:
        text = decode_text(raw)
        return Document([], text=text) if text and not text.isspace() else None


def _paragraphs(lines: Iterable[Record]) -> Iterator[Record]:
    """Runs of lines without a blank one, each with the number of its first line."""
    run = _Run()
    for line in lines:
        if line.error is None and not line.raw.isspace():  # type: ignore[union-attr]
            run.add(line)
            continue
        yield from run.take()
        if line.error is not None:
            yield line
    yield from run.take()


def _joined(lines: Iterable[Record]) -> Iterator[Record]:
    """A whole file; its first error stands for all of it."""
    run = _Run()
    for line in lines:
        if line.error is not None:
            yield line._replace(after=_next_file(line))
            return
        run.add(line)
    for record in run.take():
        yield record._replace(after=_next_file(record))


def _next_file(record: Record) -> Position:
    """An error that ends its file points behind it already."""
    return (record.after[0] + (record.after[1] > 0), 0, 0)


class _Run:
    """Lines that become one record; what is too long is not kept."""

    def __init__(self) -> None:
        self.pieces: list[bytes] = []
        self.size_bytes, self.first, self.last = 0, 0, None

    def add(self, line: Record) -> None:
        self.first = self.first or line.number
        self.last = line
        self.size_bytes += len(line.raw)
        if self.size_bytes <= MAX_RECORD_BYTES:
            self.pieces.append(cast("bytes", line.raw))
        else:
            self.pieces.clear()

    def take(self) -> Iterator[Record]:
        """The record, if there is one, and begin anew."""
        if self.last is not None:
            error = _TOO_LONG if self.size_bytes > MAX_RECORD_BYTES else None
            yield self.last._replace(raw=b"".join(self.pieces), number=self.first, error=error)
            self.__init__()
