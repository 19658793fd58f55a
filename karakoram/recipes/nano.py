"""nano: the bundled model, trained from nothing on two cores in at most 90 minutes.

K2's shape in miniature (a dense first layer, MLA with a low-rank query, 16 routed experts of which 4 run and a shared one), its
own byte-pair tokens, and generated dialogs in which a model thinks, calls the tools it was shown, and answers from their
results. With a data directory, GSM8K rewritten into calculator calls and plain text are mixed in.

    OUT/tokenizer/   tiktoken.model and tokenizer_config.json, learned from generated dialogs (about a minute)
    OUT/tokens/      documents as token ids (a few minutes; an interrupted run goes on)
    OUT/step-N/      checkpoints, the newest two, each with a `.state` beside it
    OUT/metrics.jsonl
    OUT/model/       the finished model: routed experts int4 group-32, the rest bfloat16
"""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from karakoram.config import ModelConfig
from karakoram.train.config import TrainConfig
from karakoram.train.data.batches import Batches
from karakoram.train.data.bpe import train_tokenizer
from karakoram.train.data.pack import Mix, build_token_cache
from karakoram.train.machine import faster_dtype, keep_freed_memory
from karakoram.train.trainer import Trainer

STEPS = 6000
MINUTES = 80.0  # of training; tokenizer, tokens and compiling take the other ten
WITH_DATA = {"dialogs": 0.8, "gsm8k": 0.12, "text": 0.08}


def configuration(steps: int = STEPS, minutes: float | None = MINUTES, seed: int = 0) -> TrainConfig:
    """The full configuration; learning rates were chosen on short runs, the rest is Moonlight's and K2's."""
    return TrainConfig(
        model=ModelConfig.preset("nano"),
        steps=steps,
        minutes=minutes,
        tokens_per_step=6144,
        learning_rate=5e-3,
        adamw_learning_rate=3e-3,
        warmup_steps=60,
        decay_from=0.5,
        int4_from=0.7,
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
    """Train and return the finished model's directory. Minutes alone or steps alone set the length; both default to nano's."""
    keep_freed_memory()
    torch.set_num_threads(threads or os.cpu_count() or 1)
    if minutes is None and steps is None:
        minutes = MINUTES
    config = configuration(steps or STEPS, minutes, seed)
    console = Console(stderr=True, quiet=quiet)
    tokenizer_dir = out_dir / "tokenizer"
    if not (tokenizer_dir / "tokenizer_config.json").is_file():
        console.print("Learning the tokenizer from generated dialogs (about a minute) …")
        train_tokenizer(tokenizer_dir, seed=seed)
    mix = Mix(**WITH_DATA, data_dir=str(data_dir)) if data_dir else Mix()
    with _bar("Writing tokens", quiet) as progress:
        tokens = config.steps * config.tokens_per_step
        cache = build_token_cache(out_dir / "tokens", tokenizer_dir, tokens, seed, os.cpu_count() or 1, mix, progress)
    dtype = faster_dtype()
    console.print(
        f"Training {config.model.hidden_size}-wide nano in {str(dtype).removeprefix('torch.')}; Ctrl-C saves."
    )
    pad_id = config.model.pad_token_id or 0
    batches = Batches(cache, config.tokens_per_step, pad_id, seed)
    trainer = Trainer(config, batches, out_dir, model_files(tokenizer_dir, data_dir is not None), dtype)
    if resume:
        trainer.resume()
    model_dir = trainer.run(quiet)
    console.print(f"Finished: {model_dir}. Talk to it with: k2 chat {model_dir}")
    return model_dir


def model_files(tokenizer_dir: Path, with_data: bool) -> dict[str, bytes]:
    """What lies beside the weights: the tokenizer, greedy decoding as default, and what the model was trained on."""
    generation = {"do_sample": False, "temperature": 0.0, "bos_token_id": 4992, "eos_token_id": [4993, 4994]}
    generation["karakoram"] = {"trained_on": "generated dialogs, GSM8K, text" if with_data else "generated dialogs"}
    files = {name: (tokenizer_dir / name).read_bytes() for name in ("tiktoken.model", "tokenizer_config.json")}
    return files | {"generation_config.json": json.dumps(generation, indent=2).encode()}


@contextmanager
def _bar(what: str, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    columns = (TextColumn(what), BarColumn(), TextColumn("{task.completed:,} of {task.total:,}"), TimeRemainingColumn())
    with Progress(*columns, disable=quiet) as progress:
        task = progress.add_task(what, total=1)
        yield lambda done, total: progress.update(task, completed=min(done, total), total=total)
