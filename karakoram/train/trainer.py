"""The training loop: batch, loss, gradients, guard, MuonClip, balance, publish; small enough to read in one go.

Masters in float32 are what is trained; the model holds what they are published as (bfloat16, and int4 points for the
routed experts towards the end). A run is its configuration, its batches and its out directory: stop it with Ctrl-C or
SIGTERM, or kill it, and `resume` goes on from the newest checkpoint with the very numbers that would have come.

    OUT/run.json            the settings            OUT/checkpoints/step-N/   the newest few
    OUT/metrics.jsonl       a line per step         OUT/model/                the finished model, HF layout
    OUT/events.jsonl        skips, rollbacks, …
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from karakoram.distributed.collectives import gradient_norm, share
from karakoram.distributed.fsdp import gather_anew
from karakoram.distributed.mesh import Alone, Ranks
from karakoram.errors import TrainingError
from karakoram.model.cost import flops_per_token
from karakoram.model.documents import Documents
from karakoram.model.transformer import Transformer
from karakoram.model.watch import Watch
from karakoram.train import balance
from karakoram.train.config import TrainConfig
from karakoram.train.data.batches import Batch
from karakoram.train.fuse import fuse
from karakoram.train.loss import head_loss, loss_and_gradient
from karakoram.train.machine import StopOnSignal, matmul_flops_per_s
from karakoram.train.optim.assign import update_rms
from karakoram.train.optim.qk_clip import qk_clip
from karakoram.train.optim.schedule import decay_share, rate_share
from karakoram.train.record.directory import open_run, settings_of
from karakoram.train.record.metrics import Metrics, Sink
from karakoram.train.run_state import BatchSource, RunState

EXPENSIVE_EVERY = 10  # steps between the numbers that cost a pass over the weights: update RMS, entropy, loads
LOADS_EVERY = 50


Objective = Callable[[Transformer, Tensor, Batch, Tensor], Tensor]
"""(model, normed hidden states [N, D], batch, weights [N] that sum to 1 over the step) -> scalar loss."""


def train(
    config: TrainConfig,
    data: BatchSource,
    out_dir: Path,
    resume: bool = False,
    files: Mapping[str, bytes] | None = None,
    dtype: torch.dtype = torch.bfloat16,
    compiled: bool = True,
    quiet: bool = False,
    **more: Any,
) -> Path:
    """A run from its beginning, or with `resume` from its newest checkpoint; returns the finished model's directory.

    Raises TrainingError where `out_dir` holds another run (see `open_run`), and after Ctrl-C, when all is saved.
    `more` goes to `Trainer`.
    """
    with open_run(out_dir, settings_of(config, dtype=str(dtype)), resume):
        trainer = Trainer(config, data, out_dir, files or {}, dtype, compiled, **more)
        if resume:
            trainer.resume()
        return trainer.run(quiet)


class Trainer(RunState):
    """A run that goes on, step by step; who makes one holds the directory by `open_run`.

    files      written into every checkpoint: the tokenizer and the like
    compiled   let torch.compile fuse the small pieces where it can (about a minute at the first step)
    model      instead of fresh weights: already loaded, perhaps with parts that ask for no gradient
    held_out   batches on which the loss is measured and nothing learned
    objective  instead of cross-entropy
    ranks      the others that train with this one (`distributed/mesh.py`), each with a Trainer like this
    """

    def __init__(
        self,
        config: TrainConfig,
        batches: BatchSource,
        out: Path,
        files: Mapping[str, bytes],
        dtype: torch.dtype = torch.bfloat16,
        compiled: bool = True,
        model: Transformer | None = None,
        held_out: Sequence[Batch] = (),
        objective: Objective | None = None,
        sinks: Sequence[Sink] = (),
        ranks: Alone | Ranks | None = None,
    ) -> None:
        super().__init__(config, batches, out, files, dtype, model, ranks or Alone())
        self.compiled, self.held_out, self.objective, self.sinks = compiled, held_out, objective, sinks
        self.watch = Watch(
            config.optimizer.qk_clip_threshold,
            margins=config.balance.rule == "quantile",
            sequence_loss=config.balance.sequence_loss > 0,
        )
        self.slice_loss = loss_and_gradient
        self.peak_flops_per_s = math.nan

    # ------------------------------------------------------------------------------------------------ the loop

    def run(self, quiet: bool = False) -> Path:
        """Train to the end; returns the finished model's directory. Ctrl-C saves and raises TrainingError."""
        self.out.mkdir(parents=True, exist_ok=True)
        self._prepare()
        last_saved_s = self.elapsed_s
        sinks = self.sinks if self.ranks.is_main else ()
        quiet = quiet or not self.ranks.is_main
        metrics = Metrics(self._told_in(), self.elapsed_s, quiet, self.step, sinks, self.progress)
        with self.ranks.together(), metrics, StopOnSignal(tell=not quiet) as stop:
            if self.step:
                metrics.event(self.step, "resumed", say=False, next_batch=self.position)
            while self.progress < 1 and not self.ranks.any(stop.asked):
                line = self.train_step(self.next_batch(), metrics)
                self.elapsed_s = self._agreed_s(metrics.elapsed_s)
                metrics.step(self.progress, line)
                if self.guard.wants_rollback:
                    self.roll_back(metrics)
                if self.elapsed_s - last_saved_s > 60 * self.config.checkpoints.minutes:
                    self.save()
                    last_saved_s = self.elapsed_s
            self.save(wait=True)
            if self.progress < 1:
                raise TrainingError(
                    f"Training was stopped at step {self.step}; everything is saved in {self.out}.",
                    "Go on with the same command and --resume.",
                )
            return self.finish()

    def train_step(self, batch: Batch, metrics: Metrics | None = None) -> dict[str, Any]:
        """One optimizer step on one batch, or none where the guard refuses it; returns the step's line of metrics."""
        began, c = time.monotonic(), self.config
        self.masters.int4_experts = c.int4_from <= self.progress
        share = rate_share(c.schedule, self.step, self.tokens, self.progress)
        loss = self.backward(batch, max(c.schedule.read_floor, decay_share(c.schedule, self.progress)))
        gradients = self.masters.gradients()
        norm = gradient_norm(gradients, self.ranks)
        refused = self.guard.judge(loss, norm)
        line: dict[str, Any] = {"step": self.step + 1, "loss": loss, "rate_share": share, "gradient_norm": norm}
        if refused is None:
            line |= self.update(gradients, share, norm)
        else:
            line["skipped"] = True
            if metrics is not None:
                metrics.event(self.step + 1, "batch skipped", batch=self.position, reason=refused)
        self.masters.forget_gradients()
        self.step, self.position = self.step + 1, self.position + 1
        tokens = self._everywhere(batch.token_ids.numel())
        self.tokens += tokens
        if self.held_out and self.step % c.held_out_steps == 0:
            line["held_out_loss"] = self.held_out_loss()
        return line | self._speed(tokens, batch.token_ids.shape[1], time.monotonic() - began)

    def update(self, gradients: Mapping[str, Tensor], share: float, norm: float) -> dict[str, Any]:
        """MuonClip, balance, publish; returns what there is to tell."""
        o, masters = self.config.optimizer, self.masters.weights
        scale = min(1.0, o.clip_norm / (norm + 1e-6))
        rate = o.learning_rate * share
        self.muon.step(gradients, rate, scale)
        self.adamw.step(gradients, share * (o.adamw_learning_rate or o.learning_rate), scale)
        clipped = qk_clip(masters, self.watch.max_logits, self.config.model, o.qk_clip_threshold, self.rows)
        self._balance(share)
        gather_anew(self.model)
        self.masters.publish()
        return {"learning_rate": rate, "clip_norm_share": scale} | self._told(clipped)

    def backward(self, batch: Batch, read_share: float = 1.0) -> float:
        """Mean weighted loss of a batch; gradients are left in the model, or in the masters' sums.

        read_share  multiplies the weights below 1: what the model reads and need not write
        """
        self.masters.forget_gradients()
        self.watch.reset()
        weights_BT = batch.weights
        if read_share < 1:
            weights_BT = torch.where(weights_BT < 1, weights_BT * read_share, weights_BT)
        weight = self.ranks.sum_(weights_BT.sum())
        weights_BT = weights_BT / weight.clamp_min(1e-6)  # a batch may hold nothing to learn
        total, pieces = 0.0, self._micro_batches(batch._replace(weights=weights_BT))
        sequences = self._everywhere(len(batch.token_ids)) if self.watch.sequence_loss else 1
        for number, piece in enumerate(pieces):
            self.watch.recording = True
            loss = self.loss(piece)
            total += loss.detach().item()
            if self.watch.balance_loss is not None:
                loss = loss + self.config.balance.sequence_loss / sequences * self.watch.balance_loss
                self.watch.balance_loss = None
            self.watch.recording = False  # a pass that is repeated for the backward was seen already
            loss.backward()
            if number < len(pieces) - 1:
                self.masters.accumulate()
        share(self.watch, self.ranks)
        return float(self.ranks.sum_(torch.tensor(total, dtype=torch.float64, device=self.ranks.device)))

    def loss(self, batch: Batch, watch: bool = True) -> Tensor:
        """Σ weight · loss of a batch's tokens, differentiable."""
        documents = None if batch.documents is None else Documents(batch.documents)
        seen = self.watch if watch else None
        x_ND = self.model.hidden(batch.token_ids, watch=seen, documents=documents).flatten(0, 1)
        weights_N = batch.weights.flatten()
        if self.objective is not None:
            return self.objective(self.model, x_ND, batch, weights_N)
        head = self.model.model.embed_tokens if self.model.lm_head is None else self.model.lm_head
        return head_loss(x_ND, head.weight, batch.targets.flatten(), weights_N, self.slice_loss)

    @torch.no_grad()
    def held_out_loss(self) -> float:
        """Mean weighted loss, of the objective where there is one, over the held-out batches; the same on all ranks."""
        total = weight = 0.0
        for batch in self.held_out:
            weight += float(batch.weights.sum())
            for piece in self._micro_batches(batch.map(lambda rows: rows.to(self.ranks.device))):
                total += float(self.loss(piece, watch=False))
        return total / max(weight, 1e-6)

    # ------------------------------------------------------------------------------------------------ its parts

    def _prepare(self) -> None:
        if self.progress >= 1:
            return
        if self.compiled:
            self.slice_loss = fuse(self.model)
        self.peak_flops_per_s = matmul_flops_per_s(self.model.dtype, self.model.device)

    def next_batch(self) -> Batch:
        """This rank's rows of the batch that comes next, on its device."""
        batch = self.batches.batch(self.position, self.ranks.rank, self.ranks.world)
        return batch.map(lambda rows: rows.to(self.ranks.device))

    def _micro_batches(self, batch: Batch) -> list[Batch]:
        """Pieces of rows of at most `micro_tokens`: as many on every rank, since ranks run their passes together."""
        rows, micro = len(batch.token_ids), self.config.batch.micro_tokens
        wanted = 1 if micro is None else math.ceil(rows / max(1, micro // batch.token_ids.shape[1]))
        if self.ranks.world > 1:
            most = torch.tensor([wanted, -rows], device=self.ranks.device)
            wanted, rows = (int(number) for number in self.ranks.max_(most) * torch.tensor([1, -1]))
            if not rows:
                raise TrainingError(
                    f"Batch {self.position} has fewer rows than the {self.ranks.world} ranks.",
                    "Give it more tokens (batch.tokens_per_step), or train on fewer ranks.",
                )
        count = min(wanted, rows)
        if count == 1:
            return [batch]
        return [batch.map(lambda rows, n=n: rows.tensor_split(count)[n]) for n in range(count)]

    @property
    def rows(self) -> dict[str, slice]:
        """Which rows of each weight this rank holds."""
        return {name: layout.rows for name, layout in self.layouts.items()}

    def _everywhere(self, number: int) -> int:
        return int(self.ranks.sum_(torch.tensor(number, device=self.ranks.device)))

    def _agreed_s(self, seconds: float) -> float:
        """The longest of the ranks' times: schedules and ends by time must be the same for all."""
        return float(self.ranks.max_(torch.tensor(seconds, dtype=torch.float64, device=self.ranks.device)))

    def _told_in(self) -> Path:
        """Where this rank's metrics go: the first one's are the run's, the others' are for looking after trouble."""
        if self.ranks.is_main:
            return self.out
        path = self.out / "ranks" / str(self.ranks.rank)
        path.mkdir(parents=True, exist_ok=True)
        return path

    def _balance(self, share: float) -> None:
        b = self.config.balance
        if b.rule == "none" or self.progress >= b.freeze_from:
            return
        if b.rule == "sign":
            balance.sign_step(self.biases, self.watch.loads, b.rate * min(1.0, share * 2))
        else:
            balance.quantile_step(self.biases, self.watch.margin_counts, self.config.model.num_experts_per_tok)

    def _told(self, clipped: int) -> dict[str, Any]:
        logits = {layer: float(largest_H.max()) for layer, largest_H in self.watch.max_logits.items()}
        heads = len(logits) * self.config.model.num_attention_heads
        self.loads.add(self.watch.loads)
        line: dict[str, Any] = {
            "max_logit": max(logits.values(), default=0.0), "max_logit_by_layer": logits,
            "clipped_heads": clipped, "clip_fraction": clipped / max(1, heads),
            "max_vio": max((balance.max_vio(load_E) for load_E in self.watch.loads.values()), default=0.0),
            "max_vio_global": self.loads.max_vio, "dead_experts": self.loads.dead,
        }  # fmt: skip
        if self.step % EXPENSIVE_EVERY == 0:
            line |= {"load_entropy": self.loads.entropy, "update_rms": update_rms(self.muon, self.adamw)}
        if self.step % LOADS_EVERY == 0:
            line["loads"] = {layer: load_E.tolist() for layer, load_E in self.loads.total.items()}
        return line

    def _speed(self, tokens: int, row_tokens: int, seconds: float) -> dict[str, Any]:
        # a token attends to half of its row in the mean; a training step costs three forward passes
        flops = 3 * flops_per_token(self.config.model, row_tokens // 2, absorbed=False)
        per_s = tokens / seconds
        speed = {"tokens": self.tokens, "tokens_per_s": per_s, "elapsed_s": self.elapsed_s + seconds}
        peak = self.peak_flops_per_s * self.ranks.world
        return speed if math.isnan(peak) else speed | {"mfu": per_s * flops / peak}
