"""Finished answers, kept for `previous_response_id` and for references to their items.

In memory, by client, bounded in number, bytes and age. What has been dropped, or was kept by a server that has been
restarted, is refused by name, and the client sends its conversation whole.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Stored:
    """A finished answer: the conversation before it (without instructions), its message, its items."""

    messages: tuple[dict[str, Any], ...]
    message: dict[str, Any]
    output: tuple[dict[str, Any], ...]
    size_bytes: int


class ResponseStore:
    """Finished answers by client and id, the least recently used dropped first. Thread-safe.

    Each entry is counted with its whole conversation, although the turns of one share their messages: the bound holds
    in any case, and memory stays below it.
    """

    def __init__(
        self,
        most: int = 1024,
        most_bytes: int = 64 << 20,
        most_age_s: float = 3600.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.most, self.most_bytes, self.most_age_s, self._clock = most, most_bytes, most_age_s, clock
        self.size_bytes = 0
        self._kept: OrderedDict[tuple[str, str], tuple[float, Stored]] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._kept)

    def put(self, client: str, response_id: str, stored: Stored) -> None:
        """Keep an answer, unless it is larger than all that may be kept."""
        if stored.size_bytes > self.most_bytes:
            return
        with self._lock:
            if (before := self._kept.pop((client, response_id), None)) is not None:
                self.size_bytes -= before[1].size_bytes
            self._kept[client, response_id] = (self._clock(), stored)
            self.size_bytes += stored.size_bytes
            self._drop_old()
            while len(self._kept) > self.most or self.size_bytes > self.most_bytes:
                self._drop_first()

    def get(self, client: str, response_id: str) -> Stored | None:
        """The answer, if this client was given it and it is still kept."""
        with self._lock:
            self._drop_old()
            found = self._kept.get((client, response_id))
            if found is None:
                return None
            self._kept[client, response_id] = (self._clock(), found[1])
            self._kept.move_to_end((client, response_id))
            return found[1]

    def _drop_old(self) -> None:
        now = self._clock()
        while self._kept and now - next(iter(self._kept.values()))[0] > self.most_age_s:
            self._drop_first()

    def _drop_first(self) -> None:
        _, (_, stored) = self._kept.popitem(last=False)
        self.size_bytes -= stored.size_bytes
