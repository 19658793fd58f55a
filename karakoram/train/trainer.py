"""The training loop: batch, loss, gradients, MuonClip, balance, publish; small enough to read in one go.

Masters in float32 are what is trained; the model holds what they are published as (bfloat16, and int4 points for the
routed experts towards the end). A run is its configuration, its batches and its out directory: stop it with Ctrl-C, and
`resume` goes on with the next batch as if nothing had been.
"""

import signal
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from karakoram.errors import TrainingError
from karakoram.model.transformer import Transformer
from karakoram.model.watch import Watch
from karakoram.train import resume as saved
from karakoram.train.balance import balance
from karakoram.train.config import TrainConfig
from karakoram.train.data.batches import Batch
from karakoram.train.fuse import fuse
from karakoram.train.initialize import initialize
from karakoram.train.loss import head_loss, loss_and_gradient
from karakoram.train.masters import Masters
from karakoram.train.metrics import Metrics
from karakoram.train.optim.adamw import AdamW
from karakoram.train.optim.muon import Muon
from karakoram.train.optim.qk_clip import qk_clip
from karakoram.train.optim.schedule import rate_share
from karakoram.train.run_dir import open_run, settings_of


class BatchSource(Protocol):
    """Batches by number, the same for the same number."""

    def __getitem__(self, number: int) -> Batch: ...


def train(
    config: TrainConfig,
    data: BatchSource,
    out_dir: Path,
    resume: bool = False,
    files: Mapping[str, bytes] | None = None,
    dtype: torch.dtype = torch.bfloat16,
    compiled: bool = True,
    quiet: bool = False,
) -> Path:
    """A run from its beginning, or with `resume` from its newest checkpoint; returns the finished model's directory.

    Raises TrainingError where `out_dir` holds another run (see `open_run`), and after Ctrl-C, when all is saved.
    """
    with open_run(out_dir, settings_of(config, dtype=str(dtype)), resume):
        trainer = Trainer(config, data, out_dir, files or {}, dtype, compiled)
        if resume:
            trainer.resume()
        return trainer.run(quiet)


