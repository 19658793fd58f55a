"""`pack_checkpoint`: bit for bit the same model, whatever ends a run and however it is continued."""

import errno
import fcntl
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from karakoram.checkpoint import Checkpoint, names, open_checkpoint, open_expert_source, pack_checkpoint
from karakoram.checkpoint.experts import ShardRecords, writing
from karakoram.checkpoint.experts.direct import up
from karakoram.checkpoint.experts.layout import FILE_NAME, read_front
from karakoram.checkpoint.experts.source import read_record
from karakoram.env import bundled_model_dir
from karakoram.errors import CheckpointError, FormatError
from karakoram.kernels.packed import record_bytes
from karakoram.model.load import load_model
from tests.checkpoint import small_experts
from tests.checkpoint.small_experts import EXPERTS, HIDDEN, INTERMEDIATE, LAYERS

KINDS = ("int4", "bf16", "fp8")
RECORDS = len(LAYERS) * EXPERTS


def assert_same(found: Checkpoint, expected: Checkpoint) -> None:
    """The same tensors under the same names, bit for bit, and entries that say the same of them."""
    assert set(found.tensors) == set(expected.tensors)
    for name, entry in expected.tensors.items():
        one, two = found.read(name), expected.read(name)
        assert (one.dtype, one.shape) == (two.dtype, two.shape), name
        assert torch.equal(one.view(torch.uint8), two.view(torch.uint8)), name
        mine = found.tensors[name]
        assert (mine.dtype, mine.shape, mine.nbytes) == (entry.dtype, entry.shape, entry.nbytes)
        assert mine.stored_name == entry.stored_name


@pytest.fixture
def src(tmp_path: Path) -> Path:
    return small_experts.write(tmp_path / "src")


@pytest.mark.parametrize("kind", KINDS)
def test_every_tensor_comes_back(tmp_path: Path, kind: str) -> None:
    """Sizes that are no multiples of a block of fp8 (128), nor of a panel (16 outputs, 64 inputs)."""
    src = small_experts.write(tmp_path / "src", kind, hidden_size=160, moe_intermediate_size=96)
    expected, found = open_checkpoint(src), open_checkpoint(pack_checkpoint(src, tmp_path / "packed"))
    found.check()
    assert_same(found, expected)
    assert not any(names.belongs_to_routed_expert(entry.stored_name) for entry in found.vision.values())
    for dtype in (torch.bfloat16, torch.float32):
        for projection in names.PROJECTIONS:
            assert torch.equal(found.expert(2, 3, projection, dtype), expected.expert(2, 3, projection, dtype))
            name = names.expert_weight(1, 0, projection)
            assert found.format_of(name) == expected.format_of(name) == kind
    assert sorted(path.name for path in tmp_path.iterdir()) == ["packed", "src"]


def test_nano_comes_back_and_computes_the_same(tmp_path: Path) -> None:
    packed = pack_checkpoint(bundled_model_dir(), tmp_path / "nano")
    assert_same(open_checkpoint(packed), open_checkpoint(bundled_model_dir()))
    for name in ("tiktoken.model", "tokenizer_config.json", "generation_config.json"):
        assert (packed / name).read_bytes() == (bundled_model_dir() / name).read_bytes()
    ids = torch.tensor([[5, 17, 42, 99]])
    for dense in (False, True):
        one, two = (load_model(path, dense=dense) for path in (packed, bundled_model_dir()))
        assert torch.equal(one(ids), two(ids))


def test_the_same_source_gives_the_same_file(src: Path, tmp_path: Path) -> None:
    one, two = pack_checkpoint(src, tmp_path / "one"), pack_checkpoint(src, tmp_path / "two")
    assert (one / FILE_NAME).read_bytes() == (two / FILE_NAME).read_bytes()


def test_what_else_belongs_to_a_checkpoint_comes_along(src: Path, tmp_path: Path) -> None:
    (src / "tokenizer_config.json").write_text("{}")
    packed = pack_checkpoint(src, tmp_path / "packed")
    assert (packed / "tokenizer_config.json").read_text() == "{}"
    assert (packed / "config.json").is_file() and len(list(packed.glob("*.safetensors"))) == 1


