"""Rows by number out of several sets of shards, mixed by weight: the same row for the same number, wherever one starts.

Rows are numbered over the whole run. Of every 4,096 rows each set has its fixed share, shuffled by seed; the rows of a
set come epoch by epoch, each epoch in another order. So where a number leads is arithmetic: a run goes on from one
integer, on another number of ranks too, and nothing before it is read again.

    row number → block and place → set and its row → epoch and place → row of the plan (packing.py) → tokens

A batch is a range of rows; rank r of w takes every w-th of them, from the r-th on.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import xxhash

from karakoram.errors import TrainingError
from karakoram.train.data.batches import Batch
from karakoram.train.data.corpus.conversations import WEIGHT_ONE
from karakoram.train.data.corpus.packing import Packing, Plan, pack
from karakoram.train.data.corpus.shards import ShardSet

BLOCK = 4096  # rows in which the shares are exact: weights are kept to 1/4096
STATE_VERSION = 1
_EPOCH, _MIX = 2, 3  # the first number of a seed says what is drawn, as numpy takes [7] and [7, 0] for one seed


@dataclass(frozen=True)
class Part:
    """One set of shards and its weight in rows, that is in tokens; None: as many as it has.

    Weights of all parts together are scaled to 1.
    """

    name: str
    shards: ShardSet
    weight: float | None = None


class Mixture:
    """`rows(first, count)` for any first ≥ 0. Raises TrainingError for impossible weights and sets without samples."""

    def __init__(
        self,
        parts: Sequence[Part],
        sequence_tokens: int,
        seed: int,
        pad_id: int = 0,
        packing: Packing = "best_fit",
    ) -> None:
        if not parts or len({part.name for part in parts}) < len(parts):
            raise TrainingError("A mixture needs parts, each with a name of its own.", "Name every part once.")
        if seed < 0:
            raise TrainingError(f"The seed is {seed}.", "Give a seed of 0 or more.")
        self.parts, self.sequence_tokens, self.seed, self.pad_id, self.packing = (
            parts,
            sequence_tokens,
            seed,
            pad_id,
            packing,
        )
        for part in parts:
            if not len(part.shards):
                raise TrainingError(f"The training data {part.name} hold no sample.", "Leave them out of the mixture.")
        self.plans = [pack(part.shards.lengths, sequence_tokens, seed, packing) for part in parts]
        self.quotas = _quotas(parts, self.plans)
        self._block = lru_cache(maxsize=4)(self._draw_block)
        self._epoch = lru_cache(maxsize=2 * len(parts))(self._draw_epoch)

    def rows(self, first: int, count: int, rank: int = 0, world: int = 1) -> Batch:
        """Rows first + rank, first + rank + world, … below first + count; a rank may have one more than another."""
        if first < 0 or count < 1 or not 0 <= rank < world:
            raise IndexError(f"Rows {first} to {first + count} for rank {rank} of {world}.")
        numbers = range(first + rank, first + count, world)
        shape = len(numbers), self.sequence_tokens
        ids = np.full(shape, self.pad_id, np.int64)
        targets = np.full(shape, self.pad_id, np.int64)
        weights = np.zeros(shape, np.float32)
        documents = np.zeros(shape, np.int32)
        for i, number in enumerate(numbers):
            self._fill(number, ids[i], targets[i], weights[i], documents[i])
        return Batch(*map(torch.from_numpy, (ids, targets, weights, documents)))

    def place(self, number: int) -> tuple[int, int, int]:
        """Which part a row of the run is taken from, in which epoch of that part, and which row of its plan."""
        block, at = divmod(number, BLOCK)
        part_of, count_of = self._block(block)
        part = int(part_of[at])
        epoch, row = divmod(block * self.quotas[part] + int(count_of[at]), len(self.plans[part]))
        return part, epoch, int(self._epoch(part, epoch)[row])

    def _fill(
        self, number: int, ids: np.ndarray, targets: np.ndarray, weights: np.ndarray, documents: np.ndarray
    ) -> None:
        which, _, row = self.place(number)
        part = self.parts[which]
        at = 0
        for document, (sample, start, length) in enumerate(self.plans[which].row(row)):
            has_next = start + length < part.shards.lengths[sample]
            found, hundredths = part.shards.read(sample, start, start + length + has_next)
            stop, known = at + length, at + length - (not has_next)
            ids[at:stop] = found[:length]
            targets[at:known] = found[1:]
            weights[at:known] = hundredths[1:]
            documents[at:stop] = document
            at = stop
            documents[at:] = document + 1  # padding is a document of its own
        weights /= WEIGHT_ONE

    def _draw_block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Of each row of a block, its part, and how many of that part come before it in the block."""
        parts = np.repeat(np.arange(len(self.parts)), self.quotas)
        parts = np.random.default_rng([_MIX, self.seed, block]).permutation(parts)
        counts = np.empty(BLOCK, np.int64)
        for part, quota in enumerate(self.quotas):
            counts[parts == part] = np.arange(quota)
        return parts, counts

    def _draw_epoch(self, part: int, epoch: int) -> np.ndarray:
        return np.random.default_rng([_EPOCH, self.seed, part, epoch]).permutation(len(self.plans[part]))

    # -------------------------------------------------------------------------------------------- checkpoints

    def state(self, position: int) -> dict[str, Any]:
        """JSON for a checkpoint: the position, a number of rows or batches, and what gives the position its meaning."""
        return {
            "version": STATE_VERSION, "position": position, "seed": self.seed, "packing": self.packing,
            "sequence_tokens": self.sequence_tokens,
            "parts": [
                {"name": p.name, "fingerprint": p.shards.fingerprint, "quota": q, "order": self._order(i)}
                for i, (p, q) in enumerate(zip(self.parts, self.quotas))
            ],
        }  # fmt: skip

    def load(self, state: Mapping[str, Any]) -> int:
        """The position of a checkpoint; TrainingError names what is not as it was."""
        position = state.get("position")
        if type(position) is not int or not 0 <= position < 2**62:
            raise TrainingError(f"The checkpoint's position in its data is {position!r}.", "Use another checkpoint.")
        changes = _changes(dict(state), json.loads(json.dumps(self.state(position))))
        if changes:
            raise TrainingError(
                f"The training data are not those of the checkpoint: {'; '.join(changes)}.",
                "Give the data, weights and settings that the run was started with, or begin another run.",
            )
        return position

    def _order(self, part: int) -> str:
        """Fingerprint of the rows in their first order: another version of numpy or of this file might draw another."""
        plan = self.plans[part]
        hasher = xxhash.xxh3_64()
        for array in (plan.sample_P, plan.start_P, plan.offsets_R, self._draw_epoch(part, 0)):
            hasher.update(np.ascontiguousarray(array, "<i8").data)
        return hasher.hexdigest()


