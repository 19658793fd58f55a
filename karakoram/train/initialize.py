"""First weights of a model that is to be trained: fresh ones, or those of a finished model.

Matrices are normal with standard deviation fan_in^-0.5 (activations keep their size through a projection); those that
write into the residual stream (`o_proj`, `down_proj`) start at a tenth of it, so that the first steps see an almost
identity network. Embeddings and head follow `initializer_range` 0.02. Norm weights are 1, router biases 0.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from karakoram.distributed.layout import Box
from karakoram.errors import TrainingError
from karakoram.model.load import load_model
from karakoram.model.transformer import Transformer
from karakoram.train.masters import Masters

EMBEDDING_STD = 0.02
RESIDUAL_SHARE = 0.1


@torch.no_grad()
def initialize(model: Transformer, seed: int) -> Transformer:
    """Draw all weights in place, the same for the same seed whatever the device; returns the model."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.fill_(1.0)
            continue
        std = parameter.shape[-1] ** -0.5
        if "embed_tokens" in name or "lm_head" in name:
            std = EMBEDDING_STD
        elif "o_proj" in name or "down_proj" in name:
            std *= RESIDUAL_SHARE
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.zero_()
    return model


@torch.no_grad()
def copy_weights(
    model_dir: Path, masters: Masters, biases: Mapping[int, Tensor], held: Mapping[str, Box] | None = None
) -> None:
    """Set masters and router biases (layer -> [E]) to those of a checkpoint in HF layout.

    `held`: which part of each tensor is here; all of it where it is not named.

    Raises TrainingError where it is a model of another shape.
    """
    found = load_model(model_dir, dtype=torch.float32, dense=True).state_dict()
    found = {name: tensor[held[name]] if held and name in held else tensor for name, tensor in found.items()}
    wanted = dict(masters.weights) | {bias_name(layer): bias for layer, bias in biases.items()}
    wrong = [n for n, t in wanted.items() if n not in found or found[n].shape != t.shape]
    wrong += [n for n in found if n not in wanted]
    if wrong:
        shapes = [tuple(of[wrong[0]].shape) if wrong[0] in of else "absent" for of in (found, wanted)]
        raise TrainingError(
            f"{model_dir} holds another model: {len(wrong)} tensors differ, the first is {wrong[0]} "
            f"({shapes[0]} there, {shapes[1]} here).",
            "Start from a model of the shape that is to be trained.",
        )
    for name, tensor in wanted.items():
        tensor.copy_(found[name])


def biases_of(model: Transformer) -> dict[int, Tensor]:
    """The router's correction biases by layer, as they are: float32 [E]."""
    return {
        int(name.split(".")[2]): bias
        for name, bias in model.named_buffers()
        if name.endswith("e_score_correction_bias")
    }


def bias_name(layer: int) -> str:
    """A layer's correction bias in a checkpoint."""
    return f"model.layers.{layer}.mlp.gate.e_score_correction_bias"
