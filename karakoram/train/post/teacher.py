"""What a teacher thinks of every token, on disk: its k likeliest next tokens, and how much is left for the others.

A row belongs to a flat position in the token cache (`ids`, `offsets`): what the teacher expects to follow that token,
having read its document from the beginning. A whole distribution of K2 is 163,840 numbers; the 64 largest hold nearly
all of its mass, and with the rest's sum kept, nothing has to be pretended about the others.

    OUT/index.json            settings, fingerprints of teacher and data, how far the writing has come
    OUT/ids-00000.bin         uint16 (uint32 above 65,536 ids) [n, k], likeliest first
    OUT/logp-00000.bin        float16 [n, k]: log-probabilities
    OUT/rest-00000.bin        float16 [n]: log of the mass of all other ids, -inf where there are none

That is 258 bytes a token at k = 64 (386 with uint32). float16, not bfloat16: three more bits of the fraction in the
same bytes, and no log-probability needs the range; at -8 the step is 1/128, so a probability is off by at most 0.4 %,
and readers make the k + 1 numbers sum to 1 again. Writing appends, batch by batch in the order of the documents; an
interrupted run goes on behind the last batch that the index counts.
"""

import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from karakoram.errors import InputError, TrainingError
from karakoram.model.transformer import Transformer

K = 64
SHARD_TOKENS = 1 << 20  # 258 MB of shards at k = 64
BATCH_TOKENS = 4096
LOGIT_ROWS = 512  # 512 × 163,840 float32 logits are 336 MB
_KINDS = ("ids", "logp", "rest")
_MAX_INDEX_BYTES = 1 << 16
_FORMAT = 1


