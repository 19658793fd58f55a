"""The file of packed experts: what is read from it is what was packed, or an error; never something else."""

import errno
import os
import random
import struct
from pathlib import Path

import pytest
import torch
import xxhash
from torch import Tensor

from karakoram.checkpoint import names, open_checkpoint, pack_checkpoint
from karakoram.checkpoint.experts import PackedRecords, aligned_bytes, open_expert_source, read_record
from karakoram.checkpoint.experts.layout import FILE_NAME, read_front
from karakoram.errors import CheckpointError, InputError
from karakoram.kernels import ops
from karakoram.kernels.packed import PackedExperts
from tests.checkpoint import small_experts
from tests.checkpoint.small_experts import EXPERTS, HIDDEN, INTERMEDIATE, LAYERS, Faulty, flip


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed int4 checkpoint. Tests that change it copy its file."""
    folder = tmp_path_factory.mktemp("experts")
    return pack_checkpoint(small_experts.write(folder / "src"), folder / "packed")


@pytest.fixture
def file(packed: Path, tmp_path: Path) -> Path:
    """A copy of its file."""
    copy = tmp_path / FILE_NAME
    copy.write_bytes((packed / FILE_NAME).read_bytes())
    return copy


@pytest.fixture
def first(packed: Path) -> Tensor:
    """The record of the first expert, as it is."""
    source = PackedRecords(packed / FILE_NAME)
    slot = aligned_bytes(source.slot_bytes)
    read_record(source, LAYERS[0], 0, slot)
    source.close()
    return slot


def read_first(source: PackedRecords) -> Tensor:
    slot = aligned_bytes(source.slot_bytes)
    read_record(source, LAYERS[0], 0, slot)
    return slot


def test_what_a_source_says_of_itself(packed: Path) -> None:
    source = open_expert_source(open_checkpoint(packed))
    assert (source.layers, source.experts, source.kind) == (LAYERS, EXPERTS, "int4")
    assert (source.hidden, source.intermediate) == (HIDDEN, INTERMEDIATE)
    assert source.slot_bytes % 4096 == 0 and source.record_bytes <= source.slot_bytes < source.record_bytes + 4096
    source.check_unchanged()
    source.close()


def test_records_lie_on_pages(packed: Path) -> None:
    layout, _ = read_front(packed / FILE_NAME)
    assert layout.first % 4096 == layout.slot_bytes % 4096 == 0
    assert (packed / FILE_NAME).stat().st_size == layout.file_bytes


@pytest.mark.parametrize("address", [(0, 0), (3, 0), (1, -1), (1, EXPERTS)])
def test_an_expert_that_is_not_there(packed: Path, address: tuple[int, int]) -> None:
    with PackedFile(packed) as source, pytest.raises(InputError, match="no expert"):
        source.extents(*address)


@pytest.mark.parametrize("wrong", ["size", "place"])
def test_a_slot_that_takes_no_record(packed: Path, wrong: str) -> None:
    with PackedFile(packed) as source:
        size = source.slot_bytes
        slot = aligned_bytes(size - 1) if wrong == "size" else aligned_bytes(size + 64)[64:]
        with pytest.raises(InputError, match="takes no record"):
            read_record(source, 1, 0, slot)


class PackedFile:
    """The records of a checkpoint, closed afterwards."""

    def __init__(self, directory: Path, *arguments: object) -> None:
        self.source = PackedRecords(directory / FILE_NAME, *arguments)  # type: ignore[arg-type]

    def __enter__(self) -> PackedRecords:
        return self.source

    def __exit__(self, *_: object) -> None:
        self.source.close()


def test_records_in_slots_compute_what_they_were_packed_from(packed: Path) -> None:
    """Slots are a little larger than records: a layer of them has a stride."""
    with PackedFile(packed) as source:
        slots = aligned_bytes(EXPERTS, source.slot_bytes)
        for expert in range(EXPERTS):
            read_record(source, 2, expert, slots[expert])
    experts = PackedExperts(slots[:, : source.record_bytes], HIDDEN, INTERMEDIATE)
    checkpoint = open_checkpoint(packed.parent / "src")
    for expert in range(EXPERTS):
        for projection, part in zip(names.PROJECTIONS, experts.parts(expert), strict=True):
            assert torch.equal(part.dense(), checkpoint.expert(2, expert, projection, torch.bfloat16))
    x, ids = torch.randn(5, HIDDEN).to(torch.bfloat16), torch.randint(0, EXPERTS, (5, 2))
    contiguous = PackedExperts(experts.records.contiguous(), HIDDEN, INTERMEDIATE)
    weights = torch.rand(5, 2)
    assert torch.equal(ops.moe(x, ids, weights, experts), ops.moe(x, ids, weights, contiguous))


# ------------------------------------------------------------------------------------------ damage


@pytest.mark.parametrize("seed", range(6))
def test_flipped_bits_never_become_weights(packed: Path, tmp_path: Path, seed: int) -> None:
    """50 bytes, one at a time, half of them in header and index: an error, or the records as they were."""
    content = (packed / FILE_NAME).read_bytes()
    layout, _ = read_front(packed / FILE_NAME)
    originals = content[layout.first :]
    chance = random.Random(seed)
    path = tmp_path / FILE_NAME
    path.write_bytes(content)
    refused = 0
    for _ in range(50):
        place = chance.randrange(layout.first if chance.random() < 0.5 else len(content))
        place = chance.randrange(140) if chance.random() < 0.2 else place
        with open(path, "r+b") as opened:
            opened.seek(place)
            opened.write(bytes([content[place] ^ (1 << chance.randrange(8))]))
        try:
            with PackedFile(tmp_path) as source:
                for number in range(layout.records):
                    slot = aligned_bytes(source.slot_bytes)
                    read_record(source, *layout.address(number), slot)
                    found = bytes(slot.numpy().data[: layout.record_bytes])
                    assert found == originals[number * layout.slot_bytes :][: layout.record_bytes]
        except CheckpointError:
            refused += 1
        with open(path, "r+b") as opened:
            opened.seek(place)
            opened.write(content[place : place + 1])
    assert refused >= 40  # only padding may be wrong unnoticed


@pytest.mark.parametrize("left", [0, 1, 8, 100, 4095, 4096, 4097, 8192, -4096, -1])
def test_a_file_cut_short_is_refused(file: Path, left: int) -> None:
    file.write_bytes(file.read_bytes()[:left])
    with pytest.raises(CheckpointError, match=r"cut short|holds no packed experts|damaged"):
        PackedRecords(file)


def test_bytes_behind_the_end_are_refused(file: Path) -> None:
    file.write_bytes(file.read_bytes() + bytes(4096))
    with pytest.raises(CheckpointError, match="added to"):
        PackedRecords(file)


@pytest.mark.parametrize("content", [b"", b"K2EXPER", b"GGUF" + bytes(5000), b'{"layout_version": 1}' + bytes(5000)])
def test_another_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "other").write_bytes(content)
    with pytest.raises(CheckpointError, match="holds no packed experts"):
        PackedRecords(tmp_path / "other")


def rewrite(file: Path, at: int, value: int) -> None:
    """Another number in the header, its checksum right."""
    content = bytearray(file.read_bytes())
    content[at : at + 4] = struct.pack("<I", value)
    content[112:120] = struct.pack("<Q", xxhash.xxh3_64_intdigest(bytes(content[:112])))
    file.write_bytes(content)


@pytest.mark.parametrize("at", [8, 12])
def test_another_version_is_refused_and_says_how_to_repack(file: Path, at: int) -> None:
    rewrite(file, at, 2)
    with pytest.raises(CheckpointError, match=r"version \d with layout \d; this program reads version 1") as caught:
        PackedRecords(file)
    assert "k2 pack SRC DST" in caught.value.fix


@pytest.mark.parametrize("at", [16, 20, 24, 28, 32, 36, 40, 48, 56, 64])
@pytest.mark.parametrize("value", [0, 3, 77, 0xFFFFFFFF])
def test_numbers_that_do_not_fit_are_refused_before_anything_is_allocated(file: Path, at: int, value: int) -> None:
    there = struct.unpack_from("<I", file.read_bytes(), at)[0]
    rewrite(file, at, value + 1 if there == value else value)
    with pytest.raises(CheckpointError, match=r"claims|cut short|damaged"):
        PackedRecords(file)


def test_a_record_in_anothers_place_is_noticed(file: Path) -> None:
    layout, _ = read_front(file)
    content = bytearray(file.read_bytes())
    one, two = (slice(layout.offset(n), layout.offset(n) + layout.slot_bytes) for n in (0, 1))
    content[one], content[two] = content[two], content[one]
    file.write_bytes(content)
    with PackedFile(file.parent) as source, pytest.raises(CheckpointError, match="Layer 1, expert 0"):
        read_first(source)


# ------------------------------------------------------------------------------------------ reading


def test_a_wrong_record_is_read_once_more(packed: Path, first: Tensor) -> None:
    faulty = Faulty(flip)
    with PackedFile(packed, faulty) as source:
        assert torch.equal(read_first(source), first)
    assert faulty.calls == 2


def test_a_record_that_stays_wrong_is_an_error_that_names_it(packed: Path) -> None:
    told = rf"Layer 1, expert 0 in .*{FILE_NAME} is damaged.*twice"
    faulty = Faulty(flip, always=True)
    with PackedFile(packed, faulty) as source, pytest.raises(CheckpointError, match=told) as caught:
        read_first(source)
    assert "pack it again" in caught.value.fix


@pytest.mark.parametrize("most", [4096, 5000, 100])
def test_short_reads_go_on_where_they_ended(packed: Path, first: Tensor, most: int) -> None:
    with PackedFile(packed, Faulty(most, most, most)) as source:
        assert torch.equal(read_first(source)[: source.record_bytes], first[: source.record_bytes])


def test_an_io_error_is_tried_once_more(packed: Path, first: Tensor) -> None:
    with PackedFile(packed, Faulty(OSError(errno.EIO, "Input/output error"))) as source:
        assert torch.equal(read_first(source), first)


def test_a_lasting_io_error_names_file_expert_and_place(packed: Path) -> None:
    with PackedFile(packed, Faulty(OSError(errno.EIO, "Input/output error"), always=True)) as source:
        offset = f"{source.layout.offset(0):,}"
        with pytest.raises(CheckpointError, match=rf"Layer 1, expert 0: .*{FILE_NAME} .*byte {offset}: Input/output"):
            read_first(source)


def test_interrupted_reads_go_on(packed: Path, first: Tensor) -> None:
    with PackedFile(packed, Faulty(*(InterruptedError(errno.EINTR, "EINTR") for _ in range(3)))) as source:
        assert torch.equal(read_first(source), first)


def test_a_file_that_ends_early_is_an_error(packed: Path) -> None:
    told = r"Layer 1, expert 0.* ends at byte"
    with PackedFile(packed, Faulty(0, always=True)) as source, pytest.raises(CheckpointError, match=told):
        read_first(source)


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EOPNOTSUPP])
def test_plain_reads_serve_where_direct_ones_are_refused(packed: Path, first: Tensor, code: int) -> None:
    """When the file is opened, and when it is read."""
    with PackedFile(packed, None, False) as source:
        assert not source.file.is_direct
        assert torch.equal(read_first(source), first)
    with PackedFile(packed, Faulty(OSError(code, "refused"))) as source:
        assert torch.equal(read_first(source), first)


def test_a_replaced_file_is_noticed(file: Path) -> None:
    with PackedFile(file.parent) as source:
        source.check_unchanged()
        other = file.with_name("other")
        other.write_bytes(file.read_bytes())
        os.replace(other, file)
        with pytest.raises(CheckpointError, match="replaced or changed"):
            source.check_unchanged()
        file.unlink()
        with pytest.raises(CheckpointError, match="gone"):
            source.check_unchanged()


@pytest.mark.parametrize("change", ["cut", "written"])
def test_a_file_written_to_is_noticed(file: Path, change: str) -> None:
    with PackedFile(file.parent) as source:
        status = file.stat()
        if change == "cut":
            os.truncate(file, status.st_size - 4096)
        else:
            os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
        with pytest.raises(CheckpointError, match="replaced or changed"):
            source.check_unchanged()


def test_experts_of_another_model_are_refused(packed: Path, tmp_path: Path) -> None:
    other = small_experts.write(tmp_path / "other", "bf16", n_routed_experts=8)
    (other / FILE_NAME).write_bytes((packed / FILE_NAME).read_bytes())
    checkpoint = open_checkpoint(other)
    with pytest.raises(CheckpointError, match="unexpected"):
        checkpoint.check()
    with pytest.raises(CheckpointError, match=r"4 experts \[64, 96\] in 2 layers, config.json has 8"):
        open_expert_source(checkpoint)
