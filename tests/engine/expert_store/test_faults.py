"""What can go wrong below a store: nothing wrong is ever computed, and who is not concerned goes on."""

import errno
import os
import shutil
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

from karakoram.checkpoint import open_checkpoint
from karakoram.checkpoint.experts.layout import FILE_NAME
from karakoram.checkpoint.experts.records import PackedRecords
from karakoram.engine.engine import Engine
from karakoram.engine.expert_store import store as store_module
from karakoram.engine.expert_store.opening import StoreOptions, open_fed
from karakoram.errors import CheckpointError, ExpertUnavailable, InputError
from karakoram.model.generate import generate
from karakoram.model.transformer import Transformer
from tests.engine.expert_store.fed import EVERYTHING, NEW, PROMPT, FedModel, Run, fed, run, same
from tests.engine.heard import Watched, all_blocks_back, gathered, greedy

LAYER = 3


class Faulty:
    """Reads that fail where `bad` says so: offsets of records -> what happens to them."""

    def __init__(self) -> None:
        self.bad: dict[int, str] = {}
        self.tried = 0

    def __call__(self, descriptor: int, views: Sequence[memoryview], offset: int) -> int:
        count = os.preadv(descriptor, views, offset)
        for place, fault in list(self.bad.items()):
            if not offset <= place < offset + count:
                continue
            self.tried += 1
            if fault == "EIO":
                raise OSError(errno.EIO, "Input/output error")
            if fault == "short":
                return place - offset
            if fault == "flipped once":
                del self.bad[place]
            _flip(views, place + 100 - offset)
        return count


def _flip(views: Sequence[memoryview], at: int) -> None:
    for view in views:
        if at < len(view):
            view[at] ^= 1
            return
        at -= len(view)


def offset_of(path: Path, layer: int, expert: int) -> int:
    source = PackedRecords(path / FILE_NAME)
    try:
        return source.layout.offset(source.layout.number(layer, expert))
    finally:
        source.close()


