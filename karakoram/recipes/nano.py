"""nano: the bundled model, trained from nothing on two cores in at most 90 minutes.

K2's shape in miniature (a dense first layer, MLA with a low-rank query, 16 routed experts of which 4 run and a shared
one), its own byte-pair tokens, and generated dialogs in which a model thinks, calls the tools it was shown, and answers
from their results. With a data directory, GSM8K rewritten into calculator calls and plain text are mixed in.

    OUT/tokenizer/   tiktoken.model and tokenizer_config.json, learned from generated dialogs (about a minute)
    OUT/tokens/      documents as token ids (a few minutes; an interrupted run goes on)
    OUT/step-N/      checkpoints, the newest two, each with a `.state` beside it
    OUT/metrics.jsonl
    OUT/model/       the finished model: routed experts int4 group-32, the rest bfloat16
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from karakoram.config import ModelConfig
from karakoram.train.config import TrainConfig
from karakoram.train.data.batches import Batches
from karakoram.train.data.bpe import train_tokenizer
from karakoram.train.data.pack import Mix, build_token_cache
from karakoram.train.machine import faster_dtype, keep_freed_memory
from karakoram.train.run_dir import open_run, recorded_settings, settings_of
from karakoram.train.trainer import Trainer

STEPS = 11_000
MINUTES = 80.0  # of training; tokenizer, tokens and compiling take the other ten
TOKENIZER_DOCUMENTS = 9_000
WITH_DATA = {"dialogs": 0.8, "gsm8k": 0.12, "text": 0.08}


def configuration(steps: int = STEPS, minutes: float | None = MINUTES, seed: int = 0) -> TrainConfig:
    """The full configuration; learning rates were chosen on short runs, the rest is Moonlight's and K2's."""
    return TrainConfig(
        model=ModelConfig.preset("nano"),
        steps=steps,
        minutes=minutes,
        tokens_per_step=4096,
        learning_rate=7e-3,
        adamw_learning_rate=4e-3,
        warmup_steps=50,
        decay_from=0.3,
        int4_from=0.8,
        read_floor=0.2,
        balance_rate=3e-3,  # three times Moonlight's: a few thousand steps must move a bias as far as its millions did
        seed=seed,
    )


def run(
    out_dir: Path,
    data_dir: Path | None = None,
    resume: bool = False,
    minutes: float | None = None,
    steps: int | None = None,
    threads: int | None = None,
    seed: int = 0,
    quiet: bool = False,
) -> Path:
    """Train and return the finished model's directory.

    Minutes alone or steps alone set the length; without either it is nano's. Raises TrainingError as `open_run` and
    `Trainer.run` do.
    """
    if minutes is None and steps is None:
        minutes = MINUTES
    config = configuration(steps or STEPS, minutes, seed)
    return run_configuration(config, out_dir, data_dir, resume, threads or os.cpu_count() or 1, quiet)


def run_configuration(
    config: TrainConfig,
    out_dir: Path,
    data_dir: Path | None = None,
    resume: bool = False,
    threads: int = 1,
    quiet: bool = False,
    tokenizer_documents: int = TOKENIZER_DOCUMENTS,
    compiled: bool = True,
) -> Path:
    """The recipe at any size: its steps from the tokenizer to the finished model, for a configuration of one's own."""
    keep_freed_memory()
    torch.set_num_threads(threads)
    # a resumed run goes on in the dtype it began with, even if the other one is faster today
    dtype = _dtype(recorded_settings(out_dir)) if resume else faster_dtype()
    kind = {"recipe": "nano", "data": data_dir is not None, "dtype": str(dtype).removeprefix("torch.")}
    console = Console(stderr=True, quiet=quiet)
    with open_run(out_dir, settings_of(config, **kind), resume):
        tokenizer_dir = out_dir / "tokenizer"
        if not (tokenizer_dir / "tokenizer_config.json").is_file():
            console.print("Learning the tokenizer from generated dialogs (about a minute) …")
            train_tokenizer(tokenizer_dir, tokenizer_documents, config.seed)
        cache = _tokens(config, out_dir / "tokens", tokenizer_dir, data_dir, threads, quiet)
        batches = Batches(cache, config.tokens_per_step, config.model.pad_token_id or 0, config.seed)
        files = model_files(tokenizer_dir, data_dir is not None)
        trainer = Trainer(config, batches, out_dir, files, dtype, compiled)
        if resume:
            trainer.resume()
        if trainer.finished:
            console.print(f"This run is finished: it ended with step {trainer.step}. Nothing was left to do.")
        else:
            console.print(f"Training {config.model.hidden_size}-wide nano in {kind['dtype']}; Ctrl-C saves.")
        model_dir = trainer.finished or trainer.run(quiet)
    console.print(f"Finished: {model_dir}. Talk to it with: k2 chat {model_dir}")
    return model_dir


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


def _tokens(
    config: TrainConfig, cache: Path, tokenizer_dir: Path, data_dir: Path | None, processes: int, quiet: bool
) -> Path:
    mix = Mix(**WITH_DATA, data_dir=str(data_dir)) if data_dir else Mix()
    wanted = config.steps * config.tokens_per_step
    with _bar("Writing tokens", quiet) as progress:
        return build_token_cache(cache, tokenizer_dir, wanted, config.seed, processes, mix, progress)


def _dtype(settings: Mapping[str, Any]) -> torch.dtype:
    known = {"bfloat16": torch.bfloat16, "float32": torch.float32}
    return known.get(settings.get("dtype", "")) or faster_dtype()


@contextmanager
def _bar(what: str, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    columns = (TextColumn(what), BarColumn(), TextColumn("{task.completed:,} of {task.total:,}"), TimeRemainingColumn())
    with Progress(*columns, disable=quiet) as progress:
        task = progress.add_task(what, total=1)
        yield lambda done, total: progress.update(task, completed=min(done, total), total=total)
