"""A model whose experts visit memory computes the same bits as one that has them all."""

# pyright: reportPrivateUsage=false

import os
import threading
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from karakoram.checkpoint import index
from karakoram.cli.opening import open_for_chat
from karakoram.engine.engine import Engine
from karakoram.engine.expert_store.opening import StoreOptions
from karakoram.engine.expert_store.store import SPARE_SLOTS, ExpertStore
from karakoram.engine.expert_store.trace import TraceWriter, read_trace
from karakoram.engine.request import Request, Sampling
from karakoram.env import bundled_model_dir
from karakoram.errors import InputError
from karakoram.model.generate import generate
from karakoram.model.load import load_model
from karakoram.model.transformer import Transformer
from tests.engine.expert_store.fed import EVERYTHING, NEW, PROMPT, Run, fed, run, same

SIZES = [(1, 0), (5, 0), (24, 2), (EVERYTHING, 0)]


@pytest.mark.parametrize("packed", [False, True], ids=["in place", "packed"])
@pytest.mark.parametrize("guessing", [False, True], ids=["", "guessing"])
@pytest.mark.parametrize(("capacity", "floor"), SIZES)
@pytest.mark.parametrize("policy", ["lru", "hybrid"])
def test_bits_are_those_of_a_model_in_memory(
    policy: str, capacity: int, floor: int, guessing: bool, packed: bool, in_memory: Run, packed_nano: Path
) -> None:
    path = packed_nano if packed else None
    with fed(capacity, policy, guessing, floor, path) as one:
        assert same(run(one.model), in_memory)
        assert same(run(one.model), in_memory)  # with what the first run left in memory
        counters, layers = one.store.counters, len(one.store.source.layers)
        assert counters.passes == 2 * NEW
        assert counters.demanded >= 2 * NEW * layers * one.model.config.num_experts_per_tok
        assert 0 <= counters.guessed_right <= counters.guessed
        if capacity == EVERYTHING:
            assert counters.demanded - counters.hits <= EVERYTHING  # each was read once at most


