"""The learning rate's share of its peak over a run, and the size of a batch.

K2 warms up over 500 steps, trains at a constant rate for two thirds of its tokens and then decays by a cosine (arXiv
2507.20534, §2.5): warmup, stable, decay. K3 found a plain cosine better where each was tuned. Progress is the furthest
of the shares of steps, tokens and time that a run may take: a slow machine decays in time and still finishes.
"""

import math

from karakoram.train.config import BatchConfig, ScheduleConfig


def rate_share(schedule: ScheduleConfig, step: int, tokens: int, progress: float) -> float:
    """Share of the peak at a step (from 0), after `tokens` tokens, at a progress in [0, 1]."""
    warmup = 1.0
    if schedule.warmup_steps:
        warmup = min(warmup, (step + 1) / schedule.warmup_steps)
    if schedule.warmup_tokens:
        warmup = min(warmup, max(tokens, 1) / schedule.warmup_tokens)
    return warmup * decay_share(schedule, progress)


def decay_share(schedule: ScheduleConfig, progress: float) -> float:
    """The share without the warmup: 1, then a cosine from `decay_from` on down to the floor at progress 1."""
    decay_from = 0.0 if schedule.shape == "cosine" else schedule.decay_from
    if progress <= decay_from:
        return 1.0
    down = min(1.0, (progress - decay_from) / (1 - decay_from))
    return schedule.floor + (1 - schedule.floor) * 0.5 * (1 + math.cos(math.pi * down))


def batch_tokens(batch: BatchConfig, tokens: int) -> int:
    """Tokens of the batch that follows after `tokens` tokens."""
    if batch.ramp_from_tokens is None or tokens >= batch.ramp_tokens:
        return batch.tokens_per_step
    share = tokens / batch.ramp_tokens
    return round(batch.ramp_from_tokens + (batch.tokens_per_step - batch.ramp_from_tokens) * share)
