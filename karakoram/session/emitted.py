"""What models wrote, kept for the next turn: token ids and reasoning of assistant messages.

A conversation that comes back should go on from the tokens in the cache. Rendering a message anew gives other tokens
often enough (white space in arguments, another cut of the same text), and many clients drop reasoning, without which a
thinking model starts over after each tool result. So each finished message is kept under

    (client, digest of the canonical messages before it, digest of its own tool calls or content)

and found when the client sends the conversation back. Canonical: roles, names, texts and tool calls with ids
`functions.NAME:INDEX`, arguments as JSON values; reasoning does not count, because clients drop it. Ids alone would not
do: they restart at 0 in every conversation, so two conversations at once would see each other's reasoning.

Bounded in bytes and in age; the oldest go first.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from karakoram.chat.messages import Message
from karakoram.chat.template import Written

MOST_BYTES = 64 * 1024 * 1024
MOST_AGE_S = 3600.0
_BYTES_EACH = 400  # of an entry besides its tokens and text: key, record, links


@dataclass(frozen=True)
class Emitted:
    """One finished assistant message: its tokens, its reasoning, and a digest of what the client saw besides."""

    written: Written
    reasoning: str
    visible: bytes

    @property
    def size_bytes(self) -> int:
        """About what it takes in memory: Python's small tuples of integers take 8 bytes a token and share the rest."""
        return _BYTES_EACH + 8 * len(self.written.token_ids) + len(self.reasoning)


class EmittedStore:
    """Finished messages by where they stand. Thread-safe."""

    def __init__(
        self,
        most_bytes: int = MOST_BYTES,
        most_age_s: float = MOST_AGE_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.most_bytes, self.most_age_s, self._clock = most_bytes, most_age_s, clock
        self.size_bytes = 0
        self._kept: OrderedDict[bytes, tuple[float, Emitted]] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._kept)

    def put(self, key: bytes, emitted: Emitted) -> None:
        """Keep a message; what was kept under the key before is replaced."""
        with self._lock:
            self._drop(key)
            if emitted.size_bytes > self.most_bytes:
                return
            self._kept[key] = (self._clock(), emitted)
            self.size_bytes += emitted.size_bytes
            while self.size_bytes > self.most_bytes:
                self._drop(next(iter(self._kept)))

    def get(self, key: bytes) -> Emitted | None:
        """The message under a key, if it is there and young enough."""
        with self._lock:
            now = self._clock()
            while self._kept and now - next(iter(self._kept.values()))[0] > self.most_age_s:
                self._drop(next(iter(self._kept)))
            found = self._kept.get(key)
            if found is None:
                return None
            self._kept.move_to_end(key)
            self._kept[key] = (now, found[1])
            return found[1]

    def _drop(self, key: bytes) -> None:
        found = self._kept.pop(key, None)
        if found is not None:
            self.size_bytes -= found[1].size_bytes


def prefixes(client: str, messages: Sequence[Message]) -> list[bytes]:
    """For each place in a conversation with canonical ids, a digest of the client and of all messages before it."""
    digest = hashlib.sha256(client.encode("utf-8", "surrogatepass"))
    found = [digest.digest()]
    for message in messages:
        digest.update(_canonical(message))
        found.append(digest.digest())
    return found


def key_of(prefix: bytes, message: Message) -> bytes:
    """Where an assistant message is kept: by its calls if it has any, else by its content."""
    own = _calls(message) if message.tool_calls else _content(message)
    return hashlib.sha256(prefix + json.dumps(own).encode()).digest()


def visible(message: Message) -> bytes:
    """A digest of all that a client sees of a message but its reasoning."""
    return hashlib.sha256(_canonical(message)).digest()


def _canonical(message: Message) -> bytes:
    fields = [message.role, message.name, _content(message), _calls(message), message.tool_call_id]
    return json.dumps(fields).encode() + b"\n"


def _content(message: Message) -> list[list[str]]:
    """Neighbouring texts are one text, and an empty one is none: clients cut contents as they like."""
    content: list[list[str]] = []
    for part in message.parts:
        if part.kind == "text" and content and content[-1][0] == "text":
            content[-1][1] += part.text
        elif part.kind != "text" or part.text:
            content.append([part.kind, part.text])
    return content


def _calls(message: Message) -> list[list[object]]:
    return [[call.id, call.name, _value(call.arguments)] for call in message.tool_calls]


def _value(arguments: str) -> object:
    try:
        return json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments
