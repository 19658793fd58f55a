"""What happens to a run in processes of its own: `python child.py MODE OUT …` prints what it saw as JSON lines.

kills OUT N              forks a saver N times, kills it at a random moment, and looks at what is there
full OUT                 saves under RLIMIT_FSIZE, which fails in the middle of a file
ranks OUT MODE:WORLD …   forks so many ranks for each of save, load, trouble; their lines say which rank
"""

import json
import os
import random
import resource
import select
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from karakoram.errors import TrainingError
from karakoram.train.checkpoints import dcp, find
from karakoram.train.checkpoints.dcp import Piece, read_tensors
from karakoram.train.checkpoints.ranks import Ranks
from karakoram.train.checkpoints.state import read_state
from karakoram.train.checkpoints.writer import CheckpointWriter

ROWS = 1 << 16  # 1.3 MB in five tensors: a save takes some milliseconds, most of it flushing


RANK: int | None = None


def tell(**values: Any) -> None:
    os.write(1, (json.dumps(values | {"rank": RANK}) + "\n").encode())  # at once: ranks share it


# ---------------------------------------------------------------------------------------------------- one process


def kills(out: Path, count: int) -> None:
    random.seed(0)
    for _ in range(count):
        begun, begins = os.pipe()
        child = os.fork()
        if child == 0:
            save_for_ever(out, begins)
        for _ in range(random.randint(2, 4)):
            os.read(begun, 1)  # a save begins
        select.select([], [], [], random.uniform(0, 0.03))  # any moment of that save or the next: some 10 ms each
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(begun)
        os.close(begins)
        directory = find.checkpoints_dir(out)
        hidden = [path.name for path in directory.iterdir() if path.name.startswith(".step")]
        steps = [whole(path) for path in find.complete(out)]
        CheckpointWriter(out).close()
        left = [path.name for path in directory.iterdir() if path.name.startswith(".step")]
        tell(steps=steps, hidden=hidden, left=left)


def save_for_ever(out: Path, begins: int) -> None:
    path = find.newest(out)
    step = 0 if path is None else find.step_of(path)
    writer = CheckpointWriter(out)
    while True:
        step += 1
        os.write(begins, b"x")
        writer.save(step, state_at(step), {"step": step})


def state_at(step: int) -> dict[str, torch.Tensor]:
    return {f"t{i}": torch.full((ROWS,), float(step + i)) for i in range(5)}


def whole(path: Path) -> int:
    """The checkpoint's step, after a look at every number of it."""
    step, into = find.step_of(path), state_at(-1)
    read_tensors(path, into)
    assert read_state(path)[0] == {"step": step}
    assert all(torch.equal(into[name], tensor) for name, tensor in state_at(step).items())
    return step


def full(out: Path) -> None:
    writer = CheckpointWriter(out)
    writer.save(1, state_at(1), {"step": 1})
    writer.wait()
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, resource.RLIM_INFINITY))
    writer.save(2, state_at(2), {"step": 2})
    try:
        writer.wait()
    except TrainingError as error:
        tell(what=error.what, fix=error.fix, steps=[whole(path) for path in find.complete(out)])
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    writer.save(3, state_at(3), {"step": 3})
    writer.close()
    names = sorted(path.name for path in find.checkpoints_dir(out).iterdir())
    tell(names=names, steps=[whole(path) for path in find.complete(out)])


# ---------------------------------------------------------------------------------------------------- many ranks


