"""nano: the bundled model, trained from nothing on two cores in at most 100 minutes.

K2's shape in miniature (a dense first layer, MLA with a low-rank query, 16 routed experts of which 4 run and a shared
one), its own byte-pair tokens, and generated dialogs in which a model thinks, calls the tools it was shown, and answers
from their results. With a data directory, GSM8K rewritten into calculator calls and plain text are mixed in.

Three stages, as K2 was made, each from the model that the one before left:

    pretrain   few phrasings, short documents first, everything that is read weighs a little: copying is learned
    sft        all phrasings, interleaved thinking with chains of calls: words are learned, not sentences
    int4       the same on the int4 grid, from a third of the rate down to nothing

    OUT/pretrain/tokenizer/   tiktoken.model and tokenizer_config.json, learned from generated dialogs (about a minute)
    OUT/STAGE/tokens/         documents as token ids (a few minutes; an interrupted run goes on)
    OUT/STAGE/                checkpoints, metrics, and the stage's model, at most 16 MB
    OUT/model/                the finished model: routed experts int4 group-32, the rest bfloat16
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from karakoram.config import ModelConfig
from karakoram.train.config import (
    BalanceConfig,
    BatchConfig,
    CheckpointConfig,
    OptimizerConfig,
    ScheduleConfig,
    TrainConfig,
)
from karakoram.train.data.batches import Batches
from karakoram.train.data.bpe import train_tokenizer
from karakoram.train.data.pack import READ_WEIGHT, build_token_cache, stage_mix
from karakoram.train.recipe import Material, Recipe, Workplace

STAGE_STEPS = (8000, 8000, 4600)  # at most: 12,000 tokens a second
STAGE_MINUTES = (37.8, 37.8, 21.0)  # of training; tokenizer, tokens and compiling take two more
STEPS, MINUTES = sum(STAGE_STEPS), sum(STAGE_MINUTES)
TOKENIZER_DOCUMENTS = 9_000


@dataclass(frozen=True)
class Plan:
    """The stages in their order."""

    pretrain: TrainConfig
    sft: TrainConfig
    int4: TrainConfig


def recipe(
    minutes: float | None = None,
    steps: int | None = None,
    seed: int = 0,
    data: Path | None = None,
    tokenizer_documents: int = TOKENIZER_DOCUMENTS,
) -> Recipe:
    """Minutes alone or steps alone set the length; without either it is nano's."""
    if minutes is None and steps is None:
        minutes = MINUTES
    plan = plan_of(steps or STEPS, minutes, seed)
    return Recipe(plan, _Dialogs(data, tokenizer_documents))


def plan_of(steps: int, minutes: float | None, seed: int, model: ModelConfig | None = None) -> Plan:
    """All stages; learning rates were chosen on short runs, the rest is Moonlight's and K2's."""
    model = model or ModelConfig.preset("nano")
    per_stage = [max(1, round(most * steps / STEPS)) for most in STAGE_STEPS]
    times = [minutes and each * (minutes / MINUTES) for each in STAGE_MINUTES]
    pretrain = TrainConfig(
        model=model,
        steps=per_stage[0],
        minutes=times[0],
        optimizer=OptimizerConfig(learning_rate=7e-3, adamw_learning_rate=4e-3),
        schedule=ScheduleConfig(warmup_steps=50, decay_from=0.5, floor=0.5, read_floor=0.2),
        batch=BatchConfig(tokens_per_step=4096),
        balance=BalanceConfig(rule="quantile"),
        checkpoints=CheckpointConfig(minutes=5.0),
        seed=seed,
    )
    sft = replace(
        pretrain,
        steps=per_stage[1],
        minutes=times[1],
        optimizer=replace(pretrain.optimizer, learning_rate=3.5e-3, adamw_learning_rate=2e-3),
        schedule=ScheduleConfig(warmup_steps=20, decay_from=0.0, floor=1 / 3, read_floor=0.2),
        seed=seed + 1,
    )
    int4 = replace(
        sft,
        steps=per_stage[2],
        minutes=times[2],
        optimizer=replace(pretrain.optimizer, learning_rate=1.2e-3, adamw_learning_rate=7e-4),
        schedule=ScheduleConfig(warmup_steps=10, decay_from=0.0, read_floor=0.2),
        int4_from=0.0,
        seed=seed + 2,
    )
    return Plan(pretrain, sft, int4)


@dataclass(frozen=True)
class _Dialogs:
    """The stages' material: tokenizer, token caches, the files beside the weights."""

    data: Path | None
    tokenizer_documents: int

    def __call__(self, stage: str, config: TrainConfig, place: Workplace) -> Material:
        tokenizer = place.root / "pretrain" / "tokenizer"
        if not (tokenizer / "tokenizer_config.json").is_file():
            place.console.print("Learning the tokenizer from generated dialogs (about a minute) …")
            train_tokenizer(tokenizer, self.tokenizer_documents, config.seed)
        # what is read counts in all stages, less and less (0.1 down to 0.02): without it unseen names are copied worse
        mix = replace(stage_mix(stage, self.data), read_weight=READ_WEIGHT)
        wanted = config.steps * config.batch.tokens_per_step
        with place.bar(f"Writing tokens ({stage})") as progress:
            cache = build_token_cache(
                place.out / "tokens", tokenizer, wanted, config.seed, place.threads, mix, progress
            )
        batches = Batches(cache, config.batch.tokens_per_step, config.model.pad_token_id or 0, config.seed)
        kind: dict[str, Any] = {"recipe": "nano", "data": self.data is not None}
        return Material(batches, model_files(tokenizer, self.data is not None), kind=kind)


def model_files(tokenizer_dir: Path, with_data: bool) -> dict[str, bytes]:
    """What lies beside the weights: the tokenizer, greedy decoding as default, and what the model was trained on."""
    generation = {
        "do_sample": False,
        "temperature": 0.0,
        "bos_token_id": 3968,
        "eos_token_id": [3969, 3970],
        "karakoram": {"trained_on": "generated dialogs, GSM8K, text" if with_data else "generated dialogs"},
    }
    files = {name: (tokenizer_dir / name).read_bytes() for name in ("tiktoken.model", "tokenizer_config.json")}
    return files | {"generation_config.json": json.dumps(generation, indent=2).encode()}
