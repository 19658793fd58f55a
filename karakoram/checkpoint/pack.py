"""`pack_checkpoint`: a checkpoint whose routed experts lie in one file, a record each, as the kernels read them.

Everything is made in a hidden directory beside the target, `.NAME.packing`: first the checkpoint without its experts
(`save.py`), then the records, with a journal of those that are there. A run that ended early, whatever ended it, is
continued by the next one with the same source and target: records that the journal claims are read and verified, the
others packed. At the end the directory is renamed into place. A lock on it keeps a second run away.

No bit is lost: what the records cannot hold as it is (scales of int4 or experts in fp16 or fp32) is refused.
"""

import errno
import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from torch import Tensor

from karakoram.checkpoint import names
from karakoram.checkpoint.experts.journal import Journal
from karakoram.checkpoint.experts.layout import FILE_NAME, VERSION, Layout
from karakoram.checkpoint.experts.opening import open_expert_source
from karakoram.checkpoint.experts.source import ExpertSource
from karakoram.checkpoint.experts.writing import RecordFile, verified, write_records
from karakoram.checkpoint.index import Checkpoint, open_checkpoint
from karakoram.checkpoint.safetensors import MAX_HEADER_BYTES, TensorEntry, read_tensor
from karakoram.checkpoint.save import SPARE_BYTES, check_target, flush_directory, write_checkpoint
from karakoram.errors import CheckpointError, FormatError
from karakoram.kernels.packed import LAYOUT_VERSION

Progress = Callable[[int, int], None]  # done bytes, total bytes


def pack_checkpoint(
    src: str | Path, dst: str | Path, progress: Progress | None = None, allow_config_keys: Collection[str] = ()
) -> Path:
    """Write the checkpoint `src` (directory or hub id) to the new directory `dst`, experts packed; returns it.

    FormatError: experts that records cannot hold exactly. CheckpointError: the source is damaged, dense, packed
    already, or `dst` cannot be written; what was done is kept for the next run with the same arguments.
    """
    checkpoint = open_checkpoint(src, allow_config_keys)
    checkpoint.check()
    out_dir = Path(dst).expanduser().resolve()
    if checkpoint.packed is not None:
        raise CheckpointError(f"{checkpoint.dir} is packed already.", "Copy the directory as it is.")
    if out_dir == checkpoint.dir.resolve():
        raise CheckpointError(f"{dst} is the source itself.", "Name another directory.")
    check_target(out_dir, overwrite=False)
    source = open_expert_source(checkpoint)
    try:
        _refuse_rounding(checkpoint)
        with _scratch_directory(out_dir) as scratch:
            check_target(out_dir, overwrite=False)  # whoever had the lock may have written it
            _make(checkpoint, source, scratch, out_dir, progress or (lambda done, total: None))
    finally:
        source.close()
    return out_dir


def _make(checkpoint: Checkpoint, source: ExpertSource, scratch: Path, out_dir: Path, progress: Progress) -> None:
    digest = _digest(checkpoint)
    layout = Layout(source.kind, source.layers, source.experts, source.hidden, source.intermediate, digest)
    rest = _rest(checkpoint)
    rest_bytes = sum(entry.nbytes for entry in rest)
    total = rest_bytes + layout.records * layout.slot_bytes
    made = scratch / "checkpoint"
    _check_free_space(made, rest_bytes, layout, out_dir)
    journal = Journal(scratch / "journal", _key(checkpoint, layout))
    file = None
    try:
        if not journal.continued:
            shutil.rmtree(made, ignore_errors=True)
        if not made.is_dir():
            write_checkpoint(made, checkpoint.raw_config, _tensors(rest, total, progress), checkpoint.dir)
        file = RecordFile(made / FILE_NAME, layout)

        def report(records: int) -> None:
            progress(rest_bytes + records * layout.slot_bytes, total)

        journal.checksums = verified(file.path, layout, journal.checksums, report)
        write_records(source, file, journal, report)
        source.check_unchanged()
        file.finish(journal.checksums)
        flush_directory(made)
        made.rename(out_dir)
        flush_directory(out_dir.parent)
    finally:
        journal.close()
        if file is not None:
            file.close()


