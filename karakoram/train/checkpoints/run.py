"""The checkpoints of a trainer: saved in the background, read with everything checked."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from karakoram.train.checkpoints import find
from karakoram.train.checkpoints.dcp import Piece, read_tensors
from karakoram.train.checkpoints.state import damaged, read_state
from karakoram.train.checkpoints.writer import CheckpointWriter
from karakoram.train.config import CheckpointConfig

_COUNTERS: dict[str, type | tuple[type, ...]] = {
    "step": int, "tokens": int, "position": int, "elapsed_s": (int, float), "seed": int, "int4_experts": bool,
    "guard": dict, "data": dict,
}  # fmt: skip


class Checkpoints:
    """Save, find and load; `saved_step` is the step that was last saved or loaded, -1 where there is none."""

    def __init__(self, out: Path, config: CheckpointConfig) -> None:
        self.out, self.saved_step = out, -1
        self.writer = CheckpointWriter(out, config.keep, config.asynchronous)

    def save(
        self,
        step: int,
        tensors: Mapping[str, "Tensor | Piece"],
        counters: Mapping[str, Any],
        also: Callable[[Path], None] | None = None,
    ) -> None:
        """See `CheckpointWriter.save`."""
        self.saved_step = -1
        self.writer.save(step, tensors, counters, also)
        self.saved_step = step

    def wait(self) -> None:
        """See `CheckpointWriter.wait`."""
        try:
            self.writer.wait()
        except BaseException:
            self.saved_step = -1
            raise

    def newest(self) -> Path | None:
        """The latest complete checkpoint, the same on all ranks."""
        return self.writer.ranks.first(lambda: find.newest(self.out))

    def read(self, path: Path) -> dict[str, Any]:
        """The counters of a checkpoint. Raises TrainingError where it is damaged."""
        return self.writer.ranks.first(lambda: _counters(path))

    def load(self, path: Path, tensors: Mapping[str, "Tensor | Piece"]) -> None:
        """Fill `tensors` in place; see `read_tensors`."""
        read_tensors(path, tensors, self.writer.ranks)
        self.saved_step = find.step_of(path)


def _counters(path: Path) -> dict[str, Any]:
    counters, _ = read_state(path)
    for name, kind in _COUNTERS.items():
        value = counters.get(name)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise damaged(path, f"its {name} is {value!r}")
    if counters["step"] != find.step_of(path):
        raise damaged(path, f"it says that it is of step {counters['step']}")
    return counters
