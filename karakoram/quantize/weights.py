"""A checkpoint as a list of weights: which tensors each is stored as, which it will be, and its numbers row by row.

`convert` and `quantize` differ in what they do with a number; what they share is here. A plan is made from headers
alone, so that everything that can be refused is refused before a byte is written. Carrying it out reads one weight at a
time, in the order of the source's bytes, and decodes a few rows at a time: no float32 copy of a whole weight exists.
The image tower keeps its stored form; layers of multi-token prediction, which have the same weights, are treated like
the others; stale buffers are left out.
"""

import copy
import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from karakoram.checkpoint import Checkpoint, TensorEntry, names, open_checkpoint
from karakoram.checkpoint.safetensors import read_tensor
from karakoram.errors import CheckpointError
from karakoram.formats import bf16, fp8_block, int4_group

Kind = Literal["bf16", "float", "fp8", "int4", "stored"]
Progress = Callable[[int, int], None]

_INT4_PARTS = ("weight_packed", "weight_scale", "weight_shape")
# How `ignore` names what belongs to no text model in a wrapper (K2.6's list).
IMAGE_MODULES = ("re:vision_tower.*", "re:mm_projector.*", "re:multi_modal_projector.*")
_DECODED_ROWS_BYTES = 64 << 20  # float32 of the rows decoded at a time


@dataclass(frozen=True, slots=True)
class Weight:
    """One weight: the tensors it is stored as, how, and how it will be. `stored` keeps them bit for bit."""

    name: str  # as stored, ending in `weight` (or whatever an unquantized tensor is called)
    canonical: str  # the family's name; of an image tensor, the stored one
    parts: tuple[TensorEntry, ...]
    kind: Kind
    target: Kind = "stored"

    @property
    def unchanged(self) -> bool:
        """Whether its tensors are copied."""
        return self.target in (self.kind, "stored")

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the dense weight."""
        if self.kind == "int4":
            return (self.parts[1].shape[0], self.parts[1].shape[1] * int4_group.GROUP)
        return self.parts[0].shape

    @property
    def bytes_read(self) -> int:
        """Size of all tensors it is stored as."""
        return sum(part.nbytes for part in self.parts)

    @property
    def bytes_written(self) -> int:
        """Size of all tensors it will be stored as."""
        if self.unchanged:
            return self.bytes_read
        elements = math.prod(self.shape)
        if self.target == "int4":
            rows, columns = self.shape
            return elements // 2 + rows * (columns // int4_group.GROUP) * 2 + 8
        if self.target == "fp8":
            return elements + 4 * math.prod(fp8_block.scale_shape(*self.shape))
        return elements * 2

    @property
    def divides_into_groups(self) -> bool:
        """Whether it can be int4 at all: a matrix whose inputs are a multiple of the group."""
        return len(self.shape) == 2 and self.shape[1] % int4_group.GROUP == 0


def open_source(src: str | Path, dst: str | Path, allow_config_keys: Collection[str] = ()) -> Checkpoint:
    """The checked checkpoint `src`. CheckpointError: damaged, incomplete, or the place that `dst` names."""
    checkpoint = open_checkpoint(src, allow_config_keys)
    checkpoint.check()
    if Path(dst).expanduser().resolve() == checkpoint.dir.resolve():
        raise CheckpointError(f"{dst} is the source itself.", "Name another directory.")
    return checkpoint


def plan(checkpoint: Checkpoint, target_of: Callable[[Weight], Kind]) -> list[Weight]:
    """Every weight of the source with the target that `target_of` gives it, in the order of the source's bytes."""
    text = dict(checkpoint.tensors)
    text.update((names.canonical_name(stored), entry) for stored, entry in checkpoint.mtp.items())
    weights = [_weight(name, text) for name in text if not _is_companion(name, text)]
    weights = [replace(weight, target=target_of(weight)) for weight in weights]
    weights += [Weight(name, name, (entry,), "stored") for name, entry in checkpoint.vision.items()]
    return sorted(weights, key=lambda weight: (weight.parts[0].file, weight.parts[0].offset))


