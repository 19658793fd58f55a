"""A finished set of shards: an index, checked against the tokenizer and the model, and samples by number.

    FOLDER/index.json         what it was made of and by which tokenizer, and a record of every shard
    FOLDER/shard-00000.k2s    see shard_file.py

What is checked when: index, headers, sizes and offsets on opening; file sizes, ids and weights whenever they are read;
every bit by `verify()`, which reads everything.
"""

import json
import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from karakoram.chat import Tokenizer
from karakoram.chat.tokenizer import MODEL_FILE
from karakoram.errors import TrainingError
from karakoram.train.data.corpus.conversations import WEIGHT_ONE
from karakoram.train.data.corpus.shard_file import REBUILD, Shard, id_bytes

INDEX_FILE = "index.json"
INDEX_VERSION = 1
MAX_INDEX_BYTES = 256 << 20
OPEN_SHARDS = 128  # each holds a file descriptor, of which a process commonly may have 1,024


def tokenizer_fingerprint(directory: Path, tokenizer: Tokenizer | None = None) -> str:
    """xxh3-128 of the vocabulary file and of the special tokens with their ids. `tokenizer`: as read from there."""
    tokenizer = tokenizer or Tokenizer.from_dir(directory)
    hasher = xxhash.xxh3_128((directory / MODEL_FILE).read_bytes())
    hasher.update(json.dumps(tokenizer.special_ids, sort_keys=True).encode())
    return hasher.hexdigest()


def read_index(folder: Path) -> dict[str, Any]:
    """The index of a set of shards, finished or not; TrainingError where it is missing or damaged."""
    path = folder / INDEX_FILE
    try:
        if path.stat().st_size > MAX_INDEX_BYTES:
            raise ValueError(f"it has more than {MAX_INDEX_BYTES:,} bytes")
        index = json.loads(path.read_bytes())
        _check_index(index)
    except FileNotFoundError as error:
        raise TrainingError(f"{folder} holds no token shards.", "Build them first (build_shards).") from error
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise TrainingError(f"{path} is damaged ({error}).", REBUILD) from error
    return index


def _check_index(index: Any) -> None:
    """Raises ValueError, KeyError or TypeError."""
    if not isinstance(index, dict) or index.get("version") != INDEX_VERSION:
        raise ValueError("it is no index of this version")
    counts = [index["tokenizer"]["vocab_size"], *index["position"]]
    counts += [index[count] for count in ("samples", "tokens", "records", "empty", "skipped")]
    for number, shard in enumerate(index["shards"]):
        if shard["file"] != shard_name(number):
            raise ValueError(f"shard {number} is called {shard['file']!r}")
        counts += [shard["samples"], shard["tokens"], shard["size_bytes"]]
        if not isinstance(shard["xxh3_64"], str):
            raise ValueError(f"the checksum of shard {number} is {shard['xxh3_64']!r}")
    if any(type(count) is not int or not 0 <= count < 2**62 for count in counts):
        raise ValueError("a count in it is no whole number")
    if len(index["position"]) != 3 or not all(isinstance(example, str) for example in index["skipped_examples"]):
        raise ValueError("its position or its examples are none")
    if not isinstance(index["complete"], bool) or not isinstance(index["tokenizer"]["fingerprint"], str):
        raise TypeError("it has a field of a wrong type")


def shard_name(number: int) -> str:
    """The file of one shard."""
    return f"shard-{number:05d}.k2s"


