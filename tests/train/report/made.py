"""Runs as a trainer would have written them, without one: as long as one likes, with what may go wrong."""

import json
import math
import random
from pathlib import Path
from typing import Any

from karakoram.config import ModelConfig

EVERY_COLUMN = (
    "loss held_out_loss rate_share gradient_norm clip_norm_share tokens_per_s mfu max_logit_by_layer clip_fraction"
    " update_rms max_vio max_vio_global load_entropy dead_experts loads"
).split()
GROUPS = ("attention", "experts", "router", "dense", "embedding", "head", "norm")


def line(step: int, of: int, layers: int = 7, experts: int = 16, seed: int = 0) -> dict[str, Any]:
    """One step's line with every column: a loss that falls, loads that even out, logits that meet τ = 100."""
    draw = random.Random(step + 1_000_003 * seed)
    done = step / of
    noise = draw.gauss(0, 1)
    logits = {str(at): min(100.0, 8 + 130 * done * (1 + at) / layers + 2 * noise) for at in range(layers)}
    found: dict[str, Any] = {
        "step": step, "loss": 1.6 + 6.5 * math.exp(-12 * done) + 0.08 * noise, "rate_share": min(1.0, step / 50),
        "gradient_norm": math.exp(0.4 * noise) * (0.3 + math.exp(-9 * done)),
        "clip_norm_share": min(1.0, 1 + noise / 4),
        "tokens": 4096 * step, "tokens_per_s": 4300 + 150 * noise, "mfu": 0.31 + 0.01 * noise, "elapsed_s": 0.95 * step,
        "learning_rate": 4e-3, "max_logit": max(logits.values()), "max_logit_by_layer": logits, "clipped_heads": 1,
        "clip_fraction": max(0.0, done - 0.6) / 2, "max_vio": 0.4 + 2 * math.exp(-8 * done) + 0.1 * abs(noise),
        "update_rms": {group: 0.2 / (1 + at) * math.exp(0.02 * noise) for at, group in enumerate(GROUPS)},
        "max_vio_global": 0.15 + 1.5 * math.exp(-8 * done), "dead_experts": max(0, int(6 - 30 * done)),
    }  # fmt: skip
    if step % 10 == 0:
        found["load_entropy"] = {str(at): 1 - 0.3 * math.exp(-8 * done) / (1 + at) for at in range(1, layers)}
    if step % 50 == 0:
        width = 3 * math.exp(-4 * done) + 0.2
        found["loads"] = {
            str(at): [int(4096 * math.exp(width * draw.gauss(0, 0.6))) for _ in range(experts)]
            for at in range(1, layers)
        }
        if done < 0.3:
            found["loads"]["2"][3] = 0
    if step % 100 == 0:
        found["held_out_loss"] = 1.7 + 6.5 * math.exp(-12 * done)
    return found


def write_run(directory: Path, steps: int, seed: int = 0, **shape: int) -> Path:
    """A whole run in `directory`, with settings and a few events."""
    directory.mkdir(parents=True, exist_ok=True)
    lines = [line(step, steps, seed=seed, **shape) for step in range(1, steps + 1)]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    events = [{"step": steps // 2, "event": "checkpoint", "path": f"step-{steps // 2}"}]
    events.append({"step": steps // 3, "event": "batch skipped", "batch": 17, "reason": "loss is nan"})
    events.append({"step": 2 * steps // 3, "event": "rolled back", "to": steps // 2})
    (directory / "events.jsonl").write_text("".join(json.dumps(each) + "\n" for each in events))
    settings = {
        "recipe": "nano", "model": ModelConfig.preset("nano").to_dict(), "steps": steps,
        "machine": "2 cores, one thread",
        "optimizer": {"name": "muonclip", "learning_rate": 4e-3, "qk_clip_threshold": 100.0, "clip_norm": 1.0},
    }  # fmt: skip
    (directory / "run.json").write_text(json.dumps(settings))
    return directory
