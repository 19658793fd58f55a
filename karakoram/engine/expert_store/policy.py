"""Who leaves memory: policies of replacement for (layer, expert) records.

A key is an int: index_of_moe_layer · experts + expert. A policy hears of every demand, for resident experts and missing
ones alike, and names a victim among those that may go. It keeps no list of residents: `Residency` does.

    lru      the one whose last use is longest ago
    lfu      the one used least often so far, resident or not; of equals, the one whose last use is longest ago
    hybrid   the one that is least likely to be wanted soon (`Hybrid`)

A layer is visited once a pass, so all clocks here are a layer's own visits: an expert of the layer that has just run and
one of the layer that runs next are compared by what each will do at its own next visit.
Everything is a slice of one layer or one masked minimum over all keys: 10 to 30 µs a call at 60 layers of 384 experts.

Legend: E experts of a layer.
"""

from typing import Protocol

import numpy as np

from karakoram.errors import InputError


class Policy(Protocol):
    """Decides who leaves. `Residency` asks, in the live store and in the simulator alike."""

    def used(self, keys: np.ndarray, token: int) -> None:
        """Keys (int64, unique, of one layer) that a batch demands, resident or not, in the pass number `token`."""
        ...

    def victim(self, evictable: np.ndarray) -> int:
        """The key to give up, of those that are True in a bool array over all keys; at least one is."""
        ...

    def keeps(self, victim: int) -> bool:
        """Whether a victim is worth more than a guess, which is right about every second time."""
        ...


def policy_named(name: str, layers: int, experts: int) -> Policy:
    """A new policy of `POLICIES`. Raises InputError for another name."""
    if name not in POLICIES:
        raise InputError(f"There is no policy {name!r}.", f"Choose one of {', '.join(POLICIES)}.")
    return POLICIES[name](layers, experts)


def lowest(scores: np.ndarray, among: np.ndarray) -> int:
    """The index of the lowest score among those that are True."""
    return int(np.where(among, scores, np.inf).argmin())


class LRU:
    """Least recently used."""

    def __init__(self, layers: int, experts: int) -> None:
        self._last_use = np.zeros(layers * experts)
        self._now = 0

    def used(self, keys: np.ndarray, token: int) -> None:
        """See `Policy.used`."""
        self._now += 1
        self._last_use[keys] = self._now

    def victim(self, evictable: np.ndarray) -> int:
        """See `Policy.victim`."""
        return lowest(self._last_use, evictable)

    def keeps(self, victim: int) -> bool:
        """See `Policy.keeps`: it has no opinion."""
        return False


class LFU:
    """Least frequently used, over the whole run: nothing is ever forgotten."""

    # uses count 1, the moment of the last use far less than that: it decides between equals
    _MOMENT = 2.0**-40

    def __init__(self, layers: int, experts: int) -> None:
        self._uses = np.zeros(layers * experts)
        self._score = np.zeros(layers * experts)
        self._now = 0

    def used(self, keys: np.ndarray, token: int) -> None:
        """See `Policy.used`."""
        self._now += 1
        self._uses[keys] += 1
        self._score[keys] = self._uses[keys] + self._now * self._MOMENT

    def victim(self, evictable: np.ndarray) -> int:
        """See `Policy.victim`."""
        return lowest(self._score, evictable)

    def keeps(self, victim: int) -> bool:
        """See `Policy.keeps`: it has no opinion."""
        return False


class Hybrid:
    """Least likely to be wanted: a sum of decayed counts of a short and a long memory (LRFU, Lee et al. 2001)."""

    def __init__(self, layers: int, experts: int) -> None:
        self._experts = experts
        self._short = np.zeros((layers, experts))
        self._long = np.zeros((layers, experts))
        self._visits = np.zeros(layers)
        self._likely = np.zeros(layers * experts)

    def used(self, keys: np.ndarray, token: int) -> None:
        """See `Policy.used`."""
        layer = int(keys[0]) // self._experts
        first = layer * self._experts
        self._visits[layer] += 1
        for counts, half_life in ((self._short, 4.0), (self._long, 64.0)):
            decay = 2.0 ** (-1 / half_life)
            counts[layer] *= decay
            counts[layer, keys - first] += 1 - decay
        self._likely[first : first + self._experts] = self._short[layer] + 2 * self._long[layer]

    def victim(self, evictable: np.ndarray) -> int:
        """See `Policy.victim`."""
        return lowest(self._likely, evictable)

    def keeps(self, victim: int) -> bool:
        """See `Policy.keeps`."""
        return bool(self._likely[victim] > 0.5)


POLICIES: dict[str, type[LRU] | type[LFU] | type[Hybrid]] = {"lru": LRU, "lfu": LFU, "hybrid": Hybrid}
