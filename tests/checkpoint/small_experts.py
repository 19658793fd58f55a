"""A K2-shaped checkpoint of a megabyte, its experts in a chosen format; and readers that fail as told."""

import copy
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from karakoram.checkpoint import names, write_checkpoint
from karakoram.checkpoint.experts.direct import aligned_bytes, up, view_of
from karakoram.config import PRESETS, ModelConfig, int4_quantization_config
from karakoram.formats import fp8_block, int4_group

EXPERTS, HIDDEN, INTERMEDIATE = 4, 64, 96
LAYERS = (1, 2)  # with routed experts

_SHAPE: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": HIDDEN, "intermediate_size": 64, "moe_intermediate_size": INTERMEDIATE,
    "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 2, "q_lora_rank": 32, "kv_lora_rank": 32,
    "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16, "n_routed_experts": EXPERTS,
    "num_experts_per_tok": 2,
}  # fmt: skip


def write(directory: Path, kind: str = "int4", shard_bytes: int = 1 << 30, **changes: Any) -> Path:
    """Write one. `shard_bytes` spreads it over several files."""
    raw = copy.deepcopy(PRESETS["k2"]) | _SHAPE | changes
    if kind != "fp8":
        del raw["quantization_config"]
    if kind == "int4":
        raw["quantization_config"] = int4_quantization_config()
    tensors = dict(_tensors(ModelConfig.from_dict(raw), kind, torch.Generator().manual_seed(7)))
    return write_checkpoint(directory, raw, tensors.items(), max_shard_bytes=shard_bytes)


def _tensors(config: ModelConfig, kind: str, chance: torch.Generator) -> Iterator[tuple[str, Tensor]]:
    for name, shape, _ in names.expected_tensors(config):
        if name.endswith("_bias"):
            yield name, torch.randn(shape, generator=chance)
        elif not names.is_routed_expert(name) or kind == "bf16":
            yield name, (torch.randn(shape, generator=chance) / 8).to(torch.bfloat16)
        elif kind == "fp32":
            yield name, torch.randn(shape, generator=chance)
        elif kind == "fp8":
            yield name, torch.randn(shape, generator=chance).to(torch.float8_e4m3fn)
            yield f"{name}_scale_inv", torch.rand(fp8_block.scale_shape(*shape), generator=chance) + 0.1
        else:
            rows, columns = shape
            yield f"{name}_packed", int4_group.pack(torch.randint(-8, 8, shape, dtype=torch.int8, generator=chance))
            scale = torch.rand(rows, columns // int4_group.GROUP, generator=chance) / 50 + 0.001
            yield f"{name}_scale", scale.to(torch.bfloat16)
            yield f"{name}_shape", torch.tensor(shape, dtype=torch.int32)


class Faulty:
    """`os.preadv` that first does what it is told, call by call.

    A step is an exception to raise, a number of bytes to read at most, or a function that is called after reading.
    """

    def __init__(self, *steps: BaseException | int | Callable[[Sequence[memoryview]], None], always: bool = False):
        self.steps, self.always, self.calls = list(steps), always, 0

    def __call__(self, descriptor: int, views: Sequence[memoryview], offset: int) -> int:
        self.calls += 1
        step = (self.steps[0] if self.always else self.steps.pop(0)) if self.steps else None
        if isinstance(step, BaseException):
            raise step
        if isinstance(step, int):
            return _some(descriptor, views, offset, step)
        count = os.preadv(descriptor, views, offset)
        if step is not None:
            step(views)
        return count


def _some(descriptor: int, views: Sequence[memoryview], offset: int, most: int) -> int:
    """Up to `most` bytes, whatever the memory's and the length's alignment."""
    view = view_of(aligned_bytes(up(most)))
    count = min(most, os.preadv(descriptor, [view], offset)) if most else 0
    content, done = bytes(view[:count]), 0
    for target in views:
        part = content[done : done + len(target)]
        target[: len(part)] = part
        done += len(part)
    return count


def flip(views: Sequence[memoryview]) -> None:
    """A bit of what was read is another."""
    views[0][len(views[0]) // 2] ^= 1
