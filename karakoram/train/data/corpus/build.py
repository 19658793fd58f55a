"""Tokenise a source once, in parallel, into shards that the same call finds again.

    records → chunks of records → processes (decode, render, encode) → shards, in the order of the source

One process reads, the others tokenise, and the reader writes what comes back in order: the shards are the same bytes
whatever the number of processes. A shard is written, brought to disk and renamed before the index names it, and the
index says where in the source to go on: a killed build loses its unfinished shard. The folder is named for the source,
the tokenizer and the settings; of two processes that want the same one, the second waits for the first.

What cannot be read is skipped and counted, with its file and line, up to a limit.
"""

import fcntl
import json
import multiprocessing
import os
import re
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash

from karakoram.chat import ChatFormat, load_chat_format
from karakoram.errors import TrainingError
from karakoram.train.data.corpus import shards
from karakoram.train.data.corpus.conversations import Rendering, samples
from karakoram.train.data.corpus.records import BEGINNING, BadRecord, Position, Record, Source
from karakoram.train.data.corpus.shard_file import id_bytes, write_shard
from karakoram.train.data.corpus.shards import INDEX_FILE, INDEX_VERSION, ShardSet, read_index, shard_name

SHARD_TOKENS = 1 << 25  # 100 MB of a small vocabulary, 170 MB of a large one: half a minute of one core is lost at most
CHUNK_RECORDS = 256
CHUNK_BYTES = 1 << 20
AHEAD = 3  # chunks per process that wait for it or for their turn to be written
EXAMPLES = 20  # skipped records that the index names

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class SkipLimit:
    """How many records may be bad: a share of those seen so far, and in any case a few."""

    share: float = 0.001
    at_least: int = 10


class Tokens(NamedTuple):
    """What became of a chunk: tokens and weights of its samples, and what was skipped: (file, number, why, records)."""

    ids: np.ndarray
    weights: np.ndarray
    lengths: np.ndarray
    skipped: list[tuple[str, int, str, int]]
    empty: int


def build_shards(
    source: Source,
    tokenizer_dir: Path,
    cache_dir: Path,
    name: str = "corpus",
    dialect: str | None = None,
    rendering: Rendering | None = None,
    processes: int = 1,
    progress: Progress | None = None,
    skip_limit: SkipLimit | None = None,
    shard_tokens: int = SHARD_TOKENS,
) -> ShardSet:
    """The shards of `source` in a folder of `cache_dir`, built if they are not there, or not yet whole.

    `progress(done, total)`, in the source's units (bytes or rows), is called after every chunk; total 0 is unknown.
    Raises TrainingError for too many bad records, a source without documents, and a file that vanishes or changes.
    """
    rendering = rendering or Rendering()
    if not 0 <= rendering.read_weight <= 1:
        raise TrainingError(f"read_weight is {rendering.read_weight}.", "A weight is a number from 0 to 1.")
    fmt = load_chat_format(tokenizer_dir, dialect)
    made_of = json.loads(
        json.dumps(
            {
                "source": source.describe(),
                "tokenizer": {
                    "fingerprint": shards.tokenizer_fingerprint(tokenizer_dir, fmt.tokenizer),
                    "vocab_size": fmt.tokenizer.n_vocab,
                    "dialect": fmt.dialect,
                },
                "rendering": asdict(rendering),
                "shard_tokens": shard_tokens,
            }
        )
    )
    key = xxhash.xxh3_64(json.dumps([INDEX_VERSION, made_of], sort_keys=True).encode()).hexdigest()
    folder = cache_dir / f"{re.sub(r'[^A-Za-z0-9._-]', '_', name)}-{key}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _lock(folder):
            build = _Build(folder, made_of, skip_limit or SkipLimit())
            if not build.index["complete"]:
                build.run(_Work(source, tokenizer_dir, fmt.dialect, rendering), fmt, processes, progress)
    except OSError as error:
        raise TrainingError(
            f"The token shards in {folder} cannot be written ({error}).", "Make room, or choose another cache folder."
        ) from error
    return ShardSet(folder)


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Waits until no other process builds here; ends with its process, however that ends."""
    with open(folder / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@dataclass
class _Build:
    """A build under way: the index as it is on the disk, and what the next shard has so far."""

    folder: Path
    made_of: dict[str, Any]
    skip_limit: SkipLimit
    index: dict[str, Any] = field(init=False)
    pending: list[Tokens] = field(default_factory=list)
    pending_tokens: int = 0

    def __post_init__(self) -> None:
        if (self.folder / INDEX_FILE).exists():
            self.index = read_index(self.folder)
        else:
            self.index = {
                "version": INDEX_VERSION, **self.made_of, "complete": False, "position": list(BEGINNING),
                "records": 0, "empty": 0, "skipped": 0, "skipped_examples": [], "samples": 0, "tokens": 0, "shards": [],
            }  # fmt: skip

    def run(self, work: "_Work", fmt: ChatFormat, processes: int, progress: Progress | None) -> None:
        """To the end of the source. The folder's files that the index does not name are of a build that was killed."""
        named = {shard["file"] for shard in self.index["shards"]}
        for file in self.folder.glob("shard-*"):
            if file.name not in named:
                file.unlink()
        state = dict(self.index)  # counts that run ahead of the disk, until a shard is written
        state["skipped_examples"] = list(state["skipped_examples"])
        total = work.source.total
        start: Position = tuple(state["position"])
        for chunk, tokens in _tokenised(work, fmt, work.source.records(start), processes):
            self._count(state, chunk, tokens)
            state["position"] = list(chunk[-1].after)
            self.pending.append(tokens)
            self.pending_tokens += len(tokens.ids)
            if self.pending_tokens >= self.made_of["shard_tokens"]:
                self._write(state)
            if progress is not None:
                progress(chunk[-1].done, total)
        if state["samples"] == 0:
            raise TrainingError(
                f"The training data hold no document (records: {state['records']}, skipped: {state['skipped']}, "
                f"empty: {state['empty']}).",
                "Check the paths and the names of the fields.",
            )
        state["complete"] = True
        self._write(state)

    def _count(self, state: dict[str, Any], chunk: list[Record], tokens: Tokens) -> None:
        state["records"] += sum(record.lost for record in chunk)
        state["empty"] += tokens.empty
        state["samples"] += len(tokens.lengths)
        state["tokens"] += len(tokens.ids)
        for file, number, reason, lost in tokens.skipped:
            state["skipped"] += lost
            if len(state["skipped_examples"]) < EXAMPLES:
                state["skipped_examples"].append(f"{file}:{number}: {reason}")
        allowed = max(self.skip_limit.at_least, self.skip_limit.share * state["records"])
        if state["skipped"] > allowed:
            first = "; ".join(state["skipped_examples"][:3])
            raise TrainingError(
                f"Of the first {state['records']:,} records, {state['skipped']:,} cannot be read; the first: {first}.",
                f"Mend them, or allow more (skip_limit, now {self.skip_limit.share:.2%} and at least "
                f"{self.skip_limit.at_least}).",
            )

    def _write(self, state: dict[str, Any]) -> None:
        """The pending tokens become a shard, then the index tells of it."""
        if self.pending_tokens:
            number = len(state["shards"])
            path = self.folder / shard_name(number)
            width = id_bytes(self.made_of["tokenizer"]["vocab_size"])
            lengths = np.concatenate([tokens.lengths for tokens in self.pending])
            checksum = write_shard(
                path, width, [t.ids for t in self.pending], [t.weights for t in self.pending], lengths
            )
            record = {
                "file": path.name, "samples": len(lengths), "tokens": self.pending_tokens,
                "size_bytes": path.stat().st_size, "xxh3_64": checksum,
            }  # fmt: skip
            state["shards"] = [*state["shards"], record]
            self.pending, self.pending_tokens = [], 0
        shards.write_index(self.folder, state)


