"""Shards in place give the records that a packed file holds, whatever the format and wherever the tensors lie."""

import errno
import json
import os
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from karakoram.checkpoint import open_checkpoint, pack_checkpoint
from karakoram.checkpoint.experts import PackedRecords, ShardRecords, aligned_bytes, open_expert_source, read_record
from karakoram.checkpoint.experts.direct import Preadv
from karakoram.errors import CheckpointError
from tests.checkpoint import small_experts
from tests.checkpoint.small_experts import Faulty, flip

KINDS = ("int4", "bf16", "fp8")


def shards(directory: Path, preadv: Preadv | None = None, direct: bool = True) -> ShardRecords:
    found = open_expert_source(open_checkpoint(directory), preadv, direct)
    assert isinstance(found, ShardRecords)
    return found


def read_all(source: ShardRecords | PackedRecords) -> list[Tensor]:
    found = []
    for layer in source.layers:
        for expert in range(source.experts):
            slot = aligned_bytes(source.slot_bytes).zero_()
            read_record(source, layer, expert, slot)
            found.append(slot)
    source.close()
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shard_bytes", [1 << 30, 30_000])
def test_the_same_records_from_shards_and_from_a_packed_file(tmp_path: Path, kind: str, shard_bytes: int) -> None:
    """In one file, and spread over many, an expert's tensors in several."""
    src = small_experts.write(tmp_path / "src", kind, shard_bytes, hidden_size=160, moe_intermediate_size=96)
    expected = read_all(PackedRecords(pack_checkpoint(src, tmp_path / "packed") / "experts.k2experts"))
    assert all(torch.equal(a, b) for a, b in zip(read_all(shards(src)), expected, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(read_all(shards(src, direct=False)), expected, strict=True))


@pytest.mark.parametrize(("kind", "reads"), [("int4", 2), ("bf16", 1), ("fp8", 2)])
def test_tensors_side_by_side_are_one_read(tmp_path: Path, kind: str, reads: int) -> None:
    """Files are sorted by dtype: codes in one place, scales in another."""
    calls = Faulty()
    source = shards(small_experts.write(tmp_path / "src", kind), calls)
    read_record(source, 1, 2, aligned_bytes(source.slot_bytes))
    assert calls.calls == reads


def test_tensors_far_apart_are_read_apart(tmp_path: Path) -> None:
    """What lies between is not read: here, the codes of 64 experts and a table."""
    source = shards(small_experts.write(tmp_path / "src", n_routed_experts=64, vocab_size=1024))
    (codes, scales) = source.extents(1, 0)
    assert scales.offset - codes.offset > codes.length + (64 << 10)
    assert codes.length + scales.length <= source.room_bytes < source.record_bytes + 5 * 4096


def test_tensors_at_odd_bytes_are_read(tmp_path: Path) -> None:
    """A header may have any length: data then begins at any byte."""
    src = small_experts.write(tmp_path / "src")
    expected = read_all(shards(src))
    (path,) = src.glob("*.safetensors")
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    path.write_bytes((length + 3).to_bytes(8, "little") + content[8 : 8 + length] + b"   " + content[8 + length :])
    assert all(torch.equal(a, b) for a, b in zip(read_all(shards(src)), expected, strict=True))


def infinite_scale(views: Sequence[memoryview]) -> None:
    """Every other byte 0x7F, so that some scale is infinite or not a number."""
    for view in views:
        view[:] = b"\x80\x7f" * (len(view) // 2)


def test_scales_that_are_not_finite_are_read_once_more(tmp_path: Path) -> None:
    src = small_experts.write(tmp_path / "src")
    expected = read_all(shards(src))
    faulty = Faulty(lambda views: None, infinite_scale)  # codes, scales
    assert all(torch.equal(a, b) for a, b in zip(read_all(shards(src, faulty)), expected, strict=True))
    with pytest.raises(CheckpointError, match=r"Layer 1, expert 0 in .*safetensors is damaged: gate_proj: A scale"):
        read_all(shards(src, Faulty(infinite_scale, always=True)))


def test_faults_are_told_as_with_a_packed_file(tmp_path: Path) -> None:
    src = small_experts.write(tmp_path / "src")
    expected = read_all(shards(src))
    for steps in ([OSError(errno.EIO, "EIO")], [InterruptedError()], [5000, 4096], [OSError(errno.EINVAL, "no")]):
        found = read_all(shards(src, Faulty(*steps)))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    with pytest.raises(CheckpointError, match=r"Layer 1, expert 0: .*safetensors cannot be read at byte"):
        read_all(shards(src, Faulty(OSError(errno.EIO, "EIO"), always=True)))
    with pytest.raises(CheckpointError, match=r"Layer 1, expert 0: .*safetensors ends at byte"):
        read_all(shards(src, Faulty(0, always=True)))


def test_a_shard_cut_short_after_opening_is_an_error(tmp_path: Path) -> None:
    src = small_experts.write(tmp_path / "src")
    checkpoint = open_checkpoint(src)
    source = open_expert_source(checkpoint)
    (path,) = src.glob("*.safetensors")
    os.truncate(path, path.stat().st_size // 4)
    with pytest.raises(CheckpointError, match="replaced or changed"):
        source.check_unchanged()
    slot = aligned_bytes(source.slot_bytes)
    with pytest.raises(CheckpointError, match="ends at byte"):
        read_record(source, 2, source.experts - 1, slot)
    with pytest.raises(CheckpointError, match="ends inside layer"):
        open_expert_source(checkpoint)


def test_layers_of_mixed_formats_are_refused(tmp_path: Path) -> None:
    src = small_experts.write(tmp_path / "src")
    other = open_checkpoint(small_experts.write(tmp_path / "other", "bf16"))
    checkpoint = open_checkpoint(src)
    name = "model.layers.2.mlp.experts.1.up_proj.weight"
    for suffix in ("_packed", "_scale", "_shape"):
        del checkpoint.tensors[name + suffix]
    checkpoint.tensors[name] = other.tensors[name]
    with pytest.raises(CheckpointError, match="stored in bf16 and int4"):
        open_expert_source(checkpoint)


def test_a_dense_model_has_no_experts(tmp_path: Path) -> None:
    src = small_experts.write(tmp_path / "src", "bf16", first_k_dense_replace=3)
    with pytest.raises(CheckpointError, match="dense model"):
        open_expert_source(open_checkpoint(src))
    with pytest.raises(CheckpointError, match="dense model"):
        pack_checkpoint(src, tmp_path / "packed")
    assert json.loads((src / "config.json").read_text())["first_k_dense_replace"] == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["src"]


def test_flipped_codes_go_unnoticed_without_checksums(tmp_path: Path) -> None:
    """What a packed file adds: in shards, only scales can look wrong."""
    src = small_experts.write(tmp_path / "src")
    changed = read_all(shards(src, Faulty(flip)))
    assert not all(torch.equal(a, b) for a, b in zip(changed, read_all(shards(src)), strict=True))
