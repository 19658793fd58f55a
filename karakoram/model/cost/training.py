"""Training in FLOPs and in what a token leaves behind: forward, backward, recomputation, Newton-Schulz.

Backward costs twice forward: each product x·W has two gradient products. Attention is causal, expanded, over whole
sequences of T tokens, so that a token sees (T+1)/2 on average, itself included. What flash attention computes again in
its backward pass is not counted.

What is kept for the backward pass (`recompute`):

    none       every tensor that a product, a norm or SwiGLU has to see again, each once
    selective  K2's list (arXiv 2507.20534, section 2.4): norms, SwiGLU, MLA's up-projections and the experts' down
               products are computed again; what enters the experts and SwiGLU is kept in fp8, 1x128 tiles with a
               float32 scale each
    full       a layer's input alone; everything is computed again

Legend: D hidden, H heads, N nope, R rope, V value, L latent, I expert width, K experts per token.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from karakoram.config import ModelConfig
from karakoram.model.cost.weights import BF16_BYTES, FP32_BYTES, Matrix, matrices

Recompute = Literal["none", "selective", "full"]
RECOMPUTE: tuple[Recompute, ...] = ("none", "selective", "full")
FP8_BYTES = 1 + FP32_BYTES / 128
NEWTON_SCHULZ_ITERATIONS = 5
ADAMW_COMPONENTS = ("embedding", "norms", "output head")


def mean_context(sequence_tokens: int) -> float:
    """How many tokens one sees on average, itself included."""
    return (sequence_tokens + 1) / 2


def layer_flops(config: ModelConfig, moe: bool, context_tokens: float) -> dict[str, float]:
    """Forward FLOPs of one token in one layer: 'attention' (projections), 'scores', then 'dense layers' or 'router',
    'shared experts', 'routed experts'."""
    c = config
    parts = {"attention": 2.0 * _active(c, "attention") / c.num_hidden_layers}
    per_pair = c.qk_nope_head_dim + c.qk_rope_head_dim + c.v_head_dim
    parts["scores"] = 2.0 * c.num_attention_heads * per_pair * context_tokens
    if not moe:
        return parts | {"dense layers": 2.0 * _active(c, "dense layers") / (c.num_hidden_layers - c.num_moe_layers)}
    for name in ("router", "shared experts", "routed experts"):
        parts[name] = 2.0 * _active(c, name) / c.num_moe_layers
    return parts


@lru_cache(maxsize=256)
def layer_total(config: ModelConfig, moe: bool, context_tokens: float) -> float:
    """All of `layer_flops`."""
    return sum(layer_flops(config, moe, context_tokens).values())


def head_flops(config: ModelConfig) -> float:
    """Forward FLOPs of one token's logits."""
    return 2.0 * _active(config, "output head")


@lru_cache(maxsize=256)
def _active(config: ModelConfig, component: str) -> int:
    """Weights of a component that one token is multiplied with, over all layers."""
    return sum(
        row.active_count * row.rows * row.columns
        for row in matrices(config)
        if row.component == component and row.columns > 1
    )


def forward_flops(config: ModelConfig, sequence_tokens: int) -> dict[str, float]:
    """Of one token through the whole model, by part."""
    total: dict[str, float] = {}
    context = mean_context(sequence_tokens)
    moe = config.num_moe_layers
    for kind, count in ((False, config.num_hidden_layers - moe), (True, moe)):
        for name, flops in layer_flops(config, kind, context).items() if count else ():
            total[name] = total.get(name, 0.0) + count * flops
    return total | {"output head": head_flops(config)}


@lru_cache(maxsize=256)
def training_flops(config: ModelConfig, sequence_tokens: int) -> float:
    """Of one token, forward and backward, nothing computed again: what MFU counts."""
    return 3 * sum(forward_flops(config, sequence_tokens).values())


@lru_cache(maxsize=256)
def recomputed_flops(config: ModelConfig, moe: bool, context_tokens: float, recompute: Recompute) -> float:
    """What the backward pass of one token computes again in one layer. Norms and SwiGLU are not products: 0."""
    if recompute == "none":
        return 0.0
    parts = layer_flops(config, moe, context_tokens)
    if recompute == "full":
        return sum(parts.values())
    c = config
    up = c.num_attention_heads * (c.qk_nope_head_dim + c.v_head_dim) * c.kv_lora_rank
    if c.q_lora_rank is not None:
        up += c.num_attention_heads * (c.qk_nope_head_dim + c.qk_rope_head_dim) * c.q_lora_rank
    down = parts["routed experts"] / 3 if moe else 0.0
    return 2.0 * up + down


