"""`convert`: the same numbers in another format, or a refusal.

  int4 -> bf16   always: the bf16 numbers are what the int4 tensors mean
  bf16 -> int4   where each group of 32 lies on an int4 grid, as after int4-aware training or int4 -> bf16
  fp8  -> bf16   where each product of code and scale is a bf16 number, e.g. with power-of-two scales
  bf16 -> fp8    where each 128 x 128 block lies on an e4m3 grid
Which weights are meant follows the published checkpoints: in int4 the routed experts (K2-Thinking), in fp8 all
projections (K2-Instruct); the rest is bf16. The router's correction bias and the image tower keep their stored form;
layers of multi-token prediction, which have the same weights, are treated like the others; stale buffers are left out.

Nothing is ever rounded: a weight that would change is an error that names it and counts what does not fit. Choosing new
values is quantization, and a different command. One weight is in memory at a time, and the result appears complete or
not at all (`checkpoint/save.py`).
"""

import copy
import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from karakoram.checkpoint import Checkpoint, TensorEntry, names, open_checkpoint, write_checkpoint
from karakoram.checkpoint.safetensors import read_tensor
from karakoram.config import fp8_quantization_config, int4_quantization_config
from karakoram.errors import CheckpointError, FormatError, InputError
from karakoram.formats import bf16, fp8_block, int4_group

FORMATS = ("bf16", "fp8", "int4")
Kind = Literal["bf16", "float", "fp8", "int4", "stored"]
Progress = Callable[[int, int], None]

_INT4_PARTS = ("weight_packed", "weight_scale", "weight_shape")
_WRAPPER_IGNORES = ("re:.*lm_head.*", "re:vision_tower.*", "re:mm_projector.*", "re:multi_modal_projector.*")
_DECODED_ROWS_BYTES = 64 << 20  # float32 of the rows decoded at a time


@dataclass(frozen=True, slots=True)
class _Weight:
    """One weight: the tensors it is stored as, how, and how it will be."""

    name: str  # as stored, ending in `weight` (or whatever an unquantized tensor is called)
    parts: tuple[TensorEntry, ...]
    kind: Kind
    target: Kind

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the dense weight."""
        if self.kind == "int4":
            return (self.parts[1].shape[0], self.parts[1].shape[1] * int4_group.GROUP)
        return self.parts[0].shape

    @property
    def bytes_read(self) -> int:
        return sum(part.nbytes for part in self.parts)

    @property
    def bytes_written(self) -> int:
        """Size of all tensors it will be stored as."""
        if self.target in (self.kind, "stored"):
            return self.bytes_read
        elements = math.prod(self.shape)
        if self.target == "int4":
            rows, columns = self.shape
            return elements // 2 + rows * (columns // int4_group.GROUP) * 2 + 8
        if self.target == "fp8":
            return elements + 4 * math.prod(fp8_block.scale_shape(*self.shape))
        return elements * 2


def convert(
    src: str | Path,
    dst: str | Path,
    format: str = "bf16",
    progress: Progress | None = None,
    allow_config_keys: Collection[str] = (),
) -> Path:
    """Write the checkpoint `src` (directory or hub id) to the new directory `dst` in `format`, value for value.

    progress(done_bytes, total_bytes) counts bytes of the source. FormatError: a value has no exact place in `format`.
    CheckpointError: the source is damaged or incomplete, or `dst` cannot be written; then `dst` does not exist.
    """
    if format not in FORMATS:
        raise InputError(f"there is no format {format!r}.", f"Choose one of {', '.join(FORMATS)}.")
    checkpoint = open_checkpoint(src, allow_config_keys)
    checkpoint.check()
    if Path(dst).expanduser().resolve() == checkpoint.dir.resolve():
        raise CheckpointError(f"{dst} is the source itself.", "Name another directory.")
    weights = _plan(checkpoint, format)
    return write_checkpoint(
        dst,
        _config(checkpoint, format),
        _stream(weights, progress or (lambda done, total: None)),
        copy_from=checkpoint.dir,
        total_bytes=sum(weight.bytes_written for weight in weights),
    )


def _plan(checkpoint: Checkpoint, format: str) -> list[_Weight]:
    """Every weight of the source with its target, in the order of the source's bytes."""
    text = dict(checkpoint.tensors)
    text.update((names.canonical_name(stored), entry) for stored, entry in checkpoint.mtp.items())
    weights = [_weight(name, text, format) for name in text if not _is_companion(name, text)]
    weights += [_Weight(name, (entry,), "stored", "stored") for name, entry in checkpoint.vision.items()]
    for weight in weights:
        if weight.target == "int4" and weight.shape[1] % int4_group.GROUP:
            raise FormatError(
                f"{weight.name} has {weight.shape[1]} inputs, which do not divide into groups of {int4_group.GROUP}.",
                "This model cannot be stored in int4.",
            )
    return sorted(weights, key=lambda weight: (weight.parts[0].file, weight.parts[0].offset))


def _is_companion(name: str, text: dict[str, TensorEntry]) -> bool:
    """Whether a tensor is a scale or shape that is read together with its weight."""
    stem, _, part = name.rpartition(".")
    return (part in _INT4_PARTS[1:] and f"{stem}.weight_packed" in text) or (
        part == "weight_scale_inv" and f"{stem}.weight" in text
    )


