"""Fresh weights for a model that is to be trained.

Matrices are normal with standard deviation fan_in^-0.5 (activations keep their size through a projection); those that
write into the residual stream (`o_proj`, `down_proj`) start at a tenth of it, so that the first steps see an almost
identity network. Embeddings and head follow `initializer_range` 0.02. Norm weights are 1, router biases 0.
"""

import torch

from karakoram.model.transformer import Transformer

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