# ------------------------------------------------------------------------------------------------ Newton-Schulz


def newton_schulz_flops(rows: int, columns: int, iterations: int = NEWTON_SCHULZ_ITERATIONS) -> int:
    """XXᵀ, its square, and their sum times X, with m ≤ n: 4m²n + 2m³ an iteration."""
    m, n = sorted((rows, columns))
    return iterations * (4 * m * m * n + 2 * m**3)


def muon_matrices(config: ModelConfig) -> Iterator[Matrix]:
    """What Muon updates, each whole: all but embedding, head, norms and biases."""
    for row in matrices(config):
        if row.component not in ADAMW_COMPONENTS and row.columns > 1:
            yield row


def muon_flops(config: ModelConfig, iterations: int = NEWTON_SCHULZ_ITERATIONS) -> int:
    """Of one step, all matrices."""
    return sum(row.count * newton_schulz_flops(row.rows, row.columns, iterations) for row in muon_matrices(config))


# ------------------------------------------------------------------------------------------------ activations


@dataclass(frozen=True)
class Saved:
    """A tensor that a layer keeps until its backward pass: elements and bytes for one token.

    selective_bytes: of an element under selective recomputation; 0 where it is computed again.
    """

    name: str
    elements: int
    bytes_each: float = BF16_BYTES
    selective_bytes: float = BF16_BYTES

    def bytes_under(self, recompute: Recompute) -> float:
        """Of one token; under full recomputation the layer's input alone is left."""
        if recompute == "full":
            return self.elements * self.bytes_each if self.name == "layer input" else 0.0
        return self.elements * (self.bytes_each if recompute == "none" else self.selective_bytes)


def saved_tensors(config: ModelConfig, moe: bool) -> list[Saved]:
    """Of one layer, with fused attention, norms and SwiGLU, which keep their inputs and no more."""
    return [*_saved_by_attention(config), *(_saved_by_experts(config) if moe else _saved_by_dense(config))]


def _saved_by_attention(c: ModelConfig) -> list[Saved]:
    D, H = c.hidden_size, c.num_attention_heads
    key = H * (c.qk_nope_head_dim + c.qk_rope_head_dim)
    low_rank = c.q_lora_rank or 0
    return [
        Saved("layer input", D),
        Saved("normed input", D, selective_bytes=0),
        Saved("query latent", low_rank),
        Saved("normed query latent", low_rank, selective_bytes=0),
        Saved("latent", c.kv_lora_rank),
        Saved("normed latent", c.kv_lora_rank, selective_bytes=0),
        # without the low rank, queries do not come from an up-projection
        Saved("queries", key, selective_bytes=0 if low_rank else BF16_BYTES),
        Saved("keys", key, selective_bytes=0),  # the shared rope key, in every head
        Saved("rope key", c.qk_rope_head_dim, bytes_each=0),  # kept only where keys are not
        Saved("values", H * c.v_head_dim, selective_bytes=0),
        Saved("attended", H * c.v_head_dim),
        Saved("log-sums", H, FP32_BYTES, FP32_BYTES),
        Saved("layer middle", D),
        Saved("normed middle", D, selective_bytes=0),
    ]


def _saved_by_dense(c: ModelConfig) -> list[Saved]:
    return [
        Saved("gate and up", 2 * c.intermediate_size, selective_bytes=FP8_BYTES),
        Saved("inner", c.intermediate_size, selective_bytes=0),
    ]


def _saved_by_experts(c: ModelConfig) -> list[Saved]:
    K, shared = c.num_experts_per_tok, c.n_shared_experts * c.moe_intermediate_size
    return [
        Saved("scores", c.n_routed_experts, FP32_BYTES, FP32_BYTES),
        Saved("choice and weights", 2 * K, FP32_BYTES, FP32_BYTES),
        Saved("dispatched", K * c.hidden_size, selective_bytes=FP8_BYTES),
        Saved("gate and up", 2 * K * c.moe_intermediate_size, selective_bytes=FP8_BYTES),
        Saved("inner", K * c.moe_intermediate_size, selective_bytes=0),
        Saved("experts' results", K * c.hidden_size, selective_bytes=0),
        Saved("shared gate and up", 2 * shared, selective_bytes=FP8_BYTES),
        Saved("shared inner", shared, selective_bytes=0),
    ]


@lru_cache(maxsize=256)
def activation_bytes(config: ModelConfig, moe: bool, recompute: Recompute) -> float:
    """What one token leaves in one layer until its backward pass."""
    return sum(tensor.bytes_under(recompute) for tensor in saved_tensors(config, moe))
