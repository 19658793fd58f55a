"""Byte-pair encoding for a small vocabulary whose words must be easy to copy.

A model of seven million parameters calls a tool by copying its name from the declaration (` NAME`, after a space) into
the call (`.NAME`, after a dot). Copying is learned token by token, so what is copied (names, values) must be made of
few tokens that occur often, and of the same ones in both places; what is only said or read may be whole words. Hence:

1. pairs of small letters, learned on everything but the words of prose: about three hundred tokens, of which every name
   is made, known or not;
2. punctuation such as `":` and `{"`, but not arithmetic, and never with a letter;
3. whole pieces of prose (a word with the space before it, or without one), the most frequent ones. No two tokens merge
   to one of them (but for ` a`): tiktoken looks a whole piece up before it merges (`ignore_merges` elsewhere), so
   `weather` is one token in a sentence, while a name that contains it is made of pairs like every other name.

Digits never merge. The file is an ordinary `tiktoken.model`: the first 256 ranks are the single bytes in GPT-2's order.
Layout and special tokens follow K2's tokenizer; training is plain pair counting with incremental updates over unique
words.
"""

import base64
import json
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import regex

from karakoram.chat import ChatFormat, Tokenizer
from karakoram.chat.tokenizer import CONFIG_FILE, MODEL_FILE, PATTERN
from karakoram.errors import TrainingError
from karakoram.tools.units import TEMPERATURES, UNITS
from karakoram.train.data import dialogs
from karakoram.train.data.names import ADJECTIVES, NOUNS, PEOPLE, PROSE, VERBS, plural

N_RANKS = 3968
N_SPECIALS = 128
DIALECT = "kimi-k2.5"
SPECIALS: dict[int, str] = {  # offset from the first special id, as in K2
    0: "[BOS]", 1: "[EOS]", 2: "<|im_end|>", 3: "<|im_user|>", 4: "<|im_assistant|>", 6: "<|start_header_id|>",
    7: "<|end_header_id|>", 9: "[EOT]", 10: "<|im_system|>", 11: "<|tool_calls_section_begin|>",
    12: "<|tool_calls_section_end|>", 13: "<|tool_call_begin|>", 14: "<|tool_call_argument_begin|>",
    15: "<|tool_call_end|>", 17: "<|im_middle|>", 18: "<|media_begin|>", 19: "<|media_content|>", 20: "<|media_end|>",
    21: "<|media_pad|>", 22: "<think>", 23: "</think>",
}  # fmt: skip
_NOT_STRIPPED = range(11, 16), range(22, 24)  # tool and think markers are `special: false` in K2

LETTER_PAIRS = 300
MAX_PUNCTUATION_MERGES = 64
MIN_COUNT = 20  # in 9,000 documents: a rarer token would be badly trained, a more frequent piece is prose and no name
MAX_TEXT_BYTES = 64_000_000
_ARITHMETIC = frozenset("+-*/()^ ")  # pieces of these alone stay apart, except the `//` before a description
_COMMENTS = ("//", " //")
_SMALL_LETTERS = regex.compile(r"[a-z]+")
# Tokens for the rest of the vocabulary, which dialogs do not use: one per letter of other alphabets, and runs of signs.
_LETTERS = [
    chr(code)
    for code in (*range(0xC0, 0x250), *range(0x391, 0x3CA), *range(0x410, 0x450), 0x401, 0x451)
    + (*range(0x5D0, 0x5EB), *range(0x621, 0x64B), *range(0x3041, 0x3097), *range(0x30A1, 0x30FB))
] + list("°€£×÷–—’‘“”…·•©®²³½")
_RUNS = " \n\t=#_.~"
MAX_RUN = 256  # as long as the longest tokens of K2

Pair = tuple[bytes, bytes]


