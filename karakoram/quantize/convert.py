"""`convert`: the same numbers in another format, or a refusal.

  int4 -> bf16   always: the bf16 numbers are what the int4 tensors mean
  bf16 -> int4   where each group of 32 lies on an int4 grid, as after int4-aware training or int4 -> bf16
  fp8  -> bf16   where each product of code and scale is a bf16 number, e.g. with power-of-two scales
  bf16 -> fp8    where each 128 x 128 block lies on an e4m3 grid
Which weights are meant follows the published checkpoints: in int4 the routed experts (K2-Thinking), in fp8 all
projections (K2-Instruct); the rest is bf16. The router's correction bias keeps its stored form.

Nothing is ever rounded: a weight that would change is an error that names it and counts what does not fit. Choosing new
values is quantization, and a different command (`quantize.py`). One weight is in memory at a time, and the result
appears complete or not at all (`checkpoint/save.py`).
"""

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from karakoram.checkpoint import Checkpoint, names, write_checkpoint
from karakoram.config import fp8_quantization_config, int4_quantization_config
from karakoram.errors import FormatError, InputError
from karakoram.formats import fp8_block, int4_group
from karakoram.quantize.weights import (
    IMAGE_MODULES,
    Kind,
    Progress,
    Weight,
    carry_out,
    in_bf16,
    int4_tensors,
    is_wrapped,
    new_config,
    open_source,
    plan,
)

FORMATS = ("bf16", "fp8", "int4")


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
    checkpoint = open_source(src, dst, allow_config_keys)
    weights = plan(checkpoint, lambda weight: _target(weight, format))
    return write_checkpoint(
        dst,
        new_config(checkpoint, weights, format, _section(checkpoint, format)),
        carry_out(weights, _converted, progress),
        copy_from=checkpoint.dir,
        total_bytes=sum(weight.bytes_written for weight in weights),
    )


def _target(weight: Weight, format: str) -> Kind:
    if weight.canonical.endswith(".e_score_correction_bias"):
        return "stored"
    if format == "fp8" and names.is_linear(weight.canonical):
        return "fp8"
    if format != "int4" or not names.is_routed_expert(weight.canonical):
        return "bf16"
    if not weight.divides_into_groups:
        raise FormatError(
            f"{weight.name} has {weight.shape[1]} inputs, which do not divide into groups of {int4_group.GROUP}.",
            "This model cannot be stored in int4.",
        )
    return "int4"


def _section(checkpoint: Checkpoint, format: str) -> dict[str, Any] | None:
    if format == "bf16":
        return None
    if format == "fp8":
        return fp8_quantization_config()
    section = int4_quantization_config()
    if is_wrapped(checkpoint):  # K2.6's list
        section["ignore"] += ["re:.*lm_head.*", *IMAGE_MODULES]
    return section


def _converted(weight: Weight) -> Iterator[tuple[str, Tensor]]:
    """The tensors of one weight in its new format, under stored names."""
    dense, misfits = in_bf16(weight)
    _refuse_if(misfits, weight, dense.numel(), "values are not exact in bf16")
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
        del dense
        yield from int4_tensors(weight, int4_group.pack(q), scale)


def _refuse_if(misfits: int, weight: Weight, total: int, what: str) -> None:
    if misfits:
        raise FormatError(
            f"{weight.name}: {misfits:,} of {total:,} {what}; the conversion would change the model.",
            "`k2 convert` never changes a value; `k2 quantize` chooses new ones.",
        )