class ShardSet:
    """Samples by number, over all shards of a folder. Processes may share the folder; nothing is written.

    tokenizer   the model's tokenizer directory: shards made with another are refused
    vocab_size  the model's: shards made for a larger vocabulary are refused
    """

    def __init__(self, folder: Path, tokenizer: Path | None = None, vocab_size: int | None = None) -> None:
        self.folder = folder
        self.index = read_index(folder)
        made = self.index["tokenizer"]
        if not self.index["complete"]:
            raise TrainingError(f"The token shards in {folder} are not finished.", "Build them again: it goes on.")
        if tokenizer is not None and (own := tokenizer_fingerprint(tokenizer)) != made["fingerprint"]:
            raise TrainingError(
                f"The token shards in {folder} were made with another tokenizer than {tokenizer} (vocabulary "
                f"{made['fingerprint'][:8]} of {made['vocab_size']:,} tokens, not {own[:8]}).",
                "Build shards with the model's tokenizer.",
            )
        if vocab_size is not None and made["vocab_size"] > vocab_size:
            raise TrainingError(
                f"The token shards in {folder} are for a vocabulary of {made['vocab_size']:,} tokens; the model has "
                f"{vocab_size:,}.",
                "Build shards with the model's tokenizer, or give the model a vocabulary as large.",
            )
        self.vocab_size: int = min(made["vocab_size"], vocab_size or made["vocab_size"])
        self._open: OrderedDict[int, Shard] = OrderedDict()
        self.lengths = self._read_lengths()
        self._first = np.cumsum([0] + [shard["samples"] for shard in self.index["shards"]])

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def tokens(self) -> int:
        """Tokens of all samples."""
        return self.index["tokens"]

    @property
    def fingerprint(self) -> str:
        """Changes when any token or weight does, or their order; not with the folder."""
        sums = "".join(shard["xxh3_64"] for shard in self.index["shards"])
        return xxhash.xxh3_128(f"{self.index['tokenizer']['fingerprint']} {sums}".encode()).hexdigest()

    def _read_lengths(self) -> np.ndarray:
        lengths = [np.zeros(0, np.int64)]
        for number, record in enumerate(self.index["shards"]):
            shard = self._shard(number)
            found = (shard.samples, shard.tokens, shard.size_bytes)
            wanted = (record["samples"], record["tokens"], record["size_bytes"])
            if found != wanted or shard.ids.itemsize != id_bytes(self.index["tokenizer"]["vocab_size"]):
                raise TrainingError(
                    f"The shard {shard.path} holds (samples, tokens, bytes) {found} where its index says {wanted}.",
                    REBUILD,
                )
            lengths.append(np.diff(shard.offsets))
        return np.concatenate(lengths)

    def read(self, sample: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids and weights (hundredths) of tokens [start, stop) of a sample: views of the file, valid while it is.

        Raises TrainingError, with the shard and the position, for ids outside the vocabulary and weights above one.
        """
        number = int(np.searchsorted(self._first, sample, side="right")) - 1
        shard = self._shard(number)
        shard.check_unchanged()
        begin = int(shard.offsets[sample - self._first[number]]) + start
        ids, weights = shard.ids[begin : begin + stop - start], shard.weights[begin : begin + stop - start]
        if len(ids) and (int(ids.max()) >= self.vocab_size or int(weights.max()) > WEIGHT_ONE):
            self._tell_bad_token(shard, begin, ids, weights)
        return ids, weights

    def _tell_bad_token(self, shard: Shard, begin: int, ids: np.ndarray, weights: np.ndarray) -> None:
        at = int(np.argmax((ids >= self.vocab_size) | (weights > WEIGHT_ONE)))
        what = f"id {ids[at]} (vocabulary {self.vocab_size:,})"
        if ids[at] < self.vocab_size:
            what = f"weight {weights[at]} (at most {WEIGHT_ONE})"
        raise TrainingError(f"The shard {shard.path} has the {what} at position {begin + at:,}.", REBUILD)

    def verify(self) -> None:
        """Compares every shard with its checksum: reads everything. TrainingError names the first damaged one."""
        for number, record in enumerate(self.index["shards"]):
            self._shard(number).verify(record["xxh3_64"])

    def _shard(self, number: int) -> Shard:
        shard = self._open.get(number)
        if shard is None:
            shard = self._open[number] = Shard(self.folder / shard_name(number))
            if len(self._open) > OPEN_SHARDS:
                self._open.popitem(last=False)
        self._open.move_to_end(number)
        return shard


def write_index(folder: Path, index: dict[str, Any]) -> None:
    """Replaces the index in one step."""
    part = folder / f"{INDEX_FILE}.part"
    with open(part, "w", encoding="utf-8") as file:
        json.dump(index, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, folder / INDEX_FILE)
