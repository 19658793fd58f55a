"""The trainer on several ranks, each in its own process, met through a file."""

import json
import os
from pathlib import Path
from typing import Any

import torch

from karakoram.distributed.mesh import Alone, Ranks, start
from karakoram.train.trainer import Trainer
from tests.distributed.launch import CONTEXT
from tests.train import tiny

TIMEOUT_S = 100


def run(out: Path, world: int, steps: int, expert_ranks: int = 1, resume: bool = False) -> list[float]:
    """Train to `steps` on `world` ranks in OUT/run and return the losses that rank 0 wrote down."""
    meeting = out / f"meeting-{world}-{steps}"
    arguments = (out, world, steps, expert_ranks, resume, meeting)
    processes = [CONTEXT.Process(target=_rank, args=(rank, *arguments)) for rank in range(world)]
    for process in processes:
        process.start()
    try:
        for rank, process in enumerate(processes):
            process.join(TIMEOUT_S)
            assert process.exitcode == 0, (rank, process.exitcode, (out / f"{rank}.txt").read_text())
    finally:
        for process in processes:
            process.kill()
            process.join()
    return losses(out)


def losses(out: Path) -> list[float]:
    """Of every step in OUT/run."""
    return [json.loads(line)["loss"] for line in (out / "run/metrics.jsonl").read_text().splitlines()]


def trainer(out: Path, steps: int, ranks: Alone | Ranks) -> Trainer:
    """20 steps are the schedule's; a run may stop before."""
    config = tiny.train_config(
        tiny.model_config(n_routed_experts=8), steps=20, int4_from=0.8, checkpoints__minutes=1e6,
        optimizer__learning_rate=5e-3, optimizer__adamw_learning_rate=2e-3, balance__rule="quantile",
        balance__sequence_loss=1e-3,
    )  # fmt: skip
    made = Trainer(config, tiny.CopyTask(rows=14), out / "run", {}, torch.float32, compiled=False, ranks=ranks)
    plain = made.next_batch

    def next_batch() -> Any:
        if made.step == steps:
            raise KeyboardInterrupt  # as a person would
        return plain()

    made.next_batch = next_batch
    return made


def _rank(rank: int, out: Path, world: int, steps: int, expert_ranks: int, resume: bool, meeting: Path) -> None:
    with (out / f"{rank}.txt").open("wb") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    torch.set_num_threads(1)
    ranks = start(expert_ranks, "cpu", timeout_s=60, rendezvous=f"file://{meeting}")
    go(out, steps, ranks, resume)


def go(out: Path, steps: int, ranks: Alone | Ranks, resume: bool) -> None:
    """Train until `steps` and save."""
    made = trainer(out, steps, ranks)
    if resume:
        made.resume()
    try:
        made.run(quiet=True)
    except KeyboardInterrupt:
        made.save(wait=True)
