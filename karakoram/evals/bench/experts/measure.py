"""One budget: a fresh model, a cold start, a warm decode, a prefill. Every number that the table has.

The ideal that decoding is held against: per MoE layer the larger of reading what was missing (at the disk's measured
rate for just that many records at once) and computing what was chosen, plus everything else as it was measured. The
simple ideal is the larger of the two sums over a whole token. Disk rates are measured right after the run, by the
store's own readers with nothing to compute.
"""

from __future__ import annotations

import gc
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from karakoram.checkpoint.experts import ExpertSource
from karakoram.engine.expert_store.opening import Fed, StoreOptions, open_fed
from karakoram.engine.expert_store.store import ExpertStore, Visit
from karakoram.env import peak_resident_bytes, reset_peak_resident
from karakoram.errors import InputError
from karakoram.evals.bench.experts.disk import records_gb_per_s
from karakoram.evals.bench.report import Say
from karakoram.model.generate import sample
from karakoram.model.transformer import Transformer

FIRST_PROMPT = 16
LONG_PROMPT = 512
MOST_TOGETHER = 12  # records at once, for which the disk is measured; more are no faster
WARM_UP = 64  # tokens before decoding is timed: the memory fills, the policy learns


@dataclass(frozen=True)
class Budgeted:
    """One row. Shares are of 1; seconds, GB/s."""

    budget_bytes: int | None  # of the process
    residency: float  # share of all experts that fit
    decode_tokens_per_s: float
    hit_rate: float
    missed_gb_per_token: float
    disk_gb_per_s: float
    of_ideal: float
    of_simple_ideal: float
    guesses_useful: float | None
    first_token_s: float
    first_token_bound_s: float
    prefill_s: float
    prefill_reads_per_expert: float
    prefill_overlap: float
    peak_bytes: int | None

    @property
    def problem(self) -> str | None:
        """A process that outgrew its budget."""
        if self.budget_bytes and self.peak_bytes and self.peak_bytes > 1.05 * self.budget_bytes:
            return f"{self.peak_bytes:,} bytes were used of a budget of {self.budget_bytes:,}."
        return None

    def to_dict(self, read_gb_per_s: float) -> dict[str, Any]:
        """JSON-ready."""
        found = {name: value for name, value in vars(self).items() if value is not None}
        return found | {"tokens_per_s": self.decode_tokens_per_s, "ttft_ms": 1e3 * self.first_token_s}


class _Run:
    """One sequence, drawn at temperature 1 (greedy text may fall into a loop of few experts), with the time taken."""

    def __init__(self, model: Transformer, store: ExpertStore, capacity: int) -> None:
        self.model, self.store = model, store
        self.cache = model.new_cache(1, capacity)
        self.tokens: list[int] = []
        self._draw = torch.Generator().manual_seed(0)

    @torch.inference_mode()
    def prompt(self, ids: list[int]) -> float:
        """Seconds to the first token."""
        began = time.perf_counter()
        self._take(torch.tensor([ids]))
        return time.perf_counter() - began

    @torch.inference_mode()
    def decode(self, count: int) -> float:
        """Seconds for so many further tokens."""
        began = time.perf_counter()
        for _ in range(count):
            self._take(torch.tensor([self.tokens[-1:]]))
        return time.perf_counter() - began

    def _take(self, ids_1T: torch.Tensor) -> None:
        logits_V = self.model(ids_1T, self.cache, logits_for="last")[0, -1]
        self.tokens.append(sample(logits_V, 1.0, 1.0, self._draw))


def measure(path: str | Path, options: StoreOptions, tokens: int, say: Say) -> Budgeted:
    """One row. Raises InputError where the model needs no store under these options."""
    reset_peak_resident()
    fed = open_fed(path, options)
    if fed is None:
        raise InputError(f"{path} fits into memory.", "Give a smaller budget.")
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # as the commands do where a store feeds the model
    try:
        return _measure(fed, options, tokens, say)
    finally:
        torch.set_num_threads(before)
        fed.store.close()
        gc.collect()