def byte_order() -> list[int]:
    """The 256 bytes in the order of GPT-2's table: printable ones first."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return printable + [byte for byte in range(256) if byte not in set(printable)]


class _Words:
    """Unique words as token lists with counts, and the counts of adjacent pairs, kept up to date under merges."""

    def __init__(self, counts: Iterable[tuple[bytes, int]]) -> None:
        self.tokens: list[list[bytes]] = []
        self.counts: list[int] = []
        self.pairs: Counter[Pair] = Counter()
        self.where: defaultdict[Pair, set[int]] = defaultdict(set)
        for word, count in counts:
            tokens = [word[index : index + 1] for index in range(len(word))]
            index = len(self.tokens)
            self.tokens.append(tokens)
            self.counts.append(count)
            for pair in zip(tokens, tokens[1:], strict=False):
                self.pairs[pair] += count
                self.where[pair].add(index)

    def merge(self, pair: Pair) -> None:
        """Replaces the pair by one token in all words that hold it."""
        left, right = pair
        for index in self.where.pop(pair, ()):
            tokens, count = self.tokens[index], self.counts[index]
            merged: list[bytes] = []
            position = 0
            while position < len(tokens):
                if position + 1 < len(tokens) and tokens[position] == left and tokens[position + 1] == right:
                    merged.append(left + right)
                    position += 2
                else:
                    merged.append(tokens[position])
                    position += 1
            for old in zip(tokens, tokens[1:], strict=False):
                self.pairs[old] -= count
            for new in zip(merged, merged[1:], strict=False):
                self.pairs[new] += count
                self.where[new].add(index)
            self.tokens[index] = merged
        del self.pairs[pair]

    def learn(self, wanted: int, allowed: Callable[[Pair], bool], least: int) -> Iterator[Pair]:
        """The most frequent allowed pair, again and again; ties go to the smaller bytes. Stops below `least`."""
        banned: set[Pair] = set()
        for _ in range(wanted):
            best: Pair | None = None
            best_count = least - 1
            for pair, count in self.pairs.items():
                if count > best_count or (count == best_count and best is not None and pair < best):
                    if pair in banned:
                        continue
                    if allowed(pair):
                        best, best_count = pair, count
                    else:
                        banned.add(pair)
            if best is None:
                return
            yield best
            self.merge(best)


def _count(texts: Iterable[str]) -> Counter[str]:
    """The pieces within which tokens are made, with their counts."""
    pattern = regex.compile(PATTERN, regex.VERSION1)
    pieces: Counter[str] = Counter()
    size = 0
    for text in texts:
        size += len(text)
        if size > MAX_TEXT_BYTES:
            break
        pieces.update(pattern.findall(text))
    return pieces


def _is_sign(piece: str) -> bool:
    """Punctuation or white space whose characters may merge."""
    if not 1 < len(piece) <= 8 or any(c.isalnum() for c in piece):
        return False
    return not _ARITHMETIC.issuperset(piece) or piece in _COMMENTS


def learn_ranks(texts: Iterable[str], apart: Collection[str], n_ranks: int = N_RANKS) -> dict[bytes, int]:
    """Token bytes -> rank. `apart` are words (lower case) that are copied and therefore never become one token.

    Raises TrainingError when the texts do not hold enough to fill the vocabulary.
    """
    pieces = _count(texts)
    word = regex.compile(r" ?\p{L}[\p{L}\p{M}']*", regex.VERSION1)
    prose = {
        piece: count
        for piece, count in pieces.items()
        if count >= MIN_COUNT and len(piece) > 1 and word.fullmatch(piece) and piece.lower().strip() not in apart
    }
    copied = Counter[str]()
    for piece, count in pieces.items():
        if piece not in prose:
            copied.update(dict.fromkeys(_SMALL_LETTERS.findall(piece), count))
    free = _unclaimed(prose, copied)
    pairs = list(_merges(copied, LETTER_PAIRS, lambda pair: pair[0] + pair[1] in free))
    signs = {piece: count for piece, count in pieces.items() if _is_sign(piece)}
    punctuation = list(_merges(signs, MAX_PUNCTUATION_MERGES, lambda pair: True))
    tokens = [bytes([byte]) for byte in byte_order()]
    tokens += [left + right for left, right in pairs + punctuation]
    merged = set(tokens)
    whole = [piece.encode() for piece in sorted(prose, key=lambda piece: (-prose[piece], piece))]
    whole = [token for token in whole if token == b" a" or not _splits(token, merged)]
    tokens = list(dict.fromkeys(tokens + whole + _fillers()))
    if len(tokens) < n_ranks:
        raise TrainingError(
            f"The texts give only {len(tokens)} of {n_ranks} tokens.", "Give more text to the tokenizer."
        )
    return {token: rank for rank, token in enumerate(tokens[:n_ranks])}


def _unclaimed(prose: Mapping[str, int], copied: Mapping[str, int]) -> set[bytes]:
    """The pairs of small letters that may become tokens: not those by which a more frequent piece of prose would be
    reached in merging (` is` by `is`), since that piece could then not be a token."""
    counts = Counter[bytes]()
    for word, count in copied.items():
        for i in range(len(word) - 1):
            counts[word[i : i + 2].encode()] += count
    free = set(counts)
    tokens = free | {bytes([byte]) for byte in range(256)}
    for piece, count in prose.items():
        for split in _splits(piece.encode(), tokens):
            rarest = min((part for part in split if len(part) == 2), key=counts.__getitem__, default=None)
            if rarest is not None and counts[rarest] < count:
                free.discard(rarest)
    return free


def _splits(token: bytes, tokens: Collection[bytes]) -> list[tuple[bytes, bytes]]:
    """The ways in which two of `tokens` merge to `token`."""
    cuts = ((token[:i], token[i:]) for i in range(1, len(token)))
    return [(left, right) for left, right in cuts if left in tokens and right in tokens]


def _merges(words: Mapping[str, int], wanted: int, allowed: Callable[[Pair], bool]) -> Iterator[Pair]:
    return _Words((word.encode(), count) for word, count in words.items()).learn(wanted, allowed, MIN_COUNT)


def _fillers() -> list[bytes]:
    """Tokens in an order in which each is a merge of two earlier ones."""
    letters = [letter.encode() for letter in _LETTERS]
    tokens = [letter[:2] for letter in letters if len(letter) == 3] + letters
    tokens += [sign.encode() * length for length in range(2, MAX_RUN + 1) for sign in _RUNS]
    han = [chr(code).encode() for code in range(0x4E00, 0x4F00)]  # where a short text leaves even more room
    return tokens + [letter[:2] for letter in han] + han


def write_tokenizer(out_dir: Path, ranks: dict[bytes, int], max_tokens: int = 2048) -> None:
    """`tiktoken.model` and `tokenizer_config.json`, each written whole or not at all."""
    out_dir.mkdir(parents=True, exist_ok=True)
    lines = [
        base64.b64encode(token) + b" %d\n" % rank for token, rank in sorted(ranks.items(), key=lambda item: item[1])
    ]
    _replace(out_dir / MODEL_FILE, b"".join(lines))
    text = json.dumps(tokenizer_config(len(ranks), max_tokens), indent=2, ensure_ascii=False)
    _replace(out_dir / CONFIG_FILE, text.encode() + b"\n")


def _replace(path: Path, data: bytes) -> None:
    temporary = path.with_name(path.name + ".part")
    temporary.write_bytes(data)
    os.replace(temporary, path)


def tokenizer_config(
    first_special: int, max_tokens: int, specials: int = N_SPECIALS, dialect: str = DIALECT
) -> dict[str, Any]:
    """K2's named special tokens at the same offsets, as far as there are so many; [UNK] and [PAD] last."""
    names = {offset: name for offset, name in SPECIALS.items() if offset < specials - 2}
    names |= {specials - 2: "[UNK]", specials - 1: "[PAD]"}
    added = {
        str(first_special + offset): {
            "content": name, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False,
            "special": not any(offset in span for span in _NOT_STRIPPED),
        }
        for offset, name in sorted(names.items())
    }  # fmt: skip
    return {
        "added_tokens_decoder": added,
        "bos_token": "[BOS]",
        "eos_token": "[EOS]",
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_tokens,
        "tokenizer_class": "TikTokenTokenizer",
        "karakoram": {"dialect": dialect},
    }


