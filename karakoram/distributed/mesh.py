"""The ranks of a run, and who works with whom.

    everyone   all W ranks: dense parts are split over them, and each sees its own rows of the batch
    experts    ep ranks that hold all experts of a layer between them, E/ep each; neighbours, so that the all-to-all
               stays inside a machine where it can
    replicas   W/ep ranks that answer for the same E/ep experts

    W = 4, ep = 2:   rank 0  1  2  3      experts: {0, 1} {2, 3}      replicas: {0, 2} {1, 3}

`Alone` is the same with one rank and no communication: who trains has one path. torchrun names the ranks in the
environment (RANK, WORLD_SIZE, LOCAL_RANK); gloo carries CPU tensors, NCCL those of GPUs.
"""

import atexit
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.rendezvous import rendezvous as meet

from karakoram.distributed.lost import Pulse
from karakoram.errors import TrainingError

# Long enough for a rank that compiles, saves, or waits for a slow disk; a rank that dies is noticed at once.
TIMEOUT_S = 600.0


class Mesh(Protocol):
    """What a trainer asks of its ranks; all of it on every rank, in the same order."""

    rank: int
    world: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """The one that writes and prints."""
        ...

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum over ranks, in place."""
        ...

    def max_(self, tensor: Tensor) -> Tensor:
        """Largest over ranks, in place."""
        ...

    def any(self, flag: bool) -> bool:
        """Whether any rank says so: a signal reaches one rank, and all must stop at the same step."""
        ...

    def barrier(self) -> None:
        """Wait for all."""
        ...

    def follow(self, what: str) -> None:
        """On the first rank: `what` is done. On the others: wait for it, without a limit of time."""
        ...

    def together(self) -> AbstractContextManager[None]:
        """What runs inside ends with a TrainingError that names the lost rank, where one is lost."""
        ...


class Alone:
    """One process, no communication."""

    rank, world, is_main = 0, 1, True

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)

    def sum_(self, tensor: Tensor) -> Tensor:
        """As it is."""
        return tensor

    def max_(self, tensor: Tensor) -> Tensor:
        """As it is."""
        return tensor

    def any(self, flag: bool) -> bool:
        """As it is."""
        return flag

    def barrier(self) -> None:
        """Nobody to wait for."""

    def follow(self, what: str) -> None:
        """Nobody to wait for."""

    @contextmanager
    def together(self) -> Iterator[None]:
        """Nobody to lose."""
        yield


class Ranks:
    """This rank among the others; `start` makes it."""

    def __init__(self, device: torch.device, expert_ranks: int, pulse: Pulse) -> None:
        self.rank, self.world, self.device = dist.get_rank(), dist.get_world_size(), device
        self.pulse = pulse
        ranks_W = torch.arange(self.world)
        self.everyone = DeviceMesh(device.type, ranks_W, mesh_dim_names=("everyone",))
        # dimension 0 first: a stack of experts is split over `experts`, and what is left over `replicas`
        self.grid = DeviceMesh(
            device.type, ranks_W.view(-1, expert_ranks).T.contiguous(), mesh_dim_names=("experts", "replicas")
        )
        self.experts, self.replicas = self.grid["experts"], self.grid["replicas"]

    @property
    def is_main(self) -> bool:
        """Rank 0."""
        return self.rank == 0

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum over all ranks, in place, in the tensor's dtype."""
        dist.all_reduce(tensor, dist.ReduceOp.SUM)
        return tensor

    def max_(self, tensor: Tensor) -> Tensor:
        """Largest over all ranks, in place."""
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return tensor

    def any(self, flag: bool) -> bool:
        """Whether any rank says so."""
        return bool(self.max_(torch.tensor(int(flag), device=self.device)))

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.any(False)

    def follow(self, what: str) -> None:
        """The first rank has done `what`; the others wait for that however long it takes: see `Pulse.follow`."""
        self.pulse.follow(what, self.is_main)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Until the end: a rank that fails tells the others why; they end with a TrainingError that names it."""
        with self.pulse.beating():
            yield


def start(
    expert_ranks: int = 1,
    device: str | None = None,
    timeout_s: float = TIMEOUT_S,
    rendezvous: str = "env://",
) -> Alone | Ranks:
    """This process's place among the ranks that torchrun started; `Alone` without torchrun, or with one rank.

    expert_ranks  over how many ranks the experts of a layer are split (ep)
    device        "cuda" or "cpu"; default: cuda where there is one. With cuda, rank LOCAL_RANK takes GPU LOCAL_RANK.
    timeout_s     how long one communication may take
    Raises TrainingError where the numbers cannot be.
    """
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    world = _number("WORLD_SIZE", 1, low=1)
    _check_split(expert_ranks, world)
    if world == 1:
        return Alone(kind)
    rank, local_rank = _number("RANK", None, 0, world), _number("LOCAL_RANK", 0, 0, world)
    place = torch.device(kind, local_rank) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise TrainingError(
                f"LOCAL_RANK is {local_rank}, but there are {torch.cuda.device_count()} GPUs here.",
                f"Start torchrun with --nproc-per-node {torch.cuda.device_count()}.",
            )
        torch.cuda.set_device(place)
    timeout = timedelta(seconds=timeout_s)
    store, rank, world = next(meet(rendezvous, rank, world, timeout=timeout))
    backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
    atexit.register(_leave)
    return Ranks(place, expert_ranks, Pulse(store, rank, world))


def _leave() -> None:
    # gloo's threads that still run when the interpreter goes end the process by SIGABRT (torch 2.13)
    if dist.is_initialized():
        dist.destroy_process_group()


def _check_split(expert_ranks: int, world: int) -> None:
    if expert_ranks < 1 or world % expert_ranks:
        divisors = [str(n) for n in range(1, world + 1) if world % n == 0]
        raise TrainingError(
            f"{expert_ranks} expert ranks do not divide {world} ranks.",
            f"Choose {' or '.join(divisors)}, or another --nproc-per-node for torchrun.",
        )


def _number(name: str, default: int | None, low: int, behind: int = 1 << 20) -> int:
    text = os.environ.get(name)
    if text is None and default is not None:
        return default
    try:
        number = int(text or "")
    except ValueError:
        number = low - 1
    if not low <= number < behind:
        raise TrainingError(
            f"{name} is {text!r} in the environment, which cannot be: {low} to {behind - 1} can.",
            "Let torchrun set it, or unset WORLD_SIZE to train in one process.",
        )
    return number
