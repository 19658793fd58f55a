"""Saving beside the training: what is saved is the moment of the call, whole or not at all, the newest few of them."""

import json
import re
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict_loader import load

from karakoram.errors import InputError, TrainingError
from karakoram.train.checkpoints import dcp, find
from karakoram.train.checkpoints import writer as writing
from karakoram.train.checkpoints.run import Checkpoints
from karakoram.train.checkpoints.state import read_state
from karakoram.train.checkpoints.writer import CheckpointWriter
from karakoram.train.config import CheckpointConfig
from tests.train.checkpoints import contents

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.mark.parametrize("asynchronous", [True, False])
def test_every_bit_comes_back(tmp_path: Path, asynchronous: bool) -> None:
    saved = contents.tensors()
    writer = CheckpointWriter(tmp_path, asynchronous=asynchronous)
    writer.save(1, saved, contents.STATE)
    writer.wait()
    path = tmp_path / "checkpoints/step-00000001"
    assert find.newest(tmp_path) == path
    assert not contents.differing(contents.loaded(path, saved), saved)
    assert read_state(path)[0] == contents.STATE
    assert {file.name for file in path.rglob("*") if file.is_file()} == {
        "state.json",
        "shard-00001-model-00001-of-00001.safetensors",
    }


def test_loading_goes_into_the_tensors_that_are_there(tmp_path: Path) -> None:
    saved = {"weight": torch.randn(3, 4)}
    CheckpointWriter(tmp_path, asynchronous=False).save(1, saved, {})
    weight = torch.nn.Parameter(torch.zeros(4, 3))
    dcp.read_tensors(find.path_of(tmp_path, 1), {"weight": weight.detach().t()})
    assert torch.equal(weight.t(), saved["weight"])


def test_what_is_saved_is_the_moment_of_the_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    may_write, write = threading.Event(), dcp.write_tensors

    def later(*arguments: Any) -> Any:
        assert may_write.wait(60)
        return write(*arguments)

    monkeypatch.setattr(dcp, "write_tensors", later)
    tensors, state = contents.tensors(), {"step": 1, "losses": [1.0]}
    writer = CheckpointWriter(tmp_path)
    writer.save(1, tensors, state)
    assert find.newest(tmp_path) is None, "it is not there before it is whole"
    for tensor in tensors.values():
        tensor.zero_()
    state["losses"].append(2.0)  # pyright: ignore[reportAttributeAccessIssue]
    may_write.set()
    writer.wait()
    path = find.path_of(tmp_path, 1)
    assert not contents.differing(contents.loaded(path, tensors), contents.tensors())
    assert read_state(path)[0]["losses"] == [1.0]


def test_a_second_save_waits_for_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    under_way, most, write = [0], [0], dcp.write_tensors

    def counted(*arguments: Any) -> Any:
        under_way[0] += 1
        most[0] = max(most[0], under_way[0])
        manifest = write(*arguments)
        under_way[0] -= 1
        return manifest

    monkeypatch.setattr(dcp, "write_tensors", counted)
    writer = CheckpointWriter(tmp_path, keep=9)
    for step in range(1, 6):
        writer.save(step, contents.tensors(step), {"step": step})
    writer.close()
    assert most == [1]
    for step, path in enumerate(find.complete(tmp_path), 1):
        expected = contents.tensors(step)
        assert not contents.differing(contents.loaded(path, expected), expected)


def test_the_newest_few_are_kept(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, keep=3)
    for step in (1, 2, 3, 4, 99_999_999, 100_000_000):
        writer.save(step, {"a": torch.ones(1)}, {})
        writer.wait()
        assert find.newest(tmp_path) == find.path_of(tmp_path, step)
    names = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert names == {".lock", "step-00000004", "step-99999999", "step-100000000"}
    with pytest.raises(InputError):
        CheckpointWriter(tmp_path, keep=0)


def test_the_same_step_again_replaces_it(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path)
    for number in (1, 2):
        writer.save(5, contents.tensors(number), {"number": number})
    writer.wait()
    expected = contents.tensors(2)
    (path,) = find.complete(tmp_path)
    assert not contents.differing(contents.loaded(path, expected), expected)
    assert {p.name for p in path.parent.iterdir()} == {".lock", "step-00000005"}


def test_the_caller_may_add_files(tmp_path: Path) -> None:
    def export(path: Path) -> None:
        assert threading.current_thread() is threading.main_thread(), "it may read the live model"
        (path / "hf").mkdir()
        (path / "hf/config.json").write_text("{}")

    CheckpointWriter(tmp_path, asynchronous=False).save(1, {"a": torch.ones(1)}, {}, export)
    assert (find.path_of(tmp_path, 1) / "hf/config.json").read_text() == "{}"


def test_large_states_go_into_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dcp, "FILE_BYTES", 100)
    saved = contents.tensors()
    CheckpointWriter(tmp_path, asynchronous=False).save(1, saved, {})
    path = find.path_of(tmp_path, 1)
    assert len(list((path / "model").iterdir())) > 3
    assert not contents.differing(contents.loaded(path, saved), saved)


def test_torchs_own_reader_reads_it(tmp_path: Path) -> None:
    """What PieceWriter writes is what HuggingFaceStorageWriter would: torch and safetensors open it as theirs."""
    saved = contents.tensors()
    CheckpointWriter(tmp_path, asynchronous=False).save(1, saved, {})
    directory = find.path_of(tmp_path, 1) / "model"
    del saved["nothing"]  # without elements: state.json alone knows of it
    into = {name: torch.full_like(tensor, 1).contiguous() for name, tensor in saved.items()}
    load(into, storage_reader=HuggingFaceStorageReader(str(directory)), no_dist=True)
    assert not contents.differing(into, saved)
    (file,) = directory.iterdir()
    assert not contents.differing(load_file(file), saved)


