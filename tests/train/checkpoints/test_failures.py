"""Full disks, killed processes: what was saved before stays whole, and the error says where one goes on."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from torch.distributed.checkpoint.filesystem import FileSystem

from karakoram.checkpoint.save import flush_directory
from karakoram.errors import CheckpointError, TrainingError
from karakoram.train.checkpoints import dcp, find
from karakoram.train.checkpoints import writer as writing
from karakoram.train.checkpoints.storage import PieceWriter
from karakoram.train.checkpoints.writer import CheckpointWriter
from tests.train.checkpoints import contents
from tests.train.checkpoints.processes import lines_of, start

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
BROKEN = OSError(errno.EIO, os.strerror(errno.EIO))


def _failing(error: Exception) -> Callable[..., Any]:
    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


PLACES: list[tuple[str, Any, str, Exception]] = [
    ("tensors", FileSystem, "create_stream", FULL),
    ("flush of tensors", os, "fsync", BROKEN),
    ("safetensors", PieceWriter, "write_data", SafetensorError("I/O error: No space left (os error 28)")),
    ("state", writing, "write_state", FULL),
    ("flush of directory", writing, "flush_directory", BROKEN),
    ("rename", Path, "rename", BROKEN),
    ("directory", Path, "mkdir", FULL),
]


@pytest.mark.parametrize(("where", "name", "error"), [p[1:] for p in PLACES], ids=[p[0] for p in PLACES])
def test_a_failing_disk_is_a_clear_error_and_earlier_checkpoints_survive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: Any, name: str, error: Exception
) -> None:
    writer, saved = CheckpointWriter(tmp_path), contents.tensors()
    writer.save(1, saved, {"step": 1})
    writer.wait()
    with monkeypatch.context() as patch:
        patch.setattr(where, name, _failing(error))
        with pytest.raises(TrainingError, match="step-00000002 could not be saved: ") as caught:  # noqa: PT012
            writer.save(2, saved, {"step": 2})
            writer.wait()
    assert (getattr(error, "strerror", None) or "os error 28") in caught.value.what
    assert "--resume goes on from step-00000001" in caught.value.fix
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {".lock", "step-00000001"}
    assert not contents.differing(contents.loaded(find.path_of(tmp_path, 1), saved), saved)
    writer.wait()  # it was told once
    writer.save(3, saved, {"step": 3})
    writer.close()
    assert find.newest(tmp_path) == find.path_of(tmp_path, 3)


def test_the_error_of_the_background_comes_at_the_next_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = CheckpointWriter(tmp_path)
    monkeypatch.setattr(dcp, "write_tensors", _failing(FULL))
    writer.save(1, contents.tensors(), {})
    with pytest.raises(TrainingError, match="step-00000001 could not be saved: No space left") as caught:
        writer.save(2, contents.tensors(), {})
    assert "nothing was saved before" in caught.value.fix
    writer.wait()


def test_a_bug_in_the_background_is_no_training_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = CheckpointWriter(tmp_path)
    monkeypatch.setattr(dcp, "write_tensors", _failing(ZeroDivisionError()))
    writer.save(1, contents.tensors(), {})
    with pytest.raises(ZeroDivisionError):
        writer.wait()
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {".lock"}


def test_what_the_caller_adds_may_fail_too(tmp_path: Path) -> None:
    full = CheckpointError("the disk of DIR is full: No space left on device.", "Free some space.")
    with pytest.raises(TrainingError, match="could not be saved: the disk of DIR is full: No space left") as caught:
        CheckpointWriter(tmp_path).save(1, {}, {}, _failing(full))
    assert caught.value.fix == "Free some space; nothing was saved before."
    with pytest.raises(KeyboardInterrupt):
        CheckpointWriter(tmp_path).save(1, {}, {}, _failing(KeyboardInterrupt()))  # pyright: ignore[reportArgumentType]
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {".lock"}


def test_a_directory_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file")
    with pytest.raises(TrainingError, match=r"could not be saved: (File exists|Not a directory)"):
        CheckpointWriter(tmp_path).save(1, {"a": torch.ones(1)}, {})


def test_old_ones_that_cannot_be_removed_do_no_harm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = CheckpointWriter(tmp_path, keep=1, asynchronous=False)
    writer.save(1, {"a": torch.ones(1)}, {})
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)
        writer.save(2, {"a": torch.ones(1)}, {})
    assert find.complete(tmp_path) == [find.path_of(tmp_path, 2)]
    CheckpointWriter(tmp_path)
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {".lock", "step-00000002"}


def test_a_file_that_cannot_grow(tmp_path: Path) -> None:
    """A real write that fails in the middle of a file: RLIMIT_FSIZE, in a process of its own."""
    failed, after = lines_of(start("full", tmp_path))
    assert "step-00000002 could not be saved: File too large" in failed["what"]
    assert "--resume goes on from step-00000001" in failed["fix"]
    assert failed["steps"] == [1]
    assert after["names"] == [".lock", "step-00000001", "step-00000003"]
    assert after["steps"] == [1, 3]


def test_killed_at_any_moment(tmp_path: Path) -> None:
    """Ten times: every checkpoint that is there is whole, the newest is never lost, and leftovers go."""
    seen = lines_of(start("kills", tmp_path, "10"))
    assert len(seen) == 10
    last = 0
    for look in seen:
        assert look["left"] == []
        assert len(look["steps"]) <= 3, "two, and one that was about to be forgotten"
        if last:
            assert look["steps"], "what was there is not lost"
            assert look["steps"][-1] >= last
        last = look["steps"][-1] if look["steps"] else 0
    assert last >= 10, "each saver finished one at least"
    assert any(look["hidden"] for look in seen), "some were killed in the middle of a save"


def test_flushed_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files, then directories, then the name, then the directory that holds the name: what a power cut asks for."""
    order: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def flushed(descriptor: int) -> None:
        order.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def renamed(self: Path, target: Path) -> Path:
        order.append(f"-> {target.name}")
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(Path, "rename", renamed)
    CheckpointWriter(tmp_path, asynchronous=False).save(1, {"a": torch.ones(1)}, {})
    assert order == [
        "shard-00001-model-00001-of-00001.safetensors",
        "state.json",
        "model",
        ".step-00000001.partial",
        "-> step-00000001",
        "checkpoints",
    ]
    assert json.loads((find.path_of(tmp_path, 1) / "state.json").read_text())["format"] == 1
    assert flush_directory is writing.flush_directory
