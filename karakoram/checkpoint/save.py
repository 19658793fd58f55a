"""Writing a checkpoint: all or nothing, one tensor in memory at a time.

Everything is written into a hidden directory beside the target, flushed to the disk, and renamed into place: whoever
sees the target sees a complete checkpoint. A killed run leaves only the hidden directory, which the next run to the
same target removes; a lock tells a dead run from a live one.

A safetensors file begins with a header that lists all its tensors, but a stream of tensors is known only at its end.
So the first 64 MiB of a shard wait in memory: a shard that ends there gets an exact header. A longer one leaves 1 MiB
free at its front and fills it in at the end; the format allows spaces after the header.
"""

import errno
import fcntl
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from karakoram.checkpoint.index import INDEX_NAME
from karakoram.checkpoint.safetensors import DTYPE_NAMES, header_of
from karakoram.errors import CheckpointError

MAX_SHARD_BYTES = 5_000_000_000
BUFFER_BYTES = 64 << 20
RESERVED_HEADER_BYTES = 1 << 20  # 0.02 % of a full shard
_NAME_BYTES = 160  # of a header beside the name: dtype, shape and offsets, generously
SPARE_BYTES = 64 << 20  # what must stay free beyond the tensors: headers, index, tokenizer

# What belongs to a checkpoint besides tensors and configuration; weights and their index are never copied.
_COPIED = ("*.json", "tiktoken.model", "tokenizer.model", "*.jinja", "*.txt", "*.py", "LICENSE*", "README*")
_NOT_COPIED = ("config.json", "*.safetensors.index.json", "*.bin.index.json", "trainer_state.json")
_MAX_COPIED_BYTES = 256 << 20


def write_checkpoint(
    out_dir: str | Path,
    config_dict: Mapping[str, Any],
    tensors: Iterable[tuple[str, Tensor]],
    copy_from: Path | None = None,
    extra_files: Mapping[str, bytes] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    overwrite: bool = False,
    total_bytes: int | None = None,
) -> Path:
    """Write config.json, shards and index to `out_dir`, which appears complete or not at all; returns it.

    tensors: (stored name, tensor) in any order, consumed one by one; each is written before the next is asked for
    (up to 64 MiB of small ones wait). copy_from: a checkpoint whose tokenizer, template and generation files come
    along. extra_files: file name -> content, over what was copied. overwrite: replace a checkpoint that is there.
    total_bytes: size of all tensors where `tensors` is a stream, to check the free space before starting.
    """
    out_dir = Path(out_dir).expanduser().resolve()
    if total_bytes is None and isinstance(tensors, Sized):
        total_bytes = sum(tensor.nbytes for _, tensor in tensors)
    _remove_leftovers(out_dir)
    check_target(out_dir, overwrite)
    with _scratch_directory(out_dir, total_bytes) as scratch:
        _check_free_space(scratch, total_bytes)
        if copy_from is not None:
            _copy_companions(Path(copy_from), scratch)
        for name, content in (extra_files or {}).items():
            _write_file(scratch / _plain_name(name), content)
        _write_file(scratch / "config.json", _json(config_dict))
        _write_tensors(scratch, tensors, max_shard_bytes)
        flush_directory(scratch)
        _move_into_place(scratch, out_dir)
    return out_dir


