"""Everything that a training run needs to know besides its data, in one place.

Defaults are Moonlight's and K2's where they published them (arXiv 2502.16982, §2 and §3; arXiv 2507.20534, §2). Shares
are of the whole run, from 0 to 1; other units are in the names.
"""

from dataclasses import dataclass, field
from typing import Literal

from karakoram.config import ModelConfig
from karakoram.errors import InputError


@dataclass(frozen=True)
class OptimizerConfig:
    """MuonClip, or AdamW for everything.

    adamw_learning_rate  of embedding, head and norm gains; None: the common rate, as K2 has it
    coefficients         the Newton-Schulz set, by its name in `optim/newton_schulz.py`
    calibrate            divide by the RMS that the set was measured to give on such a spectrum: one rate for all sets
    iteration            what Newton-Schulz computes in; None: the model's dtype, which the recipe's probe chose
    heads                whole: K2's matrices as they stand; head, part: K3's Per-Head Muon, see `optim/splits.py`
    clip_norm            of the whole gradient; matters to AdamW's part: Muon's update has no scale
    qk_clip_threshold    τ; infinity: never clip
    """

    name: Literal["muonclip", "adamw"] = "muonclip"
    learning_rate: float = 4e-3
    adamw_learning_rate: float | None = None
    weight_decay: float = 0.1
    momentum: float = 0.95
    coefficients: str = "jordan"
    calibrate: Literal["gaussian", "power_law"] | None = None
    iteration: Literal["bfloat16", "float32"] | None = None
    heads: Literal["whole", "head", "part"] = "whole"
    router: Literal["muon", "adamw"] = "muon"
    clip_norm: float = 1.0
    qk_clip_threshold: float = 100.0


@dataclass(frozen=True)
class ScheduleConfig:
    """The learning rate over the run, by tokens (or time, whichever is further on).

    shape         wsd: flat from the warmup to `decay_from`, then a cosine down to `floor`; cosine: down from the warmup
    read_floor    weights below 1 (what a model only reads) fall with the learning rate, to this share of theirs
    """

    shape: Literal["wsd", "cosine"] = "wsd"
    warmup_steps: int = 50
    warmup_tokens: int = 0
    decay_from: float = 0.6
    floor: float = 0.0
    read_floor: float = 1.0


@dataclass(frozen=True)
class BatchConfig:
    """tokens_per_step over all ranks; micro_tokens: at most so many at once on a rank, the rest is accumulated.

    ramp_from_tokens, ramp_tokens: the batch grows in a straight line from so many tokens to `tokens_per_step` over the
    first `ramp_tokens` of the run; None: it is whole from the beginning
    """

    tokens_per_step: int = 8192
    micro_tokens: int | None = None
    ramp_from_tokens: int | None = None
    ramp_tokens: int = 0


@dataclass(frozen=True)
class BalanceConfig:
    """How the load of experts is kept even.

    rule           sign: DeepSeek's step against the load, mean-centred as Moonlight's; quantile: K3's; none
    rate           of the sign rule, a step; it falls with the learning rate once that is below half
    sequence_loss  weight of the sequence-wise balance loss (DeepSeek-V3: 1e-4); 0: none
    window         batches over which MaxVio, dead experts and entropy are measured
    freeze_from    share of the run from which biases stay
    """

    rule: Literal["sign", "quantile", "none"] = "sign"
    rate: float = 1e-3
    sequence_loss: float = 0.0
    window: int = 100
    freeze_from: float = 1.0


@dataclass(frozen=True)
class GuardConfig:
    """When a step is not taken: see `guard.py`."""

    loss_factor: float = 2.0
    norm_factor: float = 5.0
    window: int = 128
    after_steps: int = 32
    skips_before_rollback: int = 5
    rollbacks: int = 3


@dataclass(frozen=True)
class CheckpointConfig:
    """How often, how many, and whether a loadable model in HF layout lies in each."""

    minutes: float = 10.0
    keep: int = 2
    asynchronous: bool = True
    export: bool = True


