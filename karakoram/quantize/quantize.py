"""`quantize`: a checkpoint in int4, groups of 32, with new values where the old ones are on no grid.

  int4      the published layout (K2-Thinking): the routed experts are int4, all else bf16; the router's correction bias
            keeps its stored form
  int4-all  every linear layer (attention, dense layers, shared and routed experts, the head) and the embedding; norms,
            the router's weight and its correction bias stay as they are stored. The router is no quantized linear: it
            is 0.02 % of K2, and rounding it would send tokens to other experts. A model whose head is its embedding
            has one table, quantized once.
Whatever is int4 in the source and in the result is copied bit for bit. Every other group of 32 keeps its numbers where
a bf16 scale s exists with w = bf16(q s), q in -8…7, so that weights from int4-aware training survive; otherwise
s = bf16(max|w| / 7) and q = round(w / s) (`round_to_nearest.py`). fp8 is rounded from float32, not by way of bf16.

Inputs that are no multiple of 32: a routed expert is an error, since `int4` promises that all of them are int4 and its
readers look no further; any other weight of `int4-all` is left in bf16, named in `ignore`, and reported.
Writing is that of `convert`: one weight in memory at a time, all or nothing (`checkpoint/save.py`).
"""

from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from karakoram.checkpoint import Checkpoint, names, write_checkpoint
from karakoram.config import int4_quantization_config
from karakoram.errors import FormatError, InputError
from karakoram.formats import int4_group
from karakoram.quantize.report import Error, Report, error_of
from karakoram.quantize.round_to_nearest import keep_or_round
from karakoram.quantize.weights import (
    IMAGE_MODULES,
    Kind,
    Progress,
    Weight,
    carry_out,
    decoded_rows,
    in_bf16,
    int4_tensors,
    is_wrapped,
    new_config,
    open_source,
    plan,
)

FORMATS = ("int4", "int4-all")


def quantize(
    src: str | Path,
    dst: str | Path,
    format: str = "int4",
    progress: Progress | None = None,
    allow_config_keys: Collection[str] = (),
    before_writing: Callable[[], None] | None = None,
) -> Report:
    """Write the checkpoint `src` (directory or hub id) to the new directory `dst` in `format`.

    progress(done_bytes, total_bytes) counts bytes of the source. `before_writing` is called once, when `dst` has been
    found writable and large enough. FormatError: a weight cannot be int4. CheckpointError: the source is damaged or
    incomplete, or `dst` cannot be written. After an error `dst` does not exist.
    """
    if format not in FORMATS:
        raise InputError(f"there is no format {format!r}.", f"Choose one of {', '.join(FORMATS)}.")
    checkpoint = open_source(src, dst, allow_config_keys)
    weights = plan(checkpoint, lambda weight: _target(weight, format))
    report = _opening_report(checkpoint, dst, format, weights)

    def tensors() -> Iterator[tuple[str, Tensor]]:
        if before_writing is not None:
            before_writing()
        yield from carry_out(weights, lambda weight: _changed(weight, report), progress)

    write_checkpoint(
        dst,
        new_config(checkpoint, weights, "int4", _section(checkpoint, weights, format)),
        tensors(),
        copy_from=checkpoint.dir,
        total_bytes=report.bytes_after,
    )
    return report


def _target(weight: Weight, format: str) -> Kind:
    name = weight.canonical
    if names.is_routed_expert(name):
        if not weight.divides_into_groups:
            raise FormatError(
                f"{weight.name} has {weight.shape[1]} inputs, which do not divide into groups of {int4_group.GROUP}.",
                "A model with such experts has no int4 form; `k2 convert --format fp8` may fit.",
            )
        return "int4"
    if format == "int4":
        return "stored" if name.endswith(".e_score_correction_bias") else "bf16"
    if names.is_linear(name) or names.is_table(name):
        return "int4" if weight.divides_into_groups else "bf16"
    return "stored"


def _left_in_bf16(weights: list[Weight]) -> list[Weight]:
    """What `int4-all` means to quantize and cannot."""
    return [w for w in weights if w.target == "bf16" and (names.is_linear(w.canonical) or names.is_table(w.canonical))]


def _opening_report(checkpoint: Checkpoint, dst: str | Path, format: str, weights: list[Weight]) -> Report:
    """What is known before the first number is read."""
    report = Report(
        source=str(checkpoint.dir),
        target=str(dst),
        format=format,
        bytes_before=sum(weight.bytes_read for weight in weights),
        bytes_after=sum(weight.bytes_written for weight in weights),
        left_in_bf16=[weight.name for weight in _left_in_bf16(weights)] if format == "int4-all" else [],
    )
    for weight in weights:
        if weight.kind == weight.target == "int4":
            rows, columns = weight.shape
            groups = rows * columns // int4_group.GROUP
            report.weights[weight.canonical] = Error(groups, groups)
            report.groups_already_int4 += groups
    return report


def _section(checkpoint: Checkpoint, weights: list[Weight], format: str) -> dict[str, Any]:
    """`quantization_config`. For `int4-all`, `ignore` names the linear modules without packed tensors, and no other."""
    section = int4_quantization_config()
    wrapped = is_wrapped(checkpoint)
    if format == "int4":
        section["ignore"] += ["re:.*lm_head.*", *IMAGE_MODULES] if wrapped else []
        return section
    section["config_groups"]["group_0"]["targets"] = ["Linear", "Embedding"]
    section["ignore"] = ["re:.*mlp\\.gate$"]  # a linear module in some implementations
    section["ignore"] += [weight.name.removesuffix(".weight") for weight in _left_in_bf16(weights)]
    section["ignore"] += ["re:.*lm_head.*"] if checkpoint.config.tie_word_embeddings else []
    section["ignore"] += IMAGE_MODULES if wrapped else []
    return section


def _changed(weight: Weight, report: Report) -> Iterator[tuple[str, Tensor]]:
    """The tensors of one weight in its new format, under stored names; what it cost goes into the report."""
    if weight.target == "bf16":
        dense, changed = in_bf16(weight)
        report.narrowed_values += changed
        yield weight.name, dense
        return
    packed, scale, report.weights[weight.canonical] = _int4(weight)
    yield from int4_tensors(weight, packed, scale)


def _int4(weight: Weight) -> tuple[Tensor, Tensor, Error]:
    """Packed codes, scales and error of a weight that is not int4 yet."""
    rows, columns = weight.shape
    packed = torch.empty(rows, columns // int4_group.CODES_PER_WORD, dtype=torch.int32)
    scale = torch.empty(rows, columns // int4_group.GROUP, dtype=torch.bfloat16)
    error = Error()
    for part, values in decoded_rows(weight):
        wrong = int((~values.isfinite()).sum())
        if wrong:
            raise FormatError(
                f"{weight.name} has {wrong:,} values that are infinite or no number.",
                "The source is damaged; download or train it again.",
            )
        codes, scale[part], exact = keep_or_round(values)
        packed[part] = int4_group.pack(codes)
        new = int4_group.from_grid(codes, scale[part]).float()
        error += error_of(new, values.float(), exact, scale[part].numel())
    return packed, scale, error
