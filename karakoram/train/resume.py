"""Checkpoints of a run: a model directory that anything opens, and beside it what only training needs.

    OUT/step-1200/            HF layout (config.json, model.safetensors, tokenizer files): `load_model` opens it
    OUT/step-1200.state/      masters, optimizer state (state.safetensors) and counters (state.json)

Both are written under another name and renamed, the model last: a model directory that is there is whole, and so is its
state. The newest two are kept. A save that fails (a full disk) removes what it wrote; the checkpoints before it stay.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from karakoram.checkpoint.save import write_checkpoint
from karakoram.config import ModelConfig, int4_quantization_config
from karakoram.errors import CheckpointError, TrainingError
from karakoram.formats import int4_group
from karakoram.model.transformer import Transformer

KEEP = 2


def save_model(model: Transformer, config: ModelConfig, out: Path, files: Mapping[str, bytes], int4: bool) -> None:
    """Write `model` in HF layout; `int4` stores routed experts packed (they must lie on the grid already)."""
    raw = config.to_dict()
    raw.pop("quantization_config", None)
    if int4:
        raw["quantization_config"] = config.quantization_config or int4_quantization_config()
    tensors = list(stored_tensors(model, int4))
    write_checkpoint(out, raw, tensors, extra_files=files, overwrite=True)


def stored_tensors(model: Transformer, int4: bool) -> Iterator[tuple[str, Tensor]]:
    """The checkpoint's tensors by its names: expert stacks taken apart, bfloat16 or packed; router biases float32."""
    for name, tensor in model.state_dict().items():
        stack, _, projection = name.rpartition(".experts.")
        if not stack:
            yield name, tensor.float() if name.endswith("e_score_correction_bias") else tensor.bfloat16()
            continue
        for expert, weight in enumerate(tensor):
            prefix = f"{stack}.experts.{expert}.{projection}.weight"
            if not int4:
                yield prefix, weight.bfloat16().contiguous()
                continue
            codes, scales, misfits = int4_group.exact_scales(weight.bfloat16())
            if misfits:
                raise TrainingError(
                    f"{misfits} groups of {prefix} are not on the int4 grid.", "Train with int4_from < 1."
                )
            yield f"{prefix}_packed", int4_group.pack(codes)
            yield f"{prefix}_scale", scales
            yield f"{prefix}_shape", torch.tensor(weight.shape, dtype=torch.int32)


def save_checkpoint(
    path: Path,
    model: Transformer,
    config: ModelConfig,
    files: Mapping[str, bytes],
    state: Mapping[str, Tensor],
    counters: Mapping[str, Any],
) -> None:
    """Write OUT/step-N (`path`) and its state, all or nothing, and forget all but the newest two checkpoints.

    Raises TrainingError where that fails: what was saved before is untouched, and the error says where one can go on.
    """
    try:
        save_state(state_dir(path), state, counters)
        save_model(model, config, path, files, int4=False)
    except (OSError, SafetensorError, CheckpointError) as error:
        if not path.is_dir():
            shutil.rmtree(state_dir(path), ignore_errors=True)
        before = newest(path.parent)
        rest = f"--resume goes on from {before.name}" if before else "nothing was saved before"
        why = error.what.rstrip(".") if isinstance(error, CheckpointError) else str(error)
        raise TrainingError(
            f"{path} could not be saved: {why}.", f"Free some space or mend the disk; {rest}."
        ) from error
    forget_old(path.parent)


def save_state(out: Path, tensors: Mapping[str, Tensor], counters: Mapping[str, Any]) -> None:
    """Write OUT/<name>.state atomically; a failure leaves nothing of it."""
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        save_file({name: t.contiguous() for name, t in tensors.items()}, partial / "state.safetensors")
        (partial / "state.json").write_text(json.dumps(counters, indent=1))
        for file in partial.iterdir():
            _flush(file)
        shutil.rmtree(out, ignore_errors=True)
        os.replace(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def load_state(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `save_state` wrote. Raises TrainingError for a damaged one."""
    try:
        tensors, counters = load_file(path / "state.safetensors"), json.loads((path / "state.json").read_text())
        numbers = (counters["step"], counters["elapsed_s"], counters["seed"])
        if not all(isinstance(number, int | float) for number in numbers):
            raise ValueError(f"step, elapsed_s and seed are {numbers}")
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        model = path.with_suffix("")
        raise TrainingError(
            f"The training state {path} cannot be read: {str(error).rstrip('.')}.",
            f"Remove {model} and {path.name} to resume from the checkpoint before them.",
        ) from error
    return tensors, counters


def state_dir(path: Path) -> Path:
    """Where the state of the checkpoint OUT/step-N is."""
    return path.with_name(f"{path.name}.state")


def newest(out: Path) -> Path | None:
    """The latest complete checkpoint of a run, as its model directory."""
    return max(_complete(out), key=_step, default=None)


def forget_old(out: Path) -> None:
    """Remove all but the newest two checkpoints, and states whose model was never written (a killed save)."""
    kept = sorted(_complete(out), key=_step)
    for path in kept[:-KEEP]:
        shutil.rmtree(path, ignore_errors=True)
        shutil.rmtree(state_dir(path), ignore_errors=True)
    for state in out.glob("step-*.state"):
        if not state.with_suffix("").is_dir():
            shutil.rmtree(state, ignore_errors=True)


def _complete(out: Path) -> list[Path]:
    found = [path for path in out.glob("step-*") if path.name[5:].isdigit() and (path / "config.json").is_file()]
    return [path for path in found if state_dir(path).is_dir()]


def _step(path: Path) -> int:
    return int(path.name[5:])


def _flush(file: Path) -> None:
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
