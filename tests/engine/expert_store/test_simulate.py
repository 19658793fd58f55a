"""The laboratory: Belady is the best, and a replay finds what the live store found."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.drawn_routing import draw, oracle_hits
from karakoram.engine.expert_store.laboratory.simulate import belady, capacity_of, demands, gap_closed, replay
from karakoram.engine.expert_store.policy import POLICIES
from karakoram.engine.expert_store.trace import Trace, TraceWriter, read_trace
from karakoram.errors import InputError
from tests.engine.expert_store.drawn import largest_demand, trace_of, traces
from tests.engine.expert_store.fed import fed, run


@given(traces(), st.integers(0, 8))
def test_nobody_beats_belady(trace: Trace, more: int) -> None:
    capacity = largest_demand(trace) + more
    best = belady(trace, capacity)
    assert best.evictions <= best.misses
    for name in POLICIES:
        found = replay(trace, name, capacity)
        assert found.hits <= best.hits
        assert found.hits + found.misses == best.hits + best.misses == sum(map(len, demands(trace)))


@given(traces())
def test_belady_is_optimal(trace: Trace) -> None:
    """Against every choice there is, on what fits into a moment of searching."""
    short = Trace(trace.layers, trace.experts, trace.top_k, trace.passes[: 8 // len(trace.layers)])
    capacity = max(1, largest_demand(short)) if short.passes else 1
    assert belady(short, capacity).misses == _fewest_misses(
        [frozenset(keys.tolist()) for keys in demands(short)], capacity
    )


def _fewest_misses(wanted: list[frozenset[int]], capacity: int) -> int:
    """Breadth first over all memories; what may be kept is any subset, since keeping less never helps a demand."""
    from itertools import combinations

    best: dict[frozenset[int], int] = {frozenset(): 0}
    for keys in wanted:
        after: dict[frozenset[int], int] = {}
        for memory, misses in best.items():
            others, room = memory - keys, capacity - len(keys)
            for kept in combinations(sorted(others), min(room, len(others))):
                state = keys | frozenset(kept)
                after[state] = min(after.get(state, 1 << 30), misses + len(keys - memory))
        best = after
    return min(best.values())


def test_all_in_memory_misses_once_each() -> None:
    ids_TLK = np.stack([np.random.default_rng(n).permutation(6)[:2] for n in range(40)])[:, None]
    for found in (replay(trace_of(ids_TLK, 6), "lru", 6), belady(trace_of(ids_TLK, 6), 6)):
        assert (found.misses, found.evictions, found.hit_rate) == (6, 0, 74 / 80)


def test_passes_larger_than_memory_run_in_rounds() -> None:
    ids_TLK = np.arange(8).reshape(4, 1, 2)
    trace = trace_of(np.concatenate([ids_TLK, ids_TLK]), 8, tokens_a_pass=4)
    for name in POLICIES:
        assert replay(trace, name, 3).misses <= 16
    assert replay(trace, "lru", 8).hits == 8


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("capacity", "floor"), [(30, 0), (40, 4)])
def test_it_agrees_with_the_live_store(
    policy: str, capacity: int, floor: int, packed_nano: Path, tmp_path: Path
) -> None:
    """Without guesses, to the expert: both ask the same `Residency`. (The issue asks for 2 points.)"""
    with fed(capacity, policy, guessing=False, floor=floor, path=packed_nano) as one:
        source = one.store.source
        one.store.trace = TraceWriter(tmp_path / "t", source.layers, source.experts, 4)
        run(one.model, 40, [3968, *range(40, 43)])
        live = one.store.counters
        live_hits, live_demands = live.hits, live.demanded
    found = replay(read_trace(tmp_path / "t"), policy, capacity, floor)
    assert found.hits + found.misses == live_demands
    assert found.hits == live_hits


def test_capacities_are_counts_or_shares() -> None:
    trace = trace_of(np.zeros((1, 4, 1), int), 25)
    assert capacity_of(trace, "25%") == 25
    assert capacity_of(trace, " 12.5 %") == 12
    assert capacity_of(trace, "7") == 7
    assert capacity_of(trace, "2%", least=True) == 6  # 1.5 × 1 × 4
    for wrong in ("0", "101", "-3", "101%", "many", "", "nan%", "1e999%", "2.5"):
        with pytest.raises(InputError, match="capacity"):
            capacity_of(trace, wrong)


def test_floors_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InputError, match="cannot keep"):
        replay(trace_of(np.zeros((1, 4, 1), int), 25), "lru", 7, floor=2)


# What the traces say: the bars of the policy (docs/expert-traces.md has the larger tables)

NANO = sorted((Path(__file__).parents[3] / "benchmarks/traces").glob("*.trace"))


@pytest.mark.parametrize("path", NANO, ids=lambda path: path.stem)
@pytest.mark.parametrize("share", ["12%", "25%", "50%"])
def test_the_hybrid_on_traces_of_nano(path: Path, share: str) -> None:
    trace = read_trace(path)
    capacity = capacity_of(trace, share, least=True)
    lru, lfu, hybrid = (replay(trace, name, capacity) for name in ("lru", "lfu", "hybrid"))
    assert hybrid.hit_rate >= max(lru.hit_rate, lfu.hit_rate) - 0.005
    closed = gap_closed(hybrid, lru, belady(trace, capacity))
    assert closed is not None
    assert closed >= 0.15


@pytest.mark.parametrize("memory", [1.5, 16.0, 64.0])
def test_the_hybrid_on_drawn_traces(memory: float) -> None:
    drawn = draw(layers=6, experts=128, top_k=6, tokens=400, memory=memory)
    assert 0.60 < drawn.top_quarter < 0.80
    assert 0.28 < drawn.repeat < 0.38
    for share in ("12%", "25%", "50%"):
        capacity = capacity_of(drawn.trace, share)
        lru, lfu, hybrid = (replay(drawn.trace, name, capacity) for name in ("lru", "lfu", "hybrid"))
        assert hybrid.hit_rate >= max(lru.hit_rate, lfu.hit_rate) - 0.005
        best = belady(drawn.trace, capacity)
        assert hybrid.hits <= oracle_hits(drawn, capacity) <= best.hits
