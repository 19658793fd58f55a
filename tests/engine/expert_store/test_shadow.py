"""Experts that come late are approximated, counted, and exact the next time; without need, nothing is approximated."""

import os
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from karakoram.checkpoint import open_checkpoint
from karakoram.checkpoint.experts import open_expert_source
from karakoram.engine.engine import Engine
from karakoram.engine.expert_store.shadow import Shadow, shadow_bytes
from karakoram.errors import InputError
from karakoram.kernels import ops
from karakoram.model.transformer import Transformer
from tests.engine.expert_store.fed import EVERYTHING, NEW, PROMPT, Run, fed, run, same
from tests.engine.heard import greedy, run_all


def test_with_patience_nothing_is_approximated(packed_nano: Path, in_memory: Run) -> None:
    with fed(12, path=packed_nano, shadow_after_s=60) as one:
        assert same(run(one.model), in_memory)
        assert one.store.approximated() == 0


def test_without_patience_what_is_not_in_memory_is_approximated(packed_nano: Path, in_memory: Run) -> None:
    with fed(12, path=packed_nano, shadow_after_s=0, guessing=False) as one:
        found = run(one.model)
        touched = one.store.approximated()
        assert touched is not None
        assert 0 < touched <= len(PROMPT) + NEW - 1
        assert not same(found, in_memory)
        # Two bits of four: the logits still point the same way.
        near = torch.nn.functional.cosine_similarity(found[1][0], in_memory[1][0], 0)
        assert float(near) > 0.9


def test_shadows_leave_nothing_wrong_behind(packed_nano: Path, in_memory: Run) -> None:
    """Impatient, then patient, then impatient again with all of it in memory."""
    with fed(EVERYTHING, path=packed_nano, shadow_after_s=0, guessing=False) as one:
        shadow = one.store.shadow
        assert shadow is not None
        run(one.model)
        before = one.store.approximated()
        shadow.after_s = 60
        assert same(run(one.model), in_memory)
        shadow.after_s = 0
        assert same(run(one.model), in_memory)
        assert one.store.approximated() == before


def test_a_disk_that_hangs_holds_nobody_up(packed_nano: Path) -> None:
    """Reads that never end: every token comes from shadows, and closing still works."""
    leave, armed = threading.Event(), threading.Event()

    def slow(descriptor: int, views: Sequence[memoryview], offset: int) -> int:
        if armed.is_set():
            leave.wait(60)
        return os.preadv(descriptor, views, offset)

    with fed(70, path=packed_nano, preadv=slow, shadow_after_s=0.001, guessing=False) as one:
        armed.set()
        found = run(one.model, 3)
        leave.set()
        assert len(found[0]) == 3
        assert one.store.approximated() == len(PROMPT) + 2


def test_a_pass_that_ends_in_an_error_leaves_no_tokens_to_the_next(
    packed_nano: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with fed(12, path=packed_nano, shadow_after_s=0, guessing=False) as one:
        layers = iter(range(100))

        def broken() -> None:
            if next(layers) == 3:
                raise InputError("The file is another.", "Begin again.")

        monkeypatch.setattr(one.store, "_check_source", broken)
        with pytest.raises(InputError, match="is another"):
            run(one.model, 1)
        run(one.model, 1, PROMPT[:1])
        assert one.store.approximated() in (0, 1)  # of one token


def test_each_request_hears_of_its_own_tokens(nano: Transformer, packed_nano: Path) -> None:
    requests = [greedy("a", PROMPT[:9], 5), greedy("b", PROMPT, 7)]
    with fed(12, path=packed_nano, shadow_after_s=0) as one, Engine(one.model, experts=one.store) as engine:
        heard = [list(engine.stream(request)) for request in requests]
    counts = [news[-1].approximate_tokens for news in heard]
    assert all(count is not None and 0 < count <= most for count, most in zip(counts, (13, 42), strict=True))
    assert all(one.approximate_tokens is None for news in heard for one in news[:-1])
    with Engine(nano) as engine:
        assert all(result.finish == "length" for result in run_all(engine, requests))
        assert all(one.approximate_tokens is None for one in engine.stream(requests[0]))


def test_a_shadow_is_what_the_kernels_make_of_the_record(packed_nano: Path) -> None:
    source = open_expert_source(open_checkpoint(packed_nano))
    with fed(EVERYTHING, path=packed_nano, shadow_after_s=9) as one:
        shadow = one.store.shadow
        assert isinstance(shadow, Shadow)
        run(one.model)
        key = int(one.store.residency.resident.nonzero()[0][0])
        record = one.store._arena.record(one.store._slots[key])  # pyright: ignore[reportPrivateUsage]
        assert torch.equal(shadow._codes[key], ops.shadow_make(record))  # pyright: ignore[reportPrivateUsage]
    assert shadow_bytes(source) == EVERYTHING * source.record_bytes * 5 // 9
    source.close()