def _quotas(parts: Sequence[Part], plans: Sequence[Plan]) -> list[int]:
    """Rows of each part in a block, by largest remainders."""
    weights = [float(len(plan)) if part.weight is None else part.weight for part, plan in zip(parts, plans)]
    if any(part.weight is None for part in parts) and any(part.weight is not None for part in parts):
        raise TrainingError("Some parts of the mixture have a weight and some have none.", "Give all of them, or none.")
    if not all(0 < weight < float("inf") for weight in weights):
        raise TrainingError(f"The weights of the mixture are {weights}.", "Give finite weights above 0.")
    exact = np.array(weights) / sum(weights) * BLOCK
    quotas = np.floor(exact).astype(int)
    for index in np.argsort(quotas - exact, kind="stable")[: BLOCK - quotas.sum()]:
        quotas[index] += 1
    for part, quota in zip(parts, quotas.tolist()):
        if not quota:
            raise TrainingError(
                f"{part.name} has so small a weight that it never gets one of {BLOCK} rows.",
                "Give it more weight, or leave it out.",
            )
    return quotas.tolist()


def _changes(was: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs, in words."""
    changes = [f"{key} {was.get(key)!r} → {now[key]!r}" for key in now if key != "parts" and was.get(key) != now[key]]
    parts = was.get("parts")
    if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
        return [*changes, "it does not tell its data"]
    before, after = ([part.get("name") for part in side] for side in (parts, now["parts"]))
    if before != after:
        return [*changes, f"they were {', '.join(map(str, before))} and are {', '.join(after)}"]
    words = {"fingerprint": "has other tokens", "quota": "has another weight", "order": "comes in another order"}
    for old, new in zip(parts, now["parts"]):
        changed = [word for key, word in words.items() if old.get(key) != new[key]]
        changes += [f"{new['name']} {changed[0]}"] if changed else []
    return changes


class RowBatches:
    """Batches by number: equal ranges of rows, or growing ones.

    rows           of every batch, over all ranks; or a function of the tokens before a batch (a ramp)
    settled_after  tokens after which that function is constant: batches from there on are found by arithmetic
    """

    def __init__(self, mixture: Mixture, rows: int | Callable[[int], int], settled_after: int = 0) -> None:
        self.mixture = mixture
        self.rows: Callable[[int], int] = rows if callable(rows) else lambda tokens: rows
        self.settled_after = settled_after
        self._firsts = [0]  # first row of every batch up to the first one that is settled

    def batch(self, number: int, rank: int = 0, world: int = 1) -> Batch:
        """The rows of batch `number` (from 0) for one rank."""
        first, count = self.range(number)
        return self.mixture.rows(first, count, rank, world)

    def range(self, number: int) -> tuple[int, int]:
        """First row and number of rows of a batch."""
        if number < 0:
            raise IndexError(f"Batch {number}: batches are numbered from 0.")
        firsts = self._firsts
        while len(firsts) <= number and self._tokens(firsts[-1]) < self.settled_after:
            firsts.append(firsts[-1] + self._count(firsts[-1]))
        known = min(number, len(firsts) - 1)
        count = self._count(firsts[known])
        return firsts[known] + (number - known) * count, count

    def _tokens(self, rows: int) -> int:
        return rows * self.mixture.sequence_tokens

    def _count(self, first: int) -> int:
        count = self.rows(self._tokens(first))
        if count < 1:
            raise TrainingError(f"A batch at row {first} would have {count} rows.", "Give every batch a row or more.")
        return count

    def state(self, position: int) -> dict[str, Any]:
        """Of the mixture, with the number of the next batch as position, and its first row to check the ramp by."""
        return self.mixture.state(position) | {"first_row": self.range(position)[0]}

    def load(self, state: Mapping[str, Any]) -> int:
        """The number of the next batch; TrainingError where data or batch sizes are not as they were."""
        position = self.mixture.load({key: value for key, value in state.items() if key != "first_row"})
        if state.get("first_row") != self.range(position)[0]:
            raise TrainingError(
                f"Batch {position} began at row {state.get('first_row')} and would now begin at row "
                f"{self.range(position)[0]}.",
                "Give the batch size and ramp that the run was started with.",
            )
        return position
