"""Routed experts that live on disk and visit memory: what a layer's `FedBank` is fed by.

    ids ─▶ residency (who is here, who must go) ─┬▶ here: the kernels begin at once
                                                 └▶ not here: readers ─▶ the kernels, one by one as they arrive
    next layer's router on this layer's input ─▶ guesses, read in what time the disk has left

The kernels sum a token's experts in the order of its slots, so the result is the same bits whatever was in memory, in
whatever order the rest arrived, with or without guesses.

A layer whose batch wants more experts than there are slots runs in rounds: an expert's slot is free for the next as
soon as its tokens are through. So the smallest store that works has one slot; a fast one holds a layer's batch.

Legend: N tokens, D hidden, E experts, K experts per token.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from karakoram.checkpoint.experts import ExpertSource
from karakoram.engine.expert_store.arena import Arena
from karakoram.engine.expert_store.card import Card
from karakoram.engine.expert_store.foresight import Foresight, Guess
from karakoram.engine.expert_store.policy import Policy
from karakoram.engine.expert_store.readers import Read, Readers
from karakoram.engine.expert_store.residency import REFUSED, Residency
from karakoram.engine.expert_store.shadow import Shadow
from karakoram.env import resident_bytes
from karakoram.errors import CheckpointError, ExpertUnavailable, InputError
from karakoram.kernels import ops
from karakoram.model.packed.modules import FedBank, SharedExperts
from karakoram.model.transformer import Transformer

if TYPE_CHECKING:
    from karakoram.engine.expert_store.trace import TraceWriter

MOST_IN_FLIGHT = 32  # reads of one layer's experts: more slots than that, waiting for the disk, help nobody
SPARE_SLOTS = 4  # for reads that were stopped and have not let go yet
CHECK_S = 1.0  # between two looks at the file: was it replaced?

_Rows = tuple[Tensor, Tensor, Tensor]


@dataclass
class Counters:
    """Since the store was opened; they only grow. Demands count (layer, expert) once a batch."""

    passes: int = 0
    demanded: int = 0
    hits: int = 0  # in memory, or on their way by a guess
    guessed: int = 0  # reads begun on a guess; counted when their layer came, or when they had to leave before
    guessed_right: int = 0
    waited_s: float = 0.0  # for the disk, with nothing to compute
    computing_s: float = 0.0  # in the kernels
    feeding_s: float = 0.0  # from a layer's ids to its sum


@dataclass(frozen=True)
class Visit:
    """What one layer took of one batch, for benchmarks."""

    index: int
    missed: int  # experts that were not in memory when they were wanted; those on their way by a guess among them
    computing_s: float
    feeding_s: float


@dataclass
class _Layer:
    """One layer's work on one batch."""

    index: int
    ids_NK: Tensor
    queue: list[int]  # keys that have no slot yet
    steps: ops.MoeSteps | None = None
    pending: dict[int, Read] = field(default_factory=dict)  # keys that are being read
    computing_s: float = 0.0
    began_s: float = field(default_factory=time.perf_counter)


