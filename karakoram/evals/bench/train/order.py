"""What a candidate is asked to compute: a whole training step, or one layer of experts forward and backward.

An order travels to a process of its own as one line of JSON (`process.py`).
"""

import dataclasses
import json
from dataclasses import dataclass
from typing import Any, Literal

from karakoram.config import ModelConfig

OURS, THEIRS = "karakoram", "transformers"

# 29 million parameters, K2's shape in miniature
STEP_SHAPE: dict[str, Any] = {
    "vocab_size": 8192, "hidden_size": 256, "intermediate_size": 768, "moe_intermediate_size": 128,
    "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 8, "n_routed_experts": 32,
    "num_experts_per_tok": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, "kv_lora_rank": 64,
    "q_lora_rank": 128, "qk_rope_head_dim": 16, "qk_nope_head_dim": 32, "v_head_dim": 32, "n_group": 1,
    "topk_group": 1, "tie_word_embeddings": False, "max_position_embeddings": 2048,
}  # fmt: skip
LAYER_SHAPE = STEP_SHAPE | {"n_routed_experts": 64}
ROWS, LENGTH = 8, 512


@dataclass(frozen=True)
class Order:
    """One candidate.

    implementation  of transformers' experts: eager or grouped_mm; empty for ours
    dtype           float32 or bfloat16; auto: the one that `k2 train` would choose here
    keeps_memory    with the allocator settings of `k2 train`, which reuse large blocks instead of returning them
    compiled        ours: let torch.compile fuse the small pieces, as `k2 train` does
    """

    what: Literal["step", "layer"]
    who: str
    implementation: str = ""
    dtype: str = "auto"
    keeps_memory: bool = True
    compiled: bool = True
    threads: int = 1
    rows: int = ROWS
    length: int = LENGTH
    shape: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def name(self) -> str:
        """As a person reads it."""
        if self.who == OURS:
            return f"{OURS} {self.dtype}" if self.dtype != "auto" else OURS
        return f"{THEIRS} {self.implementation} {self.dtype}{', memory kept' if self.keeps_memory else ''}"

    def to_json(self) -> str:
        """One line."""
        return json.dumps(dataclasses.asdict(self))


def config_of(shape: dict[str, Any]) -> ModelConfig:
    """Ours, of a shape: what it leaves open is as in the bundled model, and nothing is quantized."""
    nano = {k: v for k, v in ModelConfig.preset("nano").to_dict().items() if k != "quantization_config"}
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    return ModelConfig.from_dict({**nano, **ids, **shape})