@torch.no_grad()
def write_teacher_logits(
    teacher: Transformer,
    ids: np.ndarray,
    offsets: np.ndarray,
    out: Path,
    k: int = K,
    value_dtype: str = "float16",
    shard_tokens: int = SHARD_TOKENS,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Fill the directory `out` for the flat `ids`, document n at ids[offsets[n]:offsets[n + 1]]; returns it.

    At once if it is finished, further if it was interrupted. progress(tokens_done, tokens). Raises InputError for
    data that the teacher cannot read, TrainingError where `out` holds something else, or the disk is full: then the
    same call goes on later.
    """
    offsets = np.asarray(offsets, dtype=np.int64)
    _check_data(teacher, ids, offsets, k, value_dtype, shard_tokens)
    settings = {
        "format": _FORMAT,
        "tokens": len(ids),
        "k": k,
        "vocab_size": teacher.config.vocab_size,
        "value_dtype": value_dtype,
        "shard_tokens": shard_tokens,
        "teacher": fingerprint(teacher),
        "data": data_fingerprint(ids, offsets),
    }
    try:
        done = _begin(out, settings)
        document = int(np.searchsorted(offsets, done, side="left"))
        for first, last in _batches(offsets, document):
            _append(out, settings, done, _rows_of(teacher, ids, offsets[first : last + 1], k))
            done = int(offsets[last])
            _write_index(out, settings | {"done_tokens": done})
            if progress is not None:
                progress(done, len(ids))
    except OSError as error:
        raise TrainingError(
            f"The teacher's logits could not be written to {out}: {error}.",
            f"{bytes_per_token(settings) * len(ids):,} bytes are needed in all; the same command goes on.",
        ) from error
    return out


class TeacherLogits:
    """A finished directory, memory-mapped.

    data  (ids, offsets) that it must have been written for. Raises TrainingError for a directory that is unfinished,
    damaged, or of other data.
    """

    def __init__(self, path: Path, data: tuple[np.ndarray, np.ndarray] | None = None) -> None:
        self.path, index = path, _read_index(path)
        if index["done_tokens"] != index["tokens"]:
            raise TrainingError(
                f"{path} has the teacher's logits of {index['done_tokens']:,} of {index['tokens']:,} tokens.",
                "Write the rest first: the same command goes on.",
            )
        if data is not None and index["data"] != data_fingerprint(data[0], np.asarray(data[1], dtype=np.int64)):
            raise TrainingError(f"{path} was written for other tokens than these.", "Write the logits for this cache.")
        self.tokens, self.k, self.vocab_size = index["tokens"], index["k"], index["vocab_size"]
        self.teacher, self.bytes_per_token = index["teacher"], bytes_per_token(index)
        self._shard_tokens = index["shard_tokens"]
        self._shards = [_open_shard(path, index, n) for n in range(-(-self.tokens // self._shard_tokens))]

    def rows(self, positions: np.ndarray | Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Flat positions [N] -> ids int64 [N, k], log-probabilities float32 [N, k], log of the rest's mass [N].

        The k + 1 probabilities of a row sum to 1. Raises InputError for a position that is not there, TrainingError for
        rows that cannot be a teacher's.
        """
        at_N = np.asarray(positions, dtype=np.int64).reshape(-1)
        wrong_N = (at_N < 0) | (at_N >= self.tokens)
        if wrong_N.any():
            raise InputError(
                f"Position {at_N[wrong_N][0]} is outside the {self.tokens:,} tokens of {self.path}.",
                "Positions count the tokens of the cache from 0.",
            )
        ids_NK = np.empty((len(at_N), self.k), dtype=np.int64)
        logp_NK, rest_N = np.empty((len(at_N), self.k), dtype=np.float32), np.empty(len(at_N), dtype=np.float32)
        shard_N = at_N // self._shard_tokens
        for number in np.unique(shard_N):
            here = np.nonzero(shard_N == number)[0]
            inside = at_N[here] - number * self._shard_tokens
            ids_NK[here], logp_NK[here], rest_N[here] = (kind[inside] for kind in self._shards[number])
        ids, logp, rest = torch.from_numpy(ids_NK), torch.from_numpy(logp_NK), torch.from_numpy(rest_N)
        total_N = torch.logaddexp(logp.logsumexp(-1), rest)
        # float16 puts the sum off by 0.4 % at most; NaN compares as false
        if not bool((total_N.abs() <= 0.02).all()) or bool((ids >= self.vocab_size).any()):
            raise TrainingError(f"{self.path} holds rows that no teacher wrote.", "Write the logits again.")
        return ids, logp - total_N[:, None], rest - total_N


def top_k(logits_NV: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Logits -> the k likeliest ids int64 [N, k], their log-probabilities float32, log of the rest's mass [N]."""
    logp_NV = logits_NV.float().log_softmax(-1)
    logp_NK, ids_NK = logp_NV.topk(k, -1)
    if k == logits_NV.shape[-1]:
        return ids_NK, logp_NK, torch.full_like(logp_NK[:, 0], -math.inf)
    return ids_NK, logp_NK, logp_NV.scatter(-1, ids_NK, -math.inf).logsumexp(-1)


def bytes_per_token(settings: dict[str, Any]) -> int:
    """Of all three files."""
    value, code = np.dtype(settings["value_dtype"]).itemsize, np.dtype(_id_dtype(settings)).itemsize
    return settings["k"] * (value + code) + value


def fingerprint(model: Transformer) -> str:
    """Of all weights: names, shapes, dtypes and bytes; a few GB/s."""
    state = xxhash.xxh3_128()
    for name, tensor in sorted(model.state_dict().items()):
        state.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        state.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return state.hexdigest()


def data_fingerprint(ids: np.ndarray, offsets: np.ndarray) -> str:
    """Of the tokens as numbers, whatever their dtype, and of where documents begin."""
    state = xxhash.xxh3_128()
    for start in range(0, len(ids), 1 << 20):
        state.update(np.ascontiguousarray(ids[start : start + (1 << 20)], dtype=np.uint32).data)
    state.update(np.ascontiguousarray(offsets, dtype=np.int64).data)
    return state.hexdigest()


def _check_data(
    teacher: Transformer, ids: np.ndarray, offsets: np.ndarray, k: int, value_dtype: str, shard_tokens: int
) -> None:
    vocabulary, context = teacher.config.vocab_size, teacher.config.max_position_embeddings
    if not 1 <= k <= vocabulary or shard_tokens < 1 or value_dtype not in ("float16", "float32"):
        raise InputError(
            f"k {k}, {shard_tokens} tokens a shard and {value_dtype} cannot be.",
            f"k is 1 to {vocabulary}, the dtype float16 or float32.",
        )
    lengths = np.diff(offsets)
    if len(offsets) < 2 or offsets[0] != 0 or offsets[-1] != len(ids) or lengths.min() < 0:
        raise InputError(f"{len(offsets)} offsets do not divide {len(ids):,} tokens.", "They rise from 0 to the end.")
    if lengths.max() > context:
        raise InputError(
            f"Document {int(lengths.argmax())} has {int(lengths.max()):,} tokens; the teacher reads {context:,}.",
            "Cut the documents shorter.",
        )
    for start in range(0, len(ids), 1 << 20):
        piece = ids[start : start + (1 << 20)]
        if piece.max() >= vocabulary or piece.min() < 0:
            place = start + int(np.nonzero((piece >= vocabulary) | (piece < 0))[0][0])
            raise InputError(
                f"Token {place:,} is {int(ids[place])}; the teacher's vocabulary has {vocabulary:,} ids.",
                "Teacher and student must share a tokenizer.",
            )


def _batches(offsets: np.ndarray, document: int) -> Iterator[tuple[int, int]]:
    """First and last (exclusive) document of each batch: BATCH_TOKENS with the padding, or a single document."""
    count = len(offsets) - 1
    while document < count:
        last, longest = document, 0
        while last < count:
            longest = max(longest, int(offsets[last + 1] - offsets[last]))
            if last > document and longest * (last + 1 - document) > BATCH_TOKENS:
                break
            last += 1
        yield document, last
        document = last


def _rows_of(
    teacher: Transformer, ids: np.ndarray, offsets: np.ndarray, k: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Top k of consecutive documents, whose borders `offsets` are, a slice of rows at a time, in flat order."""
    lengths = np.diff(offsets)
    if not lengths.sum():
        return
    padded = np.zeros((len(lengths), lengths.max()), dtype=np.int64)
    filled = np.arange(lengths.max()) < lengths[:, None]
    padded[filled] = ids[offsets[0] : offsets[-1]]
    x_BTD = teacher.hidden(torch.from_numpy(padded).to(teacher.device))
    for x_ND in x_BTD[torch.from_numpy(filled).to(teacher.device)].split(LOGIT_ROWS):
        logits_NV = teacher.logits(x_ND)
        if not bool(logits_NV.isfinite().all()):
            raise TrainingError(
                f"The teacher's logits between tokens {offsets[0]:,} and {offsets[-1]:,} are not finite.",
                "Look at the teacher: it cannot teach.",
            )
        yield top_k(logits_NV, k)


def _id_dtype(settings: dict[str, Any]) -> str:
    return "uint16" if settings["vocab_size"] <= 1 << 16 else "uint32"


def _dtype_of(kind: str, settings: dict[str, Any]) -> np.dtype:
    return np.dtype(_id_dtype(settings) if kind == "ids" else settings["value_dtype"])


def _row_bytes(kind: str, settings: dict[str, Any]) -> int:
    return _dtype_of(kind, settings).itemsize * (1 if kind == "rest" else settings["k"])


def _file(out: Path, kind: str, shard: int) -> Path:
    return out / f"{kind}-{shard:05d}.bin"


def _append(out: Path, settings: dict[str, Any], done: int, slices: Iterator[tuple[Tensor, Tensor, Tensor]]) -> None:
    for triple in slices:
        arrays = [
            tensor.cpu().numpy().astype(_dtype_of(kind, settings)) for kind, tensor in zip(_KINDS, triple, strict=True)
        ]
        start, count = 0, len(arrays[0])
        while start < count:
            shard, inside = divmod(done, settings["shard_tokens"])
            stop = min(count, start + settings["shard_tokens"] - inside)
            for kind, array in zip(_KINDS, arrays, strict=True):
                path = _file(out, kind, shard)
                with path.open("r+b" if path.exists() else "xb") as file:
                    file.seek(inside * _row_bytes(kind, settings))
                    file.write(array[start:stop].tobytes())
                    file.flush()
                    os.fsync(file.fileno())  # the index, written next, must not know of more than there is
            done, start = done + stop - start, stop


def _begin(out: Path, settings: dict[str, Any]) -> int:
    """How many tokens are done; raises TrainingError where they are others."""
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "index.json").exists():
        if any(out.iterdir()):
            raise TrainingError(f"{out} is not empty.", "Name a directory of its own.")
        _write_index(out, settings | {"done_tokens": 0})
        return 0
    index = _read_index(out)
    other = [key for key, value in settings.items() if index[key] != value]
    if other:
        raise TrainingError(
            f"{out} holds a teacher's logits with another {', '.join(other)}.", "Remove it, or name another directory."
        )
    return index["done_tokens"]


def _write_index(out: Path, index: dict[str, Any]) -> None:
    partial = out / "index.json.part"
    partial.write_text(json.dumps(index, indent=1))
    os.replace(partial, out / "index.json")


def _read_index(path: Path) -> dict[str, Any]:
    file = path / "index.json"
    try:
        if file.stat().st_size > _MAX_INDEX_BYTES:
            raise ValueError("it is too long")
        index = json.loads(file.read_text(encoding="utf-8"))
        numbers = [index[key] for key in ("tokens", "k", "vocab_size", "shard_tokens", "done_tokens")]
        if index["format"] != _FORMAT or index["value_dtype"] not in ("float16", "float32"):
            raise ValueError(f"format {index['format']} of {index['value_dtype']} is unknown")
        if not all(type(n) is int and 0 <= n < 1 << 48 for n in numbers) or min(numbers[1:4]) < 1:
            raise ValueError(f"its numbers are {numbers}")
        if not (index["k"] <= index["vocab_size"] <= 1 << 32 and index["done_tokens"] <= index["tokens"]):
            raise ValueError(f"its numbers are {numbers}")
        return index | {"teacher": str(index["teacher"]), "data": str(index["data"])}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise TrainingError(f"{file} cannot be read: {error}.", "Write the teacher's logits again.") from error


def _open_shard(path: Path, index: dict[str, Any], number: int) -> tuple[np.ndarray, ...]:
    """ids, logp, rest of one shard."""
    rows = min(index["shard_tokens"], index["tokens"] - number * index["shard_tokens"])
    arrays = []
    for kind in _KINDS:
        file, wanted = _file(path, kind, number), rows * _row_bytes(kind, index)
        found = file.stat().st_size if file.is_file() else -1
        if found != wanted:
            raise TrainingError(f"{file} has {found:,} bytes, not {wanted:,}.", "Write the teacher's logits again.")
        shape = (rows,) if kind == "rest" else (rows, index["k"])
        arrays.append(np.memmap(file, dtype=_dtype_of(kind, index), mode="r", shape=shape))
    return tuple(arrays)
