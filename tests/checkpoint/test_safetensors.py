"""Headers are claims by whoever wrote the file: every wrong one is an error that names the file, never a crash."""

import json
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from karakoram.checkpoint import safetensors
from karakoram.checkpoint.safetensors import header_of, read_header, read_tensor
from karakoram.errors import CheckpointError


def write(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def claim(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_reads_what_safetensors_writes(tmp_path: Path) -> None:
    tensors = {
        "bf16": torch.randn(3, 5).to(torch.bfloat16),
        "fp8": torch.randn(7, 3).to(torch.float8_e4m3fn),
        "ints": torch.arange(6, dtype=torch.int32).reshape(2, 3),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
        "flags": torch.tensor([True, False, True]),
    }
    save_file(tensors, tmp_path / "a.safetensors", {"format": "pt", "note": "kept aside"})
    entries = {entry.stored_name: entry for entry in read_header(tmp_path / "a.safetensors")}
    assert entries.keys() == tensors.keys()
    for name, tensor in tensors.items():
        mine = read_tensor(entries[name])
        assert mine.dtype == tensor.dtype
        assert mine.shape == tensor.shape
        assert torch.equal(
            mine.view(torch.uint8) if mine.ndim else mine, tensor.view(torch.uint8) if mine.ndim else tensor
        )


def test_long_tensors_are_read_in_several_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"x": torch.arange(1000)}, tmp_path / "a.safetensors")
    monkeypatch.setattr(safetensors, "READ_BYTES", 333)
    assert torch.equal(read_tensor(read_header(tmp_path / "a.safetensors")[0]), torch.arange(1000))


def test_safetensors_reads_our_header(tmp_path: Path) -> None:
    data = torch.arange(4, dtype=torch.int32)
    for pad_to in (0, 4096):
        content = header_of([("ä", "I32", (2, 2))], pad_to) + data.numpy().tobytes()
        (tmp_path / "a.safetensors").write_bytes(content)
        assert (len(content) - 16) % 8 == 0
        with safe_open(tmp_path / "a.safetensors", "pt") as file:
            assert torch.equal(file.get_tensor("ä"), data.view(2, 2))


@pytest.mark.parametrize(
    ("header", "data", "length", "says"),
    [
        ({"a": claim()}, b"\0" * 8, 10**18, "header of 1000000000000000000 bytes"),
        ({"a": claim()}, b"\0" * 8, 2**64 - 1, "header of"),
        ({"a": claim()}, b"\0" * 8, 10, "no valid safetensors header"),
        (b"[1, 2]", b"", None, "does not start with"),
        (b"{" * 5000, b"", None, "no valid safetensors header"),
        (b'{"a": "\xff"}', b"", None, "no valid safetensors header"),
        (b'{"a": {"dtype":"F32","shape":[1],"data_offsets":[0,4]}, "a": 1}', b"\0" * 4, None, "twice"),
        ({"a": claim()}, b"\0" * 7, None, "tensors end at byte"),
        ({"a": claim()}, b"\0" * 9, None, "tensors end at byte"),
        ({"a": claim(offsets=(0, 12))}, b"\0" * 12, None, "takes 8 bytes"),
        ({"a": claim(offsets=(4, 12))}, b"\0" * 12, None, "hole"),
        ({"a": claim(), "b": claim(offsets=(4, 12))}, b"\0" * 12, None, "overlaps"),
        ({"a": claim(), "b": claim(offsets=(12, 20))}, b"\0" * 20, None, "hole"),
        ({"a": claim(offsets=(-8, 0))}, b"", None, "claims"),
        ({"a": claim(offsets=(8, 0))}, b"\0" * 8, None, "takes 8 bytes"),
        ({"a": claim(shape=(2.0,))}, b"\0" * 8, None, "claims"),
        ({"a": claim(shape=(True, 2))}, b"\0" * 8, None, "claims"),
        ({"a": claim(shape=(-1, -2))}, b"\0" * 8, None, "claims"),
        ({"a": claim(shape=(1,) * 9 + (2,))}, b"\0" * 8, None, "claims"),
        ({"a": claim(shape=(2**62, 2**62))}, b"\0" * 8, None, "takes"),
        ({"a": claim(shape=([1],))}, b"\0" * 8, None, "claims"),
        ({"a": claim(shape=None)}, b"\0" * 8, None, "lacks"),
        ({"a": claim(offsets=(0,))}, b"\0" * 8, None, "lacks"),
        ({"a": claim(dtype="F4")}, b"\0" * 8, None, "dtype 'F4'"),
        ({"a": claim(dtype=7)}, b"\0" * 8, None, "claims"),
        ({"a": 5}, b"", None, "lacks"),
    ],
)
def test_wrong_headers(tmp_path: Path, header: object, data: bytes, length: int | None, says: str) -> None:
    path = write(tmp_path / "bad.safetensors", header, data, length)
    with pytest.raises(CheckpointError, match=r"bad\.safetensors") as caught:
        read_header(path)
    assert says in caught.value.what
    assert caught.value.fix


@pytest.mark.parametrize("size", [0, 7, 8])
def test_files_too_short(tmp_path: Path, size: int) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"\0" * size)
    with pytest.raises(CheckpointError):
        read_header(tmp_path / "a.safetensors")


@given(st.integers(0, 400), st.integers(0, 255), st.booleans())
def test_any_damage_is_an_error_or_a_valid_file(
    tmp_path_factory: pytest.TempPathFactory, at: int, byte: int, cut: bool
) -> None:
    path = tmp_path_factory.mktemp("damage") / "a.safetensors"
    save_file({"first": torch.arange(5), "second": torch.randn(4, 3)}, path)
    content = bytearray(path.read_bytes())
    at %= len(content)
    if cut:
        del content[at:]
    else:
        content[at] = byte
    path.write_bytes(content)
    try:
        entries = read_header(path)
    except CheckpointError:
        return
    assert sum(entry.nbytes for entry in entries) <= len(content)
    assert all(read_tensor(entry).nbytes == entry.nbytes for entry in entries)


def test_a_file_that_shrinks_after_opening(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"x": torch.zeros(100)}, path)
    (entry,) = read_header(path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="ends inside x"):
        read_tensor(entry)
    path.unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_tensor(entry)
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_header(path)