def test_progress_counts_every_byte(src: Path, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    pack_checkpoint(src, tmp_path / "packed", lambda done, total: told.append((done, total)))
    assert told[0][0] == 0 and told[-1][0] == told[-1][1]
    assert told == sorted(told) and len({total for _, total in told}) == 1


# ------------------------------------------------------------------------------------------ runs that end early


class Stop(Exception):
    """Ends a run."""


def packed_by(src: Path, dst: Path) -> int:
    """Continue, or begin; how many records were packed now."""
    packed = 0

    def count(source: ShardRecords, layer: int, expert: int, slot: torch.Tensor) -> None:
        nonlocal packed
        packed += 1
        read_record(source, layer, expert, slot)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writing, "read_record", count)
        pack_checkpoint(src, dst)
    return packed


def stop_after(records: int, src: Path, dst: Path, patch: pytest.MonkeyPatch, error: BaseException) -> None:
    """One thread, and an error before the next record."""
    done = 0

    def some(source: ShardRecords, layer: int, expert: int, slot: torch.Tensor) -> None:
        nonlocal done
        if done == records:
            raise error
        done += 1
        read_record(source, layer, expert, slot)

    with patch.context() as inner:
        inner.setattr(writing, "read_record", some)
        inner.setattr(writing, "THREADS", 1)
        pack_checkpoint(src, dst)


@pytest.mark.parametrize("records", [0, 1, 5, RECORDS - 1])
def test_a_stopped_run_is_continued(src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, records: int) -> None:
    dst = tmp_path / "packed"
    with pytest.raises(Stop):
        stop_after(records, src, dst, monkeypatch, Stop())
    assert not dst.exists()
    assert packed_by(src, dst) == RECORDS - records
    assert_same(open_checkpoint(dst), open_checkpoint(src))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["packed", "src"]