class _Shard:
    """One safetensors file in the making."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: list[tuple[str, str, tuple[int, ...]]] = []
        self.waiting: list[Tensor] = []
        self.data_bytes = 0
        self.header_bytes = 0
        self.file: BinaryIO | None = None

    def takes(self, name: str, tensor: Tensor, max_bytes: int) -> bool:
        """Whether one more tensor fits: into the shard, into its header, and on an address its reader can map."""
        if not self.entries:
            return True
        fits_header = self.header_bytes + len(name.encode()) + _NAME_BYTES <= RESERVED_HEADER_BYTES - 64
        aligned = self.file is None or self.data_bytes % tensor.itemsize == 0
        return fits_header and aligned and self.data_bytes + tensor.nbytes <= max_bytes

    def add(self, name: str, tensor: Tensor) -> None:
        self.entries.append((name, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape)))
        self.header_bytes += len(name.encode()) + _NAME_BYTES
        self.data_bytes += tensor.nbytes
        self.waiting.append(tensor)
        if self.file is not None or self.data_bytes > BUFFER_BYTES:
            if self.file is None:
                self._sort_waiting()
                self.file = open(self.path, "xb", buffering=0)  # noqa: SIM115
                self.file.seek(RESERVED_HEADER_BYTES)
            self._write_waiting(self.file)

    def close(self) -> None:
        """Write what waits and the header, and flush the file to the disk."""
        if self.file is None:
            self._sort_waiting()
            self.file = open(self.path, "xb", buffering=0)  # noqa: SIM115
            _write_all(self.file, header_of(self.entries))
            self._write_waiting(self.file)
        else:
            self.file.seek(0)
            _write_all(self.file, header_of(self.entries, pad_to=RESERVED_HEADER_BYTES))
        os.fsync(self.file.fileno())
        self.file.close()

    def abandon(self) -> None:
        """Let go of the file after a failure."""
        if self.file is not None:
            self.file.close()

    def _sort_waiting(self) -> None:
        """Wide dtypes first, so that each tensor starts at a multiple of its item size."""
        order = sorted(range(len(self.waiting)), key=lambda i: -self.waiting[i].itemsize)
        self.entries = [self.entries[i] for i in order]
        self.waiting = [self.waiting[i] for i in order]

    def _write_waiting(self, file: BinaryIO) -> None:
        for tensor in self.waiting:
            if tensor.numel():
                _write_all(file, tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        self.waiting = []


def _write_all(file: BinaryIO, content: Any) -> None:
    """All of it: an unbuffered file may take less than it is given."""
    view = memoryview(content)
    while len(view):
        view = view[file.write(view[: 1 << 30]) or 0 :]


def _write_tensors(scratch: Path, tensors: Iterable[tuple[str, Tensor]], max_shard_bytes: int) -> None:
    shards: list[_Shard] = []
    seen: set[str] = set()
    try:
        for name, tensor in tensors:
            if name in seen or tensor.dtype not in DTYPE_NAMES:
                what = "comes twice" if name in seen else f"has dtype {tensor.dtype}"
                raise CheckpointError(
                    f"cannot write {name}: it {what}.", "Every tensor is written once, in a plain dtype."
                )
            seen.add(name)
            if not shards or not shards[-1].takes(name, tensor, max_shard_bytes):
                if shards:
                    shards[-1].close()
                shards.append(_Shard(scratch / f"model-{len(shards) + 1:05d}.safetensors"))
            shards[-1].add(name, tensor)
            del tensor  # a stream hands over ownership: nothing may hold a tensor while the next one is made
        if not shards:
            raise CheckpointError("there is no tensor to write.", "A checkpoint needs at least one.")
        shards[-1].close()
    finally:
        for shard in shards:
            shard.abandon()
    _name_shards(scratch, shards)


def _name_shards(scratch: Path, shards: list[_Shard]) -> None:
    """`model-00001-of-00064.safetensors`, now that the number is known, and the index over them."""
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        shard.path.rename(scratch / name)
        weight_map.update((entry[0], name) for entry in shard.entries)
    total = sum(shard.data_bytes for shard in shards)
    parameters = sum(math.prod(shape) for shard in shards for _, _, shape in shard.entries)
    index = {
        "metadata": {"total_parameters": parameters, "total_size": total},
        "weight_map": dict(sorted(weight_map.items())),
    }
    _write_file(scratch / INDEX_NAME, _json(index))


def _copy_companions(source: Path, scratch: Path) -> None:
    skipped = {path for pattern in _NOT_COPIED for path in source.glob(pattern)}
    for path in sorted({path for pattern in _COPIED for path in source.glob(pattern)} - skipped):
        if path.is_file() and path.stat().st_size <= _MAX_COPIED_BYTES:
            _write_file(scratch / path.name, path.read_bytes())


def _plain_name(name: str) -> str:
    if Path(name).name != name or name in ("", ".", "..") or name.endswith(".safetensors"):
        raise CheckpointError(f"{name!r} cannot be written beside the tensors.", "Extra files have plain names.")
    return name


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def _write_file(path: Path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def flush_directory(path: Path) -> None:
    """Its entries to the disk: what was written into it, or renamed, is there after a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_target(out_dir: Path, overwrite: bool) -> None:
    """Raises CheckpointError unless a checkpoint may be written there."""
    if not out_dir.exists():
        return
    if not out_dir.is_dir():
        raise CheckpointError(f"{out_dir} is a file.", "Name a directory that does not exist yet.")
    if not any(out_dir.iterdir()):
        return
    if not overwrite:
        raise CheckpointError(
            f"{out_dir} exists and is not empty.", "Name another directory, or remove this one first."
        )
    if not (out_dir / "config.json").is_file():
        raise CheckpointError(
            f"{out_dir} is no checkpoint: it has no config.json.", "Only checkpoints are overwritten."
        )


