"""The model of a run in HF layout: what anything opens."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from karakoram.checkpoint.save import write_checkpoint
from karakoram.config import ModelConfig, int4_quantization_config
from karakoram.errors import TrainingError
from karakoram.formats import int4_group
from karakoram.model.transformer import Transformer


def save_model(model: Transformer, config: ModelConfig, out: Path, files: Mapping[str, bytes], int4: bool) -> None:
    """`write_model` of a model that is whole here."""
    write_model(model.state_dict(), config, out, files, int4)


def write_model(
    state: Mapping[str, Tensor], config: ModelConfig, out: Path, files: Mapping[str, bytes], int4: bool
) -> None:
    """Write a model's tensors in HF layout; `int4` stores routed experts packed (they must lie on the grid already)."""
    raw = config.to_dict()
    raw.pop("quantization_config", None)
    if int4:
        raw["quantization_config"] = config.quantization_config or int4_quantization_config()
    tensors = list(stored_tensors(state, int4))
    write_checkpoint(out, raw, tensors, extra_files=files, overwrite=True)


def stored_tensors(state: Mapping[str, Tensor], int4: bool) -> Iterator[tuple[str, Tensor]]:
    """The checkpoint's tensors by its names: expert stacks taken apart, bfloat16 or packed; router biases float32."""
    for name, tensor in state.items():
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
