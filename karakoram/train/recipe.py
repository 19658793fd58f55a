"""A recipe: one or more stages, each a configuration and its data, each beginning with the model of the one before.

    OUT/                      a single stage lies here itself
    OUT/STAGE/                else one directory a stage, as `trainer.py` draws it
    OUT/model/                the last stage's model

A stage that is finished is not run again, so that a run of hours can be stopped between or within stages and resumed.
Recipes are functions in `karakoram/recipes/` or in a user's file; `plan` is what `k2 train NAME key=value` can change.
"""

import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from karakoram.distributed.mesh import Alone, Ranks, start
from karakoram.env import memory
from karakoram.errors import TrainingError
from karakoram.model.cost import parameters
from karakoram.train.checkpoints.find import newest
from karakoram.train.config import TrainConfig
from karakoram.train.data.batches import Batch
from karakoram.train.machine import faster_dtype, keep_freed_memory
from karakoram.train.optim.newton_schulz import named
from karakoram.train.record.directory import open_run, recorded_settings, settings_of
from karakoram.train.record.sinks import open_sinks
from karakoram.train.trainer import BatchSource, Objective, Trainer


@dataclass(frozen=True)
class Workplace:
    """Where and with what a stage's material is made.

    root     the run's directory; out: the stage's own, for token caches and the like
    before   the model of the stage before, or that the recipe starts from; None: fresh weights
    """

    root: Path
    out: Path
    before: Path | None
    threads: int
    quiet: bool

    @contextmanager
    def bar(self, what: str) -> Iterator[Callable[[int, int], None]]:
        """A progress bar for `progress(done, total)`."""
        columns = (
            TextColumn(what), BarColumn(), TextColumn("{task.completed:,} of {task.total:,}"), TimeRemainingColumn()
        )  # fmt: skip
        with ExitStack() as shown:  # from the first call on: there is nothing to show where all is found done
            progress = Progress(*columns, console=self.console, disable=self.quiet)
            task = progress.add_task(what)

            def update(done: int, total: int) -> None:
                if not progress.live.is_started:
                    shown.enter_context(progress)
                progress.update(task, completed=min(done, total), total=total)

            yield update

    def say(self, note: str) -> None:
        """A line on standard error, as it is: file names may hold what Rich takes for markup."""
        self.console.print(note, soft_wrap=True, markup=False, highlight=False)

    @property
    def console(self) -> Console:
        """Standard error, silent in a quiet run."""
        return Console(stderr=True, quiet=self.quiet)


@dataclass(frozen=True)
class Material:
    """What a stage trains on.

    files      written beside the weights: the tokenizer and the like
    kind       recorded in run.json beside the configuration: a resumed run must be given the same
    model      None: as the configuration describes it; else it is made with this, given the dtype
    """

    batches: BatchSource
    files: Mapping[str, bytes] = field(default_factory=dict)
    held_out: Sequence[Batch] = ()
    kind: Mapping[str, Any] = field(default_factory=dict)
    objective: Objective | None = None
    model: Callable[[torch.dtype], Any] | None = None


@dataclass(frozen=True)
class Recipe:
    """plan: a TrainConfig, or a frozen dataclass whose fields are the stages' TrainConfigs, in order.

    start_from   a model in HF layout that the first stage begins with; None: fresh weights
    """

    plan: Any
    material: Callable[[str, TrainConfig, Workplace], Material]
    start_from: Path | None = None

    def stages(self) -> list[tuple[str, TrainConfig]]:
        """Names and configurations; a single one has the empty name."""
        if isinstance(self.plan, TrainConfig):
            return [("", self.plan)]
        assert is_dataclass(self.plan)
        return [(each.name, getattr(self.plan, each.name)) for each in fields(self.plan)]

    def with_plan(self, plan: Any) -> "Recipe":
        """The same recipe with another plan."""
        return replace(self, plan=plan)


@dataclass(frozen=True)
class Manner:
    """How a recipe is run, whatever it trains.

    sinks         names that `open_sinks` knows
    expert_ranks  under torchrun: over how many ranks the experts of a layer are split
    """

    resume: bool = False
    threads: int | None = None
    quiet: bool = False
    compiled: bool = True
    dtype: torch.dtype | None = None
    sinks: Sequence[str] = ()
    expert_ranks: int = 1


