"""What lasts of a run: weights, optimizer state, balance, counters; how they are saved, taken up again and exported.

The loop over them is `trainer.py`. Tensors go to a checkpoint's safetensors by name, numbers to its JSON.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from karakoram.distributed.fsdp import split
from karakoram.distributed.layout import local
from karakoram.distributed.mesh import Alone, Ranks
from karakoram.errors import TrainingError
from karakoram.model.transformer import Transformer
from karakoram.train import balance
from karakoram.train.checkpoints.export import write_model
from karakoram.train.checkpoints.run import Checkpoints
from karakoram.train.config import TrainConfig
from karakoram.train.data.batches import Batch
from karakoram.train.fuse import recompute
from karakoram.train.guard import Guard
from karakoram.train.initialize import biases_of, copy_weights, initialize
from karakoram.train.masters import Masters
from karakoram.train.optim.assign import optimizers
from karakoram.train.record.metrics import Metrics


class BatchSource(Protocol):
    """Batches by number, the same for the same number; `rank` of `world` gets its own rows of it."""

    def batch(self, number: int, rank: int = 0, world: int = 1) -> Batch:
        """Number counts from 0."""
        ...


class RunState:
    """Everything of a run that a checkpoint holds, and the checkpoints.

    files  written into every one: the tokenizer and the like
    model  instead of fresh weights: already loaded, perhaps with parts that ask for no gradient
    """

    def __init__(
        self,
        config: TrainConfig,
        batches: BatchSource,
        out: Path,
        files: Mapping[str, bytes],
        dtype: torch.dtype,
        model: Transformer | None,
        ranks: Alone | Ranks,
    ) -> None:
        self.config, self.batches, self.out, self.files, self.ranks = config, batches, out, files, ranks
        self.model = model or initialize(Transformer(config.model, dtype=dtype), config.seed)
        self.model.to(ranks.device)
        if config.recompute:
            recompute(self.model)
        self.layouts = split(self.model, ranks)
        self.masters = Masters(self.model)
        self.muon, self.adamw = optimizers(self.masters.weights, config, self.layouts, ranks, self.model.dtype)
        self.biases = biases_of(self.model)
        self.loads = balance.Loads(config.balance.window)
        self.guard = Guard(config.guard)
        self.step, self.tokens, self.position, self.elapsed_s = 0, 0, 0, 0.0
        self.checkpoints = Checkpoints(out, config.checkpoints)

    @property
    def finished(self) -> Path | None:
        """The finished model's directory, if the run has come to its end."""
        path = self.out / "model"
        return path if self.progress >= 1 and (path / "config.json").is_file() else None

    @property
    def progress(self) -> float:
        """Share of the run that is done, by steps, tokens or time, whichever is furthest."""
        c = self.config
        by_tokens = self.tokens / c.tokens if c.tokens else 0.0
        by_time = self.elapsed_s / (60 * c.minutes) if c.minutes else 0.0
        return min(1.0, max(self.step / c.steps, by_tokens, by_time))

    def save(self, wait: bool = False) -> None:
        """Write a checkpoint of this step, if there is none yet; `wait` until it is on the disk.

        The tensors are copied and written beside the training that goes on. Raises TrainingError where this or the
        save before it fails: checkpoints from before are untouched.
        """
        if self.step != self.checkpoints.saved_step:
            self.checkpoints.save(self.step, self._tensors(), self._counters(), self._export)
        if wait:
            self.checkpoints.wait()

    def resume(self) -> None:
        """Go back to the newest checkpoint in the out directory.

        Raises TrainingError where there is none, or where it is damaged or of another run.
        """
        path = self.checkpoints.newest()
        if path is None:
            raise TrainingError(f"There is no checkpoint to resume in {self.out}.", "Leave out --resume to begin anew.")
        counters = self.checkpoints.read(path)
        if counters["seed"] != self.config.seed:
            raise TrainingError(
                f"{path} was trained with seed {counters['seed']}, this run has seed {self.config.seed}.",
                f"Resume with --seed {counters['seed']}.",
            )
        self.checkpoints.load(path, self._tensors())
        self._go_on_from(counters)

    def roll_back(self, metrics: Metrics) -> None:
        """The newest checkpoint's weights, the batches that come next: what followed was spoilt.

        Raises TrainingError where there is no checkpoint, or where it has been tried too often.
        """
        self.checkpoints.wait()
        path, at, position = self.checkpoints.newest(), self.step, self.position
        if path is None or self.guard.rollbacks >= self.config.guard.rollbacks:
            tried = "nothing was saved yet" if path is None else f"{self.guard.rollbacks} rollbacks did not help"
            raise TrainingError(
                f"{self.guard.skipped_in_a_row} batches in a row up to step {at} were refused, and {tried}.",
                f"See {self.out / 'events.jsonl'} for the reasons; begin again with a lower learning rate, "
                "or look at the data.",
            )
        guard, elapsed_s = self.guard, self.elapsed_s
        counters = self.checkpoints.read(path)
        self.checkpoints.load(path, self._tensors())
        self._go_on_from(counters)
        self.guard, self.position, self.elapsed_s = guard, position, elapsed_s
        guard.rolled_back()
        self.checkpoints.saved_step = -1  # another save of this step is news: it goes on with other batches
        self.loads = balance.Loads(self.config.balance.window)
        metrics.event(at, "rolled back", to=self.step, next_batch=position)

    def start_from(self, model_dir: Path) -> None:
        """Begin with the weights and balance of a model in HF layout; steps, time and momenta begin anew.

        Raises TrainingError where it is a model of another shape.
        """
        copy_weights(model_dir, self.masters, self.biases, {n: layout.held for n, layout in self.layouts.items()})
        self.masters.int4_experts = self.config.int4_from <= 0
        self.masters.publish()

    def finish(self) -> Path:
        """Write the finished model to OUT/model: routed experts int4 if they were trained so, or were and stayed so."""
        self.masters.int4_experts = self.config.int4_from < 1
        self.masters.publish()
        path, state = self.out / "model", self._whole_state()
        untouched = not any(".experts." in name for name in self.masters.weights)
        int4 = self.masters.int4_experts or (untouched and self.config.model.weight_format == "int4")
        if self.ranks.is_main:
            write_model(state, self.config.model, path, self.files, int4)
        self.ranks.barrier()
        return path

    def _whole_state(self) -> dict[str, Tensor]:
        """The model's tensors by name, whole on every rank."""
        state = dict(self.model.state_dict())
        for name, layout in self.layouts.items():
            if name in state:
                state[name] = layout.gathered(local(state[name]))
        return state

    def _tensors(self) -> dict[str, Tensor]:
        """What training moves, by its name in a saved state."""
        state = {f"masters/{n}": self.layouts[n].whole(t) for n, t in self.masters.weights.items()}
        state |= {f"muon/{n}": self.layouts[n].whole(t) for n, t in self.muon.state().items()}
        for name, tensor in self.adamw.state().items():
            weight = name.rsplit("/", 1)[0]
            state[f"adamw/{name}"] = self.layouts[weight].whole(tensor) if tensor.ndim else tensor
        return state | {f"bias/{n}": t for n, t in self.biases.items()}

    def _counters(self) -> dict[str, Any]:
        return {
            "step": self.step, "tokens": self.tokens, "position": self.position, "elapsed_s": self.elapsed_s,
            "seed": self.config.seed, "int4_experts": self.masters.int4_experts, "guard": self.guard.state(),
            "data": state_of(self.position) if (state_of := getattr(self.batches, "state", None)) else {},
        }  # fmt: skip

    def _go_on_from(self, counters: Mapping[str, Any]) -> None:
        self.step, self.tokens, self.position = counters["step"], counters["tokens"], counters["position"]
        self.elapsed_s = counters["elapsed_s"]
        if load := getattr(self.batches, "load", None):
            load(counters["data"])  # refuses data that changed
        self.guard.load(counters["guard"])
        # as the last step published them: at the very step where int4 begins, progress alone would say it too early
        self.masters.int4_experts = counters["int4_experts"]
        self.masters.publish()

    def _export(self, path: Path) -> None:
        if self.config.checkpoints.export and self.ranks.world == 1:  # over ranks, nobody holds the whole model
            write_model(self.model.state_dict(), self.config.model, path / "hf", self.files, int4=False)
