"""Warmup, stable, decay: the learning rate's share of its peak over a run.

K2 trains at a constant rate for two thirds of its tokens and then decays (arXiv 2507.20534, §2.5). Progress here is the
larger of the share of steps and the share of the time that a run may take: a slow machine decays in time and still
finishes.
"""

import math


def rate_share(step: int, warmup_steps: int, progress: float, decay_from: float, floor: float = 0.0) -> float:
    """Share of the peak at a step (from 0) and progress in [0, 1].

    Linear up over the warmup, flat, and from `decay_from` on a cosine down to `floor`.
    """
    warmup = min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
    if progress <= decay_from:
        return warmup
    down = min(1.0, (progress - decay_from) / (1 - decay_from))
    return warmup * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * down)))
