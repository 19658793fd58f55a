"""Small checkpoints to quantize, and what lies in the results, read without the package's own decoding."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.checkpoint import tiny

SHAPE = {"q_lora_rank": 32}  # every input divides into groups
Tensors = dict[str, torch.Tensor]


def saved(directory: Path, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Path:
    tiny.save(directory, dtype, **{**SHAPE, **changes})
    (directory / "tokenizer_config.json").write_text("{}")
    (directory / "tiktoken.model").write_bytes(b"AA== 0\n")
    return directory


def rewritten(directory: Path, change) -> Path:
    """The same checkpoint, each tensor replaced by `change(name, tensor)`."""
    tensors = load_file(directory / "model.safetensors")
    tensors = {name: change(name, tensor).contiguous() for name, tensor in tensors.items()}
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return directory


def stored(directory: Path) -> Tensors:
    tensors: Tensors = {}
    for file in sorted(directory.glob("*.safetensors")):
        tensors.update(load_file(file))
    return tensors


def by_hand(tensors: Tensors) -> Tensors:
    """Dense weights from packed ones, by shifts and one bf16 product."""
    dense = {}
    for name, tensor in tensors.items():
        if name.endswith("_packed"):
            scale = tensors[name.replace("_packed", "_scale")]
            nibbles = torch.stack([(tensor >> (4 * place)) & 0xF for place in range(8)], dim=-1).flatten(-2) - 8
            dense[name.removesuffix("_packed")] = nibbles.bfloat16() * scale.repeat_interleave(32, dim=1)
        elif not name.endswith(("weight_scale", "weight_shape")):
            dense[name] = tensor
    return dense


def packed_names(tensors: Tensors) -> set[str]:
    return {name.removesuffix("_packed") for name in tensors if name.endswith("_packed")}
