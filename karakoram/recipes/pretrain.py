"""pretrain: a model of K2's shape from nothing, on text of one's own.

    k2 train pretrain data=texts/ --minutes 30
    k2 train pretrain data=code/:3,notes.jsonl:1 held_out=check.jsonl model.num_hidden_layers=8

The shape is nano's unless `preset=` names another or single keys are changed; the tokenizer is the bundled one unless
`tokenizer=DIR` names another. What is tokenised once is found again.
"""

from pathlib import Path

from karakoram.config import ModelConfig
from karakoram.env import bundled_model_dir
from karakoram.errors import InputError
from karakoram.train.config import BalanceConfig, BatchConfig, OptimizerConfig, ScheduleConfig, TrainConfig
from karakoram.train.corpus import Corpus
from karakoram.train.recipe import Recipe

STEPS = 20_000


def recipe(
    data: str = "",
    held_out: str = "",
    preset: str = "nano",
    tokenizer: Path | None = None,
    sequence_tokens: int = 512,
    minutes: float | None = None,
    steps: int | None = None,
    seed: int = 0,
) -> Recipe:
    """Raises InputError without data."""
    if not data:
        raise InputError("The recipe pretrain needs data.", "Give data=FILE or data=FOLDER: text, JSON lines, Parquet.")
    plan = TrainConfig(
        model=ModelConfig.preset(preset),
        steps=steps or STEPS,
        minutes=minutes,
        optimizer=OptimizerConfig(learning_rate=4e-3),
        schedule=ScheduleConfig(warmup_steps=50, decay_from=0.6, floor=0.05),
        batch=BatchConfig(tokens_per_step=8192),
        balance=BalanceConfig(rule="quantile"),
        seed=seed,
    )
    return Recipe(
        plan, Corpus("pretrain", data, held_out, tokenizer or bundled_model_dir(), sequence_tokens, read_weight=1.0)
    )