class ExpertStore:
    """Feeds one model's routed experts from a source. Any thread may run the model; layers take turns."""

    def __init__(
        self,
        source: ExpertSource,
        capacity: int,
        policy: Policy,
        floor: int = 0,
        guessing: bool = True,
        threads: int = 4,
        trace: TraceWriter | None = None,
        limit_bytes: int | None = None,
        card: Card | None = None,
        shadow_after_s: float | None = None,
    ) -> None:
        """capacity: experts in memory at most, over all layers. limit_bytes: of the process; slots are given back
        where it grows beyond."""
        self.source, self.trace, self.policy, self.limit_bytes = source, trace, "", limit_bytes
        self.card = card
        self.counters = Counters()
        self.log: list[Visit] | None = None  # a list, to be filled
        self._rows_N: np.ndarray | None = None  # whose tokens the next pass has
        everything = len(source.layers) * source.experts
        self.capacity = min(capacity, everything)
        spare = SPARE_SLOTS if self.capacity < everything else 0
        self._arena = Arena(self.capacity + spare, source.slot_bytes, source.record_bytes)
        self.residency = Residency(len(source.layers), source.experts, self.capacity, policy, floor)
        self.readers = Readers(source, threads)
        self.shadow = None if shadow_after_s is None else Shadow(source, shadow_after_s)
        self._guessing = guessing
        self._foresight: Foresight | None = None
        self._slots: dict[int, int] = {}
        self._guesses: dict[int, Read] = {}  # on their way, or arrived and not yet asked about
        self._late: set[int] = set()  # of these, no guesses: their layer went on with their shadows
        self._guess_now: Guess | None = None  # for the layer that comes next
        self._leaving: list[tuple[Read, int]] = []  # stopped reads and their slots
        self._spare, self._owed = spare, 0  # slots beyond the capacity; slots to be given back when they are free
        self._checked_s = time.monotonic()
        self._lock = threading.Lock()

    def __str__(self) -> str:
        everything = len(self.source.layers) * self.source.experts
        share = self.capacity / everything
        return f"{self.capacity:,} of {everything:,} experts in memory ({share:.0%}, {self.policy})"

    def tell_rows(self, rows_N: np.ndarray) -> None:
        """Numbers of the sequences whose tokens the next pass has, for the trace."""
        self._rows_N = rows_N.astype(np.int32)

    def approximated(self, sequence: int | None = None) -> int | None:
        """Tokens that were touched by shadows: of a sequence that is over, or of all so far; None without shadows."""
        if self.shadow is None:
            return None
        return self.shadow.tokens if sequence is None else self.shadow.touched(sequence)

    def stats(self) -> dict[str, float]:
        """Counters since the store was opened, for metrics."""
        c, readers = self.counters, self.readers
        return {
            "experts_capacity": self.capacity,
            "experts_demanded": c.demanded,
            "experts_hits": c.hits,
            "experts_guessed": c.guessed,
            "experts_guessed_right": c.guessed_right,
            "experts_bytes_read": readers.bytes_read,
            "experts_waited_s": c.waited_s,
        }

    def attach(self, model: Transformer) -> None:
        """Feed this model, which was loaded without its routed experts."""
        routers, norms = [], []
        for index, number in enumerate(self.source.layers):
            layer: Any = model.model.layers[number]
            bank = layer.mlp.experts
            if not isinstance(bank, FedBank):
                raise InputError("This model has its experts already.", "Load it with routed_experts=False.")
            bank.feed = self._feeder(index)
            routers.append(layer.mlp.gate)
            norms.append(layer.post_attention_layernorm.weight)
        if self._guessing and self.capacity < len(self.source.layers) * self.source.experts:
            self._foresight = Foresight(routers, norms)

    def _feeder(self, index: int) -> Callable[[Tensor, Tensor, Tensor, SharedExperts | None], Tensor]:
        def feed(x_ND: Tensor, ids_NK: Tensor, weights_NK: Tensor, shared: SharedExperts | None) -> Tensor:
            with self._lock:
                began = time.perf_counter()
                mixed_ND, missed, computing_s = self._mix(index, (x_ND, ids_NK, weights_NK), shared)
                took = time.perf_counter() - began
            self.counters.feeding_s += took
            self.counters.computing_s += computing_s
            if self.log is not None:
                self.log.append(Visit(index, missed, computing_s, took))
            return mixed_ND

        return feed

    def _mix(self, index: int, rows: _Rows, shared: SharedExperts | None) -> tuple[Tensor, int, float]:
        """A layer's experts on a batch; how many were missing, seconds in the kernels.

        Raises ExpertUnavailable for one that cannot be read.
        """
        x_ND, ids_NK = rows[:2]
        source = self.source
        if index == 0:
            self._keep_within()
            if self.shadow is not None:
                self.shadow.begin_pass()
        if self.trace is not None:
            rows_N = self._rows_N if self._rows_N is not None and len(self._rows_N) == len(ids_NK) else None
            self.trace.record(source.layers[index], ids_NK.numpy(), sequences_T=rows_N)
        self._check_source()
        wanted, on_card = self._split(index, np.unique(ids_NK.numpy()))
        here, missing = self._demand(index, wanted)
        layer = _Layer(index, ids_NK, missing)
        try:
            missed = len(missing) + self._take_over_guesses(layer, here)
            if missed or on_card:
                self._request(layer)
                layer.steps = ops.MoeSteps(*rows, source.experts, source.intermediate, source.kind)
                begun = self.card.begin(on_card, x_ND, ids_NK) if self.card is not None and on_card else []
                self._foresee(index, wanted, x_ND)
                mixed_ND = self._in_steps(layer, here, begun, shared)
            else:
                self._foresee(index, wanted, x_ND)
                mixed_ND = self._at_once(layer, here, rows, shared)
        except BaseException:
            self._abandon(layer)
            raise
        finally:
            self.residency.release(index)
        if self.shadow is not None and index == len(source.layers) - 1:
            self.shadow.end_pass(self._rows_N)
        return mixed_ND, missed, layer.computing_s

    def _at_once(self, layer: _Layer, here: list[int], rows: _Rows, shared: SharedExperts | None) -> Tensor:
        """All are in memory: one call."""
        source = self.source
        records = {key % source.experts: self._arena.record(self._slots[key]) for key in here}
        mixed_ND = self._timed(
            layer, ops.moe_scattered, *rows, records, source.experts, source.intermediate, source.kind, shared
        )
        if self.card is not None:
            self.residency.release(layer.index)
            self._promote(here)
        return mixed_ND

    def _in_steps(
        self, layer: _Layer, here: list[int], begun: list[tuple[int, Tensor]], shared: SharedExperts | None
    ) -> Tensor:
        """Those in memory, then each other one as it arrives."""
        assert layer.steps is not None
        self._compute(layer, [key for key in here if key not in layer.pending])
        if shared is not None:
            self._timed(layer, layer.steps.shared, shared)
        for expert, rows_MD in begun:
            layer.steps.partial(expert, rows_MD.cpu())
        while layer.pending or layer.queue:
            self._request(layer)  # what was computed has made room
            left_s = (
                None if self.shadow is None else max(0.0, layer.began_s + self.shadow.after_s - time.perf_counter())
            )
            self._compute(layer, arrived := self._arrived(layer, left_s))
            if self.shadow is not None and not arrived:
                self._approximate(layer, self.shadow)
        return self._timed(layer, layer.steps.finish)

    def _approximate(self, layer: _Layer, shadow: Shadow) -> None:
        """The layer has waited long enough: what is not here comes from its shadow. Reads that have begun go on."""
        assert layer.steps is not None
        missing = [*layer.pending, *layer.queue]
        for key, read in list(layer.pending.items()):
            if read.state == "waiting":
                del layer.pending[key]
                self.residency.drop(key)
                self._stop(read, self._slots.pop(key))
        self._timed(layer, shadow.compute, layer.steps, missing, layer.ids_NK)
        self._guesses.update(layer.pending)
        self._late.update(layer.pending)
        layer.pending.clear()
        layer.queue.clear()

    def _timed(self, layer: _Layer, work: Callable[..., Any], *arguments: Any) -> Any:
        before = time.perf_counter()
        result = work(*arguments)
        layer.computing_s += time.perf_counter() - before
        return result

    def _split(self, index: int, wanted: np.ndarray) -> tuple[np.ndarray, list[int]]:
        """The experts that memory must have, and the keys of those on the card."""
        if self.card is None:
            return wanted, []
        keys = wanted + index * self.source.experts
        self.card.see(keys, index == 0)
        there = self.card.holds(keys)
        on_card = keys[there].tolist()
        self.counters.demanded += len(on_card)
        self.counters.hits += len(on_card)
        return wanted[~there], on_card

    def _demand(self, index: int, wanted: np.ndarray) -> tuple[list[int], list[int]]:
        counters = self.counters
        counters.passes += index == 0
        here, missing = self.residency.demand(index, wanted)
        counters.demanded += len(here) + len(missing)
        counters.hits += len(here)
        self._drop_wrong_guesses(index, set(here))
        return here, missing

    def _compute(self, layer: _Layer, keys: Sequence[int]) -> None:
        """The kernels' part; the keys' slots may be given to others from here on."""
        if not keys:
            return
        assert layer.steps is not None
        experts = self.source.experts
        records = [self._arena.record(self._slots[key]) for key in keys]
        self._timed(layer, layer.steps.experts, [key % experts for key in keys], records)
        self.residency.release(layer.index, keys)
        if self.card is not None:
            self._promote(keys)

    def _promote(self, keys: Sequence[int]) -> None:
        """To the card, what it has chosen; their slots are free."""
        assert self.card is not None
        for key in keys:
            if self.card.wants(key):
                slot = self._slots.pop(key)
                self.card.put(key, self._arena.record(slot))
                self.residency.drop(key)
                self._arena.give(slot)

    def _request(self, layer: _Layer) -> None:
        """Begin reads of what is missing, as far as there are slots."""
        taken: list[int] = []
        while layer.queue and len(layer.pending) + len(taken) < MOST_IN_FLIGHT:
            if not self._make_room(layer.queue[0], guessed=False):
                break
            taken.append(layer.queue.pop(0))
        if taken:
            layer.pending.update(zip(taken, self._submit(taken, urgent=True), strict=True))

    def _submit(self, keys: list[int], urgent: bool) -> list[Read]:
        source = self.source
        places = [divmod(key, source.experts) for key in keys]
        wanted = [
            (source.layers[at], expert, self._arena.slot(self._slots[key]))
            for key, (at, expert) in zip(keys, places, strict=True)
        ]
        return self.readers.submit(wanted, urgent)

    def _arrived(self, layer: _Layer, timeout_s: float | None) -> list[int]:
        """Wait for at least one of the layer's reads, or for so long; the keys of those that are here."""
        if not layer.pending:
            raise InputError(f"Pins leave no room in a store of {self.capacity} experts.", "Give it more memory.")
        before = time.perf_counter()
        finished = set(map(id, self.readers.wait(list(layer.pending.values()), timeout_s)))
        self.counters.waited_s += time.perf_counter() - before
        keys = [key for key, read in layer.pending.items() if id(read) in finished]
        for key in keys:
            if (error := layer.pending[key].error) is not None:
                raise self._unavailable(layer, key, error)
            del layer.pending[key]
        return keys

    def _unavailable(self, layer: _Layer, key: int, error: BaseException) -> BaseException:
        if not isinstance(error, CheckpointError):
            return error
        rows = (layer.ids_NK == key % self.source.experts).any(-1).nonzero().flatten().tolist()
        return ExpertUnavailable(error.what, error.fix, tuple(rows))

    def _make_room(self, key: int, guessed: bool) -> bool:
        """A slot for this key; False where none can be had now."""
        self._sweep()
        victim = self.residency.admit(key, guessed)
        if victim == REFUSED:
            return False
        if victim is None:
            self._slots[key] = self._take_slot()
            return True
        slot = self._slots.pop(victim)
        if (read := self._guesses.pop(victim, None)) is not None:
            self._count_wrong(victim, read)
            self._stop(read, slot)
            slot = self._take_slot()
        self._slots[key] = slot
        return True

    def _take_slot(self) -> int:
        while not self._arena.free and self._leaving:
            self.readers.wait([read for read, _ in self._leaving])
            self._sweep()
        return self._arena.take()

    # -------------------------------------------------------------------------------------------- guesses

    def _guess(self, index: int, x_ND: Tensor, foresight: Foresight) -> None:
        """Begin to read what the next layer may want, with what time the disk has left."""
        guess = foresight.guess(index, x_ND)
        if guess is None:
            return
        self._guess_now = guess
        if self.trace is not None:
            self.trace.guess(self.source.layers[index + 1], guess.experts)
        keys = guess.experts + (index + 1) * self.source.experts
        guess.missing = ~self.residency.resident[keys]
        if self.card is not None:
            guess.missing &= ~self.card.holds(keys)
        taken: list[int] = []
        for key in keys[guess.missing & foresight.worthwhile(guess)].tolist():
            if len(self._guesses) + len(taken) >= MOST_IN_FLIGHT or not self._make_room(key, guessed=True):
                break
            taken.append(key)
        taken = [key for key in taken if key in self._slots]  # in a tiny store, one may have taken another's place
        foresight.saw(len(taken))
        if taken:
            self._guesses.update(zip(taken, self._submit(taken, urgent=False), strict=True))

    def _take_over_guesses(self, layer: _Layer, here: list[int]) -> int:
        """Wanted experts that a guess has asked for: wait for those like for any other. How many are not here yet."""
        taken = {key: self._guesses.pop(key) for key in here if key in self._guesses}
        right = len(taken.keys() - self._late)
        self.counters.guessed += right
        self.counters.guessed_right += right
        self._late -= taken.keys()
        late = {key: read for key, read in taken.items() if read.state != "done"}
        self.readers.promote(late.values())
        layer.pending.update(late)
        return len(late)

    def _foresee(self, index: int, wanted: np.ndarray, x_ND: Tensor) -> None:
        """Learn from what is wanted now, and guess what will be next; the disk is at work already."""
        self.residency.settle()
        guess, self._guess_now = self._guess_now, None
        if self._foresight is None:
            return
        if guess is not None and guess.index == index:
            self._foresight.learn(guess, wanted)
        self._guess(index, x_ND, self._foresight)

    def _drop_wrong_guesses(self, index: int, wanted: set[int]) -> None:
        first = index * self.source.experts
        for key in [key for key in self._guesses if first <= key < first + self.source.experts and key not in wanted]:
            read = self._guesses.pop(key)
            self._count_wrong(key, read)
            if not read.finished or read.error is not None:
                self.residency.drop(key)
                self._stop(read, self._slots.pop(key))

    def _count_wrong(self, key: int, read: Read) -> None:
        """A guess that its layer did not want, or that leaves before; not one that nobody began to read."""
        self.counters.guessed += read.state != "waiting" and key not in self._late
        self._late.discard(key)

    # -------------------------------------------------------------------------------------------- ends of reads

    def _stop(self, read: Read, slot: int) -> None:
        self.readers.cancel([read])
        self._leaving.append((read, slot))

    def _sweep(self) -> None:
        """Slots of stopped reads that have let go."""
        for read, slot in self._leaving:
            if read.finished:
                self._arena.give(slot)
        self._leaving = [(read, slot) for read, slot in self._leaving if not read.finished]
        self._give_back()

    def _abandon(self, layer: _Layer) -> None:
        """After an error: what was on its way for this layer is not here."""
        for key, read in layer.pending.items():
            self.residency.drop(key)
            self._stop(read, self._slots.pop(key))
        layer.pending.clear()

    def _check_source(self) -> None:
        """Once a second: is the file still the one that was opened?"""
        now = time.monotonic()
        if now - self._checked_s >= CHECK_S:
            self._checked_s = now
            self.source.check_unchanged()

    def _keep_within(self) -> None:
        """Give slots back where the process has grown beyond its budget."""
        if self.limit_bytes is None or (here := resident_bytes()) is None or here <= self.limit_bytes:
            return
        most = max(1, self.capacity // 8)  # in one pass
        count = min(-(-(here - self.limit_bytes) // self.source.slot_bytes), self.capacity - 1, most)
        if count < 1:
            return
        self.capacity -= count
        for key in self.residency.shrink(self.capacity):
            slot = self._slots.pop(key)
            if (read := self._guesses.pop(key, None)) is not None:
                self._count_wrong(key, read)
                self._stop(read, slot)
            else:
                self._arena.give(slot)
        self._owed += count
        self._sweep()

    def _give_back(self) -> None:
        """Slots that are owed, as far as they are free and no spare ones: a stopped read still holds its own."""
        if self._owed:
            self._owed -= self._arena.retire(min(self._owed, max(0, self._arena.free - self._spare)))

    def close(self) -> None:
        """Stop all reads and let go of the source. The model cannot run any more."""
        self.readers.close()
        self.source.close()
        if self.trace is not None:
            self.trace.close()
