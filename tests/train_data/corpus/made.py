"""Shard sets made of numbers, without a tokenizer."""

from pathlib import Path
from typing import Any

import numpy as np

from karakoram.train.data.corpus.shard_file import write_shard
from karakoram.train.data.corpus.shards import INDEX_VERSION, ShardSet, shard_name, write_index

VOCAB_SIZE = 60_000


def shards_of(folder: Path, samples: list[list[int]], per_shard: int = 7, weights: Any = None) -> ShardSet:
    """A finished set of these samples; every token weighs `weights(sample, place)`, default one."""
    folder.mkdir(parents=True, exist_ok=True)
    records = []
    for start in range(0, len(samples), per_shard):
        some = samples[start : start + per_shard]
        of = [[100 if weights is None else weights(start + s, i) for i in range(len(x))] for s, x in enumerate(some)]
        path = folder / shard_name(len(records))
        lengths = np.array([len(x) for x in some])
        checksum = write_shard(path, 2, [np.array(x, "<u2") for x in some], [np.array(x, "u1") for x in of], lengths)
        records.append(
            {
                "file": path.name, "samples": len(some), "tokens": int(lengths.sum()),
                "size_bytes": path.stat().st_size, "xxh3_64": checksum,
            }
        )  # fmt: skip
    index = {
        "version": INDEX_VERSION, "complete": True, "samples": len(samples), "tokens": sum(map(len, samples)),
        "tokenizer": {"fingerprint": "made", "vocab_size": VOCAB_SIZE}, "shards": records,
        "position": [1, 0, 0], "records": len(samples), "empty": 0, "skipped": 0, "skipped_examples": [],
    }  # fmt: skip
    write_index(folder, index)
    return ShardSet(folder)