def _measure(fed: Fed, options: StoreOptions, tokens: int, say: Say) -> Budgeted:
    store, model = fed.store, fed.model
    source, readers = store.source, store.readers
    draw = np.random.default_rng(0)
    vocabulary = model.config.vocab_size

    say("first token")
    run = _Run(model, store, FIRST_PROMPT + WARM_UP + tokens + 1)
    first_s = run.prompt(draw.integers(vocabulary, size=FIRST_PROMPT).tolist())
    first_bytes = readers.bytes_read

    say("decoding")
    run.decode(WARM_UP)
    before = vars(store.counters).copy()
    store.log = []
    took_s = run.decode(tokens)
    log, store.log = store.log, None
    now = {name: value - before[name] for name, value in vars(store.counters).items()}

    say("prefill")
    long = _Run(model, store, LONG_PROMPT)
    reads, store.log = readers.done, []
    prefill_s = long.prompt(draw.integers(vocabulary, size=LONG_PROMPT).tolist())
    prefill, store.log = store.log, None
    prefill_reads = readers.done - reads

    say("the disk alone")
    missed = sum(visit.missed for visit in log)
    disk = _Disk(source)
    read_s = sum(disk.seconds(visit.missed) for visit in log)
    rest_s = took_s - sum(visit.feeding_s for visit in log)
    return Budgeted(
        budget_bytes=options.ram_bytes,
        residency=store.capacity / (len(source.layers) * source.experts),
        decode_tokens_per_s=tokens / took_s,
        hit_rate=now["hits"] / now["demanded"],
        missed_gb_per_token=missed * source.record_bytes / tokens / 1e9,
        disk_gb_per_s=missed * source.record_bytes / read_s / 1e9 if missed else disk.most_gb_per_s,
        of_ideal=(sum(max(disk.seconds(v.missed), v.computing_s) for v in log) + rest_s) / took_s,
        of_simple_ideal=max(read_s, rest_s + sum(visit.computing_s for visit in log)) / took_s,
        guesses_useful=now["guessed_right"] / now["guessed"] if now["guessed"] else None,
        first_token_s=first_s,
        first_token_bound_s=1.3 * first_bytes / disk.most_gb_per_s / 1e9 + 2,
        prefill_s=prefill_s,
        prefill_reads_per_expert=prefill_reads / (len(source.layers) * source.experts),
        prefill_overlap=_overlap(prefill, disk),
        peak_bytes=peak_resident_bytes(),
    )


class _Disk:
    """How long the disk alone takes for so many records that are wanted together; asked once for each number."""

    def __init__(self, source: ExpertSource) -> None:
        self._source = source
        self._gb_per_s: dict[int, float] = {}

    @property
    def most_gb_per_s(self) -> float:
        """At the largest depth."""
        return self._rate(MOST_TOGETHER)

    def seconds(self, records: int) -> float:
        """For this many at once."""
        return records * self._source.record_bytes / self._rate(min(records, MOST_TOGETHER)) / 1e9 if records else 0.0

    def _rate(self, together: int) -> float:
        if together not in self._gb_per_s:
            self._gb_per_s[together] = records_gb_per_s(self._source, together)
        return self._gb_per_s[together]


def _overlap(log: list[Visit], disk: _Disk) -> float:
    """Of the shorter of reading and computing, the share that ran beside the longer: 1 is perfect, 0 is in turn."""
    reading = [disk.seconds(visit.missed) for visit in log]
    computing, took = [visit.computing_s for visit in log], [visit.feeding_s for visit in log]
    shorter = sum(min(pair) for pair in zip(reading, computing, strict=True))
    hidden = sum(reading) + sum(computing) - sum(took)
    return max(0.0, min(1.0, hidden / shorter)) if shorter else 1.0
