"""Which rank orthogonalises what, where matrices are cut over ranks.

Owners are chosen by cost: an iteration on A × B, A ≤ B, takes about 4A²B + 2A³ operations, so A²B counts, not A·B. The
longest goes first, each to the rank with the least so far (LPT: at most 4/3 of the best; K2 and Moonlight on 16 ranks
or fewer: within 0.3 %). What ranks hold whole counts as their work from the beginning.

Legend: n matrices of A rows and B columns.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from karakoram.distributed.layout import Box, Layout, chunks, numbers


class Unit(NamedTuple):
    """A matrix, or a run of a stack's experts, that is cut over ranks and orthogonalised by one of them.

    part     of the whole parameter: all its rows and columns, and of a stack the experts `part[0]`
    holders  ranks that may own it: of a matrix all, of experts those that hold a part
    """

    name: str
    part: Box
    holders: Sequence[int]
    owner: int = -1


def owned_units(layouts: Mapping[str, Layout], world: int) -> list[Unit]:
    """Everything that is cut over ranks, in the layouts' order, each with its owner; the same on every rank."""
    load, units = [0] * world, []
    for name, layout in layouts.items():
        if len(layout.shape) == 3 and all(_is_whole(box, layout) for box in layout.by_rank):
            for rank, box in enumerate(layout.by_rank):
                load[rank] += cost(layout, box)
        elif world > 1:
            units += _units(name, layout)
    order = sorted(range(len(units)), key=lambda n: (-cost(layouts[units[n].name], units[n].part), n))
    for number in order:
        unit = units[number]
        owner = min(unit.holders, key=load.__getitem__)
        units[number] = unit._replace(owner=owner)
        load[owner] += cost(layouts[unit.name], unit.part)
    return units


def cost(layout: Layout, box: Box) -> int:
    """Of orthogonalising a part of whole matrices, in units that only compare: n·A²·B, A the shorter side."""
    rows, columns = layout.shape[-2:]
    count = box[0].stop - box[0].start if len(layout.shape) == 3 else 1
    return count * min(rows, columns) ** 2 * max(rows, columns)


def _units(name: str, layout: Layout) -> list[Unit]:
    """A matrix is one; of experts cut by rows, as many runs as ranks share them."""
    if len(layout.shape) == 2:
        return [Unit(name, tuple(slice(0, size) for size in layout.shape), range(len(layout.by_rank)))]
    sharing: dict[tuple[int, int], list[int]] = defaultdict(list)
    for rank, box in enumerate(layout.by_rank):
        sharing[box[0].start, box[0].stop].append(rank)
    rest = tuple(slice(0, size) for size in layout.shape[1:])
    return [
        Unit(name, (run, *rest), ranks)
        for (start, stop), ranks in sharing.items()
        for run in chunks(start, stop, len(ranks))
        if run.start < run.stop
    ]


def rounds(layouts: Mapping[str, Layout], world: int, most: int) -> list[list[str]]:
    """Names in runs of about `most` numbers a rank; the same on every rank."""
    runs: list[list[str]] = [[]]
    filled = 0
    for name, layout in layouts.items():
        size = numbers(tuple(slice(0, s) for s in layout.shape)) // world
        if runs[-1] and filled + size > most:
            runs, filled = [*runs, []], 0
        runs[-1].append(name)
        filled += size
    return runs


def _is_whole(box: Box, layout: Layout) -> bool:
    return all(one == slice(0, size) for one, size in zip(box[1:], layout.shape[1:], strict=True))
