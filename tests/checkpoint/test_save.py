"""Writing: complete or not there, whatever happens in between; and what is written is plain safetensors."""

import errno
import fcntl
import json
import os
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from karakoram.checkpoint import save, write_checkpoint
from karakoram.checkpoint.safetensors import read_header
from karakoram.errors import CheckpointError

CONFIG = {"model_type": "deepseek_v3", "note": "ä"}


def tensors() -> list[tuple[str, torch.Tensor]]:
    return [
        ("fp8", torch.randn(5, 3).to(torch.float8_e4m3fn)),  # 15 bytes: what follows needs care to be aligned
        ("bf16", torch.randn(7, 3).to(torch.bfloat16)),
        ("fp32", torch.randn(11)),
        ("int64", torch.arange(4)),
        ("empty", torch.zeros(0, 2)),
        ("view", torch.randn(6, 4).t()),
        ("scalar", torch.tensor(1.5)),
    ]


def read_back(directory: Path) -> dict[str, torch.Tensor]:
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    result = {}
    for file in sorted(set(index["weight_map"].values())):
        result.update(load_file(directory / file))
    assert set(result) == set(index["weight_map"])
    return result


def equal(first: dict[str, torch.Tensor], second: list[tuple[str, torch.Tensor]]) -> bool:
    return first.keys() == dict(second).keys() and all(
        first[name].dtype == tensor.dtype and torch.equal(first[name].float(), tensor.float())
        for name, tensor in second
    )


@pytest.mark.parametrize("buffer_bytes", [1 << 20, 40, 0])
@pytest.mark.parametrize("max_shard_bytes", [10**9, 100, 1])
def test_safetensors_reads_every_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, buffer_bytes: int, max_shard_bytes: int
) -> None:
    monkeypatch.setattr(save, "BUFFER_BYTES", buffer_bytes)
    monkeypatch.setattr(save, "RESERVED_HEADER_BYTES", 4096)
    wanted = tensors()
    out = write_checkpoint(tmp_path / "out", CONFIG, iter(wanted), max_shard_bytes=max_shard_bytes)
    assert equal(read_back(out), wanted)
    assert json.loads((out / "config.json").read_text()) == CONFIG
    for file in out.glob("*.safetensors"):
        entries = read_header(file)
        assert len(entries) == 1 or sum(entry.nbytes for entry in entries) <= max_shard_bytes
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_many_names_fill_several_headers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(save, "BUFFER_BYTES", 0)
    monkeypatch.setattr(save, "RESERVED_HEADER_BYTES", 4096)
    wanted = [(f"model.layers.{i}.weight", torch.tensor([float(i)])) for i in range(200)]
    out = write_checkpoint(tmp_path / "out", CONFIG, wanted)
    assert len(list(out.glob("*.safetensors"))) > 5
    assert equal(read_back(out), wanted)


