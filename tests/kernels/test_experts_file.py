"""Packed experts on disk: they come back as they were, on pages of their own, and what is no such file is refused."""

import json
from pathlib import Path

import pytest
import torch

from karakoram.errors import CheckpointError, FormatError
from karakoram.kernels import ops, packed
from karakoram.kernels.cpu.library import Library
from karakoram.kernels.packed import PackedExperts
from tests.kernels import drawn

HIDDEN, INTERMEDIATE = 64, 96


@pytest.fixture
def layers(lib: Library) -> list[PackedExperts]:
    return [drawn.experts(3, HIDDEN, INTERMEDIATE) for _ in range(2)]


@pytest.fixture
def file(layers: list[PackedExperts], tmp_path: Path) -> Path:
    path = tmp_path / "experts.k2"
    packed.write_experts(path, layers)
    return path


def rewrite(file: Path, **changes: object) -> None:
    """Another value, or none, under these keys of the header."""
    content = file.read_bytes()
    header = json.loads(content[8:4096].rstrip(b"\0")) | changes
    text = b"K2PANELS" + json.dumps({key: value for key, value in header.items() if value is not None}).encode()
    file.write_bytes(text.ljust(4096, b"\0") + content[4096:])


def test_round_trip(file: Path, layers: list[PackedExperts]) -> None:
    opened = packed.open_experts(file)
    assert len(opened) == 2
    for found, written in zip(opened, layers):
        assert (found.hidden, found.intermediate, found.experts) == (HIDDEN, INTERMEDIATE, 3)
        assert torch.equal(found.records, written.records)
    assert [path.name for path in file.parent.iterdir()] == ["experts.k2"]


def test_every_record_is_on_a_page_of_its_own(file: Path) -> None:
    for layer in packed.open_experts(file):
        assert {record.data_ptr() % 4096 for record in layer.records} == {0}
        assert layer.records.stride(0) % 4096 == 0
    assert file.stat().st_size % 4096 == 0


def test_a_mapped_layer_computes_the_same_bits(file: Path, layers: list[PackedExperts]) -> None:
    x, (ids, weights) = drawn.rows(5, HIDDEN), drawn.routing(5, 3, 2)
    expected = ops.moe_int4(x, ids, weights, layers[1])
    assert torch.equal(ops.moe_int4(x, ids, weights, packed.open_experts(file)[1]), expected)


def test_another_layout_version_is_refused_and_says_how_to_repack(file: Path) -> None:
    rewrite(file, layout_version=packed.LAYOUT_VERSION + 1)
    with pytest.raises(CheckpointError, match="layout version 2, this program reads 1") as caught:
        packed.open_experts(file)
    assert "write_experts" in caught.value.fix and "checkpoint" in caught.value.fix


@pytest.mark.parametrize("left", [1, 8, 20, 4095, 4096, 4097, -4096, -1])
def test_a_file_cut_short_is_refused(file: Path, left: int) -> None:
    file.write_bytes(file.read_bytes()[:left])
    with pytest.raises(CheckpointError, match=r"cut short|holds no packed experts"):
        packed.open_experts(file)


@pytest.mark.parametrize("content", [b"", b"K2PANEL", b"GGUF" + bytes(5000), b'{"layout_version": 1}' + bytes(5000)])
def test_another_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "other"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="holds no packed experts"):
        packed.open_experts(path)


@pytest.mark.parametrize("changes", [{"hidden": None}, {"layers": "two"}, {"experts": -3}])
def test_a_damaged_header_is_refused(file: Path, changes: dict[str, object]) -> None:
    rewrite(file, **changes)
    with pytest.raises(CheckpointError):
        packed.open_experts(file)


def test_layers_of_unequal_shape_are_not_written(layers: list[PackedExperts], tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="differ"):
        packed.write_experts(tmp_path / "experts.k2", [*layers, drawn.experts(3, HIDDEN, 32)])
    assert not list(tmp_path.iterdir())


def test_records_of_another_size_are_refused(layers: list[PackedExperts]) -> None:
    for records in (layers[0].records[:, :-1], layers[0].records.view(torch.int8), layers[0].records[0]):
        with pytest.raises(FormatError, match="records"):
            PackedExperts(records, HIDDEN, INTERMEDIATE)
