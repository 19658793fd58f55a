"""The spike guard: a step whose loss or gradient is out of all proportion is not taken.

A single broken batch (a NaN, a mangled document, a bit that flipped on its way) can undo days; gradient clipping does
not help a Muon update, whose size does not depend on the gradient's. Before each update the loss and the gradient's
norm are compared with the largest of the last `window` steps that were taken. Above `loss_factor` or `norm_factor`
times that, or not finite, the batch is skipped and written down; after `skips_before_rollback` skips in a row the
weights themselves are suspect, and the trainer goes back to its newest checkpoint and on with the batches that follow.

The largest, not the mean: batches differ (short documents, hard ones), and a guard that trips on ordinary noise trains
on a biased sample. In the first `after_steps` steps only numbers that are not finite count.
"""

import math
from collections import deque
from typing import Any

from karakoram.train.config import GuardConfig


class Guard:
    """`judge` every batch before its update."""

    def __init__(self, config: GuardConfig) -> None:
        self.config = config
        self.losses: deque[float] = deque(maxlen=config.window)
        self.norms: deque[float] = deque(maxlen=config.window)
        self.skipped_in_a_row = self.rollbacks = 0

    def judge(self, loss: float, norm: float) -> str | None:
        """Why this step must not be taken, or None; then its numbers become part of the measure."""
        reason = self._reason(loss, norm)
        if reason is None:
            self.losses.append(loss)
            self.norms.append(norm)
            self.skipped_in_a_row = 0
        else:
            self.skipped_in_a_row += 1
        return reason

    @property
    def wants_rollback(self) -> bool:
        """Whether so many batches in a row were refused that the weights are suspect."""
        return self.skipped_in_a_row >= self.config.skips_before_rollback

    def rolled_back(self) -> None:
        """Begin anew after a rollback: what was measured on the way to it counts no more."""
        self.rollbacks += 1
        self.skipped_in_a_row = 0
        self.losses.clear()
        self.norms.clear()

    def _reason(self, loss: float, norm: float) -> str | None:
        for name, value, seen, factor in (
            ("loss", loss, self.losses, self.config.loss_factor),
            ("gradient norm", norm, self.norms, self.config.norm_factor),
        ):
            if not math.isfinite(value):
                return f"{name} is {value}"
            enough = max(1, min(self.config.after_steps, self.config.window))
            if len(seen) >= enough and value > factor * max(seen):
                return (
                    f"{name} is {value:.4g}, over {factor:g} times {max(seen):.4g}, the largest of the last {len(seen)}"
                )
        return None

    def state(self) -> dict[str, Any]:
        """As JSON: a resumed run must judge as the one that was killed."""
        return {
            "losses": list(self.losses), "norms": list(self.norms),
            "skipped_in_a_row": self.skipped_in_a_row, "rollbacks": self.rollbacks,
        }  # fmt: skip

    def load(self, state: dict[str, Any]) -> None:
        """Take over what `state` gave."""
        self.losses = deque((float(x) for x in state["losses"]), maxlen=self.config.window)
        self.norms = deque((float(x) for x in state["norms"]), maxlen=self.config.window)
        self.skipped_in_a_row, self.rollbacks = int(state["skipped_in_a_row"]), int(state["rollbacks"])
