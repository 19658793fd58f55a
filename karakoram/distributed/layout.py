"""Which part of a parameter each rank holds; no number is held twice.

    matrix [A, B], vector [A]    rows (numbers) cut over all ranks
    stack of experts [E, A, B]   experts cut over `experts`; a rank's part of them then over its `replicas`: whole
                                 experts where they divide evenly, else rows of each (dimension 1) where those do, else
                                 whole experts unevenly

Whole experts need no travel to be orthogonalised. But K2's 384 = 3 · 128 over 16 replicas would leave some without any,
and the memory with the others.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from karakoram.distributed.mesh import Ranks

Box = tuple[slice, ...]
"""A part of a tensor: a slice in each dimension."""


@dataclass(frozen=True)
class Layout:
    """Of one parameter, seen from one rank.

    shape    of the whole; three dimensions are a stack of experts
    by_rank  which part of the whole each rank holds
    """

    shape: tuple[int, ...]
    by_rank: tuple[Box, ...]
    rank: int = 0
    mesh: DeviceMesh | None = None
    placements: tuple[Shard, ...] = ()

    @property
    def held(self) -> Box:
        """The part that this rank holds: `whole[held]`."""
        return self.by_rank[self.rank]

    @property
    def rows(self) -> slice:
        """The rows of `held`, of dimension 0."""
        return self.held[0]

    def whole(self, local: Tensor) -> Tensor:
        """This rank's part as a DTensor of the whole, sharing memory: what a checkpoint writes, and reads into.

        With one rank the part is the whole, and comes back as it is.
        """
        if self.mesh is None:
            return local
        stride = torch.empty(self.shape, device="meta").stride()
        return DTensor.from_local(
            local, self.mesh, self.placements, run_check=False, shape=torch.Size(self.shape), stride=stride
        )

    def gathered(self, local: Tensor) -> Tensor:
        """The whole on every rank, from each rank's part; on every rank."""
        if self.mesh is None:
            return local
        spread, placements = self.whole(local), list[Placement](self.placements)
        assert isinstance(spread, DTensor)
        for dim in reversed(range(len(placements))):  # one at a time, as they were cut: torch warns of doing both
            placements[dim] = Replicate()
            spread = spread.redistribute(placements=placements)
        return spread.to_local()


def alone(shape: Sequence[int]) -> Layout:
    """All of it here."""
    return Layout(tuple(shape), (tuple(slice(0, size) for size in shape),))


def among(ranks: Ranks, shape: Sequence[int]) -> Layout:
    """Of a parameter of this whole shape."""
    boxes = by_rank(shape, ranks.world, ranks.experts.size())
    if len(shape) == 3:
        placements = (Shard(0), Shard(cut_dim(shape, ranks.experts.size(), ranks.replicas.size())))
        return Layout(tuple(shape), boxes, ranks.rank, ranks.grid, placements)
    return Layout(tuple(shape), boxes, ranks.rank, ranks.everyone, (Shard(0),))


def by_rank(shape: Sequence[int], world: int, expert_ranks: int) -> tuple[Box, ...]:
    """Which part each of `world` ranks holds, of which groups of `expert_ranks` neighbours split the experts."""
    rest = tuple(slice(0, size) for size in shape[1:])
    if len(shape) != 3:
        return tuple((rows, *rest) for rows in chunks(0, shape[0], world))
    replicas = world // expert_ranks
    parts = chunks(0, shape[0], expert_ranks)
    if cut_dim(shape, expert_ranks, replicas) == 1:
        rows = chunks(0, shape[1], replicas)
        return tuple((parts[rank % expert_ranks], rows[rank // expert_ranks], rest[1]) for rank in range(world))
    cut = [chunks(part.start, part.stop, replicas) for part in parts]
    return tuple((cut[rank % expert_ranks][rank // expert_ranks], *rest) for rank in range(world))


def cut_dim(shape: Sequence[int], expert_ranks: int, replicas: int) -> int:
    """Along which dimension replicas cut their part of a stack of this whole shape: experts, or rows of each."""
    return int(shape[0] // expert_ranks % replicas != 0 and shape[1] % replicas == 0)


def local(tensor: Tensor | nn.Parameter) -> Tensor:
    """This rank's part of a tensor that is spread over ranks, sharing memory; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def numbers(box: Box) -> int:
    """How many there are in a part."""
    return math.prod(one.stop - one.start for one in box)


def chunks(start: int, stop: int, parts: int) -> list[slice]:
    """[start, stop) in `parts` runs as `torch.chunk` and FSDP2 cut it: of equal length but for the last ones."""
    length = -(-(stop - start) // parts)
    cuts = [min(stop, start + length * n) for n in range(parts + 1)]
    return [slice(a, b) for a, b in zip(cuts, cuts[1:])]
