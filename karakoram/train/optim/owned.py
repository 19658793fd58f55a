"""Muon over ranks: each orthogonalises the whole matrices it owns.

A matrix is cut into rows over ranks (`distributed/layout.py`), and Newton-Schulz wants it whole. So it gets an owner
among those that hold a part, and a step is

    on every rank    M ← μM + G and μM + G of its own rows: momentum is split as the parameter is
    all-to-all       the rows travel to the owners
    on the owner     O = orthogonalize(whole matrix), those of one shape together
    all-to-all       O's rows travel back
    on every rank    W ← W − η · (0.2 · √max(A, B) · O + λW) on its own rows of the master

which is `muon.py`'s rule, and Moonlight's distribution (arXiv 2502.16982, §2.3) but for the all-gather: only the owner
needs the matrix. Experts that a rank holds whole need no travel and no owner.

Legend: n matrices of A rows and B columns.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from karakoram.distributed.collectives import exchange
from karakoram.distributed.layout import Box, Layout, numbers
from karakoram.distributed.mesh import Mesh
from karakoram.train.optim.muon import MOMENTUM, UPDATE_RMS, orthogonalize
from karakoram.train.optim.owners import Unit, owned_units, rounds

# Numbers of a rank's rows that are under way at once: 2 GB in float32, beside as much for the directions. Fewer would
# let ranks wait for the longest of a few matrices.
ROUND_NUMBERS = 1 << 29


class OwnedMuon:
    """`Muon`'s calls over weights that are this rank's parts of the whole.

    layouts     of each weight, by name
    orthogonal  [n, A, B], A ≤ B, float32 -> each matrix's U·Vᵀ, about: the one place where Newton-Schulz is chosen
    units       what this rank holds a part of, in the same order on all that do
    """

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        layouts: Mapping[str, Layout],
        ranks: Mesh,
        weight_decay: float = 0.1,
        momentum: float = MOMENTUM,
        orthogonal: Callable[[Tensor], Tensor] = orthogonalize,
        round_numbers: int = ROUND_NUMBERS,
    ) -> None:
        self.weights, self.ranks, self.weight_decay, self.momentum = dict(weights), ranks, weight_decay, momentum
        self.layouts, self.orthogonal = {name: layouts[name] for name in self.weights}, orthogonal
        self.buffers = {name: torch.zeros_like(weight) for name, weight in self.weights.items()}
        self.units: dict[str, list[Unit]] = defaultdict(list)
        for unit in owned_units(self.layouts, ranks.world):
            if ranks.rank in unit.holders:
                self.units[unit.name].append(unit)
        self._rounds = rounds(self.layouts, ranks.world, round_numbers)

    @torch.no_grad()
    def step(self, gradients: Mapping[str, Tensor], learning_rate: float, scale: float = 1.0) -> None:
        """One update from this rank's part of the gradients (any float dtype) times `scale`; on every rank.

        Weights without a gradient keep still; which ones, all ranks agree on.
        """
        for names in self._rounds:
            wanted = {name: self._nesterov(name, gradients[name], scale) for name in names if name in gradients}
            here = [name for name in wanted if name not in self.units]
            directions = dict(zip(here, self._orthogonalized([wanted[name] for name in here]), strict=True))
            for name, direction in (directions | self._by_owners(wanted)).items():
                factor = UPDATE_RMS * max(self.layouts[name].shape[-2:]) ** 0.5
                weight = self.weights[name].mul_(1 - learning_rate * self.weight_decay)
                weight.add_(direction, alpha=-learning_rate * factor)

    def state(self) -> dict[str, Tensor]:
        """Momentum by weight name, split as the weight is: `Layout.whole` makes it part of a whole for a checkpoint."""
        return self.buffers

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over buffers of these parts."""
        for name, buffer in self.buffers.items():
            buffer.copy_(state[name])

    def _nesterov(self, name: str, gradient: Tensor, scale: float) -> Tensor:
        gradient = gradient.float() * scale
        buffer = self.buffers[name].mul_(self.momentum).add_(gradient)
        return gradient.add_(buffer, alpha=self.momentum)

    def _by_owners(self, wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This rank's parts of the directions of what is cut over ranks: two all-to-alls, the owners' work between."""
        group, world, me = dist.group.WORLD, self.ranks.world, self.ranks.rank
        if group is None or world == 1:
            return {}
        units = [unit for name in wanted for unit in self.units.get(name, ())]
        by_owner = [[unit for unit in units if unit.owner == rank] for rank in range(world)]
        mine, sending = by_owner[me], [unit for owned in by_owner for unit in owned]
        to_owner = [sum(self._size(unit, me) for unit in owned) for owned in by_owner]
        from_rank = [sum(self._size(unit, rank) for unit in mine) for rank in range(world)]
        parts = [wanted[unit.name][_within(self._cut(unit, me), self.layouts[unit.name].held)] for unit in sending]
        arrived = exchange(_joined(parts, self.ranks.device), to_owner, from_rank, group)
        wholes = self._orthogonalized(self._assembled(mine, arrived))
        back = [
            whole[_within(self._cut(unit, rank), unit.part)]
            for rank in range(world)
            for unit, whole in zip(mine, wholes, strict=True)
        ]
        returned = exchange(_joined(back, self.ranks.device), from_rank, to_owner, group)
        directions = {name: torch.empty_like(part) for name, part in wanted.items() if name in self.units}
        for unit, part in zip(sending, returned.split([self._size(unit, me) for unit in sending]), strict=True):
            box = _within(self._cut(unit, me), self.layouts[unit.name].held)
            directions[unit.name][box].copy_(part.view_as(directions[unit.name][box]))
        return directions

    def _assembled(self, units: Sequence[Unit], arrived: Tensor) -> list[Tensor]:
        """Whole matrices from what each rank sent, its parts one after the other."""
        wholes = [arrived.new_empty([one.stop - one.start for one in unit.part]) for unit in units]
        sizes = [self._size(unit, rank) for rank in range(self.ranks.world) for unit in units]
        parts = iter(arrived.split(sizes))
        for rank in range(self.ranks.world):
            for unit, whole in zip(units, wholes, strict=True):
                into = whole[_within(self._cut(unit, rank), unit.part)]
                into.copy_(next(parts).view_as(into))
        return wholes

    def _cut(self, unit: Unit, rank: int) -> Box:
        """What a rank holds of a unit, in the whole's coordinates."""
        return _overlap(unit.part, self.layouts[unit.name].by_rank[rank])

    def _size(self, unit: Unit, rank: int) -> int:
        return numbers(self._cut(unit, rank))

    def _orthogonalized(self, matrices: Sequence[Tensor]) -> list[Tensor]:
        """Directions in float32 of whole matrices or stacks of them; those of one shape, lying, go together."""
        same_shape: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for number, matrix in enumerate(matrices):
            same_shape[tuple(sorted(matrix.shape[-2:]))].append(number)
        directions = list(matrices)
        for chosen in same_shape.values():
            stacks = [_lying(matrices[number]) for number in chosen]
            together = torch.cat(stacks)
            made = self.orthogonal(together).float() if len(together) else together
            for number, part in zip(chosen, made.split([len(stack) for stack in stacks]), strict=True):
                standing = matrices[number].shape[-2] > matrices[number].shape[-1]
                directions[number] = (part.mT if standing else part).reshape(matrices[number].shape)
        return directions


def _overlap(a: Box, b: Box) -> Box:
    starts = [max(one.start, other.start) for one, other in zip(a, b, strict=True)]
    stops = [min(one.stop, other.stop) for one, other in zip(a, b, strict=True)]
    return tuple(slice(start, max(start, stop)) for start, stop in zip(starts, stops))


def _within(box: Box, outer: Box) -> Box:
    """A part of the whole in the coordinates of a part around it."""
    return tuple(slice(one.start - o.start, one.stop - o.start) for one, o in zip(box, outer, strict=True))


def _joined(parts: Sequence[Tensor], device: torch.device) -> Tensor:
    return torch.cat([part.flatten() for part in parts]) if parts else torch.empty(0, device=device)


def _lying(matrix: Tensor) -> Tensor:
    """As a stack of matrices no taller than wide: [..., A, B] -> [n, A, B]."""
    stack = matrix[None] if matrix.ndim == 2 else matrix
    return stack.mT if stack.shape[-2] > stack.shape[-1] else stack
