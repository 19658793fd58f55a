"""sft: a finished model learns from conversations: thinking, tool calls and answers count, what it reads does not.

    k2 train sft model=DIR data=chats.jsonl --minutes 20
    k2 train sft data=chats.jsonl lora=16    # adapters on attention and shared experts; the other weights stay

A line of the data has `messages` in OpenAI's form, and `tools` where there are any. A model whose experts are int4 is
trained on the grid and stays int4.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from karakoram.config import ModelConfig
from karakoram.env import bundled_model_dir
from karakoram.errors import InputError
from karakoram.model.load import load_model
from karakoram.model.transformer import Transformer
from karakoram.train.config import BalanceConfig, BatchConfig, OptimizerConfig, ScheduleConfig, TrainConfig
from karakoram.train.corpus import Corpus
from karakoram.train.post import lora as low_rank
from karakoram.train.recipe import Recipe

STEPS = 1000


def recipe(
    data: str = "",
    held_out: str = "",
    model: Path | None = None,
    lora: int = 0,
    sequence_tokens: int = 1024,
    minutes: float | None = None,
    steps: int | None = None,
    seed: int = 0,
) -> Recipe:
    """Raises InputError without data, ConfigError for a model that is none."""
    if not data:
        raise InputError("The recipe sft needs data.", "Give data=FILE.jsonl with a conversation a line.")
    if lora < 0:
        raise InputError(f"lora is {lora}.", "Give the adapters' rank, as lora=16, or 0 to train all weights.")
    start = model or bundled_model_dir()
    shape = ModelConfig.from_dir(start)
    plan = TrainConfig(
        model=shape,
        steps=steps or STEPS,
        minutes=minutes,
        optimizer=OptimizerConfig(learning_rate=1e-3),
        schedule=ScheduleConfig(warmup_steps=20, decay_from=0.0),
        batch=BatchConfig(tokens_per_step=8192),
        balance=BalanceConfig(rule="sign", rate=1e-3),
        int4_from=0.0 if shape.weight_format == "int4" and not lora else 1.0,
        seed=seed,
    )
    if lora:
        plan = low_rank.settings(plan)
    adapted = _Adapted(start, lora, seed) if lora else None
    corpus = Corpus("sft", data, held_out, start, sequence_tokens, read_weight=0.0, model=adapted)
    return Recipe(plan, corpus, start_from=None if lora else start)


@dataclass(frozen=True)
class _Adapted:
    """The model with adapters of a rank; everything else frozen."""

    start: Path
    rank: int
    seed: int

    def __call__(self, dtype: torch.dtype) -> Transformer:
        model = load_model(self.start, dtype=dtype, dense=True)
        low_rank.adapt(model, self.rank, 2.0 * self.rank, seed=self.seed)
        return model
