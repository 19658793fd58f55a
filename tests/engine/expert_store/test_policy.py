"""Policies name the victim that their definition names."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given

from karakoram.engine.expert_store.laboratory.simulate import demands, replay
from karakoram.engine.expert_store.policy import POLICIES, policy_named
from karakoram.engine.expert_store.trace import Trace
from karakoram.errors import InputError
from tests.engine.expert_store.drawn import largest_demand, traces


@given(traces())
def test_lru_is_a_naive_lru(trace: Trace) -> None:
    capacity = largest_demand(trace) + 1
    resident: dict[int, int] = {}  # key -> when it was last wanted
    hits = 0
    for moment, keys in enumerate(demands(trace)):
        wanted = keys.tolist()
        hits += sum(key in resident for key in wanted)
        missing = [key for key in wanted if key not in resident]
        for key in wanted:
            if key in resident:
                resident[key] = moment
        for key in missing:
            if len(resident) >= capacity:
                del resident[min((k for k in resident if k not in wanted), key=lambda k: (resident[k], k))]
            resident[key] = moment
    assert replay(trace, "lru", capacity).hits == hits


@given(traces())
def test_lfu_is_a_naive_lfu(trace: Trace) -> None:
    capacity = largest_demand(trace) + 1
    resident: set[int] = set()
    uses: Counter[int] = Counter()
    last: dict[int, int] = {}
    hits = 0
    for moment, keys in enumerate(demands(trace)):
        wanted = keys.tolist()
        uses.update(wanted)
        last.update(dict.fromkeys(wanted, moment))
        hits += sum(key in resident for key in wanted)
        for key in [key for key in wanted if key not in resident]:
            if len(resident) >= capacity:
                resident.remove(min(resident - set(wanted), key=lambda k: (uses[k], last[k], k)))
            resident.add(key)
    assert replay(trace, "lfu", capacity).hits == hits


@pytest.mark.parametrize("name", POLICIES)
def test_a_victim_is_one_of_those_that_may_go(name: str) -> None:
    policy = policy_named(name, 3, 8)
    random = np.random.default_rng(0)
    for step in range(60):
        policy.used(step % 3 * 8 + np.sort(random.choice(8, 2, replace=False)), step // 3)
        evictable = random.random(24) < 0.3
        evictable[step % 24] = True
        assert evictable[policy.victim(evictable)]


def test_the_hybrid_parts_with_what_is_never_wanted() -> None:
    policy = policy_named("hybrid", 1, 8)
    for step in range(40):
        policy.used(np.array([0, 1 + step % 3]), step)
    everyone = np.ones(8, bool)
    assert policy.victim(everyone) >= 4
    everyone[4:] = False
    assert policy.victim(everyone) != 0  # wanted every time
    assert policy.keeps(0)
    assert not policy.keeps(7)


def test_the_hybrid_keeps_what_a_layer_needs_soon() -> None:
    """Two layers alike in everything: after layer 0, its own experts are needed later than those of layer 1."""
    policy = policy_named("hybrid", 3, 4)
    for step in range(50):
        for layer in range(3):
            policy.used(np.array([4 * layer + step % 4]), step)
    policy.used(np.array([50 % 4]), 50)
    alike = np.zeros(12, bool)
    alike[[1, 5, 9]] = True  # the expert that each layer uses at the next token
    assert policy.victim(alike) == 1


def test_the_hybrid_learns_a_pattern_that_neither_recency_nor_frequency_shows() -> None:
    """An expert that returns every fifth token: the one that was wanted last is the one that comes last."""
    ids = np.arange(400) % 5
    policy = policy_named("hybrid", 1, 5)
    for token, expert in enumerate(ids):
        policy.used(np.array([expert]), token)
    assert policy.victim(np.ones(5, bool)) != (ids[-1] + 1) % 5


def test_a_name_that_is_none() -> None:
    with pytest.raises(InputError, match="no policy 'fifo'"):
        policy_named("fifo", 1, 4)