def visited(path: Path, prompt: list[int], new: int) -> set[tuple[int, int]]:
    """(layer, expert) of all that a prompt and its continuation visit."""
    with fed(EVERYTHING, path=path, guessing=False) as one:
        run(one.model, new, prompt)
        source = one.store.source
        keys = one.store.residency.resident.nonzero()[0].tolist()
        return {(source.layers[key // source.experts], key % source.experts) for key in keys}


@pytest.mark.parametrize(("fault", "words"), [("EIO", "Input/output"), ("short", ""), ("flipped", "damaged")])
def test_a_record_that_cannot_be_read_is_named(packed_nano: Path, in_memory: Run, fault: str, words: str) -> None:
    faulty = Faulty()
    with fed(20, path=packed_nano, preadv=faulty, guessing=False) as one:
        for expert in range(16):
            faulty.bad[offset_of(packed_nano, LAYER, expert)] = fault
        with pytest.raises(ExpertUnavailable) as caught:
            run(one.model)
        assert f"ayer {LAYER}, expert" in caught.value.what
        assert words in caught.value.what
        assert caught.value.fix
        assert caught.value.rows
        assert faulty.tried >= 2  # once more before it is given up
        faulty.bad.clear()  # the disk has come to its senses, and nothing wrong was kept
        assert same(run(one.model), in_memory)


def test_a_record_that_is_wrong_once_is_read_again(packed_nano: Path, in_memory: Run) -> None:
    faulty = Faulty()
    for expert in range(16):
        faulty.bad[offset_of(packed_nano, LAYER, expert)] = "flipped once"
    with fed(EVERYTHING, path=packed_nano, preadv=faulty) as one:
        assert same(run(one.model), in_memory)
        assert one.store.readers.reread >= 4


def test_guesses_that_fail_are_errors_only_when_they_are_wanted(packed_nano: Path, in_memory: Run) -> None:
    """A broken expert of a layer that no token visits hurts nobody, however often it is guessed."""
    faulty = Faulty()
    never = {(layer, expert) for layer in range(1, 6) for expert in range(16)} - visited(packed_nano, PROMPT, NEW)
    for layer, expert in never:
        faulty.bad[offset_of(packed_nano, layer, expert)] = "EIO"
    with fed(12, path=packed_nano, preadv=faulty) as one:
        assert same(run(one.model), in_memory)


def test_other_requests_of_the_batch_are_unharmed(nano: Transformer, packed_nano: Path) -> None:
    """Of two requests that run together, only the one whose token needs the broken expert ends."""
    prompts = [[3968], [900]]
    first, second = (visited(packed_nano, prompt, 1) for prompt in prompts)
    broken = min(expert for layer, expert in first - second if layer == LAYER)
    faulty = Faulty()
    faulty.bad[offset_of(packed_nano, LAYER, broken)] = "EIO"
    expected = list(generate(nano, prompts[1], 1, stop_ids=()))
    with fed(20, path=packed_nano, preadv=faulty) as one, Engine(one.model, deterministic=True) as engine:
        heard = gathered(Watched(engine), [greedy("a", prompts[0], 1), greedy("b", prompts[1], 1)])
        failed = heard.end("a")
        assert failed.finish == "error"
        assert f"ayer {LAYER}, expert {broken}" in failed.error
        assert heard.end("b").tokens == tuple(expected)
        all_blocks_back(engine)


def test_a_file_that_is_replaced_under_a_running_model_is_noticed(
    packed_nano: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = shutil.copytree(packed_nano, tmp_path / "copy")
    monkeypatch.setattr(store_module, "CHECK_S", 0.0)
    with fed(8, path=copy) as one:
        run(one.model, 2)
        other = shutil.copy(copy / FILE_NAME, tmp_path / "other")
        os.replace(other, copy / FILE_NAME)
        with pytest.raises(CheckpointError, match=r"replaced|changed") as caught:
            run(one.model, 2)
        assert str(copy / FILE_NAME) in caught.value.what


def test_two_stores_on_one_file(packed_nano: Path, in_memory: Run) -> None:
    with fed(8, path=packed_nano) as one, fed(20, path=packed_nano) as other:
        found: list[Run] = []
        threads = [threading.Thread(target=lambda m=m: found.append(run(m.model))) for m in (one, other)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert len(found) == 2
        assert all(same(each, in_memory) for each in found)


def test_two_threads_on_one_model(packed_nano: Path, in_memory: Run) -> None:
    with fed(8, path=packed_nano) as one:
        found: list[Run] = []
        threads = [threading.Thread(target=lambda: found.append(run(one.model))) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert len(found) == 2
        assert all(same(each, in_memory) for each in found)


def test_closing_in_mid_read(packed_nano: Path) -> None:
    """As a signal would: reads that hang are not waited for beyond their piece, and later passes say what happened."""
    entered, leave = threading.Event(), threading.Event()

    def slow(descriptor: int, views: Sequence[memoryview], offset: int) -> int:
        entered.set()
        leave.wait(30)
        return os.preadv(descriptor, views, offset)

    with fed(8, path=packed_nano, preadv=slow) as one:
        failed: list[BaseException] = []

        def attempt(one: FedModel = one) -> None:
            try:
                run(one.model, 2)
            except BaseException as error:  # noqa: BLE001
                failed.append(error)

        thread = threading.Thread(target=attempt)
        thread.start()
        assert entered.wait(30)
        closing = threading.Thread(target=one.store.close)
        closing.start()
        leave.set()
        closing.join(30)
        thread.join(30)
        assert not closing.is_alive()
        assert not thread.is_alive()
        assert failed


def test_a_budget_below_the_least_is_refused_with_the_least(packed_nano: Path) -> None:
    with pytest.raises(InputError, match="too small") as caught:
        open_fed(packed_nano, StoreOptions(ram_bytes=100 << 20))
    assert "--ram" in caught.value.fix
    assert open_checkpoint(packed_nano).config.n_routed_experts == 16
