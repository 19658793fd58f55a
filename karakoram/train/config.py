"""Everything that a training run needs to know besides its data, in one place."""

from dataclasses import dataclass

from karakoram.config import ModelConfig


@dataclass(frozen=True)
class TrainConfig:
    """Units are in the names; shares are of the whole run.

    steps, minutes  the run ends at whichever comes first; the schedule follows the one that is further on
    int4_from       share of the run from which routed experts are trained on the int4 grid; 1 or more: never
    read_floor      weights below 1 (what a model only reads) fall with the learning rate, to this share of theirs
    """

    model: ModelConfig
    steps: int
    minutes: float | None = None
    tokens_per_step: int = 8192
    learning_rate: float = 4e-3
    adamw_learning_rate: float = 4e-3
    warmup_steps: int = 50
    decay_from: float = 0.6
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    qk_clip_threshold: float = 100.0
    balance_rate: float = 1e-3
    int4_from: float = 0.8
    read_floor: float = 1.0
    seed: int = 0
    checkpoint_minutes: float = 10.0