def numbers(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


WHOLE = {
    "even": numbers(1, 8, 6),
    "uneven": numbers(2, 5, 3).bfloat16(),  # 2, 2, 1, 0 rows on 4 ranks
    "few": numbers(3, 2, 3),  # two of 4 ranks have none
    "columns": numbers(4, 3, 8),
    "grid": numbers(5, 6, 4),
    "replicated": numbers(6, 4, 4),
    "scalar": torch.tensor(2.5),
    "plain": torch.arange(6),
    "empty": torch.empty(0, 3),
    "experts": numbers(7, 8, 2, 3),  # as Piece
    "owned/a": numbers(8, 4, 4),  # each on one rank only
    "owned/b": numbers(9, 4, 4),
}


def spread(world: int, rank: int, of: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Everything as `world` ranks hold it."""
    line = init_device_mesh("cpu", (world,))
    grid = init_device_mesh("cpu", (2, world // 2))
    tensors: dict[str, Any] = {
        "even": distribute_tensor(of["even"], line, [Shard(0)]),
        "uneven": distribute_tensor(of["uneven"], line, [Shard(0)]),
        "few": distribute_tensor(of["few"], line, [Shard(0)]),
        "columns": distribute_tensor(of["columns"], line, [Shard(1)]),
        "grid": distribute_tensor(of["grid"], grid, [Shard(0), Shard(1)]),
        "replicated": distribute_tensor(of["replicated"], grid, [Replicate(), Shard(0)]),
        "scalar": distribute_tensor(of["scalar"], line, [Replicate()]),
        "plain": of["plain"].clone(),
        "empty": of["empty"].clone(),
    }
    rows = len(of["experts"]) // world
    tensors["experts"] = Piece(of["experts"][rank * rows : (rank + 1) * rows].clone(), (rank * rows, 0, 0), (8, 2, 3))
    for number, name in enumerate(("owned/a", "owned/b")):
        if rank == number % world:
            tensors[name] = of[name].clone()
    return tensors


def local_of(tensor: Any) -> torch.Tensor:
    return tensor.local if isinstance(tensor, Piece) else tensor.to_local() if isinstance(tensor, DTensor) else tensor


def save(out: Path, rank: int, world: int) -> None:
    writer = CheckpointWriter(out)
    for step in (1, 2, 3):
        writer.save(step, spread(world, rank, WHOLE), {"step": step, "rank": rank})
    writer.close()


def load(out: Path, rank: int, world: int) -> None:
    path = find.newest(out)
    assert path is not None
    into = spread(world, rank, {name: torch.zeros_like(tensor) for name, tensor in WHOLE.items()})
    read_tensors(path, into, Ranks())
    expected = spread(world, rank, WHOLE)
    wrong = [name for name in expected if not torch.equal(local_of(into[name]), local_of(expected[name]))]
    tell(wrong=wrong, state=read_state(path)[0], names=len(into))
    into["even"] = torch.zeros(8, 7)
    told(lambda: read_tensors(path, into, Ranks()))
    if rank == 1:  # and the others are told
        into["even"] = DTensor.from_local(torch.ones(8, 6), expected["even"].device_mesh, [Partial()])
    told(lambda: read_tensors(path, into, Ranks()))


def trouble(out: Path, rank: int, world: int) -> None:
    """Rank 1 fails to write; then its disk is well again; then rank 0's fails; then rank 1 dies in a save."""
    writer = CheckpointWriter(out)
    tensors = spread(world, rank, WHOLE)
    writer.save(1, tensors, {"step": 1})
    told(writer.wait)
    writer_class, create = dcp.PieceWriter, dcp.PieceWriter.write_data

    def fail(*_: Any) -> Any:
        raise OSError(28, "No space left on device")

    def die(*_: Any) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)

    for step, (failing, do) in enumerate([(1, fail), (None, fail), (0, fail)], 2):
        writer_class.write_data = do if rank == failing else create  # pyright: ignore[reportAttributeAccessIssue]
        writer.save(step, tensors, {"step": step})
        told(writer.wait)
    writer_class.write_data = die if rank == 1 else create  # pyright: ignore[reportAttributeAccessIssue]
    writer.save(5, tensors, {"step": 5})
    told(writer.wait)
    tell(steps=[find.step_of(path) for path in find.complete(out)])
    os._exit(0)  # its group is broken: there is nobody to say goodbye to


def told(do: Any) -> None:
    try:
        do()
        tell(error=None)
    except TrainingError as error:
        tell(error=str(error))


def ranks(out: Path, mode: str, world: int) -> None:
    """Fork `world` ranks, before there is a thread: torch imported anew in each takes ten times as long as the rest."""
    children: list[int] = []
    for rank in range(world):
        child = os.fork()
        if child == 0:
            global RANK
            RANK = rank
            meeting = out / f"meeting-{mode}-{world}"
            dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
            {"save": save, "load": load, "trouble": trouble}[mode](out, rank, world)
            dist.destroy_process_group()
            sys.stdout.flush()
            os._exit(0)
        children.append(child)
    tell(ended=[os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children])


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    mode, out = sys.argv[1], Path(sys.argv[2])
    if mode == "kills":
        kills(out, int(sys.argv[3]))
    elif mode == "full":
        full(out)
    else:
        for step in sys.argv[3:]:
            name, world = step.split(":")
            ranks(out, name, int(world))


main()
