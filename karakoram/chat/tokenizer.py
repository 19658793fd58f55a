"""Text to token ids and back, exactly as the Kimi family does it.

A tokenizer is a directory with `tiktoken.model` (lines of `base64(token bytes) SPACE rank`; ranks are the ids of
ordinary tokens) and `tokenizer_config.json`, whose `added_tokens_decoder` names the special tokens. The special ids
follow the ranks without a gap up to the highest named id; ids between that nobody named are
`<|reserved_token_{id}|>`. K2 has 163,584 ranks and 256 specials; nano has 3,968 and 128, with the same names at other
ids: no id is written in this package.

Encoding is byte-level BPE by rank inside the pieces of a pre-tokenizer pattern. Two details of the official class
decide giant inputs and are kept: a text is cut every 400,000 characters, and inside such a window every run of white
space or of non-white-space longer than 25,000 characters is cut every 25,000 (tiktoken's regex engine and its merge
loop do not take longer ones well). `cut_points` says where, so that the chat format can cut a rendered prompt in the
same places.

Changed against the official class: strings that look like special tokens are ordinary text unless the caller asks
(`allow_special=True`); there they become control ids by default, which lets any user write system messages.

Source: MoonshotAI/Kimi-Vendor-Verifier, `tokenization_kimi.py` (MIT), read for its behaviour.
"""

from __future__ import annotations

import binascii
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from karakoram.errors import TokenizerError

if TYPE_CHECKING:
    import tiktoken