def run_recipe(recipe: Recipe, out: Path, manner: Manner | None = None) -> Path:
    """Train all stages and return the finished model's directory.

    Under torchrun every rank calls it. Raises TrainingError as `open_run` and `Trainer.run` do; where `out` holds a run
    already and it is not to be resumed.
    """
    manner = manner or Manner()
    keep_freed_memory()
    ranks = start(manner.expert_ranks)
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # ranks on this machine, by torchrun
    torch.set_num_threads(manner.threads or max(1, (os.cpu_count() or 1) // here))
    stages, before = recipe.stages(), recipe.start_from
    quiet = manner.quiet or not ranks.is_main
    for _, config in stages:
        named(config.optimizer.coefficients)  # before hours of tokenising, not after
    place = Workplace(out, out, before, torch.get_num_threads(), quiet)
    with ranks.together():
        _refuse_mixture(out, stages, manner.resume)
        ranks.barrier()
        for name, config in stages:
            place = replace(place, out=out / name if name else out, before=before)
            before = _run_stage(recipe, name, config, place, manner, ranks)
        if stages[-1][0] and ranks.is_main:
            _publish(place.out / "model", out / "model")
        ranks.barrier()
    place.say(f"Finished: {out / 'model'}. Talk to it with: k2 chat {out / 'model'}")
    return out / "model"


def _run_stage(
    recipe: Recipe, name: str, config: TrainConfig, place: Workplace, manner: Manner, ranks: Alone | Ranks
) -> Path:
    going_on = manner.resume and newest(place.out) is not None
    stage = f"stage {name}" if name else "this run"
    if manner.resume and not going_on and recorded_settings(place.out):
        place.say(f"Nothing was saved of {stage} before it stopped: it begins anew.")
    # a resumed run goes on in the dtype it began with, even if the other one is faster today
    dtype = (_dtype(recorded_settings(place.out)) if going_on else manner.dtype) or _agreed(faster_dtype(), ranks)
    told = {"stage": name, "dtype": str(dtype).removeprefix("torch.")}
    try:
        material = _made(recipe, name, config, place, ranks)
    except KeyboardInterrupt as error:
        raise TrainingError(
            f"Stopped before {stage} began: its data were not ready.",
            "The same command goes on; what was tokenised in whole shards is found again.",
        ) from error
    if material.model is None:
        _check_memory(config, dtype, ranks)
    settings = settings_of(config, **told, **material.kind)
    with open_run(place.out, settings, going_on) if ranks.is_main else nullcontext():
        ranks.barrier()
        model = None if material.model is None else material.model(dtype)
        trainer = Trainer(
            config, material.batches, place.out, material.files, dtype, manner.compiled and ranks.world == 1, model,
            material.held_out, material.objective, ranks=ranks,
        )  # fmt: skip
        if going_on:
            trainer.resume()
        elif place.before is not None:
            trainer.start_from(place.before)
        if trainer.finished:
            place.console.print(f"{stage.capitalize()} is finished: it ended with step {trainer.step}.")
            return trainer.finished
        if config.schedule.warmup_steps > config.steps:
            place.say(
                f"The warmup (schedule.warmup_steps={config.schedule.warmup_steps}) is longer than the run of "
                f"{config.steps} steps: the learning rate stays below its peak."
            )
        place.console.print(f"Training ({stage}) in {told['dtype']}; Ctrl-C saves.")
        if ranks.is_main:
            trainer.sinks = open_sinks(manner.sinks, place.out, settings, trainer.step)
        return trainer.run(place.quiet)


def _made(recipe: Recipe, name: str, config: TrainConfig, place: Workplace, ranks: Alone | Ranks) -> Material:
    """The first rank tokenises, for hours perhaps; the others find it done."""
    if ranks.is_main:
        material = recipe.material(name, config, place)
        ranks.follow(f"material {name}")
        return material
    ranks.follow(f"material {name}")
    return recipe.material(name, config, place)


def _agreed(dtype: torch.dtype, ranks: Alone | Ranks) -> torch.dtype:
    """float32 where any rank found it faster: each measures for itself, and all must compute in one dtype."""
    wide = ranks.any(dtype == torch.float32)
    return torch.float32 if wide else torch.bfloat16


def _check_memory(config: TrainConfig, dtype: torch.dtype, ranks: Alone | Ranks) -> None:
    """Refuse what cannot be held, before the machine ends this process or another: activations are not counted."""
    if ranks.device.type != "cpu":
        return
    # weights and gradients; the float32 master and momentum
    per_parameter_bytes = 2 * dtype.itemsize + 8
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) / ranks.world
    needed_bytes = int(parameters(config.model).total * per_parameter_bytes * here)
    total_bytes = memory().total_bytes
    if total_bytes is not None and needed_bytes > total_bytes:
        raise TrainingError(
            f"Training this model takes {needed_bytes / 1e9:,.0f} GB and more, and this machine has "
            f"{total_bytes / 1e9:,.0f} GB of memory.",
            "Choose a smaller shape (model.…, preset=nano), or more machines; k2 plan NAME --train counts for both.",
        )


def _refuse_mixture(out: Path, stages: Sequence[tuple[str, TrainConfig]], resume: bool) -> None:
    held = [name for name, _ in stages if newest(out / name if name else out) is not None]
    if held and not resume:
        raise TrainingError(
            f"{out} already holds a run{f', in its stage {held[-1]}' if held[-1] else ''}.",
            "Go on with it by --resume, or begin another in another directory (--out DIR).",
        )
    if resume and not held and not any((out / name / "run.json").is_file() for name, _ in stages):
        raise TrainingError(f"There is no checkpoint to resume in {out}.", "Leave out --resume to begin anew.")


def _publish(found: Path, model_dir: Path) -> None:
    if (model_dir / "config.json").is_file():
        return
    partial = model_dir.with_name(f".{model_dir.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(found, partial)
    os.replace(partial, model_dir)


def _dtype(settings: Mapping[str, Any]) -> torch.dtype | None:
    return {"bfloat16": torch.bfloat16, "float32": torch.float32}.get(settings.get("dtype", ""))
