"""Small models whose greedy outputs wander: the smallest K2 shape with weights that make attention and experts matter.

Every matrix is normal with standard deviation fan_in^-0.5 (embeddings 1): activations keep their size, and no layer is
an almost-identity as in `train.initialize`, so that a wrong position or a lost block shows in the first token.
"""

from pathlib import Path
from typing import Any

import torch

from karakoram.config import ModelConfig
from karakoram.model.load import load_model
from karakoram.model.transformer import Transformer
from karakoram.train.checkpoints.export import save_model
from karakoram.train.masters import Masters

VOCABULARY = 96
CONTEXT = 512

SHAPE: dict[str, Any] = {
    "model_type": "kimi_k2",
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "max_position_embeddings": CONTEXT,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


def config(**changes: Any) -> ModelConfig:
    """The shape, with the defaults of the nano preset for what it leaves open."""
    return ModelConfig.from_dict({**ModelConfig.preset("nano").to_dict(), **SHAPE, **changes})


@torch.no_grad()
def tiny(dtype: torch.dtype = torch.float32, seed: int = 3, **changes: Any) -> Transformer:
    """A dense model of random weights; with seed 3 greedy outputs of the prompts below go long without a loop."""
    model = Transformer(config(**changes), dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        std = 1.0 if "embed_tokens" in name else parameter.shape[-1] ** -0.5
        drawn = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(1 + 0.1 * drawn if parameter.ndim == 1 else std * drawn)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.zero_()
    return model.eval().requires_grad_(False)


def write_packed(directory: Path, **changes: Any) -> Path:
    """The same model with int4 experts, as a checkpoint: `load_model` opens it packed, or dense in float32."""
    model = tiny(torch.bfloat16, **changes).requires_grad_()  # what is frozen has no master
    masters = Masters(model)
    masters.int4_experts = True
    masters.publish()
    path = directory / "model"
    save_model(model, model.config, path, {}, int4=True)
    return path


def packed(directory: Path, **changes: Any) -> Transformer:
    """See `write_packed`."""
    return load_model(write_packed(directory, **changes))


def prompt(length: int, seed: int = 0, vocabulary: int = VOCABULARY) -> list[int]:
    """Random token ids, without the first two."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, vocabulary, (length,), generator=generator).tolist()
