"""What the training benchmarks share: a small model of K2's shape, bytes of source code to learn, one run.

The text is Python's own standard library (every machine with this package has it), read as bytes: files in a fixed
shuffled order, the first ones to train on, the last ones held out. A run is `Trainer.train_step` over it, without
checkpoints; its final loss is over 262,144 held-out tokens, the same for all runs, so that pairs can be compared.
"""

import os
import platform
import subprocess
import sysconfig
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch

from karakoram.config import ModelConfig
from karakoram.env import processor
from karakoram.train.config import TrainConfig
from karakoram.train.data.batches import Batch
from karakoram.train.trainer import Trainer

ROWS, LENGTH = 8, 256
HELD_OUT_TOKENS = 1 << 18
RESULTS = Path(__file__).parents[1] / "results"

SHAPE: dict[str, Any] = {
    "model_type": "kimi_k2", "vocab_size": 256, "hidden_size": 128, "intermediate_size": 384,
    "moe_intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 4,
    "n_routed_experts": 16, "num_experts_per_tok": 4, "n_shared_experts": 1, "first_k_dense_replace": 1,
    "kv_lora_rank": 32, "q_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32,
    "n_group": 1, "topk_group": 1, "tie_word_embeddings": False, "max_position_embeddings": 512,
}  # fmt: skip


def shape(**changes: Any) -> ModelConfig:
    """Hidden 128, 4 layers, 16 experts of which 4 run: 1.5 million parameters."""
    nano = {k: v for k, v in ModelConfig.preset("nano").to_dict().items() if k not in ("quantization_config",)}
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    return ModelConfig.from_dict({**nano, **SHAPE, **ids, **changes})


@cache
def text() -> np.ndarray:
    """All files' bytes, uint8; the order is fixed, so the last ones are always the held-out ones."""
    root = Path(sysconfig.get_path("stdlib"))
    files = sorted(p for p in root.rglob("*.py") if not {"site-packages", "test", "tests"} & set(p.parts))
    Random(0).shuffle(files)
    return np.frombuffer(b"\0".join(file.read_bytes() for file in files), dtype=np.uint8)


class Source:
    """Rows from anywhere before the held-out part; batch n is a function of the seed and n."""

    def __init__(self, seed: int, rows: int = ROWS, length: int = LENGTH) -> None:
        self.seed, self.rows, self.length = seed, rows, length

    def batch(self, number: int, rank: int = 0, world: int = 1) -> Batch:
        """Every `world`-th row from `rank` on."""
        generator = np.random.default_rng((self.seed, number))
        last = len(text()) - HELD_OUT_TOKENS - 2 * self.length
        return _rows(generator.integers(0, last, self.rows)[rank::world], self.length)


def held_out(length: int = LENGTH) -> Iterator[Batch]:
    """The last 262,144 bytes, 32 rows at a time."""
    first = len(text()) - HELD_OUT_TOKENS - 1
    starts = np.arange(first, len(text()) - length, length)
    for chunk in np.array_split(starts, max(1, len(starts) // 32)):
        yield _rows(chunk, length)


def _rows(starts: np.ndarray, length: int) -> Batch:
    ids = torch.from_numpy(np.stack([text()[s : s + length + 1] for s in starts]).astype(np.int64))
    return Batch(ids[:, :-1], ids[:, 1:], torch.ones(ids.shape[0], length))


def trainer(config: TrainConfig, seed: int, dtype: torch.dtype = torch.bfloat16, **more: Any) -> Trainer:
    """Of this text; uncompiled, so that runs are the same with a compiler or without."""
    return Trainer(config, Source(seed), Path("."), {}, dtype, compiled=False, **more)


def held_out_losses(made: Trainer) -> list[float]:
    """Of each held-out batch, in nats a token."""
    with torch.no_grad():
        return [float(made.loss(batch, watch=False)) / float(batch.weights.sum()) for batch in held_out()]


def run(made: Trainer) -> tuple[list[dict[str, Any]], float]:
    """All steps; the lines, and the seconds they took."""
    began = time.perf_counter()
    lines = []
    while made.progress < 1:
        lines.append(made.train_step(made.next_batch()))
    return lines, time.perf_counter() - began


def about() -> dict[str, Any]:
    """The machine and the commit, for every line of results."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent, capture_output=True, text=True, check=False,
    ).stdout.strip()  # fmt: skip
    return {
        "commit": commit or None, "cpu": processor().model, "cores": os.cpu_count(), "threads": torch.get_num_threads(),
        "python": platform.python_version(), "torch": torch.__version__,
    }  # fmt: skip
