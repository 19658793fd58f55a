"""A tokenizer as a grammar sees it: which bytes each token spells, and the fewest tokens that spell given bytes.

llguidance accepts any tokenization of a text, so the cheapest end of an output is a matter of spelling: a dynamic
programme from the right over the positions of the text, with every token that matches there. A text may hold
`OPTIONAL` marks, places where one space may stand, as between JSON tokens; where a token such as `": "` saves one, the
programme takes it.

Three sets of tokens are kept as bit rows:
  plain   whole UTF-8 characters without quote, backslash or control: such a token never ends a JSON string
  handy   one byte, JSON's punctuation, or the end of a sentence and a string (616 of K2's): tried where not all can be
  all     every token of the tokenizer, without the ids that pad the model's vocabulary
Special tokens are never text: llguidance gets them as special, and none of them is plain.
"""

from __future__ import annotations

import re
import threading
from bisect import bisect_left
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import numpy as np
from llguidance import LLTokenizer

from karakoram.chat.tokenizer import Tokenizer

OPTIONAL = b"\xff"
"""May be left out or be one space. 0xFF occurs in no UTF-8."""
# In longer texts no spaces are tried: a space saves at best a token here and there.
MAX_CHOSEN = 4096
_OPTIONAL = OPTIONAL[0]
# Characters with which a string is filled up to its shortest length; all are plain, the first is taken among equals.
FILLERS = b"a0 -_.xA"
_CHOICES = re.compile(rb'[{\[,"]|[^{\[,"\]}: \n\r\t]+')
_HANDY = re.compile(rb'[{}\[\]":, \n]{1,6}|[.!?)\']"[,}\]]?|.', re.DOTALL)
_SPECIAL = re.compile(rb'["\\\x00-\x1f]')


