"""Which experts are in memory: pure bookkeeping, shared by the live store and the simulator: both decide alike.

A layer's turn is `demand` (who is here, who is missing; all are locked), `admit` for each missing one, and `release`.
Never evicted are: the locked, the pinned, and the last `floor` experts of a layer, except by an expert of that layer.
A guess (prefetch) that has not been asked about yet leaves only where nobody else can, and never for another guess.

The capacity should hold the experts of a layer's largest batch. Where it does not, the layer runs in rounds: `admit`
says REFUSED, and `release` with the keys whose tokens are through makes room.
"""

from collections.abc import Iterable

import numpy as np

from karakoram.engine.expert_store.policy import Policy
from karakoram.errors import InputError

REFUSED = -1  # no key: nothing may leave now, or nothing that is worth less than a guess


class Residency:
    """Residents of a memory of `capacity` experts. Not thread-safe.

    resident        bool over all keys
    hits, misses    demanded experts that were resident, and that were not
    evictions       experts that had to leave
    guessed_useful  guesses that were demanded at their layer's next visit
    guessed_wasted  guesses that were not, or left before
    """

    def __init__(
        self, layers: int, experts: int, capacity: int, policy: Policy, floor: int = 0, pins: Iterable[int] = ()
    ) -> None:
        """Raises InputError where floors and pins leave no room to move."""
        pinned = np.unique(np.fromiter(pins, np.int64))
        keys = layers * experts
        _check(keys, capacity, layers, floor, pinned)
        self.layers, self.experts, self.capacity, self.floor = layers, experts, capacity, floor
        self.resident = np.zeros(keys, bool)
        self.hits = self.misses = self.evictions = 0
        self.guessed_useful = self.guessed_wasted = 0
        self._policy = policy
        self._pinned = np.zeros(keys, bool)
        self._pinned[pinned] = True
        self._locked = np.zeros(keys, bool)
        self._evictable = np.zeros(keys, bool)  # resident, and neither locked, pinned nor an open guess
        self._due: np.ndarray | None = None  # demanded keys of which the policy has not heard
        self._guessed: set[int] = set()  # guesses that their layer has not been asked about yet
        self._count = 0
        self._count_by_layer = np.zeros(layers, np.int64)
        self._pass, self._last_layer = -1, layers

    def __len__(self) -> int:
        return self._count

    def demand(self, layer_index: int, experts: np.ndarray) -> tuple[list[int], list[int]]:
        """The unique experts of a batch -> resident keys and missing keys, each in the given order.

        All are locked until `release`. Guesses for this layer are decided here.
        """
        self.settle()
        if layer_index <= self._last_layer:
            self._pass += 1
        self._last_layer = layer_index
        self._policy.enter(layer_index)
        keys = experts.astype(np.int64) + layer_index * self.experts
        if not len(keys):
            return [], []
        here = self.resident[keys]
        self._locked[keys] = True
        self._evictable[keys] = False
        found, missing = keys[here].tolist(), keys[~here].tolist()
        self.hits += len(found)
        self.misses += len(missing)
        self._decide_guesses(layer_index, found)
        self._due = keys
        return found, missing

    def settle(self) -> None:
        """Tell the policy of the last demand; at the latest the next one does.

        Apart from `demand`, so that reads can begin first: what they evict is decided by what was known before.
        """
        if self._due is not None:
            keys, self._due = self._due, None
            self._policy.used(keys, self._pass)

    def admit(self, key: int, guessed: bool = False) -> int | None:
        """Make room for a key, which is resident from here on.

        Returns the key that had to leave, None where there was room, or REFUSED (and the key is not resident) where
        nothing may leave now, or, for a guess, nothing that is worth less.
        """
        if self.resident[key]:
            raise ValueError(f"expert {key} is resident already")
        victim = None
        if self._count >= self.capacity:
            victim = self._victim(key // self.experts, guessed)
            if victim == REFUSED:
                return REFUSED
            self._remove(victim)
            self.evictions += 1
        self.resident[key] = True
        self._count += 1
        self._count_by_layer[key // self.experts] += 1
        if guessed:
            self._guessed.add(key)
        else:
            self._refresh(key)
        return victim

    def release(self, layer_index: int, keys: Iterable[int] | None = None) -> None:
        """Unlock some of a layer's keys, or all."""
        if keys is None:
            first = layer_index * self.experts
            self._unlock(np.flatnonzero(self._locked[first : first + self.experts]) + first)
        else:
            self._unlock(np.fromiter(keys, np.int64))

    def drop(self, key: int) -> None:
        """A resident that turned out not to be there (its read failed or was stopped); not counted as an eviction."""
        if self.resident[key]:
            self._remove(key)

    def shrink(self, capacity: int) -> list[int]:
        """Hold so many at most from now on; the keys that had to leave. Floors give way, pins and locks do not."""
        self.capacity = max(1, capacity)
        self.floor = min(self.floor, self.capacity // self.layers)
        gone: list[int] = []
        while self._count > self.capacity:
            victim = self._victim(0, guessed=False)
            if victim == REFUSED:
                break
            self._remove(victim)
            gone.append(victim)
        self.evictions += len(gone)
        return gone

    # ------------------------------------------------------------------------------------------ inside

    def _victim(self, layer: int, guessed: bool) -> int:
        victim = self._choose(layer, self._evictable)
        if guessed:
            return REFUSED if victim == REFUSED or self._policy.keeps(victim) else victim
        if victim == REFUSED and self._guessed:
            return self._choose(layer, self._open_guesses())
        return victim

    def _choose(self, layer: int, candidates: np.ndarray) -> int:
        """The policy's choice among those whose layer can spare one for an expert of `layer`."""
        if self.floor:
            spare = self._count_by_layer > self.floor
            spare[layer] = True
            if not spare.all():
                candidates = (candidates.reshape(self.layers, self.experts) & spare[:, None]).reshape(-1)
        return self._policy.victim(candidates) if candidates.any() else REFUSED

    def _open_guesses(self) -> np.ndarray:
        guesses = np.zeros(len(self.resident), bool)
        guesses[list(self._guessed)] = True
        return guesses & ~self._locked & ~self._pinned

    def _decide_guesses(self, layer_index: int, found: list[int]) -> None:
        if not self._guessed:
            return
        first = layer_index * self.experts
        decided = {key for key in self._guessed if first <= key < first + self.experts}
        right = decided.intersection(found)
        self.guessed_useful += len(right)
        self.guessed_wasted += len(decided) - len(right)
        self._guessed -= decided
        for key in decided:
            self._refresh(key)

    def _remove(self, key: int) -> None:
        self.resident[key] = self._evictable[key] = False
        self._count -= 1
        self._count_by_layer[key // self.experts] -= 1
        if key in self._guessed:
            self._guessed.remove(key)
            self.guessed_wasted += 1

    def _refresh(self, key: int) -> None:
        self._evictable[key] = self.resident[key] and not (self._locked[key] or self._pinned[key])

    def _unlock(self, keys: np.ndarray) -> None:
        self._locked[keys] = False
        self._evictable[keys] = self.resident[keys] & ~self._pinned[keys]
        if self._guessed:
            self._evictable[[key for key in keys.tolist() if key in self._guessed]] = False


def _check(keys: int, capacity: int, layers: int, floor: int, pinned: np.ndarray) -> None:
    if not 0 <= floor * layers <= capacity or capacity < 1:
        raise InputError(
            f"A memory of {capacity:,} experts cannot keep {floor:,} of each of {layers:,} layers.",
            "Give it more memory, or lower the floor.",
        )
    if len(pinned) and not (pinned[0] >= 0 and pinned[-1] < keys):
        raise InputError(f"A pinned expert is none of the {keys:,}.", "Pin keys of this model.")
    if len(pinned) >= capacity and capacity < keys:
        raise InputError(
            f"{len(pinned):,} pinned experts fill a memory of {capacity:,}.", "Pin fewer, or give it more memory."
        )
