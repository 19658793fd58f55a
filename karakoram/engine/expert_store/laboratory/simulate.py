"""The laboratory: a trace replayed against a memory of any size, under any policy, and under Belady's optimum.

The memory is the live store's own `Residency`, and a layer takes its turn as there: demand, admit what is missing, in
rounds where a batch is too large, release. So a replay finds what the store found (guesses aside), and Belady's optimum
obeys the same rules: what a layer demands is in memory while it runs, and may leave right after.

Belady (1966): the victim is the expert whose next use is farthest away. It knows the future, so no policy beats it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from karakoram.engine.expert_store.policy import Policy, policy_named
from karakoram.engine.expert_store.residency import REFUSED, Residency
from karakoram.engine.expert_store.trace import Trace
from karakoram.errors import InputError

BELADY = "belady"
_NEVER = np.iinfo(np.int64).max


@dataclass(frozen=True)
class Result:
    """What a memory of `capacity` experts served. A demand counts (layer, expert) once a pass."""

    policy: str
    capacity: int
    hits: int
    misses: int
    evictions: int

    @property
    def hit_rate(self) -> float:
        """Share of demands that were in memory."""
        return self.hits / max(1, self.hits + self.misses)


def replay(trace: Trace, policy_name: str, capacity: int, floor: int = 0) -> Result:
    """One of `POLICIES` over a trace, from an empty memory. Raises InputError for an impossible capacity or floor."""
    policy = policy_named(policy_name, len(trace.layers), trace.experts)
    return _run(trace, demands(trace), policy_name, policy, capacity, floor)


def belady(trace: Trace, capacity: int) -> Result:
    """The most that any policy can reach that reads only what is demanded."""
    wanted = demands(trace)
    return _run(trace, wanted, BELADY, Clairvoyant(wanted, len(trace.layers) * trace.experts), capacity, 0)


def demands(trace: Trace) -> list[np.ndarray]:
    """The keys that each layer of each pass demands, sorted and unique; pass by pass, layer by layer."""
    found: list[np.ndarray] = []
    for one in trace.passes:
        first = 0
        for ids_TK in one.ids_LTK:
            found.append(np.unique(ids_TK).astype(np.int64) + first)
            first += trace.experts
    return found


def capacity_of(trace: Trace, text: str, least: bool = False) -> int:
    """ "1200" or "25%" of the trace's experts; `least`: at least 1.5 × top-k per layer, as small models need.

    Raises InputError for what is neither, or does not fit the model.
    """
    total = len(trace.layers) * trace.experts
    number, percent = text.strip().removesuffix("%"), text.strip().endswith("%")
    try:
        capacity = round(float(number) / 100 * total) if percent else int(number)
    except (ValueError, OverflowError):
        capacity = 0
    if not 0 < capacity <= total:
        raise InputError(f"A capacity of {text!r} is none.", f'Give a count up to {total:,}, or a share such as "25%".')
    return max(capacity, -(-3 * trace.top_k * len(trace.layers) // 2)) if least else capacity


def gap_closed(result: Result, lru: Result, best: Result) -> float | None:
    """How far a result is on the way from LRU to Belady; None where there is no way to go."""
    return (result.hits - lru.hits) / (best.hits - lru.hits) if best.hits > lru.hits else None


class Clairvoyant:
    """Belady's policy: it has the demands of the whole trace, in the order in which they will come."""

    def __init__(self, wanted: Sequence[np.ndarray], keys: int) -> None:
        self._next_uses: list[np.ndarray] = []
        upcoming = np.full(keys, _NEVER)
        for moment in range(len(wanted) - 1, -1, -1):
            self._next_uses.append(upcoming[wanted[moment]])
            upcoming[wanted[moment]] = moment
        self._next_use = upcoming

    def enter(self, layer: int) -> None:
        """See `Policy.enter`: it knows when, not where."""

    def used(self, keys: np.ndarray, token: int) -> None:
        """See `Policy.used`."""
        self._next_use[keys] = self._next_uses.pop()

    def victim(self, evictable: np.ndarray) -> int:
        """See `Policy.victim`."""
        return int(np.where(evictable, self._next_use, -1).argmax())

    def keeps(self, victim: int) -> bool:
        """See `Policy.keeps`: simulations guess nothing."""
        return False


def _run(trace: Trace, wanted: Sequence[np.ndarray], name: str, policy: Policy, capacity: int, floor: int) -> Result:
    layers, experts = len(trace.layers), trace.experts
    memory = Residency(layers, experts, capacity, policy, floor)
    for moment, keys in enumerate(wanted):
        layer = moment % layers
        _, missing = memory.demand(layer, keys - layer * experts)
        for key in missing:
            if memory.admit(key) == REFUSED:
                memory.settle()
                memory.release(layer)  # a round is over: those that are in memory have been computed
                memory.admit(key)
        memory.release(layer)
    return Result(name, capacity, memory.hits, memory.misses, memory.evictions)