def carry_out(
    weights: list[Weight], changed: Callable[[Weight], Iterator[tuple[str, Tensor]]], progress: Progress | None
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of all weights under stored names: what stays is copied, the rest comes from `changed`."""
    total, done = sum(weight.bytes_read for weight in weights), 0
    report = progress or (lambda done, total: None)
    report(0, total)
    for weight in weights:
        if weight.unchanged:
            for part in weight.parts:
                yield part.stored_name, read_tensor(part)
        else:
            yield from changed(weight)
        done += weight.bytes_read
        report(done, total)


def new_config(checkpoint: Checkpoint, weights: list[Weight], format: str, section: Any) -> dict[str, Any]:
    """The source's config.json with `section` (None: plain bf16) as `quantization_config`, where the family keeps it.

    The source's own section stays if it declares the same `format` and no weight comes into or out of quantization.
    """
    config = copy.deepcopy(checkpoint.raw_config)
    inner = config.get("text_config")
    levels = [config, inner] if isinstance(inner, dict) else [config]
    for level in levels:
        for key in ("dtype", "torch_dtype"):
            if key in level:
                level[key] = "bfloat16"
    quantized = [weight for weight in weights if {weight.kind, weight.target} & {"int4", "fp8"}]
    if checkpoint.config.weight_format == format and all(weight.unchanged for weight in quantized):
        return config
    for level in levels:
        level.pop("quantization_config", None)
    if section is not None:
        levels[-1]["quantization_config"] = section
    return config


def is_wrapped(checkpoint: Checkpoint) -> bool:
    """Whether the text model is one part of the checkpoint's model, so that other modules have prefixes too."""
    return isinstance(checkpoint.raw_config.get("text_config"), dict)


def decoded_rows(weight: Weight) -> Iterator[tuple[slice, Tensor]]:
    """The numbers of a matrix, some rows at a time: (rows, values). fp8 gives float32, the others what is stored."""
    stored = [read_tensor(part) for part in weight.parts]
    rows, columns = weight.shape
    step = max(1, _DECODED_ROWS_BYTES // (4 * fp8_block.BLOCK * columns)) * fp8_block.BLOCK
    for first in range(0, rows, step):
        part = slice(first, min(first + step, rows))
        if weight.kind == "int4":
            yield part, int4_group.dequantize(stored[0][part], stored[1][part], stored[1].dtype)
        elif weight.kind == "fp8":
            scale = stored[1][first // fp8_block.BLOCK : -(-(first + step) // fp8_block.BLOCK)]
            yield part, fp8_block.dequantize(stored[0][part], scale, torch.float32)
        else:
            yield part, stored[0][part]


def in_bf16(weight: Weight) -> tuple[Tensor, int]:
    """The weight in bf16, rounded to nearest, and how many values that changed."""
    if weight.kind in ("bf16", "float"):
        return bf16.narrow_exact(read_tensor(weight.parts[0]))
    dense = torch.empty(weight.shape, dtype=torch.bfloat16)
    changed = 0
    for rows, values in decoded_rows(weight):
        dense[rows], wrong = bf16.narrow_exact(values)
        changed += wrong
    return dense, changed


def int4_tensors(weight: Weight, packed: Tensor, scale: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The three tensors of an int4 weight under their stored names."""
    yield f"{weight.name}_packed", packed
    yield f"{weight.name}_scale", scale
    yield f"{weight.name}_shape", torch.tensor(weight.shape, dtype=torch.int32)


def _is_companion(name: str, text: dict[str, TensorEntry]) -> bool:
    """Whether a tensor is a scale or shape that is read together with its weight."""
    stem, _, part = name.rpartition(".")
    return (part in _INT4_PARTS[1:] and f"{stem}.weight_packed" in text) or (
        part == "weight_scale_inv" and f"{stem}.weight" in text
    )


def _weight(name: str, text: dict[str, TensorEntry]) -> Weight:
    entry = text[name]
    if name.endswith(".weight_packed"):
        dense = name.removesuffix("_packed")
        parts = tuple(_companion(dense.removesuffix("weight") + part, text) for part in _INT4_PARTS)
        return Weight(entry.stored_name.removesuffix("_packed"), dense, parts, "int4")
    if entry.dtype == "F8_E4M3":
        return Weight(entry.stored_name, name, (entry, _companion(f"{name}_scale_inv", text)), "fp8")
    return Weight(entry.stored_name, name, (entry,), "bf16" if entry.dtype == "BF16" else "float")


def _companion(name: str, text: dict[str, TensorEntry]) -> TensorEntry:
    if name not in text:
        raise CheckpointError(f"{name} is missing.", "Download the shards again.")
    return text[name]
