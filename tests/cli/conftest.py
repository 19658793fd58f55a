"""A checkpoint of the smallest kind, with weights, tokenizer and generation settings, for commands that open one."""

import json
from pathlib import Path
from typing import Any

import pytest

CONFIG: dict[str, Any] = {
    "vocab_size": 297,  # exactly the small tokenizer's: 256 bytes, 14 merges, 27 special tokens
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "max_position_embeddings": 1024,
}


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random bf16 weights; they say nothing sensible, but always the same."""
    import torch

    from karakoram.checkpoint import names, write_checkpoint
    from karakoram.config import ModelConfig
    from tests.chat.conftest import write_tokenizer

    root = tmp_path_factory.mktemp("tiny")
    (root / "tokenizer").mkdir()
    write_tokenizer(root / "tokenizer", karakoram={"dialect": "kimi-k2.5"})
    raw = {**ModelConfig.preset("nano").to_dict(), **CONFIG}
    raw.pop("quantization_config", None)
    draw = torch.Generator().manual_seed(7)
    tensors = []
    for expected in names.expected_tensors(ModelConfig.from_dict(raw)):
        bias = expected.name.endswith("_bias")
        tensor = torch.randn(expected.shape, generator=draw) * (0.0 if bias else 0.1)
        tensors.append((expected.name, tensor if bias else tensor.bfloat16()))
    settings = json.dumps({"do_sample": False}).encode()
    extra = {"generation_config.json": settings}
    return write_checkpoint(root / "model", raw, tensors, copy_from=root / "tokenizer", extra_files=extra)