class _Work(NamedTuple):
    """What a process needs to tokenise."""

    source: Source
    tokenizer_dir: Path
    dialect: str
    rendering: Rendering


_WORK: tuple[_Work, ChatFormat] | None = None


def _start(work: _Work) -> None:
    global _WORK
    _WORK = work, load_chat_format(work.tokenizer_dir, work.dialect)
    if parent := multiprocessing.parent_process():
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: Any) -> None:
    """A pool's processes would wait for work for ever where the reader was killed: each holds the queue's other end."""
    parent.join()
    os._exit(1)


def _tokenise(records: list[Record]) -> Tokens:
    assert _WORK is not None
    return _tokens(*_WORK, records)


def _tokens(work: _Work, fmt: ChatFormat, records: list[Record]) -> Tokens:
    ids: list[int] = []
    weights: list[int] = []
    lengths: list[int] = []
    skipped: list[tuple[str, int, str, int]] = []
    empty = 0
    for record in records:
        try:
            if record.error is not None:
                raise BadRecord(record.error)
            document = work.source.document(record.raw)
            if document is None:
                empty += 1
                continue
            for sample in samples(fmt, document, work.rendering):
                ids += sample.ids
                weights += sample.weights
                lengths.append(len(sample.ids))
        except BadRecord as error:
            skipped.append((record.file, record.number, str(error), record.lost))
    dtype = f"<u{id_bytes(fmt.tokenizer.n_vocab)}"
    arrays = np.asarray(ids, dtype), np.asarray(weights, np.uint8), np.asarray(lengths, np.int64)
    return Tokens(*arrays, skipped, empty)


def _chunks(records: Iterator[Record]) -> Iterator[list[Record]]:
    chunk: list[Record] = []
    size = 0
    for record in records:
        chunk.append(record)
        size += len(record.raw) if isinstance(record.raw, bytes) else 0
        if len(chunk) >= CHUNK_RECORDS or size >= CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _tokenised(
    work: _Work, fmt: ChatFormat, records: Iterator[Record], processes: int
) -> Iterator[tuple[list[Record], Tokens]]:
    """Chunks in order, each with its tokens."""
    if processes <= 1:
        for chunk in _chunks(records):
            yield chunk, _tokens(work, fmt, chunk)
        return
    context = multiprocessing.get_context("spawn")  # a forked copy of a process that runs torch threads can hang
    pool = ProcessPoolExecutor(processes, context, _start, (work,))
    waiting: deque[tuple[list[Record], Future[Tokens]]] = deque()
    try:
        for chunk in _chunks(records):
            waiting.append((chunk, pool.submit(_tokenise, chunk)))
            if len(waiting) >= AHEAD * processes:
                first, future = waiting.popleft()
                yield first, future.result()
        while waiting:
            first, future = waiting.popleft()
            yield first, future.result()
    except BrokenProcessPool as error:  # the worker printed why
        raise TrainingError(
            "A process that tokenises ended before its work was done.",
            "See the lines above; the same call goes on from the last whole shard, or in one process (processes=1).",
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)
