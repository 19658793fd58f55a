"""Writing checkpoints beside the training: copy now, write in the background, rename when all is on the disk.

    caller's thread      copy this rank's tensors → (rank 0) the hidden directory, what the caller writes into it
    background thread    model/*.safetensors, each flushed → state.json → directories flushed → rename → forget old ones

One save at a time: a second waits for the first. A directory OUT/checkpoints/step-N that is there is whole; a save that
fails removes what it wrote, and the checkpoints before it stay; what a killed one left goes at the next start.
"""

import fcntl
import os
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from karakoram.checkpoint.save import flush_directory
from karakoram.errors import InputError, KarakoramError, TrainingError
from karakoram.train.checkpoints import dcp, find
from karakoram.train.checkpoints.ranks import Ranks, reason_of
from karakoram.train.checkpoints.state import Manifest, json_of, write_state

LOCK_FILE = ".lock"
FAILURES = (OSError, SafetensorError, KarakoramError)


class CheckpointWriter:
    """The checkpoints of a run in OUT/checkpoints, the newest `keep` of them.

    With torch.distributed every rank makes one at the same time, and all call every method together.
    asynchronous  the background writes while the caller trains on; else `save` returns when all is on the disk
    Raises TrainingError where another process is saving there.
    """

    def __init__(self, out_dir: Path, keep: int = 2, asynchronous: bool = True) -> None:
        if keep < 1:
            raise InputError(f"{keep} checkpoints cannot be kept.", "Keep at least one.")
        self.out, self.keep, self.asynchronous = out_dir, keep, asynchronous
        self.ranks = Ranks()
        self._background = ThreadPoolExecutor(1, "save")  # an interpreter that ends lets a save come to its end
        self._saving: Future[None] | None = None
        self._lock: int | None = None  # rank 0's, from the beginning of a save to its end
        self.ranks.first(self._clear)

    def save(
        self,
        step: int,
        tensors: Mapping[str, "Tensor | dcp.Piece"],
        state: Mapping[str, Any],
        also: Callable[[Path], None] | None = None,
    ) -> None:
        """Save `tensors` (this rank's: plain, DTensor or Piece) and `state` (JSON values; rank 0's) as of this moment.

        `also` may write more into the directory that it is given; rank 0 calls it before `save` returns, so what it
        reads may change afterwards. Waits for the save before. Raises TrainingError where that one failed, or this.
        """
        self.wait()
        path, staged, begun = find.path_of(self.out, step), _Staged(), False
        try:
            self.ranks.each(lambda: staged.take(tensors, state))
            self.ranks.first(lambda: self._begin(path, also))
            begun = True
        except FAILURES as error:
            raise self._told(path, error) from error
        finally:
            if not begun:
                self._release(path)
        self._saving = self._background.submit(self._write, path, staged)
        if not self.asynchronous:
            self.wait()

    def wait(self) -> None:
        """Until nothing is being written. Raises TrainingError, once, where the last save failed."""
        if self._saving is not None:
            wait([self._saving])
            saving, self._saving = self._saving, None
            saving.result()

    def close(self) -> None:
        """Wait, and give the thread and the ranks' group back."""
        try:
            self.wait()
        finally:
            self._background.shutdown()
            self.ranks.close()

    # ------------------------------------------------------------------------------------ in the background

    def _write(self, path: Path, staged: "_Staged") -> None:
        try:
            manifest = dcp.write_tensors(find.partial_of(path), staged.pieces, self.ranks)
            self.ranks.first(lambda: self._finish(path, staged.state_json, manifest))
        except FAILURES as error:
            raise self._told(path, error) from error
        finally:
            self._release(path)

    def _finish(self, path: Path, state_json: str, manifest: Manifest) -> None:
        partial, aside = find.partial_of(path), find.aside_of(path)
        write_state(partial, state_json, manifest)
        flush_directory(partial / find.TENSORS_DIR)
        flush_directory(partial)
        if path.exists():  # the same step again, after a rollback
            path.rename(aside)
        partial.rename(path)
        flush_directory(path.parent)
        shutil.rmtree(aside, ignore_errors=True)
        find.forget_old(self.out, self.keep)

    def _told(self, path: Path, error: Exception) -> TrainingError:
        before = find.newest(self.out)
        rest = f"--resume goes on from {before.name}" if before else "nothing was saved before"
        fix = error.fix.rstrip(". ") if isinstance(error, KarakoramError) else "Free some space or mend the disk"
        return TrainingError(
            f"{path} could not be saved: {reason_of(error)}.", f"{fix}; {rest}." if fix else f"{rest.capitalize()}."
        )

    # ------------------------------------------------------------------------------------ rank 0's directory

    def _clear(self) -> None:
        if find.checkpoints_dir(self.out).is_dir():
            self._take_lock()
            try:
                find.remove_leftovers(self.out)
            finally:
                self._give_lock()

    def _begin(self, path: Path, also: Callable[[Path], None] | None) -> None:
        self._take_lock()
        partial = find.partial_of(path)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        if also is not None:
            also(partial)

    def _release(self, path: Path) -> None:
        """Remove what is unfinished, if it is ours, and give the lock back."""
        if self._lock is not None:
            shutil.rmtree(find.partial_of(path), ignore_errors=True)
        self._give_lock()

    def _take_lock(self) -> None:
        """Two processes that save in one directory would remove each other's work."""
        directory = find.checkpoints_dir(self.out)
        directory.mkdir(parents=True, exist_ok=True)
        lock = os.open(directory / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(lock)
            raise TrainingError(
                f"Another process is saving in {directory}.", "Wait for it or stop it, or train in another directory."
            ) from error
        self._lock = lock

    def _give_lock(self) -> None:
        lock, self._lock = self._lock, None
        if lock is not None:
            os.close(lock)


class _Staged:
    """What one save writes, as it was when the caller asked for it."""

    def __init__(self) -> None:
        self.pieces: dict[str, dcp.Piece] = {}
        self.state_json = ""

    def take(self, tensors: Mapping[str, "Tensor | dcp.Piece"], state: Mapping[str, Any]) -> None:
        self.state_json = json_of(state)
        self.pieces = dcp.staged(tensors)
