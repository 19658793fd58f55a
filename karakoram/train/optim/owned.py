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

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from karakoram.distributed.collectives import exchange
from karakoram.distributed.layout import Box, Layout, numbers
from karakoram.distributed.mesh import Mesh
from karakoram.train.optim.muon import MOMENTUM, factor, nesterov
from karakoram.train.optim.newton_schulz import Spectrum, named, orthogonalize
from karakoram.train.optim.owners import Unit, owned_units, rounds
from karakoram.train.optim.splits import Split, whole

# Numbers of a rank's rows that are under way at once: 2 GB in float32, beside as much for the directions. Fewer would
# let ranks wait for the longest of a few matrices.
ROUND_NUMBERS = 1 << 29


class OwnedMuon:
    """`Muon`'s calls over weights that are this rank's parts of the whole, with `Muon`'s options.

    layouts        of each weight, by name
    round_numbers  see `ROUND_NUMBERS`
    units          what this rank holds a part of, in the same order on all that do
    """

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        layouts: Mapping[str, Layout],
        ranks: Mesh,
        weight_decay: float = 0.1,
        momentum: float = MOMENTUM,
        *,
        nesterov: bool = True,
        mean: bool = True,
        coefficients: str = "jordan",
        calibrate: Spectrum | None = None,
        dtype: torch.dtype = torch.bfloat16,
        splits: Mapping[str, Split] | None = None,
        round_numbers: int = ROUND_NUMBERS,
    ) -> None:
        named(coefficients)
        self.weights, self.ranks, self.weight_decay, self.momentum = dict(weights), ranks, weight_decay, momentum
        self.layouts = {name: layouts[name] for name in self.weights}
        self.nesterov, self.mean, self.coefficients = nesterov, mean, coefficients
        self.calibrate: Spectrum | None = calibrate
        self.dtype, self.splits = dtype, dict(splits or {})
        self.buffers = {name: torch.zeros_like(w, dtype=torch.float32) for name, w in self.weights.items()}
        self._squares: dict[str, Tensor] = {}
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
            wanted = {name: self._momentum(name, gradients[name], scale) for name in names if name in gradients}
            here = [name for name in wanted if name not in self.units]
            made = self._directions([(name, wanted[name]) for name in here])
            for name, direction in (dict(zip(here, made, strict=True)) | self._by_owners(wanted)).items():
                self._squares[name] = torch.linalg.vector_norm(direction).square()
                weight = self.weights[name].mul_(1 - learning_rate * self.weight_decay)
                weight.add_(direction, alpha=-learning_rate)

    def update_rms(self, names: Iterable[str] | None = None) -> dict[str, float]:
        """RMS of the last update of whole weights over the learning rate, decay left out; on every rank, one sum.

        0 before the first update. Default: all weights.
        """
        chosen = list(self.weights if names is None else names)
        zero = torch.zeros((), device=self.ranks.device)
        squares = self.ranks.sum_(torch.stack([self._squares.get(name, zero) for name in chosen] or [zero]))
        sizes = [math.prod(self.layouts[name].shape) for name in chosen]
        return {name: (float(s) / size) ** 0.5 for name, s, size in zip(chosen, squares, sizes)}

    def state(self) -> dict[str, Tensor]:
        """Momentum by weight name, split as the weight is: `Layout.whole` makes it part of a whole for a checkpoint."""
        return self.buffers

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over buffers of these parts."""
        for name, buffer in self.buffers.items():
            buffer.copy_(state[name])

    def _momentum(self, name: str, gradient: Tensor, scale: float) -> Tensor:
        buffer = self.buffers[name]
        ahead = nesterov(gradient, buffer, self.momentum, scale, self.mean)
        return ahead if self.nesterov else buffer

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
        assembled = self._assembled(mine, arrived)
        wholes = self._directions([(unit.name, made) for unit, made in zip(mine, assembled, strict=True)])
        back = [
            direction[_within(self._cut(unit, rank), unit.part)]
            for rank in range(world)
            for unit, direction in zip(mine, wholes, strict=True)
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
            for unit, made in zip(units, wholes, strict=True):
                into = made[_within(self._cut(unit, rank), unit.part)]
                into.copy_(next(parts).view_as(into))
        return wholes

    def _cut(self, unit: Unit, rank: int) -> Box:
        """What a rank holds of a unit, in the whole's coordinates."""
        return _overlap(unit.part, self.layouts[unit.name].by_rank[rank])

    def _size(self, unit: Unit, rank: int) -> int:
        return numbers(self._cut(unit, rank))

    def _directions(self, matrices: Sequence[tuple[str, Tensor]]) -> list[Tensor]:
        """0.2·√max(A, B)·O in float32 of whole matrices or stacks, by name; those of one shape go together."""
        made = [torch.empty_like(matrix) for _, matrix in matrices]
        same_shape: dict[torch.Size, list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for (name, matrix), into in zip(matrices, made, strict=True):
            split = self.splits.get(name, whole)
            for view, target in zip(split(matrix), split(into), strict=True):
                same_shape[view.shape[-2:]].append((view, target))
        for shape, pairs in same_shape.items():
            stack = torch.cat([view.reshape(-1, *shape) for view, _ in pairs])
            if len(stack):
                parts = orthogonalize(stack, self.coefficients, self.dtype, self.calibrate)
                counts = [target.numel() // shape.numel() for _, target in pairs]
                for (_, target), part in zip(pairs, parts.split(counts), strict=True):
                    torch.mul(part.view(target.shape).float(), factor(shape), out=target)
        return made


def _overlap(a: Box, b: Box) -> Box:
    starts = [max(one.start, other.start) for one, other in zip(a, b, strict=True)]
    stops = [min(one.stop, other.stop) for one, other in zip(a, b, strict=True)]
    return tuple(slice(start, max(start, stop)) for start, stop in zip(starts, stops))


def _within(box: Box, outer: Box) -> Box:
    """A part of the whole in the coordinates of a part around it."""
    return tuple(slice(one.start - o.start, one.stop - o.start) for one, o in zip(box, outer, strict=True))


def _joined(parts: Sequence[Tensor], device: torch.device) -> Tensor:
    return torch.cat([part.flatten() for part in parts]) if parts else torch.empty(0, device=device)
