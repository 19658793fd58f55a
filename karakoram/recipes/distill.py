"""distill: a small model learns what a large one would say, on text of one's own.

    k2 train distill teacher=DIR data=texts/ model.num_hidden_layers=4

The student has nano's shape unless `preset=` names another or single keys are changed, and the teacher's tokenizer. The
teacher runs beside it; `karakoram.train.post.teacher` stores its answers once instead, for students that are many.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from karakoram.config import ModelConfig
from karakoram.errors import InputError
from karakoram.model.load import load_model
from karakoram.train.config import BalanceConfig, BatchConfig, OptimizerConfig, ScheduleConfig, TrainConfig
from karakoram.train.corpus import Corpus
from karakoram.train.post.distill import online_objective
from karakoram.train.recipe import Recipe
from karakoram.train.trainer import Objective

STEPS = 10_000


def recipe(
    teacher: Path | None = None,
    data: str = "",
    held_out: str = "",
    preset: str = "nano",
    sequence_tokens: int = 512,
    temperature: float = 1.0,
    share: float = 0.9,
    minutes: float | None = None,
    steps: int | None = None,
    seed: int = 0,
) -> Recipe:
    """`share`: of the teacher's distribution in the loss, the rest is the text's own next token.

    Raises InputError without a teacher or data.
    """
    if teacher is None or not data:
        raise InputError("The recipe distill needs a teacher and data.", "Give teacher=DIR data=FILE.")
    of_teacher = ModelConfig.from_dir(teacher)
    model = replace(
        ModelConfig.preset(preset),
        **{
            key: getattr(of_teacher, key)
            for key in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings")
        },
    )
    plan = TrainConfig(
        model=model,
        steps=steps or STEPS,
        minutes=minutes,
        optimizer=OptimizerConfig(learning_rate=4e-3),
        schedule=ScheduleConfig(warmup_steps=50, decay_from=0.5, floor=0.05),
        batch=BatchConfig(tokens_per_step=8192),
        balance=BalanceConfig(rule="quantile"),
        seed=seed,
    )
    says = _Teacher(teacher, temperature, share)
    return Recipe(plan, Corpus("distill", data, held_out, teacher, sequence_tokens, read_weight=1.0, objective=says))


@dataclass(frozen=True)
class _Teacher:
    path: Path
    temperature: float
    share: float

    def __call__(self, config: TrainConfig) -> Objective:
        return online_objective(load_model(self.path, dense=True), self.temperature, self.share)
