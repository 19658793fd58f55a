"""nano: the bundled model, trained from nothing on two cores in at most 90 minutes.

K2's shape in miniature (a dense first layer, MLA with a low-rank query, 16 routed experts of which 4 run and a shared
one), its own byte-pair tokens, and generated dialogs in which a model thinks, calls the tools it was shown, and answers
from their results. With a data directory, GSM8K rewritten into calculator calls and plain text are mixed in.

In two parts: first few phrasings, so that copying is learned; then all of them, so that words are learned rather than
sentences, from the first part's weights, at a lower rate, on the int4 grid from the beginning.

    OUT/first/tokenizer/   tiktoken.model and tokenizer_config.json, learned from generated dialogs (about a minute)
    OUT/PART/tokens/       documents as token ids (a few minutes; an interrupted run goes on); PART is first or second
    OUT/PART/step-N/       checkpoints, the newest two, each with a `.state` beside it
    OUT/PART/metrics.jsonl
    OUT/model/             the finished model: routed experts int4 group-32, the rest bfloat16
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from karakoram.config import ModelConfig
from karakoram.errors import TrainingError
from karakoram.train.config import TrainConfig
from karakoram.train.data.batches import Batches
from karakoram.train.data.bpe import train_tokenizer
from karakoram.train.data.pack import Mix, build_token_cache
from karakoram.train.machine import faster_dtype, keep_freed_memory
from karakoram.train.resume import newest
from karakoram.train.run_dir import open_run, recorded_settings, settings_of
from karakoram.train.trainer import Trainer

STEPS = 12_000
MINUTES = 80.0  # of training; tokenizer, tokens and compiling take the other ten
FIRST_SHARE = 0.8  # of steps and minutes, for the first part
TOKENIZER_DOCUMENTS = 9_000
WITH_DATA = Mix(dialogs=0.8, gsm8k=0.12, text=0.08)


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


def second_part(first: TrainConfig, steps: int, minutes: float | None) -> TrainConfig:
    """The configuration of the second part: from a third of the rate down to nothing."""
    return replace(
        first,
        steps=steps,
        minutes=minutes,
        learning_rate=first.learning_rate / 3,
        adamw_learning_rate=first.adamw_learning_rate / 3,
        decay_from=0.0,
        int4_from=0.0,
        seed=first.seed + 1,
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
    """Train both parts and return the finished model's directory.

    Minutes alone or steps alone set the length; without either it is nano's. Raises TrainingError as `open_run` and
    `Trainer.run` do.
    """
    if minutes is None and steps is None:
        minutes = MINUTES
    steps = steps or STEPS
    first_steps = max(1, round(steps * FIRST_SHARE))
    first = configuration(first_steps, minutes and minutes * FIRST_SHARE, seed)
    second = second_part(first, max(1, steps - first_steps), minutes and minutes * (1 - FIRST_SHARE))
    options: dict[str, Any] = {"data_dir": data_dir, "threads": threads or os.cpu_count() or 1, "quiet": quiet}
    in_second = resume and newest(out_dir / "second") is not None
    if not in_second:
        _refuse_finished(out_dir, resume)
        run_configuration(first, out_dir / "first", resume=resume, **options)
    found = run_configuration(second, out_dir / "second", resume=in_second, start_from=out_dir / "first", **options)
    model_dir = out_dir / "model"
    if not (model_dir / "config.json").is_file():
        partial = out_dir / ".model.partial"
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(found, partial)
        os.replace(partial, model_dir)
    Console(stderr=True, quiet=quiet).print(f"Finished: {model_dir}. Talk to it with: k2 chat {model_dir}")
    return model_dir


def _refuse_finished(out_dir: Path, resume: bool) -> None:
    if not resume and newest(out_dir / "second") is not None:
        raise TrainingError(
            f"{out_dir} already holds a run, in its second part.",
            "Go on with it by --resume, or begin another in another directory (--out DIR).",
        )


def run_configuration(
    config: TrainConfig,
    out_dir: Path,
    data_dir: Path | None = None,
    resume: bool = False,
    threads: int = 1,
    quiet: bool = False,
    tokenizer_documents: int = TOKENIZER_DOCUMENTS,
    compiled: bool = True,
    start_from: Path | None = None,
) -> Path:
    """One part at any size, from the tokenizer to its model, for a configuration of one's own.

    start_from  a first part: its tokenizer and weights, and from here on all phrasings
    """
    keep_freed_memory()
    torch.set_num_threads(threads)
    # a resumed run goes on in the dtype it began with, even if the other one is faster today
    dtype = _dtype(recorded_settings(out_dir)) if resume else faster_dtype()
    kind = {"recipe": "nano", "data": data_dir is not None, "dtype": str(dtype).removeprefix("torch.")}
    console = Console(stderr=True, quiet=quiet)
    with open_run(out_dir, settings_of(config, **kind), resume):
        tokenizer_dir = (start_from or out_dir) / "tokenizer"
        if not (tokenizer_dir / "tokenizer_config.json").is_file():
            console.print("Learning the tokenizer from generated dialogs (about a minute) …")
            train_tokenizer(tokenizer_dir, tokenizer_documents, config.seed)
        mix = replace(WITH_DATA, data_dir=str(data_dir)) if data_dir else Mix()
        mix = replace(mix, rich=start_from is not None)
        cache = _tokens(config, out_dir / "tokens", tokenizer_dir, mix, threads, quiet)
        batches = Batches(cache, config.tokens_per_step, config.model.pad_token_id or 0, config.seed)
        files = model_files(tokenizer_dir, data_dir is not None)
        trainer = Trainer(config, batches, out_dir, files, dtype, compiled)
        if resume:
            trainer.resume()
        elif start_from is not None:
            trainer.start_from(start_from)
        if trainer.finished:
            console.print(f"This run is finished: it ended with step {trainer.step}. Nothing was left to do.")
        else:
            console.print(f"Training {config.model.hidden_size}-wide nano in {kind['dtype']}; Ctrl-C saves.")
        return trainer.finished or trainer.run(quiet)


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


def _tokens(config: TrainConfig, cache: Path, tokenizer_dir: Path, mix: Mix, processes: int, quiet: bool) -> Path:
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