def test_one_tensor_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With no buffer, a tensor is on the disk before the next one is asked for."""
    monkeypatch.setattr(save, "BUFFER_BYTES", 0)
    sizes: list[int] = []

    def stream():
        for number in range(4):
            sizes.append(sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors")))
            yield f"t{number}", torch.zeros(1 << 18)

    write_checkpoint(tmp_path / "out", CONFIG, stream())
    assert [size // (1 << 20) for size in sizes] == [0, 2, 3, 4]  # 1 MiB for the header, 1 MiB for each tensor


def test_companions_come_along(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("tokenizer_config.json", "tiktoken.model", "chat_template.jinja", "generation_config.json", "LICENSE"):
        (source / name).write_text(name)
    for name in ("config.json", "model.safetensors.index.json", "model.safetensors", "pytorch_model.bin"):
        (source / name).write_text("old")
    extra = {"tokenizer_config.json": b"{}", "card.json": b"[]"}
    out = write_checkpoint(tmp_path / "out", CONFIG, tensors(), copy_from=source, extra_files=extra)
    assert (out / "tiktoken.model").read_text() == "tiktoken.model"
    assert (out / "tokenizer_config.json").read_bytes() == b"{}"
    assert (out / "card.json").read_bytes() == b"[]"
    assert json.loads((out / "config.json").read_text()) == CONFIG
    assert not (out / "pytorch_model.bin").exists()
    assert not (out / "model.safetensors").exists()


def test_a_failing_stream_leaves_nothing(tmp_path: Path) -> None:
    def stream():
        yield "a", torch.zeros(3)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(tmp_path / "out", CONFIG, stream())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ([("a", torch.zeros(1)), ("a", torch.zeros(1))], "comes twice"),
        ([("a", torch.zeros(1, dtype=torch.complex64))], "complex64"),
        ([], "no tensor"),
    ],
)
def test_streams_that_make_no_checkpoint(tmp_path: Path, wrong: list, says: str) -> None:
    with pytest.raises(CheckpointError, match=says):
        write_checkpoint(tmp_path / "out", CONFIG, wrong)
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_is_not_overwritten_unless_told(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_checkpoint(out, CONFIG, tensors())
    before = sorted((path.name, path.stat().st_mtime_ns) for path in out.iterdir())
    with pytest.raises(CheckpointError, match="not empty"):
        write_checkpoint(out, CONFIG, tensors())
    assert sorted((path.name, path.stat().st_mtime_ns) for path in out.iterdir()) == before
    write_checkpoint(out, CONFIG, [("only", torch.ones(2))], overwrite=True)
    assert equal(read_back(out), [("only", torch.ones(2))])
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    (out / "config.json").unlink()
    with pytest.raises(CheckpointError, match="no checkpoint"):
        write_checkpoint(out, CONFIG, tensors(), overwrite=True)
    with pytest.raises(CheckpointError, match="is a file"):
        write_checkpoint(next(out.iterdir()), CONFIG, tensors())
    (tmp_path / "empty").mkdir()
    write_checkpoint(tmp_path / "empty", CONFIG, tensors())


def test_a_failed_replacement_keeps_the_old_one(tmp_path: Path) -> None:
    out = write_checkpoint(tmp_path / "out", CONFIG, tensors())
    with pytest.raises(CheckpointError, match="twice"):
        write_checkpoint(out, {}, [("a", torch.zeros(1))] * 2, overwrite=True)
    assert json.loads((out / "config.json").read_text()) == CONFIG


def test_leftovers_of_killed_runs(tmp_path: Path) -> None:
    """A partial directory goes; an old checkpoint that was moved aside when the run died comes back."""
    out = write_checkpoint(tmp_path / "out", CONFIG, tensors())
    (tmp_path / ".out.partial-dead").mkdir()
    (tmp_path / ".out.partial-dead" / "model-00001.safetensors").write_bytes(b"half")
    (tmp_path / ".other.partial-x").mkdir()
    out.rename(tmp_path / ".out.replaced-dead")
    with pytest.raises(CheckpointError, match="not empty"):
        write_checkpoint(out, {}, tensors())
    assert json.loads((out / "config.json").read_text()) == CONFIG
    assert sorted(path.name for path in tmp_path.iterdir()) == [".other.partial-x", "out"]


def test_two_writers_to_one_target(tmp_path: Path) -> None:
    (tmp_path / ".out.partial-live").mkdir()
    descriptor = os.open(tmp_path / ".out.partial-live", os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        with pytest.raises(CheckpointError, match="another process"):
            write_checkpoint(tmp_path / "out", CONFIG, tensors())
        assert (tmp_path / ".out.partial-live").exists()
    finally:
        os.close(descriptor)


def test_a_disk_too_small_is_told_before_starting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")(10**9, 10**9 - 10**6, 10**6)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    needed = f"{sum(t.nbytes for _, t in tensors()) + (64 << 20):,}"
    with pytest.raises(CheckpointError, match=f"{needed} bytes needed, 1,000,000 bytes free"):
        write_checkpoint(tmp_path / "out", CONFIG, tensors())
    with pytest.raises(CheckpointError, match="bytes needed"):
        write_checkpoint(tmp_path / "out", CONFIG, iter(tensors()), total_bytes=10**12)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_fills_up_on_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def full(file: object, content: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(save, "_write_all", full)
    with pytest.raises(CheckpointError, match=r"full: [\d,]+ bytes needed, [\d,]+ bytes free"):
        write_checkpoint(tmp_path / "out", CONFIG, tensors())
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError):
        write_checkpoint(tmp_path / "file" / "out", CONFIG, tensors())
    with pytest.raises(CheckpointError, match="plain names"):
        write_checkpoint(tmp_path / "out", CONFIG, tensors(), extra_files={"../x": b""})
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