# The pre-tokenizer, branch by branch in the order that matters: the first branch that matches wins. It is GPT-4o's with
# a branch of its own for Han characters, which the letter branches exclude. `&&` is set intersection in Rust's regexes.
PATTERN = "|".join(
    [
        r"[\p{Han}]+",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*"
        r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+"
        r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)

MAX_WINDOW_CHARS = 400_000
MAX_RUN_CHARS = 25_000

# K2's tiktoken.model has 2.8 MB and its tokenizer_config.json 5 KB: far above both, far below what would hurt.
MAX_MODEL_BYTES = 256 * 1024 * 1024
MAX_CONFIG_BYTES = 64 * 1024 * 1024
# An id above ranks + this is a typo, not a special token (K2 reserves 256).
MAX_SPECIAL_TOKENS = 65_536

MODEL_FILE = "tiktoken.model"
CONFIG_FILE = "tokenizer_config.json"

_RUN = re.compile(r"\s+|\S+")


def cut_points(text: str) -> list[int]:
    """Offsets, ascending and exclusive of both ends, at which `text` is cut before it is encoded."""
    if len(text) <= MAX_RUN_CHARS:
        return []
    cuts: list[int] = []
    for start in range(0, len(text), MAX_WINDOW_CHARS):
        end = min(start + MAX_WINDOW_CHARS, len(text))
        if start:
            cuts.append(start)
        for run in _RUN.finditer(text, start, end):
            cuts.extend(range(run.start() + MAX_RUN_CHARS, run.end(), MAX_RUN_CHARS))
    return cuts


class Tokenizer:
    """Byte-level BPE with special tokens. Immutable; safe to share between threads."""

    def __init__(self, ranks: dict[bytes, int], special_ids: dict[str, int]) -> None:
        """`ranks`: token bytes -> id, ids 0..len-1 without a gap; `special_ids`: the ids that follow, without a gap."""
        import tiktoken

        self.special_ids: dict[str, int] = dict(special_ids)
        self.first_special_id: int = len(ranks)
        self.n_vocab: int = len(ranks) + len(special_ids)
        self._special_names: dict[int, str] = {token_id: name for name, token_id in special_ids.items()}
        self._bytes: list[bytes] = [b""] * len(ranks)
        for token, rank in ranks.items():
            self._bytes[rank] = token
        self._encoding: tiktoken.Encoding = tiktoken.Encoding(
            name="karakoram", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=self.special_ids
        )

    @classmethod
    def from_dir(cls, path: str | Path) -> Tokenizer:
        """Read `tiktoken.model` and `tokenizer_config.json` in `path`; TokenizerError names the file and the line."""
        directory = Path(path)
        if not directory.is_dir():
            raise TokenizerError(
                f"{directory} is not a directory with a tokenizer.",
                f"Give a directory that holds {MODEL_FILE} and {CONFIG_FILE}.",
            )
        ranks = read_ranks(directory / MODEL_FILE)
        return cls(ranks, read_special_ids(directory / CONFIG_FILE, len(ranks)))

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        """Token ids of `text`. With `allow_special`, strings that spell a special token become its id.

        No token is added at either end. Lone surrogates are encoded as U+FFFD.
        """
        cuts = cut_points(text)
        ids: list[int] = []
        for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
            piece = text[start:end]
            if allow_special:
                ids.extend(self._encoding.encode(piece, allowed_special="all"))
            else:
                ids.extend(self._encoding.encode_ordinary(piece))
        return ids

    def encode_uncut(self, text: str) -> list[int]:
        """Ordinary token ids of a text that the caller has already cut where `cut_points` says."""
        return self._encoding.encode_ordinary(text)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; bytes that are no UTF-8 become U+FFFD, special tokens their names."""
        return b"".join([self.token_bytes(token_id) for token_id in ids]).decode("utf-8", errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one id stands for; TokenizerError if it is outside the vocabulary."""
        if 0 <= token_id < self.first_special_id:
            return self._bytes[token_id]
        name = self._special_names.get(token_id)
        if name is None:
            raise TokenizerError(
                f"Token id {token_id} is outside the vocabulary (ids 0 to {self.n_vocab - 1}).",
                "Check that the tokenizer belongs to the model that produced the ids.",
            )
        return name.encode("utf-8")

    def special_name(self, token_id: int) -> str | None:
        """The name of a special token, None for an ordinary one."""
        return self._special_names.get(token_id)

    def __repr__(self) -> str:
        return f"Tokenizer(n_vocab={self.n_vocab}, first_special_id={self.first_special_id})"


def _read_bounded(path: Path, limit_bytes: int) -> bytes:
    try:
        size = path.stat().st_size
        if size > limit_bytes:
            raise TokenizerError(
                f"{path} has {size:,} bytes, more than the {limit_bytes:,} a tokenizer file may have.",
                "Check that it is the right file.",
            )
        return path.read_bytes()
    except OSError as error:
        raise TokenizerError(
            f"Cannot read {path}: {error.strerror or error}.", "Copy the file from the model's original directory."
        ) from error


def read_ranks(path: Path) -> dict[bytes, int]:
    """The ordinary tokens of a `tiktoken.model`: bytes -> rank, complete (all 256 single bytes) and without gaps."""
    fix = "The file is damaged or not a tiktoken.model; copy it again from the model's original directory."
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(_read_bounded(path, MAX_MODEL_BYTES).splitlines(), start=1):
        if not line:
            continue
        fields = line.split()
        if len(fields) != 2:
            raise TokenizerError(f"{path}, line {number}: expected 'base64 rank', found {line[:40]!r}.", fix)
        try:
            token = binascii.a2b_base64(fields[0], strict_mode=True)
        except ValueError as error:  # binascii.Error is a ValueError
            raise TokenizerError(f"{path}, line {number}: bad base64 {fields[0][:40]!r} ({error}).", fix) from error
        if not (fields[1].isdigit() and len(fields[1]) <= 9):
            raise TokenizerError(f"{path}, line {number}: the rank {fields[1][:40]!r} is no whole number.", fix)
        if not token or token in ranks:
            kind = "an empty token" if not token else f"the token {token[:40]!r} a second time"
            raise TokenizerError(f"{path}, line {number}: {kind}.", fix)
        ranks[token] = int(fields[1])
    _check_ranks(path, ranks, fix)
    return ranks


def _check_ranks(path: Path, ranks: dict[bytes, int], fix: str) -> None:
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        shown = ", ".join(f"0x{byte:02x}" for byte in missing[:5])
        raise TokenizerError(f"{path} lacks {len(missing)} of the 256 single-byte tokens (first: {shown}).", fix)
    for expected, rank in enumerate(sorted(ranks.values())):
        if rank != expected:
            found = "appears twice" if rank < expected else f"is missing, the next one is {rank}"
            raise TokenizerError(
                f"{path}: ranks must run from 0 to {len(ranks) - 1} without a gap; {min(rank, expected)} {found}.", fix
            )


def read_special_ids(path: Path, n_ranks: int) -> dict[str, int]:
    """All special tokens of a `tokenizer_config.json`, name -> id, from `n_ranks` on in the order of their ids."""
    fix = "Copy tokenizer_config.json and tiktoken.model from the same model."
    raw = read_json_object(path)
    named = raw.get("added_tokens_decoder")
    if not isinstance(named, dict) or not named:
        raise TokenizerError(f"{path} has no added_tokens_decoder, so the special tokens are unknown.", fix)
    names: dict[int, str] = {}
    for key, value in cast("dict[str, Any]", named).items():
        name = cast("dict[str, Any]", value).get("content") if isinstance(value, dict) else value
        if not (key.isascii() and key.isdigit() and len(key) <= 9) or not isinstance(name, str) or not name:
            raise TokenizerError(f"{path}: added_tokens_decoder entry {key!r} names no token.", fix)
        token_id = int(key)
        if not n_ranks <= token_id < n_ranks + MAX_SPECIAL_TOKENS:
            raise TokenizerError(
                f"{path}: the special token {name!r} has id {token_id}, but the {n_ranks} tokens of tiktoken.model "
                f"leave the ids from {n_ranks} to special ones.",
                fix,
            )
        names[token_id] = name
    special_ids: dict[str, int] = {}
    for token_id in range(n_ranks, max(names) + 1):
        name = names.get(token_id, f"<|reserved_token_{token_id}|>")
        if name in special_ids:
            raise TokenizerError(f"{path}: {name!r} names two special ids, {special_ids[name]} and {token_id}.", fix)
        special_ids[name] = token_id
    return special_ids


def read_json_object(path: Path) -> dict[str, Any]:
    """A small JSON file that must hold an object; TokenizerError otherwise."""
    try:
        raw = json.loads(_read_bounded(path, MAX_CONFIG_BYTES))
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{path} is not valid JSON: {error}.", "Copy the file again from the model.") from error
    if not isinstance(raw, dict):
        raise TokenizerError(f"{path} must hold a JSON object.", "Copy the file again from the model.")
    return cast("dict[str, Any]", raw)