def _check_free_space(scratch: Path, total_bytes: int | None) -> None:
    free = shutil.disk_usage(scratch).free
    if total_bytes is not None and total_bytes + SPARE_BYTES > free:
        raise _disk_full(scratch.parent, total_bytes, free)


def _disk_full(parent: Path, total_bytes: int | None, free: int) -> CheckpointError:
    needed = "more" if total_bytes is None else f"{total_bytes + SPARE_BYTES:,} bytes"
    return CheckpointError(
        f"the disk of {parent} is full: {needed} needed, {free:,} bytes free.",
        "Free some space or write to another disk; nothing was left behind.",
    )


@contextmanager
def _scratch_directory(out_dir: Path, total_bytes: int | None) -> Iterator[Path]:
    """A locked hidden directory beside the target; gone afterwards unless it was moved into place."""
    scratch, lock = None, None
    try:
        out_dir.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{out_dir.name}.partial-", dir=out_dir.parent))
        lock = os.open(scratch, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX)
        scratch.chmod(0o777 & ~_umask())  # mkdtemp makes it private; a checkpoint is as readable as any directory
        yield scratch
    except OSError as error:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)  # before the free space is measured
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _disk_full(out_dir.parent, total_bytes, shutil.disk_usage(out_dir.parent).free) from error
        raise CheckpointError(f"cannot write {out_dir}: {error}.", "Check the path and its permissions.") from error
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def _remove_leftovers(out_dir: Path) -> None:
    """Clear what killed runs to the same target left: a checkpoint half moved aside comes back, partial ones go."""
    for path in sorted(out_dir.parent.glob(f".{_escaped(out_dir.name)}.replaced-*")):
        if out_dir.exists():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.rename(out_dir)
    for path in sorted(out_dir.parent.glob(f".{_escaped(out_dir.name)}.partial-*")):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path, ignore_errors=True)
        except BlockingIOError:
            raise CheckpointError(f"{out_dir} is being written by another process.", "Wait for it to end.") from None
        finally:
            os.close(descriptor)


def _escaped(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def _move_into_place(scratch: Path, out_dir: Path) -> None:
    """The one moment of truth: a rename, atomic on every POSIX file system."""
    aside = out_dir.parent / scratch.name.replace(".partial-", ".replaced-")
    replaces = out_dir.is_dir() and any(out_dir.iterdir())
    if replaces:
        out_dir.rename(aside)
    scratch.rename(out_dir)
    flush_directory(out_dir.parent)
    if replaces:
        shutil.rmtree(aside, ignore_errors=True)