class Vocabulary:
    """Immutable once made (memory of spellings apart); safe to share between threads."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        """`vocab_size`: tokens of the model; those beyond the tokenizer's are padding."""
        self.special_ids: dict[str, int] = {
            name: token for name, token in tokenizer.special_ids.items() if token < vocab_size
        }
        self.known = min(tokenizer.n_vocab, vocab_size)
        """Ids below this are tokens."""
        self.words = (vocab_size + 31) // 32
        """Words of 32 bits of a row."""
        ordinary = min(tokenizer.first_special_id, self.known)
        self.spellings: list[bytes] = [tokenizer.token_bytes(token) for token in range(ordinary)]
        """The bytes of each ordinary token."""
        self.ids: dict[bytes, int] = {spelling: token for token, spelling in enumerate(self.spellings)}
        self._longest = _longest(self.spellings)
        self._sorted = sorted(self.spellings)
        self._lock = threading.Lock()
        self._fillers: dict[int, list[int]] = {byte: [0] for byte in FILLERS}
        self._filler_lengths = {byte: _run_lengths(byte, self.ids) for byte in FILLERS}
        self.tokenizer = _guidance_tokenizer(tokenizer, self.known)
        self._guided_words = (self.known + 31) // 32
        self.row_of_all = self.row(range(self.known))
        self.is_plain: bytes = bytes(map(_is_plain, self.spellings))
        """A byte for each ordinary token: whether it is plain."""
        self.plain = self.row(token for token, is_plain in enumerate(self.is_plain) if is_plain)
        self.most_choices: int = max(len(_CHOICES.findall(spelling)) for spelling in self.spellings)
        """The most things that one token begins of which each may be a choice: openers, commas, scalars. K2: 6."""
        self.handy = self.row(token for token, spelling in enumerate(self.spellings) if _HANDY.fullmatch(spelling))
        """The tokens of one byte, and those of JSON's punctuation: any continuation begins with one of them."""
        self.cost = lru_cache(4096)(self._cost)
        """How many tokens spell a text at least."""
        self.first = lru_cache(4096)(self._first)
        """The first of them."""

    def row(self, tokens: Iterable[int]) -> np.ndarray:
        """A new row with the bits of these tokens set."""
        bits = np.zeros(self.words * 32, np.uint8)
        bits[np.fromiter(tokens, np.int64)] = 1
        return np.packbits(bits, bitorder="little").view(np.uint32)

    @lru_cache(8)  # noqa: B019 - as long as the model
    def row_of_ends(self, marker: bytes) -> np.ndarray:
        """The tokens that can end `marker`, a marker spelled as text, and go on after it."""

        def passes(spelling: bytes) -> bool:
            heads = (spelling[:end] for end in range(1, len(spelling)))
            return any(marker.endswith(head) or head.endswith(marker) for head in heads)

        return self.row(token for token, spelling in enumerate(self.spellings) if passes(spelling))

    def mask(self, matcher: Any, row: np.ndarray) -> None:
        """Write what may come next in the text that `matcher` follows; special tokens, the end included, are not."""
        matcher.unsafe_compute_mask_ptr(row.ctypes.data, self._guided_words * 4)
        row[self._guided_words :] = 0
        first = len(self.spellings)
        row[first // 32 : first // 32 + 1] &= np.uint32((1 << first % 32) - 1)
        row[first // 32 + 1 :] = 0

    def tokens(self, row: np.ndarray) -> list[int]:
        """The tokens whose bits are set."""
        return np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little")).tolist()

    def spell(self, text: bytes) -> list[int]:
        """The fewest tokens that spell `text`, in which `OPTIONAL` stands for a space or nothing."""
        if len(text) > MAX_CHOSEN:
            text = text.replace(OPTIONAL, b"")
        _, choices = self._table(text)
        out: list[int] = []
        position = 0
        while position < len(text):
            token, position = choices[position]
            if token >= 0:
                out.append(token)
        return out

    def costs(self, text: bytes) -> list[int]:
        """How many tokens spell the rest of `text` from each position on, at least."""
        return self._table(text)[0]

    def filler(self, count: int) -> tuple[int, bytes]:
        """(tokens, character) of the cheapest run of `count` equal characters."""
        best = (count + 1, FILLERS[:1])
        with self._lock:
            for byte, counts in self._fillers.items():
                lengths = self._filler_lengths[byte]
                while len(counts) <= count:
                    size = len(counts)
                    counts.append(1 + min(counts[size - length] for length in lengths if length <= size))
                if counts[count] < best[0]:
                    best = (counts[count], bytes([byte]))
        return best

    def _cost(self, text: bytes) -> int:
        return self._table(text)[0][0]

    def _first(self, text: bytes) -> int:
        return self.spell(text)[0]

    def _table(self, text: bytes) -> tuple[list[int], list[tuple[int, int]]]:
        size = len(text)
        costs = [0] * (size + 1)
        choices: list[tuple[int, int]] = [(-1, size)] * size
        for start in range(size - 1, -1, -1):
            best = size + 1
            if text[start] == _OPTIONAL:
                best, choices[start] = costs[start + 1], (-1, start + 1)
            for token, end in self._matches(text, start):
                if costs[end] + 1 < best:
                    best, choices[start] = costs[end] + 1, (token, end)
            costs[start] = best
        return costs, choices

    def _matches(self, text: bytes, start: int) -> Iterable[tuple[int, int]]:
        """The tokens that spell text from `start`, each with the position after it; longest first."""
        found: list[tuple[int, int]] = []
        stack = [(b"", start)]
        while stack:
            spelling, end = stack.pop()
            while end < len(text):
                if text[end] == _OPTIONAL:
                    stack.append((spelling, end + 1))
                    spelling += b" "
                else:
                    spelling += text[end : end + 1]
                end += 1
                token = self.ids.get(spelling)
                if token is not None:
                    found.append((token, end))
                if len(spelling) >= self._longest.get(spelling[:2], 1 if len(spelling) > 1 else 2):
                    break
                if stack and not self._begins_token(spelling):
                    break
        found.reverse()
        return found

    def _begins_token(self, spelling: bytes) -> bool:
        place = bisect_left(self._sorted, spelling)
        return place < len(self._sorted) and self._sorted[place].startswith(spelling)


def _longest(spellings: list[bytes]) -> dict[bytes, int]:
    """The length of the longest token by its first two bytes."""
    longest: dict[bytes, int] = {}
    for spelling in spellings:
        head = spelling[:2]
        if len(spelling) > longest.get(head, 1):
            longest[head] = len(spelling)
    return longest


def _run_lengths(byte: int, ids: dict[bytes, int]) -> list[int]:
    return [length for length in range(1, 257) if bytes([byte]) * length in ids]


def _is_plain(spelling: bytes) -> bool:
    if _SPECIAL.search(spelling):
        return False
    try:
        spelling.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _guidance_tokenizer(tokenizer: Tokenizer, known: int) -> LLTokenizer:
    """llguidance's view of the first `known` tokens. Its end token is any special one: `mask` takes it away again."""

    class Wrapped:
        is_tokenizer_wrapper = True
        eos_token_id = tokenizer.first_special_id
        bos_token_id = None
        tokens = tuple(tokenizer.token_bytes(token) for token in range(known))
        special_token_ids = tuple(range(tokenizer.first_special_id, known))

        def __call__(self, text: str) -> list[int]:
            return tokenizer.encode(text)

    return LLTokenizer(Wrapped())  # type: ignore[arg-type]
