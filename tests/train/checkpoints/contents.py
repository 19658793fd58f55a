"""What the tests save, and how they look at it again."""

import json
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from karakoram.train.checkpoints import dcp, find

STATE: dict[str, Any] = {"step": 1, "elapsed_s": 0.1 + 0.2, "guard": {"losses": [1.5, float("inf")]}}


def tensors(seed: int = 0) -> dict[str, Tensor]:
    """One of every kind that a run has."""
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(6, 4, generator=generator)
    return {
        "masters/stack": torch.randn(4, 3, 5, generator=generator),
        "masters/transposed": matrix.t(),
        "masters/view": matrix[1:3],
        "muon/momentum": torch.randn(7, 3, generator=generator).bfloat16(),
        "adamw/step": torch.tensor(seed + 3),
        "adamw/loss": torch.tensor(float("nan")),
        "data/position": torch.arange(5) * 2**40 + seed,
        "bias/layer": torch.randn(16, generator=generator),
        "nothing": torch.empty(0, 3),
        "flags": torch.tensor([True, False]),
        "nan": torch.tensor([float("nan"), -0.0, float("-inf"), 1e-45]),
    }


def blank(like: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of these shapes that hold something else."""
    return {name: torch.full_like(tensor, 1) for name, tensor in like.items()}


def differing(found: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    """Names whose bits differ."""
    return [name for name in expected if _bits(found[name]) != _bits(expected[name])]


def loaded(path: Path, like: dict[str, Tensor]) -> dict[str, Tensor]:
    """A checkpoint's tensors."""
    into = blank(like)
    dcp.read_tensors(path, into)
    return into


def sign_anew(path: Path) -> None:
    """As one would who tampers with tensors: make bytes and CRCs in state.json those of the files that are there."""
    file = path / find.STATE_FILE
    content = json.loads(file.read_text())
    for name in content["files"]:
        raw = (path / find.TENSORS_DIR / name).read_bytes()
        content["files"][name] = [len(raw), zlib.crc32(raw)]
    file.write_text(json.dumps(content))


def _bits(tensor: Tensor) -> tuple[torch.dtype, torch.Size, bytes]:
    flat = tensor.contiguous().reshape(-1)
    return tensor.dtype, tensor.shape, bytes(flat.view(torch.uint8).tolist()) if flat.numel() else b""