def test_two_hundred_tokens_from_a_quarter_of_the_experts(nano: Transformer, packed_nano: Path) -> None:
    expected = run(nano, 200)
    with fed(EVERYTHING // 4, path=packed_nano) as one:
        assert same(run(one.model, 200), expected)
        assert one.store.counters.hits > one.store.counters.demanded // 4


def test_a_batch_through_the_engine(nano: Transformer, packed_nano: Path) -> None:
    """Prompts of several lengths prefilled and decoded together, from fewer slots than a layer's batch wants."""
    requests = [Request(f"r{n}", PROMPT[: 8 + 9 * n], 12, Sampling(temperature=0)) for n in range(4)]
    with Engine(nano, deterministic=True) as engine:
        expected = [engine.generate(request) for request in requests]
    with fed(9, path=packed_nano) as one, Engine(one.model, deterministic=True) as engine:
        assert [engine.generate(request) for request in requests] == expected


def test_it_works_through_the_plain_generate(nano: Transformer) -> None:
    expected = list(generate(nano, PROMPT, 9, stop_ids=()))
    with fed(7) as one:
        assert list(generate(one.model, PROMPT, 9, stop_ids=())) == expected


def test_it_shrinks_where_the_process_outgrows_its_budget(in_memory: Run) -> None:
    """A limit far below what any process has: every pass gives slots back, and the bits stay."""
    with fed(64, limit_bytes=1 << 20) as one:
        assert same(run(one.model), in_memory)
        assert one.store.capacity < 64 - NEW
        for _ in range(4):
            assert same(run(one.model), in_memory)
        assert one.store.capacity >= 1


def test_a_model_without_experts_says_so_until_it_is_fed() -> None:
    model = load_model(bundled_model_dir(), routed_experts=False)
    with pytest.raises(InputError, match="without its routed experts") as caught:
        model(torch.tensor([PROMPT]))
    assert "expert store" in caught.value.fix


def test_a_model_that_has_its_experts_is_not_fed(nano: Transformer) -> None:
    with fed(5) as one, pytest.raises(InputError, match="experts already"):
        one.store.attach(nano)


def test_a_trace_tells_the_sequences_of_a_batch_apart(packed_nano: Path, tmp_path: Path) -> None:
    requests = [Request(f"r{n}", PROMPT[: 8 + 9 * n], 6, Sampling(temperature=0)) for n in range(3)]
    path = tmp_path / "batch.trace"
    with fed(30, path=packed_nano) as one:
        source = one.store.source
        one.store.trace = TraceWriter(path, source.layers, source.experts, one.model.config.num_experts_per_tok)
        with Engine(one.model, experts=one.store) as engine:
            for request in requests:
                engine.generate(request)
            stats = engine.stats()
    assert stats["experts_demanded"] >= stats["experts_hits"] > 0
    trace = read_trace(path)
    lengths = {int(n): sum(int((p.sequences_T == n).sum()) for p in trace.passes) for n in range(3)}
    assert all(lengths[n] > 5 for n in range(3))
    assert trace.tokens == sum(lengths.values())


class Held:
    """Reads that wait, once they are told to, until they are let go."""

    def __init__(self) -> None:
        self.armed, self.begun, self.leave = threading.Event(), threading.Event(), threading.Event()

    def __call__(self, descriptor: int, views: Sequence[memoryview], offset: int) -> int:
        if self.armed.is_set():
            self.begun.set()
            self.leave.wait(20)
        return os.preadv(descriptor, views, offset)


def guess(store: ExpertStore, keys: list[int]) -> None:
    """As the store does, of these keys."""
    assert all(store._make_room(key, guessed=True) for key in keys)
    store._guesses.update(zip(keys, store._submit(keys, urgent=False), strict=True))


def test_a_guess_is_counted_when_it_is_decided_and_no_count_falls(packed_nano: Path) -> None:
    held = Held()
    with fed(40, path=packed_nano, preadv=held, threads=1, guessing=False) as one:
        held.armed.set()
        guess(one.store, [35, 41])  # of the third layer, not side by side: one thread begins one of them
        assert held.begun.wait(60)
        assert one.store.stats()["experts_guessed"] == 0
        one.store._drop_wrong_guesses(2, set())
        assert one.store.stats()["experts_guessed"] == 1  # the other was never begun
        held.leave.set()


def test_counts_only_grow(packed_nano: Path) -> None:
    with fed(12, path=packed_nano) as one:
        cache, seen = one.model.new_cache(1, 60), one.store.stats()
        with torch.inference_mode():
            for token in PROMPT:
                one.model(torch.tensor([[token]]), cache, logits_for="last")
                now = one.store.stats()
                assert all(now[name] >= seen[name] for name in seen if name != "experts_capacity")
                seen = now
        assert seen["experts_guessed"] >= seen["experts_guessed_right"] > 0


def test_shrinking_leaves_stopped_reads_their_slots_and_the_spare_ones(packed_nano: Path) -> None:
    """All slots hold guesses, two of which are being read and cannot let go."""
    held, capacity = Held(), 40
    with fed(capacity, path=packed_nano, preadv=held, guessing=False, limit_bytes=1) as one:
        store = one.store
        held.armed.set()
        guess(store, list(range(0, 2 * capacity, 2)))
        assert held.begun.wait(60)
        store._late.update(store._guesses)

        def slots() -> int:
            return store._arena.free + len(store._slots) + len(store._leaving)

        while store.capacity > 1:
            store._keep_within()
            assert slots() == store.capacity + SPARE_SLOTS + store._owed
            assert store._arena.free >= SPARE_SLOTS
            assert store._owed <= len(store._leaving) <= 2
            assert store._late == set(store._guesses)
        held.leave.set()
        for read, _ in store._leaving:
            store.readers.wait([read])
        store._sweep()
        assert store._owed == 0 and slots() == 1 + SPARE_SLOTS


def test_a_models_headers_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    read = Counter[str]()
    real = index.read_header

    def counted(path: Path, *more: Any) -> Any:
        read[path.name] += 1
        return real(path, *more)

    monkeypatch.setattr(index, "read_header", counted)
    threads = torch.get_num_threads()
    for options in (StoreOptions(expert_bytes=1_000_000), StoreOptions()):  # fed by a store; all in memory
        read.clear()
        opened = open_for_chat("nano", None, "cpu", "bfloat16", [], options)
        torch.set_num_threads(threads)
        assert (opened.store is not None) == options.asked
        opened.close()
        assert read and set(read.values()) == {1}
