"""A model's parameters, its stored bytes, and the FLOPs of a token.

A model is listed as rows of equal matrices and vectors (`Matrix`); every number below is a sum over those rows, so the
sums cannot disagree with one another. *Active* parameters are those one token multiplies with. The family's published
"activated" counts differ by what they include, so three are given: without embeddings, with the output head, and with
both head and input embedding. K2: 30.5 / 31.7 / 32.9 billion of 1,026.4; Moonshot writes 32.6. Byte counts are decimal
and include what the formats add: fp8 one float32 per 128x128 block, int4 one bf16 per 32 weights and a shape of two
int32 per matrix. Which matrices a format touches follows the published checkpoints: fp8 all projections, int4 the
routed experts only; norms, router, embedding and head always stay bf16, the router's correction bias float32.

FLOPs count a multiply and an add as two. Attention to n earlier tokens is counted as decoded over the latent cache
(absorbed) or as in training and prefill (expanded); causal prefill of n tokens averages n/2 earlier ones.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from karakoram.config import ModelConfig

FORMATS: tuple[Literal["bf16", "fp8", "int4"], ...] = ("bf16", "fp8", "int4")
_FP8_BLOCK = 128
_INT4_GROUP = 32
_INT4_SHAPE_BYTES = 8  # weight_shape: two int32
BF16_BYTES = 2
FP32_BYTES = 4

COMPONENTS = (
    "embedding",
    "attention",
    "norms",
    "dense layers",
    "router",
    "shared experts",
    "routed experts",
    "output head",
)


@dataclass(frozen=True)
class Matrix:
    """`count` equal tensors of `rows` x `columns`, of which one token uses `active_count`."""

    component: str
    rows: int
    columns: int
    count: int
    active_count: int
    kind: Literal["plain", "projection", "expert", "float32"] = "plain"

    def format_in(self, weight_format: str) -> str:
        """How a checkpoint of `weight_format` stores this: 'bf16', 'fp32', 'fp8' or 'int4'."""
        if self.kind == "float32":
            return "fp32"
        quantized = {"fp8": ("projection", "expert"), "int4": ("expert",)}.get(weight_format, ())
        return weight_format if self.kind in quantized else "bf16"

    def bytes_each(self, weight_format: str) -> int:
        """Stored size of one such tensor, scales included, in a checkpoint of `weight_format`."""
        elements = self.rows * self.columns
        match self.format_in(weight_format):
            case "fp32":
                return elements * FP32_BYTES
            case "fp8":
                return elements + FP32_BYTES * _ceil(self.rows, _FP8_BLOCK) * _ceil(self.columns, _FP8_BLOCK)
            case "int4":
                packed = 4 * _ceil(self.columns, 8)  # eight weights to an int32
                scales = BF16_BYTES * _ceil(self.columns, _INT4_GROUP)
                return self.rows * (packed + scales) + _INT4_SHAPE_BYTES
            case _:
                return elements * BF16_BYTES


@dataclass(frozen=True)
class Component:
    """One line of the bill: parameters, those one token uses, and their stored bytes."""

    name: str
    parameters: int
    active_parameters: int
    active_bytes: int
    bytes_by_format: dict[str, int]

    @property
    def stored_bytes(self) -> int:
        return sum(self.bytes_by_format.values())


@dataclass(frozen=True)
class ParameterCount:
    """`total` and `without_embeddings` count what is stored, `active*` what one token multiplies with."""

    total: int
    without_embeddings: int
    active: int
    active_with_head: int
    active_with_both: int


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def matrices(config: ModelConfig) -> Iterator[Matrix]:
    """Every tensor of the model, equal ones in one row. A tied head is listed with count 0: active, but not stored."""
    D, layers, moe = config.hidden_size, config.num_hidden_layers, config.num_moe_layers
    yield Matrix("embedding", config.vocab_size, D, 1, 1)
    yield from _attention(config)
    yield Matrix("norms", D, 1, 2 * layers + 1, 2 * layers + 1)
    dense = layers - moe
    yield from _swiglu("dense layers", D, config.intermediate_size, dense, dense, "projection")
    if moe:
        experts, active = config.n_routed_experts, config.num_experts_per_tok
        shared = config.n_shared_experts * config.moe_intermediate_size
        yield Matrix("router", experts, D, moe, moe)
        yield Matrix("router", experts, 1, moe, moe, "float32")
        yield from _swiglu("shared experts", D, shared, moe, moe, "projection")
        yield from _swiglu("routed experts", D, config.moe_intermediate_size, moe * experts, moe * active, "expert")
    yield Matrix("output head", config.vocab_size, D, 0 if config.tie_word_embeddings else 1, 1)


def _attention(config: ModelConfig) -> Iterator[Matrix]:
    D, H, L, n = config.hidden_size, config.num_attention_heads, config.kv_lora_rank, config.num_hidden_layers
    query_rows = H * (config.qk_nope_head_dim + config.qk_rope_head_dim)
    if config.q_lora_rank is None:
        shapes = [(query_rows, D)]
    else:
        shapes = [(config.q_lora_rank, D), (query_rows, config.q_lora_rank)]
        yield Matrix("norms", config.q_lora_rank, 1, n, n)
    yield Matrix("norms", L, 1, n, n)
    shapes += [
        (L + config.qk_rope_head_dim, D),
        (H * (config.qk_nope_head_dim + config.v_head_dim), L),
        (D, H * config.v_head_dim),
    ]
    for rows, columns in shapes:
        yield Matrix("attention", rows, columns, n, n, "projection")


def _swiglu(
    component: str, width: int, inner: int, count: int, active: int, kind: Literal["projection", "expert"]
) -> Iterator[Matrix]:
    yield Matrix(component, inner, width, 2 * count, 2 * active, kind)  # gate and up
    yield Matrix(component, width, inner, count, active, kind)  # down


def components(config: ModelConfig, weight_format: str | None = None) -> list[Component]:
    """The bill by component, zero where the model lacks one; `weight_format` defaults to what the config declares."""
    stored_as = weight_format or config.weight_format
    rows = list(matrices(config))
    result: list[Component] = []
    for name in COMPONENTS:
        mine = [row for row in rows if row.component == name]
        bytes_by_format: dict[str, int] = {}
        for row in mine:
            key = row.format_in(stored_as)
            bytes_by_format[key] = bytes_by_format.get(key, 0) + row.count * row.bytes_each(stored_as)
        result.append(
            Component(
                name,
                sum(row.count * row.rows * row.columns for row in mine),
                sum(row.active_count * row.rows * row.columns for row in mine),
                sum(row.active_count * row.bytes_each(stored_as) for row in mine),
                bytes_by_format,
            )
        )
    return result


def parameters(config: ModelConfig) -> ParameterCount:
    """Parameters stored and active, scales of the formats not counted."""
    bill = {part.name: part for part in components(config, "bf16")}
    ends = ("embedding", "output head")
    core = [part for part in bill.values() if part.name not in ends]
    without = sum(part.parameters for part in core)
    active = sum(part.active_parameters for part in core)
    head = bill["output head"].active_parameters
    return ParameterCount(
        total=without + sum(bill[name].parameters for name in ends),
        without_embeddings=without,
        active=active,
        active_with_head=active + head,
        active_with_both=active + head + bill["embedding"].active_parameters,
    )


def stored_bytes(config: ModelConfig, weight_format: str | None = None) -> int:
    """Bytes of all text tensors in a checkpoint of `weight_format` (default: the declared one), headers not counted."""
    return sum(part.stored_bytes for part in components(config, weight_format))


def kv_bytes_per_token(config: ModelConfig, element_bytes: int = BF16_BYTES) -> int:
    """Cache growth per token: the latent and the rope key of every layer. K2 in bf16: 70,272."""
    return config.num_hidden_layers * (config.kv_lora_rank + config.qk_rope_head_dim) * element_bytes


def decode_bytes_per_token(config: ModelConfig, context_tokens: int = 0, weight_format: str | None = None) -> int:
    """Bytes read from memory to decode one token alone (batch 1) after `context_tokens` cached in bf16.

    Every active weight is read once, but of the embedding one row only.
    """
    active = sum(part.active_bytes for part in components(config, weight_format) if part.name != "embedding")
    row = config.hidden_size * BF16_BYTES
    return active + row + context_tokens * kv_bytes_per_token(config)


def flops_per_token(config: ModelConfig, context_tokens: int = 0, absorbed: bool = True) -> int:
    """Forward FLOPs of one token that attends to `context_tokens`. Training costs three times as much.

    Norms, softmax, rotations and the routing itself are left out: under 1 % for K2.
    """
    lookups = ("embedding", "norms")
    products = [row for row in matrices(config) if row.component not in lookups and row.kind != "float32"]
    linear = 2 * sum(row.active_count * row.rows * row.columns for row in products)
    if absorbed:
        per_pair = 2 * config.kv_lora_rank + config.qk_rope_head_dim
    else:
        per_pair = config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim
    attention = 2 * config.num_hidden_layers * config.num_attention_heads * per_pair * context_tokens
    return linear + attention
