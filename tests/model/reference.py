"""Small models of transformers with weights that make mistakes visible, and the distances docs/numerics.md defines.

Matrices are N(0, 0.08²), norm weights 1 + N(0, 0.3²), correction biases N(0, 0.3²); 200 positions with
`original_max_position_embeddings` 128, so that YaRN's stretched region is really used. `rms_norm_eps` is 1e-5, as K2.5
has it: the two latent norms keep 1e-6.
"""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, PreTrainedModel

from karakoram import load_model
from karakoram.model.transformer import Transformer

VOCABULARY = 160
POSITIONS = 200
# docs/numerics.md: float32 sums in another order differ by 1e-6 to 1e-5, the mildest mistake by more than 1e-4
TOLERANCE = 1e-4

SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "routed_scaling_factor": 2.827,
    "norm_topk_prob": True,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 24,
    "v_head_dim": 16,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 256,
    "num_nextn_predict_layers": 0,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


class Case(NamedTuple):
    """One point of the grid; `yarn` is (factor, beta_fast) or None."""

    q_lora: int | None = 48
    n_group: int = 1
    yarn: tuple[int, int] | None = (32, 1)
    shared: int = 1
    dense: int = 1
    tied: bool = False

    @property
    def changes(self) -> dict[str, Any]:
        """As keys of a `DeepseekV3Config`."""
        rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 50000.0}
        positions = SHAPE["max_position_embeddings"]
        if self.yarn:
            factor, beta_fast = self.yarn
            rope = {**rope, "rope_type": "yarn", "factor": float(factor), "beta_fast": float(beta_fast)}
            rope |= {"beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "original_max_position_embeddings": 128}
            positions = 128 * factor
        return {
            "q_lora_rank": self.q_lora,
            "n_group": self.n_group,
            "topk_group": 2 if self.n_group > 1 else 1,
            "n_shared_experts": self.shared,
            "first_k_dense_replace": self.dense,
            "tie_word_embeddings": self.tied,
            "rope_parameters": rope,
            "max_position_embeddings": positions,
        }

    def __str__(self) -> str:
        return "-".join(f"{name}={value}" for name, value in zip(self._fields, self)).replace(" ", "")


DEFAULT = Case()
YARNS = (None, (32, 1), (32, 32), (64, 1), (64, 32))
GRID = [Case(*values) for values in itertools.product((48, None), (1, 4), YARNS, (1, 2), (0, 1, 3), (False, True))]


def pairs(case: Case) -> set[tuple[int, Any, int, Any]]:
    """All pairs of settings that a case tries together."""
    return {(i, case[i], j, case[j]) for i, j in itertools.combinations(range(len(case)), 2)}


def covering(grid: list[Case]) -> list[Case]:
    """A small part of the grid in which every pair of settings occurs; always takes the case that adds most pairs."""
    missing = set().union(*map(pairs, grid))
    chosen: list[Case] = []
    while missing:
        best = max(grid, key=lambda case: len(pairs(case) & missing))
        chosen.append(best)
        missing -= pairs(best)
    return chosen


COVERING = covering(GRID)


def draw(model: PreTrainedModel, seed: int = 0) -> None:
    """Weights in place, as the module's docstring says."""
    generator = torch.Generator().manual_seed(seed)

    def normal(tensor: Tensor, mean: float, deviation: float) -> None:
        tensor.copy_(mean + deviation * torch.randn(tensor.shape, generator=generator))

    with torch.no_grad():
        for tensor in model.parameters():
            normal(tensor, *((1.0, 0.3) if tensor.ndim == 1 else (0.0, 0.08)))
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                normal(buffer, 0.0, 0.3)


def build(case: Case = DEFAULT, seed: int = 0, **changes: Any) -> DeepseekV3ForCausalLM:
    """A float32 model of transformers at one point of the grid."""
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**{**SHAPE, **case.changes, **changes})).eval()
    draw(model, seed)
    return model


def opened(reference: PreTrainedModel, directory: Path, dtype: str = "float32") -> Transformer:
    """Saved by transformers, opened by us."""
    reference.save_pretrained(directory)
    return load_model(directory, dtype=dtype)


def token_ids(rows: int = 1, length: int = POSITIONS, seed: int = 0) -> Tensor:
    """Random ids [rows, length], without the stop id 1."""
    return torch.randint(2, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model: Callable[..., Any], ids_BT: Tensor) -> Tensor:
    """Float32 logits of either side."""
    out = model(ids_BT)
    return (out if isinstance(out, Tensor) else out.logits).float()


def distance(ours: Tensor, reference: Tensor) -> float:
    """Max|Δ| / max|reference|; infinite where shapes differ or something is not a number."""
    if ours.shape != reference.shape:
        return float("inf")
    delta = float((ours.float() - reference.float()).abs().max() / reference.float().abs().max())
    return delta if delta == delta else float("inf")
