"""Which rank holds which rows, and which orthogonalises which matrix."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from karakoram.config import ModelConfig
from karakoram.distributed.layout import Layout, alone, by_rank, numbers
from karakoram.distributed.mesh import Alone
from karakoram.model.transformer import Transformer
from karakoram.train.optim.assign import is_matrix
from karakoram.train.optim.muon import Muon
from karakoram.train.optim.owned import OwnedMuon
from karakoram.train.optim.owners import cost, owned_units
from karakoram.train.optim.splits import per_head


@given(
    rows=st.integers(0, 40),
    expert_ranks=st.sampled_from([1, 2, 3, 4]),
    replicas=st.integers(1, 5),
    per_rank=st.integers(1, 5),
    inner=st.integers(1, 8),
)
def test_no_number_is_lost_or_held_twice(
    rows: int, expert_ranks: int, replicas: int, per_rank: int, inner: int
) -> None:
    """Matrices of any size, stacks of a multiple of the expert ranks; cut as `torch.chunk` cuts."""
    world = expert_ranks * replicas
    for shape in ((rows, 3), (per_rank * expert_ranks, inner, 3)):
        found, count = torch.zeros(shape, dtype=torch.int64), 0
        for box in by_rank(shape, world, expert_ranks):
            found[box] += 1
            count += numbers(box)
        assert (found == 1).all() and count == found.numel()
    sizes = [len(chunk) for chunk in torch.arange(rows).chunk(world)] if rows else []
    assert [box[0].stop - box[0].start for box in by_rank((rows, 3), world, expert_ranks)] == sizes + [0] * (
        world - len(sizes)
    )
    # neighbours hold different experts, the replicas of a part the same ones between them
    for first in range(expert_ranks):
        boxes = by_rank((per_rank * expert_ranks, inner, 3), world, expert_ranks)[first::expert_ranks]
        assert {e // per_rank for box in boxes if numbers(box) for e in range(box[0].start, box[0].stop)} == {first}


def _layouts(preset: str, world: int, expert_ranks: int) -> dict[str, Layout]:
    model = Transformer(ModelConfig.preset(preset), device="meta")
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters() if is_matrix(n, p)}
    return {n: Layout(shape, by_rank(shape, world, expert_ranks)) for n, shape in shapes.items()}


@pytest.mark.parametrize(
    ("preset", "world", "expert_ranks"),
    [("k2", 8, 8), ("moonlight-16b", 8, 8), ("moonlight-16b", 8, 4), ("k2", 32, 8), ("k2", 256, 64)],
)
def test_owners_share_the_work_evenly(preset: str, world: int, expert_ranks: int) -> None:
    """By m²n, the busiest has at most 5 % more than the mean, in the dense matrices alone too on up to 8 ranks.

    K2 on 256 ranks has 6 experts for 4 replicas: cut by rows, and 3 · 6 matrices of a layer are shared by four.
    """
    layouts = _layouts(preset, world, expert_ranks)
    dense, work = [0] * world, [0] * world
    units = owned_units(layouts, world)
    for unit in units:
        layout = layouts[unit.name]
        (dense if len(layout.shape) == 2 else work)[unit.owner] += cost(layout, unit.part)
    for name in {*layouts} - {unit.name for unit in units}:
        for rank, box in enumerate(layouts[name].by_rank):
            work[rank] += cost(layouts[name], box)
    total = [a + b for a, b in zip(dense, work, strict=True)]
    whole = sum(cost(layout, tuple(slice(0, size) for size in layout.shape)) for layout in layouts.values())
    assert sum(total) == whole
    assert max(total) <= 1.05 * whole / world
    assert world > 8 or max(dense) <= 1.05 * sum(dense) / world


def test_every_rank_chooses_the_same_owners() -> None:
    """From the same layouts; owners of experts hold a part of them."""
    layouts = _layouts("moonlight-16b", 16, 2)  # 32 experts over 8 replicas
    assert owned_units(layouts, 16) == owned_units(dict(layouts), 16)
    layouts = {"stack": Layout((6, 8, 4), by_rank((6, 8, 4), 4, 1)), "m": Layout((8, 8), by_rank((8, 8), 4, 1))}
    units = owned_units(layouts, 4)
    assert [(unit.name, unit.part[0]) for unit in units[:3]] == [("stack", slice(n, n + 2)) for n in (0, 2, 4)]
    assert {unit.owner for unit in units} == {0, 1, 2, 3}  # 2 experts of 8 × 4 cost half of a matrix of 8 × 8


def test_uneven_experts_count_as_work() -> None:
    """Who holds no expert gets the matrices."""
    stack = Layout((3, 9, 9), by_rank((3, 9, 9), 4, 1))  # 1, 1, 1, 0 experts: 9 rows cannot be cut in four
    matrices = {f"m{n}": Layout((9, 9), by_rank((9, 9), 4, 1)) for n in range(5)}
    assert sorted(unit.owner for unit in owned_units({"stack": stack, **matrices}, 4)) == [0, 1, 2, 3, 3]


def test_one_rank_makes_muons_steps() -> None:
    """Alone, the step is that of `Muon`: tall, wide, stacked and split weights, momentum over steps."""
    torch.manual_seed(0)
    shapes = {"wide": (6, 10), "tall": (12, 5), "stack": (3, 4, 9), "tall_stack": (2, 9, 4)}
    first = {name: torch.randn(shape) for name, shape in shapes.items()}
    ours, theirs = ({name: weight.clone() for name, weight in first.items()} for _ in range(2))
    layouts = {name: alone(shape) for name, shape in shapes.items()}
    splits = {"tall": per_head(3)}
    owned, muon = OwnedMuon(ours, layouts, Alone(), splits=splits), Muon(theirs, splits=splits)
    for step in range(3):
        gradients = {name: torch.randn(shape) for name, shape in shapes.items() if (name, step) != ("wide", 1)}
        owned.step(gradients, 0.02, scale=0.5)
        muon.step(gradients, 0.02, scale=0.5)
    found = owned.update_rms()
    for name in shapes:
        # the learning rate is multiplied in before the direction is rounded to float32, or after: its last bit
        torch.testing.assert_close(ours[name], theirs[name], rtol=3e-7, atol=1e-8)
        assert torch.equal(owned.buffers[name], muon.buffers[name])
        assert found[name] == pytest.approx(muon.update_rms(name), rel=1e-3), name
    fresh = OwnedMuon(ours, layouts, Alone())
    fresh.load(owned.state())
    assert all(torch.equal(fresh.buffers[name], owned.buffers[name]) for name in shapes)
