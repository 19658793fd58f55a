"""QK-Clip: after the optimizer's step, rein in the heads whose attention logits passed the threshold τ.

    γ_h = min(1, τ / S_h);   q_nope, k_nope of head h × √γ_h;   q_rope of head h × γ_h;   the shared rope key stays

S_h is the largest softmax input that the forward saw. The head's logits shrink by γ exactly; other heads, values,
momentum and learning rate are untouched (Kimi K2 report, arXiv 2507.20534, §2.1 and Algorithm 1). It edits float32
masters: a bfloat16 weight rounds most factors below 1 away.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from karakoram.config import ModelConfig


@torch.no_grad()
def qk_clip(
    weights: Mapping[str, Tensor],
    max_logits: Mapping[int, Tensor],
    config: ModelConfig,
    threshold: float,
    rows: Mapping[str, slice] | None = None,
) -> int:
    """Edit the masters in place from `max_logits` (layer -> float32 [H]); returns how many heads were clipped."""
    clipped = 0
    nope, heads = config.qk_nope_head_dim, config.num_attention_heads
    for layer, largest_H in max_logits.items():
        gamma_H11 = (threshold / largest_H.clamp_min(1e-9)).clamp(max=1.0)[:, None, None]
        hot = int((gamma_H11 < 1).sum())
        if not hot:
            continue
        clipped += hot
        prefix = f"model.layers.{layer}.self_attn."
        query = "q_proj.weight" if config.q_lora_rank is None else "q_b_proj.weight"
        q_HxD = weights[prefix + query].unflatten(0, (heads, -1))
        q_HxD[:, :nope] *= gamma_H11.sqrt()
        q_HxD[:, nope:] *= gamma_H11
        weights[prefix + "kv_b_proj.weight"].unflatten(0, (heads, -1))[:, :nope] *= gamma_H11.sqrt()
    return clipped