def special_ids(first_special: int = N_RANKS) -> dict[str, int]:
    """All special names, unnamed ones as `<|reserved_token_N|>`."""
    names = SPECIALS | {N_SPECIALS - 2: "[UNK]", N_SPECIALS - 1: "[PAD]"}
    return {
        names.get(offset, f"<|reserved_token_{first_special + offset}|>"): first_special + offset
        for offset in range(N_SPECIALS)
    }


def generated_texts(documents: int, seed: int = 0) -> Iterator[str]:
    """Rendered training dialogs (never evaluation ones), every other one from all phrasings; about 1,300 characters."""
    bytes_only = {bytes([byte]): rank for rank, byte in enumerate(byte_order())}
    fmt = ChatFormat(DIALECT, Tokenizer(bytes_only, special_ids(256)))
    specials = regex.compile(r"<\|[a-z_]+\|>|</?think>")
    for index in range(documents):
        document = dialogs.generate(seed, index, rich=index % 2 == 1)
        rendered = fmt.render(
            document.messages, document.tools, thinking=document.thinking, add_generation_prompt=False
        )
        yield specials.sub("\n", rendered)
        for message in document.messages:  # history drops thoughts from the rendered text, the model still writes them
            if message.get("reasoning_content"):
                yield message["reasoning_content"]


def words_apart() -> frozenset[str]:
    """Words that appear as names or values and are copied: pools of both splits, one and several, and units."""
    units = {name for kind in UNITS.values() for unit, (_, others) in kind.items() for name in (unit, *others)}
    degrees = {name for scale, others in TEMPERATURES.items() for name in (scale, *others)}
    pools = {*VERBS, *NOUNS, *ADJECTIVES, *PEOPLE, *map(plural, NOUNS)} - {*PROSE}
    return frozenset(word.lower() for word in (*pools, *units, *degrees))


def train_tokenizer(out_dir: Path, documents: int = 9_000, seed: int = 0, extra_texts: Iterable[str] = ()) -> Tokenizer:
    """Learns the merges from generated dialogs (and `extra_texts`), writes the two files, returns the tokenizer."""

    def texts() -> Iterator[str]:
        yield from generated_texts(documents, seed)
        yield from extra_texts

    write_tokenizer(out_dir, learn_ranks(texts(), words_apart()))
    return Tokenizer.from_dir(out_dir)
