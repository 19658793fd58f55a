"""QK-Clip: after the optimizer's step, rein in the heads whose attention logits passed the threshold τ.

    γ_h = min(1, τ / S_h);   q_nope, k_nope of head h × √γ_h;   q_rope of head h × γ_h;   the shared rope key stays

S_h is the largest softmax input that the forward saw: signed, all scales included, masked positions not. The head's
logits shrink by γ exactly; other heads, values, momentum and learning rate are untouched (Kimi K2 report, arXiv
2507.20534, §2.1 and Algorithm 1). It edits float32 masters: a bfloat16 weight rounds most factors below 1 away.

Legend: H heads, N nope, R rope, V value.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from karakoram.config import ModelConfig

THRESHOLD = 100.0


@torch.no_grad()
def qk_clip(
    weights: Mapping[str, Tensor],
    max_logits: Mapping[int, Tensor],
    config: ModelConfig,
    threshold: float = THRESHOLD,
    rows: Mapping[str, slice] | None = None,
) -> int:
    """Edit the masters in place from `max_logits` (layer -> [H]); returns how many heads of all layers were clipped.

    A layer whose projections are not among the masters, being frozen or adapted, stays as it is and is not counted.

    rows  weight -> which rows of the whole matrix `weights` holds; all of them where it is not named
    """
    clipped = 0
    query = "q_proj.weight" if config.q_lora_rank is None else "q_b_proj.weight"
    for layer, largest_H in max_logits.items():
        gamma_H = gammas(largest_H, threshold)
        hot = int((gamma_H < 1).sum())
        names = [f"model.layers.{layer}.self_attn.{kind}" for kind in (query, "kv_b_proj.weight")]
        if not hot or any(name not in weights for name in names):
            continue
        clipped += hot
        for name, factors in zip(names, row_factors(gamma_H, config), strict=True):
            weight = weights[name]
            held = rows[name] if rows and name in rows else slice(None)
            weight.mul_(factors[held, None].to(weight))
    return clipped


def gammas(largest_H: Tensor, threshold: float) -> Tensor:
    """min(1, τ / S) of each head, float64; 1 where S is no number, so that no clip can spoil a weight."""
    largest_H = largest_H.double()
    hot_H = (largest_H > threshold) & largest_H.isfinite()
    return torch.where(hot_H, threshold / largest_H, 1.0)


def row_factors(gamma_H: Tensor, config: ModelConfig) -> tuple[Tensor, Tensor]:
    """What the rows of the query matrix [H · (N + R)] and of kv_b_proj [H · (N + V)] are multiplied by."""
    root_H1, gamma_H1 = gamma_H.sqrt()[:, None], gamma_H[:, None]
    nope_HN = root_H1.expand(-1, config.qk_nope_head_dim)
    rope_HR = gamma_H1.expand(-1, config.qk_rope_head_dim)
    value_HV = torch.ones_like(gamma_H1).expand(-1, config.v_head_dim)
    return torch.cat((nope_HN, rope_HR), 1).flatten(), torch.cat((nope_HN, value_HV), 1).flatten()
