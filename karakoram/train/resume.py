"""Checkpoints of a run: a model directory that anything opens, and beside it what only training needs.

    OUT/step-1200/            HF layout (config.json, model.safetensors, tokenizer files): `load_model` opens it
    OUT/step-1200.state/      masters, optimizer state (state.safetensors) and counters (state.json)

Both are written under another name and renamed, the model last: a model directory that is there is whole, and so is its
state. The newest two are kept.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from karakoram.checkpoint.save import write_checkpoint
from karakoram.config import ModelConfig
from karakoram.errors import TrainingError
from karakoram.formats import int4_group
from karakoram.model.transformer import Transformer

KEEP = 2


def save_model(model: Transformer, config: ModelConfig, out: Path, files: Mapping[str, bytes], int4: bool) -> None:
    """Write `model` in HF layout; `int4` stores routed experts packed (they must lie on the grid already)."""
    raw = config.to_dict()
    if not int4:
        raw.pop("quantization_config", None)
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


def save_state(out: Path, tensors: Mapping[str, Tensor], counters: Mapping[str, Any]) -> None:
    """Write OUT/<name>.state atomically."""
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_file({name: t.contiguous() for name, t in tensors.items()}, partial / "state.safetensors")
    (partial / "state.json").write_text(json.dumps(counters, indent=1))
    shutil.rmtree(out, ignore_errors=True)
    os.replace(partial, out)


def load_state(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `save_state` wrote. Raises TrainingError for a damaged one."""
    try:
        return load_file(path / "state.safetensors"), json.loads((path / "state.json").read_text())
    except Exception as error:  # safetensors raises its own kinds, json others: all mean the same to the user
        raise TrainingError(
            f"The training state {path} cannot be read: {error}.", f"Remove {path} and resume from the one before."
        ) from error


def newest(out: Path) -> Path | None:
    """The latest complete checkpoint of a run, as its model directory."""
    return max(_complete(out), key=_step, default=None)


def forget_old(out: Path) -> None:
    """Remove all but the newest two checkpoints."""
    for path in sorted(_complete(out), key=_step)[:-KEEP]:
        shutil.rmtree(path, ignore_errors=True)
        shutil.rmtree(path.with_name(f"{path.name}.state"), ignore_errors=True)


def _complete(out: Path) -> list[Path]:
    found = [path for path in out.glob("step-*") if path.name[5:].isdigit() and (path / "config.json").is_file()]
    return [path for path in found if path.with_name(f"{path.name}.state").is_dir()]


def _step(path: Path) -> int:
    return int(path.name[5:])
