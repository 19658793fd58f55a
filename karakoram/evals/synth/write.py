"""Writing a synthetic checkpoint: all or nothing, one weight in memory at a time, at the speed of the disk."""

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from karakoram.checkpoint import write_checkpoint
from karakoram.evals.synth.measure import Measured
from karakoram.evals.synth.records import write_packed
from karakoram.evals.synth.routing import TARGET
from karakoram.evals.synth.shape import Shape
from karakoram.evals.synth.tokenizer import generated_tokenizer, tokenizer_of
from karakoram.evals.synth.weights import Weights

Progress = Callable[[int, int], None]
ACCOUNT = "synth.json"


@dataclass(frozen=True)
class Written:
    """A checkpoint that stands."""

    directory: Path
    nbytes: int  # of all tensors
    seconds: float

    @property
    def bytes_per_s(self) -> float:
        """Flushing to the disk included."""
        return self.nbytes / self.seconds


def write(
    shape: Shape,
    out: str | Path,
    seed: int = 0,
    tokenizer: Path | None = None,
    progress: Progress | None = None,
    packed: bool = False,
) -> Written:
    """Write the checkpoint to the new directory `out`, which appears complete or not at all.

    tokenizer: a directory to copy it from; None generates one. progress(done_bytes, total_bytes) is called after each
    weight. packed: experts as records (`k2 pack`). CheckpointError: `out` exists, or the disk has not enough room
    (checked before the first byte).
    """
    began = time.perf_counter()
    report = progress or (lambda done, total: None)
    with _one_thread():
        weights = Weights(shape, seed)
        files = _files(shape, weights, seed, tokenizer)
        if packed:
            directory, total = write_packed(Path(out), shape, weights, files, report)
        else:
            total = sum(weight.nbytes for weight in shape.weights())
            tensors = _tensors(shape, weights, total, report)
            directory = write_checkpoint(out, shape.raw, tensors, extra_files=files, total_bytes=total)
    return Written(directory, total, time.perf_counter() - began)


def _tensors(shape: Shape, weights: Weights, total: int, report: Progress) -> Iterator[tuple[str, Tensor]]:
    done = 0
    for weight in shape.weights():
        yield from weights.tensors(weight)
        done += weight.nbytes
        report(done, total)


def _files(shape: Shape, weights: Weights, seed: int, tokenizer: Path | None) -> dict[str, bytes]:
    """What lies beside the tensors: file name -> content."""
    if tokenizer is None:
        files = generated_tokenizer(shape.config, shape.raw["karakoram"]["dialect"])
    else:
        files = tokenizer_of(tokenizer, shape.config)
    ends = list(shape.config.eos_token_ids)
    files["generation_config.json"] = _json({"do_sample": False, "eos_token_id": ends})
    files[ACCOUNT] = _json(account(shape, seed, weights))
    return files


def record(directory: Path, found: Measured) -> None:
    """Add a measurement to a checkpoint's synth.json, which is replaced at once or not at all."""
    path = directory / ACCOUNT
    told = json.loads(path.read_text(encoding="utf-8")) | {"target": asdict(TARGET), "measured": found.to_dict()}
    aside = path.with_name(f".{ACCOUNT}.partial")
    aside.write_bytes(_json(told))
    os.replace(aside, path)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Copying is the disk's work and memory's: beside other processes, torch's threads wait for each other 50 times
    longer than they copy (2 cores, measured)."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def account(shape: Shape, seed: int, weights: Weights) -> dict[str, Any]:
    """What synth.json holds before anything is measured."""
    patterns = weights.patterns
    return {
        "what": "synthetic checkpoint: random weights, routing with published statistics (k2 synth)",
        "preset": shape.preset,
        "layers": shape.config.num_hidden_layers,
        "format": shape.format,
        "seed": seed,
        "bytes": sum(weight.nbytes for weight in shape.weights()),
        "construction": {
            "score_correlation_of_neighbouring_tokens": patterns.routing.token,
            "score_correlation_of_neighbouring_layers": patterns.routing.layer,
            "slow_share_of_router_scores": patterns.slow_share(),
            "growth_of_variance_per_layer": patterns.stream.growth,
            "attention_tokens": [recency.tokens for recency in patterns.recencies],
        },
    }


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()
