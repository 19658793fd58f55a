"""A model of the smallest K2 shape, a task that it learns in seconds, and the pieces of a run around them."""

from pathlib import Path
from typing import Any

import torch

from karakoram.config import ModelConfig
from karakoram.train.config import (
    BalanceConfig,
    CheckpointConfig,
    GuardConfig,
    OptimizerConfig,
    ScheduleConfig,
    TrainConfig,
)
from karakoram.train.data.batches import Batch
from karakoram.train.trainer import Trainer

SHAPE: dict[str, Any] = {
    "model_type": "kimi_k2",
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 128,
}


def model_config(**changes: Any) -> ModelConfig:
    """The shape, with the defaults of the nano preset for what it leaves open."""
    return ModelConfig.from_dict({**ModelConfig.preset("nano").to_dict(), **SHAPE, **changes})


_PARTS: dict[str, type] = {
    "optimizer": OptimizerConfig, "schedule": ScheduleConfig, "balance": BalanceConfig, "guard": GuardConfig,
    "checkpoints": CheckpointConfig,
}  # fmt: skip


def train_config(model: ModelConfig | None = None, **changes: Any) -> TrainConfig:
    """Thirty steps at rates that a model of this size likes; a part's field is named `part__field`."""
    settings = {
        "steps": 30, "schedule__warmup_steps": 4, "optimizer__learning_rate": 2e-2,
        "optimizer__adamw_learning_rate": 1e-2, "int4_from": 0.8, **changes,
    }  # fmt: skip
    parts: dict[str, dict[str, Any]] = {part: {} for part in _PARTS}
    for name in [name for name in settings if "__" in name]:
        part, field = name.split("__")
        parts[part][field] = settings.pop(name)
    made = {part: _PARTS[part](**fields) for part, fields in parts.items()}
    return TrainConfig(model=model or model_config(), **made, **settings)


class CopyTask:
    """Rows `a b c … | a b c …`: only the second half counts, and attention over the first half predicts it."""

    def __init__(self, rows: int = 32, length: int = 8) -> None:
        self.rows, self.length = rows, length

    def batch(self, number: int, rank: int = 0, world: int = 1) -> Batch:
        return self[number].map(lambda rows: rows[rank::world])

    def __getitem__(self, number: int) -> Batch:
        generator = torch.Generator().manual_seed(number)
        half = torch.randint(2, SHAPE["vocab_size"], (self.rows, self.length), generator=generator)
        bar = torch.ones(self.rows, 1, dtype=torch.int64)
        ids = torch.cat((half, bar, half), 1)
        weights = torch.zeros(self.rows, ids.shape[1] - 1)
        weights[:, self.length :] = 1
        return Batch(ids[:, :-1], ids[:, 1:], weights)


def trainer(out: Path, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Trainer:
    """A trainer of the copy task, uncompiled: it starts at once, and is the same with a compiler or without."""
    torch.set_num_threads(1)  # a sum over threads depends on how many there are
    return Trainer(train_config(**changes), CopyTask(), out, {"note.txt": b"beside the weights"}, dtype, compiled=False)