def test_no_tensors_at_all(tmp_path: Path) -> None:
    CheckpointWriter(tmp_path, asynchronous=False).save(1, {}, {"step": 1})
    dcp.read_tensors(find.path_of(tmp_path, 1), {})
    assert read_state(find.path_of(tmp_path, 1))[0] == {"step": 1}


def test_two_writers_do_not_save_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    may_write, write = threading.Event(), dcp.write_tensors

    def later(*arguments: Any) -> Any:
        assert may_write.wait(60)
        return write(*arguments)

    monkeypatch.setattr(dcp, "write_tensors", later)
    first, second = CheckpointWriter(tmp_path), CheckpointWriter(tmp_path)
    first.save(1, {"a": torch.ones(1)}, {})
    with pytest.raises(TrainingError, match="Another process is saving in"):
        second.save(1, {"a": torch.zeros(1)}, {})
    with pytest.raises(TrainingError, match="Another process is saving in"):
        CheckpointWriter(tmp_path)
    may_write.set()
    first.wait()
    assert contents.loaded(find.path_of(tmp_path, 1), {"a": torch.zeros(1)})["a"].item() == 1
    second.save(2, {"a": torch.zeros(1)}, {})
    second.wait()
    assert len(find.complete(tmp_path)) == 2


def test_a_state_that_json_cannot_hold_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="cannot be saved: Object of type Tensor"):
        CheckpointWriter(tmp_path).save(1, {}, {"x": torch.ones(1)})
    assert not list(tmp_path.rglob("*step*"))


def test_leftovers_of_a_killed_save_go_and_a_replaced_checkpoint_comes_back(tmp_path: Path) -> None:
    CheckpointWriter(tmp_path, asynchronous=False).save(3, {"a": torch.ones(1)}, {})
    directory = tmp_path / "checkpoints"
    (directory / "step-00000003").rename(directory / ".step-00000003.replaced")
    (directory / ".step-00000003.partial/model").mkdir(parents=True)
    (directory / ".step-00000007.partial").mkdir()
    assert find.newest(tmp_path) is None
    CheckpointWriter(tmp_path)
    assert {path.name for path in directory.iterdir()} == {".lock", "step-00000003"}


OTHERS: list[tuple[str, dict[str, Any], str]] = [
    ("shape", {"a": torch.zeros(4, 3)}, "1 tensors differ, the first is a: F32 [3, 4] there, F32 [4, 3] here"),
    ("dtype", {"a": torch.zeros(3, 4).bfloat16()}, "the first is a: F32 [3, 4] there, BF16 [3, 4] here"),
    ("name", {"c": torch.zeros(3, 4)}, "2 tensors differ, the first is a: F32 [3, 4] there, absent here"),
    ("more", {"a": torch.zeros(3, 4), "aa": torch.zeros(0)}, "the first is aa: absent there, F32 [0] here"),
]


@pytest.mark.parametrize(("wanted", "told"), [other[1:] for other in OTHERS], ids=[other[0] for other in OTHERS])
def test_a_checkpoint_of_another_shape_is_refused(tmp_path: Path, wanted: dict[str, Any], told: str) -> None:
    CheckpointWriter(tmp_path, asynchronous=False).save(1, {"a": torch.ones(3, 4), "b": torch.ones(2)}, {})
    wanted = {"b": torch.zeros(2)} | wanted
    with pytest.raises(TrainingError, match=f"is of another model: .*{re.escape(told)}"):
        dcp.read_tensors(find.path_of(tmp_path, 1), wanted)
    assert not any(tensor.any() for tensor in wanted.values()), "nothing was read"


def test_a_trainers_checkpoints(tmp_path: Path) -> None:
    counters = {
        "step": 7, "tokens": 70, "position": 8, "elapsed_s": 1.5, "seed": 0, "int4_experts": False, "guard": {},
        "data": {},
    }  # fmt: skip
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    assert checkpoints.newest() is None
    checkpoints.save(7, contents.tensors(), counters)
    checkpoints.wait()
    assert checkpoints.saved_step == 7
    again = Checkpoints(tmp_path, CheckpointConfig())
    path = again.newest()
    assert path is not None
    assert again.read(path) == counters
    into = contents.blank(contents.tensors())
    again.load(path, into)
    assert not contents.differing(into, contents.tensors())
    assert (again.saved_step, checkpoints.saved_step) == (7, 7)
    for name, value in (("step", 8), ("step", True), ("position", "8"), ("guard", None)):
        content = json.loads((path / "state.json").read_text())
        content["state"] = counters | {name: value}
        (path / "state.json").write_text(json.dumps(content))
        with pytest.raises(TrainingError, match="is damaged: it"):
            again.read(path)


def test_a_failed_save_is_not_taken_for_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    with monkeypatch.context() as patch:
        patch.setattr(writing, "write_state", _fail)
        checkpoints.save(7, contents.tensors(), {"step": 7})
        with pytest.raises(TrainingError, match="could not be saved: Input/output error"):
            checkpoints.wait()
    assert checkpoints.saved_step == -1


def _fail(*_: object) -> None:
    raise OSError(5, "Input/output error")