def _weight(name: str, text: dict[str, TensorEntry], format: str) -> _Weight:
    entry = text[name]
    dense_name = name.removesuffix("_packed") if name.endswith(".weight_packed") else name
    target: Kind = "bf16"
    if name.endswith(".e_score_correction_bias"):
        target = "stored"
    elif format == "int4" and names.is_routed_expert(dense_name):
        target = "int4"
    elif format == "fp8" and names.is_linear(dense_name):
        target = "fp8"
    if dense_name != name:
        parts = tuple(_companion(dense_name.removesuffix("weight") + part, text) for part in _INT4_PARTS)
        return _Weight(entry.stored_name.removesuffix("_packed"), parts, "int4", target)
    if entry.dtype == "F8_E4M3":
        return _Weight(entry.stored_name, (entry, _companion(f"{name}_scale_inv", text)), "fp8", target)
    return _Weight(entry.stored_name, (entry,), "bf16" if entry.dtype == "BF16" else "float", target)


def _companion(name: str, text: dict[str, TensorEntry]) -> TensorEntry:
    if name not in text:
        raise CheckpointError(f"{name} is missing.", "Download the shards again.")
    return text[name]


def _config(checkpoint: Checkpoint, format: str) -> dict[str, Any]:
    """The source's config.json with the `quantization_config` of the new format, where the family keeps it."""
    config = copy.deepcopy(checkpoint.raw_config)
    inner = config.get("text_config")
    levels = [config, inner] if isinstance(inner, dict) else [config]
    keep = checkpoint.config.weight_format == format
    for level in levels:
        if not keep:
            level.pop("quantization_config", None)
        for key in ("dtype", "torch_dtype"):
            if key in level:
                level[key] = "bfloat16"
    if not keep and format != "bf16":
        section = int4_quantization_config() if format == "int4" else fp8_quantization_config()
        if format == "int4" and len(levels) > 1:  # K2.6's list: in a wrapper the other modules have prefixes too
            section["ignore"] += list(_WRAPPER_IGNORES)
        levels[-1]["quantization_config"] = section
    return config


def _stream(weights: list[_Weight], progress: Progress) -> Iterator[tuple[str, Tensor]]:
    total, done = sum(weight.bytes_read for weight in weights), 0
    progress(0, total)
    for weight in weights:
        yield from _converted(weight)
        done += weight.bytes_read
        progress(done, total)


def _converted(weight: _Weight) -> Iterator[tuple[str, Tensor]]:
    """The tensors of one weight in its new format, under stored names."""
    if weight.target in (weight.kind, "stored"):
        for part in weight.parts:
            yield part.stored_name, read_tensor(part)
        return
    dense = _dense(weight)
    if weight.target == "bf16":
        yield weight.name, dense
    elif weight.target == "fp8":
        scale = fp8_block.exact_scales(dense)
        codes, misfits = fp8_block.quantize_exact(dense, scale)
        _refuse_if(misfits, weight, dense.numel(), "values fit no exact 128x128 e4m3 block")
        del dense
        yield weight.name, codes
        yield f"{weight.name}_scale_inv", scale
    else:
        q, scale, misfits = int4_group.exact_scales(dense)
        _refuse_if(misfits, weight, scale.numel(), f"groups of {int4_group.GROUP} lie on no int4 grid")
        shape = torch.tensor(dense.shape, dtype=torch.int32)
        del dense
        yield f"{weight.name}_packed", int4_group.pack(q)
        yield f"{weight.name}_scale", scale
        yield f"{weight.name}_shape", shape


def _dense(weight: _Weight) -> Tensor:
    """The weight in bf16, decoded a few rows at a time: no float32 copy of the whole. FormatError unless exact."""
    stored = [read_tensor(part) for part in weight.parts]
    if weight.kind == "bf16":
        return stored[0]
    if weight.kind == "float":
        dense, misfits = bf16.narrow_exact(stored[0])
        _refuse_if(misfits, weight, dense.numel(), "values are not exact in bf16")
        return dense
    rows, columns = weight.shape
    dense = torch.empty(rows, columns, dtype=torch.bfloat16)
    step = max(1, _DECODED_ROWS_BYTES // (4 * fp8_block.BLOCK * columns)) * fp8_block.BLOCK
    misfits = 0
    for first in range(0, rows, step):
        part = slice(first, first + step)
        if weight.kind == "int4":
            decoded = int4_group.dequantize(stored[0][part], stored[1][part], stored[1].dtype)
        else:
            scale = stored[1][first // fp8_block.BLOCK : -(-(first + step) // fp8_block.BLOCK)]
            decoded = fp8_block.dequantize(stored[0][part], scale, torch.float32)
        dense[part], wrong = bf16.narrow_exact(decoded)
        misfits += wrong
    _refuse_if(misfits, weight, dense.numel(), "values are not exact in bf16")
    return dense


def _refuse_if(misfits: int, weight: _Weight, total: int, what: str) -> None:
    if misfits:
        raise FormatError(
            f"{weight.name}: {misfits:,} of {total:,} {what}; the conversion would change the model.",
            "`k2 convert` never changes a value; `k2 quantize` chooses new ones.",
        )
