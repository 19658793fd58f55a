"""Several processes on this machine, as torchrun would start them, but met through a file: no port, no network."""

import json
import multiprocessing
import os
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
# One process imports torch, the others are its copies: each would need seconds.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.distributed.work"])


class Ended(NamedTuple):
    """How one rank ended: its exit code (negative: the signal), what it printed, what it told, and when, in seconds."""

    code: int | None
    output: str
    told: dict[str, Any]
    after_s: float


def launch(task: str, world: int, out: Path, timeout_s: float = 60, **arguments: Any) -> list[Ended]:
    """Run `task` of `work.py` on every rank; who is still there after the timeout has the exit code None."""
    began = time.monotonic()
    processes = [CONTEXT.Process(target=_rank, args=(task, rank, world, out, arguments)) for rank in range(world)]
    for process in processes:
        process.start()
    try:
        return [_end(process, out / str(rank), began, timeout_s) for rank, process in enumerate(processes)]
    finally:
        for process in processes:
            process.kill()
            process.join()


def run(task: str, world: int, out: Path, timeout_s: float = 60, **arguments: Any) -> list[dict[str, Any]]:
    """What every rank told, where all must end well."""
    ended = launch(task, world, out, timeout_s, **arguments)
    for rank, end in enumerate(ended):
        assert end.code == 0, f"rank {rank} ended with {end.code}:\n{end.output}"
    return [end.told for end in ended]


def _end(process: BaseProcess, path: Path, began: float, timeout_s: float) -> Ended:
    process.join(max(0.1, timeout_s - (time.monotonic() - began)))
    told, output = path.with_suffix(".json"), path.with_suffix(".txt")
    return Ended(
        process.exitcode,
        output.read_text(errors="replace") if output.exists() else "",
        json.loads(told.read_text()) if told.exists() else {},
        time.monotonic() - began,
    )


def _rank(task: str, rank: int, world: int, out: Path, arguments: dict[str, Any]) -> None:
    with (out / f"{rank}.txt").open("wb") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    from tests.distributed import work

    told = getattr(work, task)(out, **arguments)
    (out / f"{rank}.json").write_text(json.dumps(told))