class Trainer:
    """Everything of a run in memory; who makes one holds the directory by `open_run`.

    files     written into every checkpoint: the tokenizer and the like
    compiled  let torch.compile fuse the small pieces where it can (about a minute at the first step)
    """

    def __init__(
        self,
        config: TrainConfig,
        batches: BatchSource,
        out: Path,
        files: Mapping[str, bytes],
        dtype: torch.dtype = torch.bfloat16,
        compiled: bool = True,
    ) -> None:
        self.config, self.batches, self.out, self.files, self.compiled = config, batches, out, files, compiled
        self.model = initialize(Transformer(config.model, dtype=dtype), config.seed)
        self.masters = Masters(self.model)
        matrices = {n: w for n, w in self.masters.weights.items() if _is_matrix(n, w)}
        others = {n: w for n, w in self.masters.weights.items() if n not in matrices}
        self.muon = Muon(matrices, config.weight_decay)
        self.adamw = AdamW(others, config.weight_decay)
        self.biases = {  # by layer: model.layers.L.mlp.gate.e_score_correction_bias
            int(name.split(".")[2]): bias
            for name, bias in self.model.named_buffers()
            if name.endswith("e_score_correction_bias")
        }
        self.watch = Watch(config.qk_clip_threshold)
        self.step, self.saved_step = 0, -1
        self.elapsed_s = 0.0
        self.slice_loss = loss_and_gradient

    def run(self, quiet: bool = False) -> Path:
        """Train to the end; returns the finished model's directory. Ctrl-C saves and raises TrainingError."""
        self.out.mkdir(parents=True, exist_ok=True)
        if self.compiled and self.progress < 1:
            self.slice_loss = fuse(self.model)
        stop = _StopOnInterrupt()
        last_saved_s = self.elapsed_s
        with Metrics(self.out / "metrics.jsonl", self.elapsed_s, quiet, self.step) as metrics, stop:
            while self.progress < 1 and not stop.asked:
                line = self.train_step(self.batches[self.step])
                self.elapsed_s = metrics.elapsed_s
                metrics.step(self.progress, line)
                if self.elapsed_s - last_saved_s > 60 * self.config.checkpoint_minutes:
                    self.save()
                    last_saved_s = self.elapsed_s
            self.save()
        if self.progress < 1:
            raise TrainingError(
                f"Training was stopped at step {self.step}; everything is saved in {self.out}.",
                "Go on with the same command and --resume.",
            )
        return self.finish()

    @property
    def finished(self) -> Path | None:
        """The finished model's directory, if the run has come to its end."""
        path = self.out / "model"
        return path if self.progress >= 1 and (path / "config.json").is_file() else None

    @property
    def progress(self) -> float:
        """Share of the run that is done, by steps or by time, whichever is further."""
        by_time = self.elapsed_s / (60 * self.config.minutes) if self.config.minutes else 0.0
        return min(1.0, max(self.step / self.config.steps, by_time))

    def train_step(self, batch: Batch) -> dict[str, float | int]:
        """One optimizer step on one batch; returns the step's line of metrics."""
        began, c = time.monotonic(), self.config
        self.masters.int4_experts = c.int4_from <= self.progress
        self.watch.reset()
        share = rate_share(self.step, c.warmup_steps, self.progress, c.decay_from)
        read_share = max(c.read_floor, rate_share(self.step, 0, self.progress, c.decay_from))
        loss = self.backward(batch, read_share)
        gradients = self.masters.gradients()
        norm = float(torch.linalg.vector_norm(torch.stack([g.float().norm() for g in gradients.values()])))
        if not (norm < float("inf")):
            raise TrainingError(
                f"The gradient became {norm} at step {self.step}.",
                f"Begin again with a lower learning rate or another seed; checkpoints in {self.out} are from before.",
            )
        scale = min(1.0, c.clip_norm / (norm + 1e-6))
        self.muon.step(gradients, c.learning_rate * share, scale)
        self.adamw.step(gradients, c.adamw_learning_rate * share, scale)
        clipped = qk_clip(self.masters.weights, self.watch.max_logits, c.model, c.qk_clip_threshold)
        violation = balance(self.biases, self.watch.loads, c.balance_rate * min(1.0, share * 2))
        self.masters.publish()
        self.step += 1
        tokens, seconds = batch.token_ids.numel(), time.monotonic() - began
        return {
            "step": self.step, "loss": loss, "rate_share": share, "gradient_norm": norm, "tokens": tokens,
            "tokens_per_s": tokens / seconds, "max_vio": violation, "clipped_heads": clipped,
            "max_logit": float(max((m.max() for m in self.watch.max_logits.values()), default=0.0)),
            "elapsed_s": self.elapsed_s + seconds,
        }  # fmt: skip

    def backward(self, batch: Batch, read_share: float = 1.0) -> float:
        """Mean weighted loss of a batch; gradients are left in the model.

        read_share  multiplies the weights below 1: what the model reads and need not write
        """
        self.model.zero_grad(set_to_none=True)
        x_ND = self.model.hidden(batch.token_ids, watch=self.watch).flatten(0, 1)
        head = self.model.model.embed_tokens if self.model.lm_head is None else self.model.lm_head
        weights_N = batch.weights.flatten()
        if read_share < 1:
            weights_N = torch.where(weights_N < 1, weights_N * read_share, weights_N)
        weights_N = weights_N / weights_N.sum().clamp_min(1e-6)  # a batch may hold nothing to learn
        loss = head_loss(x_ND, head.weight, batch.targets.flatten(), weights_N, self.slice_loss)
        loss.backward()
        return loss.detach().item()

    def save(self) -> None:
        """Write a checkpoint of this step, if there is none yet, and forget all but the newest two."""
        if self.step == self.saved_step:
            return
        state = self._trained() | {f"adamw/{n}": t for n, t in self.adamw.state().items()}
        counters = {
            "step": self.step,
            "elapsed_s": self.elapsed_s,
            "seed": self.config.seed,
            "int4_experts": self.masters.int4_experts,
        }
        path = self.out / f"step-{self.step}"
        saved.save_checkpoint(path, self.model, self.config.model, self.files, state, counters)
        self.saved_step = self.step

    def resume(self) -> None:
        """Go back to the newest checkpoint in the out directory.

        Raises TrainingError where there is none, or where it is damaged or of another run.
        """
        path = saved.newest(self.out)
        if path is None:
            raise TrainingError(f"There is no checkpoint to resume in {self.out}.", "Leave out --resume to begin anew.")
        state, counters = saved.load_state(saved.state_dir(path))
        self._check_state(path, state, counters)
        for name, tensor in self._trained().items():
            tensor.copy_(state[name])
        self.adamw.load({name.removeprefix("adamw/"): t for name, t in state.items() if name.startswith("adamw/")})
        self.step, self.saved_step, self.elapsed_s = counters["step"], counters["step"], counters["elapsed_s"]
        # as the last step published them: at the very step where int4 begins, progress alone would say it too early
        self.masters.int4_experts = counters.get("int4_experts", self.config.int4_from <= self.progress)
        self.masters.publish()

    def start_from(self, run: Path) -> None:
        """Begin with the weights and balance of another run's newest checkpoint; steps, time and momenta begin anew.

        Raises TrainingError where there is none, or where it is damaged or of another model.
        """
        path = saved.newest(run)
        if path is None:
            raise TrainingError(f"There is no checkpoint to start from in {run}.", "Let that run finish first.")
        state, counters = saved.load_state(saved.state_dir(path))
        self._check_state(path, state, counters | {"seed": self.config.seed})
        for name, tensor in self._trained().items():
            if not name.startswith("muon/"):
                tensor.copy_(state[name])
        self.masters.int4_experts = self.config.int4_from <= 0
        self.masters.publish()

    def _trained(self) -> dict[str, Tensor]:
        """What training moves, by its name in a saved state; AdamW's moments apart: they begin with a step."""
        state = {f"masters/{n}": t for n, t in self.masters.weights.items()}
        state |= {f"muon/{n}": t for n, t in self.muon.state().items()}
        return state | {f"bias/{n}": t for n, t in self.biases.items()}

    def _check_state(self, path: Path, state: Mapping[str, Tensor], counters: Mapping[str, Any]) -> None:
        if counters["seed"] != self.config.seed:
            raise TrainingError(
                f"{path} was trained with seed {counters['seed']}, this run has seed {self.config.seed}.",
                f"Resume with --seed {counters['seed']}.",
            )
        expected = self._trained()
        others = {n: t for n, t in state.items() if not n.startswith("adamw/")}
        wrong = sorted({*expected} ^ {*others}) or [n for n, t in expected.items() if t.shape != others[n].shape]
        if wrong:
            raise TrainingError(
                f"The state of {path} is of another model: {len(wrong)} tensors differ, the first is {wrong[0]}.",
                "Resume with the configuration that the run was started with.",
            )

    def finish(self) -> Path:
        """Write the finished model to OUT/model: routed experts int4 if they were trained so."""
        path = self.out / "model"
        self.masters.int4_experts = self.config.int4_from < 1
        self.masters.publish()
        saved.save_model(self.model, self.config.model, path, self.files, int4=self.masters.int4_experts)
        return path


class _StopOnInterrupt:
    """While active, Ctrl-C asks to stop after the step (half a step would spoil the masters), a second one at once.

    Python lets only the main thread handle signals; in another one nothing changes.
    """

    asked = False

    def __enter__(self) -> None:
        self._handles = threading.current_thread() is threading.main_thread()
        if self._handles:
            self._before = signal.signal(signal.SIGINT, self._ask)

    def __exit__(self, *_: object) -> None:
        if self._handles:
            signal.signal(signal.SIGINT, self._before)

    def _ask(self, *_: object) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True


def _is_matrix(name: str, weight: Tensor) -> bool:
    return weight.ndim >= 2 and "embed_tokens" not in name and "lm_head" not in name