def _rest(checkpoint: Checkpoint) -> list[TensorEntry]:
    """Everything but routed experts and stale buffers, in the order of the source's bytes."""
    text = [entry for name, entry in checkpoint.tensors.items() if not names.belongs_to_routed_expert(name)]
    rest = [*text, *checkpoint.mtp.values(), *checkpoint.vision.values()]
    return sorted(rest, key=lambda entry: (entry.file, entry.offset))


def _tensors(entries: list[TensorEntry], total: int, progress: Progress) -> Iterator[tuple[str, Tensor]]:
    done = 0
    progress(done, total)
    for entry in entries:
        yield entry.stored_name, read_tensor(entry)
        done += entry.nbytes
        progress(done, total)


def _refuse_rounding(checkpoint: Checkpoint) -> None:
    for name, entry in checkpoint.tensors.items():
        exact = ("BF16", "F8_E4M3") if not name.endswith(("_packed", "_shape", "_scale_inv")) else (entry.dtype,)
        if names.belongs_to_routed_expert(name) and entry.dtype not in exact:
            raise FormatError(
                f"{name} is stored as {entry.dtype}; a record holds it as BF16, which could lose bits.",
                "Write the checkpoint in bf16 first, k2 convert SRC DST --format bf16, or in int4 with k2 quantize.",
            )


def _digest(checkpoint: Checkpoint) -> bytes:
    """sha256 of config.json and of each safetensors file's name and header: which model, not which numbers."""
    found = hashlib.sha256((checkpoint.dir / "config.json").read_bytes())
    for path in checkpoint.files:
        with open(path, "rb") as file:
            size = file.read(8)
            found.update(path.name.encode() + size + file.read(min(int.from_bytes(size, "little"), MAX_HEADER_BYTES)))
    return found.digest()


def _key(checkpoint: Checkpoint, layout: Layout) -> bytes:
    """What a journal is continued for: the same model in the same files, not written to since, in the same layout."""
    places = [(path.name, (status := path.stat()).st_size, status.st_mtime_ns) for path in checkpoint.files]
    return hashlib.sha256(repr((layout, VERSION, LAYOUT_VERSION, places)).encode()).digest()


# --------------------------------------------------------------------------------------------------- the directory


@contextmanager
def _scratch_directory(out_dir: Path) -> Iterator[Path]:
    """The locked hidden directory beside the target. It stays where the run did not end well."""
    scratch = out_dir.with_name(f".{out_dir.name}.packing")
    lock = None
    try:
        lock = _locked(scratch, out_dir)
        yield scratch
        shutil.rmtree(scratch, ignore_errors=True)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(out_dir.parent).free
            raise CheckpointError(
                f"the disk of {out_dir.parent} is full: {free:,} bytes free.",
                f"Free some space and run the same command again: what is done is kept in {scratch}.",
            ) from error
        raise CheckpointError(f"cannot write {out_dir}: {error}.", "Check the path and its permissions.") from error
    finally:
        if lock is not None:
            with suppress(OSError):
                scratch.rmdir()  # where nothing was done
            os.close(lock)


def _locked(scratch: Path, out_dir: Path) -> int:
    while True:
        scratch.mkdir(parents=True, exist_ok=True)
        lock = os.open(scratch, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            raise CheckpointError(f"{out_dir} is being packed by another process.", "Wait for it to end.") from None
        if scratch.is_dir() and os.path.samestat(os.fstat(lock), os.stat(scratch)):
            return lock
        os.close(lock)  # whoever held it has just finished and removed it


def _check_free_space(made: Path, rest_bytes: int, layout: Layout, out_dir: Path) -> None:
    needed = layout.file_bytes + SPARE_BYTES
    if made.is_dir():
        records = made / FILE_NAME
        needed -= records.stat().st_blocks * 512 if records.is_file() else 0
    else:
        needed += rest_bytes
    free = shutil.disk_usage(made.parent).free
    if needed > free:
        raise CheckpointError(
            f"the disk of {out_dir.parent} is too small: {needed:,} bytes needed, {free:,} bytes free.",
            "Free some space, or write to another disk; what an earlier run has done is kept.",
        )
