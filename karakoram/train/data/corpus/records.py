"""What a source hands over: raw records with their places, and how a record becomes a document.

A source reads; it does not judge. A record is decoded later, in the process that tokenises it, and a bad one is a
`BadRecord`, which is counted (`build.py`) and names its file and line.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn, Protocol

from karakoram.train.data.documents import Document

MAX_RECORD_BYTES = 64 << 20  # one document: a thousand times a long book chapter, and it still fits memory many times

Position = tuple[int, int, int]
"""Where a source goes on: file, then place in it, twice (bytes and lines, or row group and row)."""

BEGINNING: Position = (0, 0, 0)


class Record(NamedTuple):
    """One undecoded document: a line, a text, or a table's row; or an error where none could be read.

    number   line or row in the file, from 1
    after    where the source goes on behind it
    done     how much of the source's `total` has been read
    lost     how many records the error stands for
    """

    raw: bytes | Mapping[str, Any]
    file: str
    number: int
    after: Position
    done: int
    error: str | None = None
    lost: int = 1


class BadRecord(Exception):
    """A record that is no document: the reason, without its place."""


class Source(Protocol):
    """Documents in a fixed order. `total` is what `Record.done` ends with, 0 where unknown."""

    @property
    def total(self) -> int: ...

    def describe(self) -> dict[str, Any]:
        """JSON values that change when the data or the way of reading it change; not the folder it lies in."""
        ...

    def records(self, start: Position = BEGINNING) -> Iterator[Record]:
        """All records from `start`. TrainingError names a file that vanished or changed while it was read."""
        ...

    def document(self, raw: Any) -> Document | None:
        """A record's document, None for an empty one; raises BadRecord."""
        ...


@dataclass(frozen=True)
class Fields:
    """Which fields of a record hold what. A record with `messages` is a conversation, else it must have `text`.

    tools     a list of OpenAI declarations, or the JSON text of one
    thinking  of conversations that have no field `thinking`: whether the model was asked to think
    """

    text: str = "text"
    messages: str = "messages"
    tools: str = "tools"
    thinking: bool = True

    @property
    def columns(self) -> tuple[str, str, str, str]:
        """All names that are looked up."""
        return self.text, self.messages, self.tools, "thinking"

    def document(self, record: Mapping[str, Any]) -> Document | None:
        """The record's document, None where its text or conversation is empty; raises BadRecord."""
        messages = _parsed(record.get(self.messages), self.messages)
        if messages is None:
            return self._text(record)
        if not isinstance(messages, list):
            raise BadRecord(f"the field {self.messages!r} is a {type(messages).__name__}, not a list")
        if not messages:
            return None
        tools = _parsed(record.get(self.tools), self.tools)
        if tools is not None and not isinstance(tools, list):
            raise BadRecord(f"the field {self.tools!r} is a {type(tools).__name__}, not a list")
        thinking = record.get("thinking")
        if thinking is not None and not isinstance(thinking, bool):
            raise BadRecord(f"the field 'thinking' is {thinking!r}, not true or false")
        return Document(messages, tools or None, self.thinking if thinking is None else thinking)

    def _text(self, record: Mapping[str, Any]) -> Document | None:
        if self.text not in record:
            raise BadRecord(f"it has neither a field {self.messages!r} nor {self.text!r}")
        text = record[self.text]
        if text is not None and not isinstance(text, str):
            raise BadRecord(f"the field {self.text!r} is a {type(text).__name__}, not a string")
        return Document([], text=text) if text and not text.isspace() else None


def decode_text(raw: bytes) -> str:
    """UTF-8 with or without a byte order mark; raises BadRecord."""
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadRecord(f"it is not UTF-8 at byte {error.start}") from error


def decode_json(raw: bytes | str) -> Any:
    """One JSON value; raises BadRecord, also for NaN and infinities, which JSON does not know."""
    try:
        return json.loads(decode_text(raw) if isinstance(raw, bytes) else raw, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        raise BadRecord(f"it is not JSON ({error.msg}, character {error.pos + 1})") from error
    except (ValueError, RecursionError) as error:
        raise BadRecord(f"it is not JSON ({error})") from error


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _parsed(value: Any, name: str) -> Any:
    """Tables often hold messages and tools as the JSON text of them."""
    if not isinstance(value, str):
        return value
    if not value:
        return None
    try:
        return decode_json(value)
    except BadRecord as error:
        raise BadRecord(f"the field {name!r}: {error}") from error
