"""Who leaves memory: policies of replacement for (layer, expert) records.

A key is an int: index_of_moe_layer · experts + expert. A policy hears of every demand, for resident experts and missing
ones alike, and names a victim among those that may go. It keeps no list of residents: `Residency` does.

    lru      the one whose last use is longest ago
    lfu      the one used least often so far, resident or not; of equals, the one whose last use is longest ago
    hybrid   the one that is least likely to be wanted soon (`Hybrid`)

A layer is visited once a pass, so all clocks here are a layer's own visits: an expert of the layer that has just run
and one of the layer that runs next are compared by what each will do at its own next visit.
Everything is a slice of one layer or one masked minimum over all keys. At 60 layers of 384 experts a victim costs 15 to
25 µs, a layer's demand 1 to 60 µs.

Legend: E experts of a layer.
"""

from typing import Protocol

import numpy as np

from karakoram.errors import InputError

GUESS_IS_RIGHT = 0.6  # of guesses: the share that the next router finds one layer early (docs/expert-traces.md)


class Policy(Protocol):
    """Decides who leaves. `Residency` asks, in the live store and in the simulator alike."""

    def enter(self, layer: int) -> None:
        """The pass has come to this layer (by index): what it evicts now is for this one."""
        ...

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
    return int(np.where(among, scores, scores.dtype.type(np.inf)).argmin())


class LRU:
    """Least recently used."""

    def __init__(self, layers: int, experts: int) -> None:
        self._last_use = np.zeros(layers * experts)
        self._now = 0

    def enter(self, layer: int) -> None:
        """See `Policy.enter`: all layers are alike."""

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

    def enter(self, layer: int) -> None:
        """See `Policy.enter`: all layers are alike."""

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
    """The expert whose chance to be wanted, for the time until its layer runs again, is smallest.

    An expert is in one of 1,024 cells: visits of its layer since it was wanted last, how often it was wanted in the
    long run, and lately. What becomes of a cell's experts is counted as the model runs, so its chance is measured:
    nothing is assumed of how recency and popularity weigh. Until much has been counted, the mean of long-run and recent
    frequency stands in.

    A layer that runs soon asks soon: keeping its expert costs memory for a part of a pass only. So the chance is
    divided by the distance to the layer, in passes: 1 to 2 points of hits more with nano's 5 layers, 0.1 with 12.
    What was tried besides, and its hit rates, are in docs/expert-traces.md.
    """

    _OCTAVES = 8  # of age and recent frequency: 2^8 visits, shares down to 1/256; of long-run frequency, half octaves
    _LONG, _RECENT = 512.0, 4.0  # half-lives of the frequencies, in visits of a layer
    _PRIOR = 50.0  # visits of experts for which the estimate that needs no counting stands in
    _FORGETTING = 2.0 ** (-1 / 4096)  # of the cells, per pass: half after a long answer or four

    def __init__(self, layers: int, experts: int) -> None:
        self._layers, self._experts = layers, experts
        self._visits = np.zeros(layers, np.int64)
        self._last_use = np.full((layers, experts), -(2**self._OCTAVES), np.int64)
        self._decays = np.array([[2 ** (-1 / self._LONG)], [2 ** (-1 / self._RECENT)]])
        self._counts = np.zeros((layers, 2, experts))  # decayed
        self._weights = np.zeros((layers, 2, 1))  # what the counts would be of one that is always wanted
        self._cells = np.zeros((layers, experts), np.int64)
        self._visited = np.zeros(2 * self._OCTAVES**3)
        self._wanted = np.zeros(2 * self._OCTAVES**3)
        self._chance = np.zeros((layers, experts), np.float32)
        ahead = (np.arange(layers)[None] - np.arange(layers)[:, None] - 1) % layers + 1
        self._nearness = (layers / ahead).astype(np.float32)[..., None]  # of every layer, seen from every layer
        self._worth = np.zeros((layers, experts), np.float32)
        self._layer, self._token = 0, -1

    def enter(self, layer: int) -> None:
        """See `Policy.enter`."""
        self._layer = layer

    def used(self, keys: np.ndarray, token: int) -> None:
        """See `Policy.used`."""
        layer = int(keys[0]) // self._experts
        chosen = keys - layer * self._experts
        if self._visits[layer]:
            self._learn(layer, chosen, token)
        self._visits[layer] += 1
        self._last_use[layer, chosen] = self._visits[layer]
        for array in (self._counts[layer], self._weights[layer]):
            array *= self._decays
        self._counts[layer][:, chosen] += 1
        self._weights[layer] += 1
        self._estimate(layer, len(chosen) / self._experts)

    def _learn(self, layer: int, chosen: np.ndarray, token: int) -> None:
        """Count what became of the layer's experts since its visit before."""
        if token != self._token:
            self._token = token
            self._visited *= self._FORGETTING
            self._wanted *= self._FORGETTING
        cells = self._cells[layer]
        self._visited += np.bincount(cells, minlength=len(self._visited))
        self._wanted += np.bincount(cells[chosen], minlength=len(self._wanted))

    def _estimate(self, layer: int, mean: float) -> None:
        """Each expert's chance to be wanted at the layer's next visit; `mean` is that of all."""
        counts, weights = self._counts[layer], self._weights[layer]
        often = (counts[0] + mean) / (weights[0] + 1)
        lately = (counts[1] + often) / (weights[1] + 1)
        age = self._visits[layer] - self._last_use[layer]
        cells = _halvings(often * often, 2 * self._OCTAVES)
        for share in (1 / (age + 1.0), lately):
            cells = cells * self._OCTAVES + _halvings(share, self._OCTAVES)
        self._cells[layer] = cells
        guess = (often + lately) / 2
        self._chance[layer] = (self._wanted[cells] + self._PRIOR * guess) / (self._visited[cells] + self._PRIOR)

    def victim(self, evictable: np.ndarray) -> int:
        """See `Policy.victim`."""
        np.multiply(self._chance, self._nearness[self._layer], out=self._worth)
        return lowest(self._worth.reshape(-1), evictable)

    def keeps(self, victim: int) -> bool:
        """See `Policy.keeps`."""
        return bool(self._chance.flat[victim] > GUESS_IS_RIGHT)


def _halvings(share: np.ndarray, most: int) -> np.ndarray:
    """How often 1 must be halved until it is no more than a share in (0, 1]; less than `most`."""
    return np.minimum(1 - np.frexp(share)[1], most - 1)


POLICIES: dict[str, type[LRU] | type[LFU] | type[Hybrid]] = {"lru": LRU, "lfu": LFU, "hybrid": Hybrid}