@dataclass(frozen=True)
class TrainConfig:
    """A run ends at `steps`, `tokens` or `minutes`, whichever comes first; the schedule follows the furthest one.

    int4_from      share of the run from which routed experts are trained on the int4 grid; 1 or more: never
    recompute      keep only each layer's input for the backward pass (activation checkpointing)
    held_out_steps loss on held-out batches every so many steps, where such batches are given
    """

    model: ModelConfig
    steps: int
    tokens: int | None = None
    minutes: float | None = None
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    checkpoints: CheckpointConfig = field(default_factory=CheckpointConfig)
    int4_from: float = 1.0
    recompute: bool = False
    held_out_steps: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises InputError for values that no run can have."""
        micro, ramp_from = self.batch.micro_tokens, self.batch.ramp_from_tokens
        for name, value, most in (
            ("steps", self.steps, 2**40),
            ("tokens", 1 if self.tokens is None else self.tokens, 2**60),
            ("minutes", 1 if self.minutes is None else self.minutes, 1e9),
            ("batch.tokens_per_step", self.batch.tokens_per_step, 2**32),
            ("batch.micro_tokens", 1 if micro is None else micro, 2**32),
            ("batch.ramp_from_tokens", 1 if ramp_from is None else ramp_from, 2**32),
            ("balance.window", self.balance.window, 2**20),
            ("guard.window", self.guard.window, 2**20),
            ("held_out_steps", self.held_out_steps, 2**40),
            ("checkpoints.keep", self.checkpoints.keep, 2**20),
            ("optimizer.clip_norm", self.optimizer.clip_norm, float("inf")),
            ("optimizer.qk_clip_threshold", self.optimizer.qk_clip_threshold, float("inf")),
            ("guard.skips_before_rollback", self.guard.skips_before_rollback, 2**20),
        ):
            if not 0 < value <= most:
                raise InputError(f"{name} is {value}.", f"Give a number above 0, at most {most}.")
        for name, value in (
            ("optimizer.learning_rate", self.optimizer.learning_rate),
            ("optimizer.adamw_learning_rate", self.optimizer.adamw_learning_rate or 0.0),
            ("optimizer.weight_decay", self.optimizer.weight_decay),
            ("schedule.warmup_steps", self.schedule.warmup_steps),
            ("schedule.warmup_tokens", self.schedule.warmup_tokens),
            ("batch.ramp_tokens", self.batch.ramp_tokens),
            ("balance.rate", self.balance.rate),
            ("balance.sequence_loss", self.balance.sequence_loss),
            ("checkpoints.minutes", self.checkpoints.minutes),
            ("guard.after_steps", self.guard.after_steps),
            ("guard.rollbacks", self.guard.rollbacks),
            ("int4_from", self.int4_from),
            ("balance.freeze_from", self.balance.freeze_from),
        ):
            if not 0 <= value < float("inf"):
                raise InputError(f"{name} is {value}.", "Give a finite number that is not negative.")
        for name, value in (
            ("optimizer.momentum", self.optimizer.momentum),
            ("schedule.decay_from", self.schedule.decay_from),
            ("schedule.floor", self.schedule.floor),
            ("schedule.read_floor", self.schedule.read_floor),
        ):
            if not 0 <= value <= 1:
                raise InputError(f"{name} is {value}.", "Give a number from 0 to 1.")
        for name, value in (
            ("guard.loss_factor", self.guard.loss_factor),
            ("guard.norm_factor", self.guard.norm_factor),
        ):
            if not value >= 1:  # below, ordinary steps would be refused
                raise InputError(f"{name} is {value}.", "Give a number of at least 1; inf never refuses.")
        if ramp_from is not None and not self.batch.ramp_tokens:
            raise InputError(
                "batch.ramp_from_tokens is given, but the ramp is of 0 tokens.",
                "Give batch.ramp_tokens, over which the batch grows, too.",
            )