def test_what_the_journal_claims_is_read_again(src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A record that a power cut left unwritten, a line cut short, a line of nonsense."""
    dst, scratch = tmp_path / "packed", tmp_path / ".packed.packing"
    with pytest.raises(Stop):
        stop_after(5, src, dst, monkeypatch, Stop())
    with open(scratch / "journal", "ab") as journal:
        journal.write(os.urandom(23))
    with open(scratch / "checkpoint" / FILE_NAME, "r+b") as file:
        file.seek((2 - RECORDS) * up(record_bytes(HIDDEN, INTERMEDIATE)) + 77, os.SEEK_END)  # of record 2
        file.write(b"\xff\x00\xff\x00\xff\x00")
    assert packed_by(src, dst) == RECORDS - 4
    assert_same(open_checkpoint(dst), open_checkpoint(src))


@pytest.mark.parametrize("change", ["source", "journal", "rest"])
def test_another_source_is_begun_anew(src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    dst, scratch = tmp_path / "packed", tmp_path / ".packed.packing"
    with pytest.raises(Stop):
        stop_after(5, src, dst, monkeypatch, Stop())
    if change == "source":
        (path,) = src.glob("*.safetensors")
        os.utime(path, ns=(1, 1))
    elif change == "journal":
        (scratch / "journal").write_bytes(b"K2PACK")
    else:
        shutil.rmtree(scratch / "checkpoint")
    assert packed_by(src, dst) == RECORDS
    assert_same(open_checkpoint(dst), open_checkpoint(src))


KILLED = """
import os, signal, sys
from karakoram.checkpoint import pack_checkpoint
from karakoram.checkpoint.experts import writing
read, count = writing.read_record, 0
def some(*arguments):
    global count
    count += 1
    if count > 3:
        os.kill(os.getpid(), signal.SIGKILL)
    read(*arguments)
writing.read_record, writing.THREADS = some, 1
pack_checkpoint(sys.argv[1], sys.argv[2])
"""


def test_a_killed_run_is_continued(src: Path, tmp_path: Path, project_root: Path) -> None:
    dst = tmp_path / "packed"
    done = subprocess.run([sys.executable, "-c", KILLED, src, dst], cwd=project_root, check=False, timeout=120)
    assert done.returncode == -signal.SIGKILL and not dst.exists()
    assert packed_by(src, dst) == RECORDS - 3
    assert_same(open_checkpoint(dst), open_checkpoint(src))


def test_a_full_disk_keeps_what_is_done(src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dst = tmp_path / "packed"
    with pytest.raises(CheckpointError, match="is full") as caught:
        stop_after(4, src, dst, monkeypatch, OSError(errno.ENOSPC, "No space left on device"))
    assert "run the same command again: what is done is kept in" in caught.value.fix and not dst.exists()
    assert packed_by(src, dst) == RECORDS - 4


def test_too_small_a_disk_is_told_before_anything_is_written(
    src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(CheckpointError, match=r"too small: [\d,]+ bytes needed, 1,000 bytes free"):
        pack_checkpoint(src, tmp_path / "packed")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["src"]


def test_a_target_that_cannot_be_written(src: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot write"):
        pack_checkpoint(src, tmp_path / "file" / "packed")
    with pytest.raises(CheckpointError, match="is a file"):
        pack_checkpoint(src, tmp_path / "file")
    with pytest.raises(CheckpointError, match="the source itself"):
        pack_checkpoint(src, src)
    with pytest.raises(CheckpointError, match="not empty"):
        pack_checkpoint(src, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "src"]


def test_a_second_run_to_the_same_target_is_refused(src: Path, tmp_path: Path) -> None:
    scratch = tmp_path / ".packed.packing"
    scratch.mkdir()
    lock = os.open(scratch, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        with pytest.raises(CheckpointError, match="being packed by another process"):
            pack_checkpoint(src, tmp_path / "packed")
    finally:
        os.close(lock)
    pack_checkpoint(src, tmp_path / "packed")


def test_a_source_that_changes_meanwhile_is_noticed(src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (path,) = src.glob("*.safetensors")

    def touched(*arguments) -> None:
        os.utime(path)
        read_record(*arguments)

    monkeypatch.setattr(writing, "read_record", touched)
    with pytest.raises(CheckpointError, match="replaced or changed"):
        pack_checkpoint(src, tmp_path / "packed")
    assert not (tmp_path / "packed").exists()


# ------------------------------------------------------------------------------------------ what is refused


def test_a_packed_checkpoint_is_not_packed_again(src: Path, tmp_path: Path) -> None:
    packed = pack_checkpoint(src, tmp_path / "packed")
    with pytest.raises(CheckpointError, match="packed already"):
        pack_checkpoint(packed, tmp_path / "again")


def test_what_a_record_would_round_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="stored as F32"):
        pack_checkpoint(small_experts.write(tmp_path / "src", "fp32"), tmp_path / "packed")


def test_damage_in_a_packed_checkpoint_is_an_error_of_whoever_reads_it(src: Path, tmp_path: Path) -> None:
    packed = pack_checkpoint(src, tmp_path / "packed")
    layout, _ = read_front(packed / FILE_NAME)
    with open(packed / FILE_NAME, "r+b") as file:
        file.seek(layout.offset(layout.number(2, 1)) + 500)
        file.write(b"damage")
    checkpoint = open_checkpoint(packed)
    checkpoint.check()
    checkpoint.expert(2, 0, "up_proj", torch.bfloat16)
    for read in (
        lambda: checkpoint.expert(2, 1, "up_proj", torch.bfloat16),
        lambda: load_model(packed),
        lambda: load_model(packed, dense=True),
    ):
        with pytest.raises(CheckpointError, match=r"Layer 2, expert 1 in .* is damaged"):
            read()


def test_other_commands_take_a_packed_checkpoint(src: Path, tmp_path: Path) -> None:
    """Converted, it is what its source is converted."""
    from karakoram.quantize.convert import convert

    packed = pack_checkpoint(src, tmp_path / "packed")
    one, two = convert(packed, tmp_path / "one", "bf16"), convert(src, tmp_path / "two", "bf16")
    assert_same(open_checkpoint(one), open_checkpoint(two))
    source = open_expert_source(open_checkpoint(one))
    assert source.kind == "bf16"
    source.close()
