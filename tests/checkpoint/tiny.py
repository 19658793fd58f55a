"""Small DeepSeek-V3 checkpoints, written by transformers' own `save_pretrained`."""

import functools
from pathlib import Path
from typing import Any

import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

SHAPE: dict[str, Any] = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "n_shared_experts": 1,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 32,
    "q_lora_rank": 48,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "qk_nope_head_dim": 16,
    "max_position_embeddings": 128,
    "num_nextn_predict_layers": 0,
}


def model(dtype: torch.dtype = torch.bfloat16, **changes: Any) -> DeepseekV3ForCausalLM:
    """A model of random weights."""
    torch.manual_seed(0)
    return DeepseekV3ForCausalLM(DeepseekV3Config(**{**SHAPE, **changes})).to(dtype).eval()


def save(directory: Path, dtype: torch.dtype = torch.bfloat16, max_shard_size: str = "5GB", **changes: Any) -> Path:
    """Write one to `directory`."""
    model(dtype, **changes).save_pretrained(directory, max_shard_size=max_shard_size)
    return directory


@functools.cache
def token_ids() -> torch.Tensor:
    """[1, 24] token ids."""
    return torch.randint(0, SHAPE["vocab_size"], (1, 24), generator=torch.Generator().manual_seed(5))


def logits(directory: Path) -> torch.Tensor:
    """What transformers computes from a checkpoint in bf16."""
    loaded = DeepseekV3ForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        return loaded(token_ids()).logits
