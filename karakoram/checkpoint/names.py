"""Names: from what a file calls a tensor to what the family calls it, and what a configuration expects to find.

Canonical names are those of K2-Instruct: `model.layers.L.…`, `model.embed_tokens.weight`, `model.norm.weight`,
`lm_head.weight`. Around them, seen in the wild:
  language_model.model.…, language_model.lm_head.…   K2.5, K2.6, Kimi-VL
  model.language_model.…                             transformers' in-memory names of Kimi-K2.5
  language_model.layers.…                            some legacy repacks
  language_model.model.blocks.L.…                    transformers 5.23 saving Kimi-K2.5: its renaming of the vision
                                                     tower's layers also catches those of the text model
Vision towers and projectors are set aside, as are the layers of multi-token prediction (L >= num_hidden_layers);
`rotary_emb.inv_freq` is a stale buffer of K2-Instruct (56 values where rope has 32) and is ignored.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

from karakoram.config import ModelConfig
from karakoram.errors import InputError

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
TABLES = ("model.embed_tokens.weight", "lm_head.weight")

_TEXT_PREFIXES = (
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
    ("model.language_model.", "model."),
    ("language_model.layers.", "model.layers."),
    ("language_model.embed_tokens.", "model.embed_tokens."),
    ("language_model.norm.", "model.norm."),
)
_VISION = re.compile(r"(model\.)?(vision_tower|mm_projector|multi_modal_projector|vision_model|visual)\.")
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_EXPERT_PART = re.compile(r"model\.layers\.(\d+)\.mlp\.experts\.(\d+)\.(gate_proj|up_proj|down_proj)\.weight(\w*)")
_EXPERT = re.compile(r"\.mlp\.experts\.\d+\.(gate|up|down)_proj\.weight$")
_LINEAR = re.compile(r"\.(self_attn|mlp|mlp\.shared_experts|mlp\.experts\.\d+)\.\w+_proj(_with_mqa)?\.weight$")


class Expected(NamedTuple):
    """One tensor of a model: a `linear` one may be stored quantized, a table too, every other one only as floats."""

    name: str
    shape: tuple[int, ...]
    linear: bool


def canonical_name(stored: str) -> str:
    """The family's name of a text tensor; a name that follows no known convention comes back unchanged."""
    if stored.startswith(("model.layers.", "lm_head.")):
        return stored
    for prefix, replacement in _TEXT_PREFIXES:
        if stored.startswith(prefix):
            stored = replacement + stored[len(prefix) :]
            break
    if stored.startswith("model.blocks."):
        stored = "model.layers." + stored[len("model.blocks.") :]
    return stored


def is_vision(stored: str) -> bool:
    """Whether a stored name belongs to an image tower or the projector behind it."""
    return _VISION.match(stored) is not None


def is_stale_buffer(name: str) -> bool:
    """Whether a tensor is a buffer that old code saved although it is computed."""
    return name.endswith(".rotary_emb.inv_freq")


def layer_of(name: str) -> int | None:
    """The layer a canonical name belongs to; None for embedding, final norm and head."""
    match = _LAYER.match(name)
    return int(match.group(1)) if match else None


def is_routed_expert(name: str) -> bool:
    """Whether `name` is the weight of a routed expert: the tensors K2-Thinking stores in int4."""
    return _EXPERT.search(name) is not None


def is_linear(name: str) -> bool:
    """Whether `name` is a weight that K2-Instruct stores in fp8: projections, not norms, router, embedding or head."""
    return _LINEAR.search(name) is not None


def is_table(name: str) -> bool:
    """Whether `name` is the embedding or the output head: bf16 in every published checkpoint, int4 where asked for."""
    return name in TABLES


def expert_weight(layer: int, expert: int, projection: str) -> str:
    """The canonical name of one projection of one routed expert."""
    return f"model.layers.{layer}.mlp.experts.{expert}.{projection}.weight"


def belongs_to_routed_expert(name: str) -> bool:
    """Whether `name` is one of the tensors that the weight of a routed expert is stored as."""
    return _EXPERT_PART.fullmatch(name) is not None


def parse_expert(name: str) -> tuple[int, int, str, str]:
    """(layer, expert, projection, what follows `weight`) of a tensor of a routed expert, by its canonical name."""
    match = _EXPERT_PART.fullmatch(name)
    if match is None:
        raise InputError(f"{name} is no tensor of a routed expert.", "Their names are model.layers.L.mlp.experts.E.…")
    return int(match[1]), int(match[2]), match[3], match[4]


def expected_tensors(config: ModelConfig) -> Iterator[Expected]:
    """Every tensor the model computes with, dense shapes [out, in], layer by layer."""
    hidden = config.hidden_size
    yield Expected("model.embed_tokens.weight", (config.vocab_size, hidden), False)
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        yield Expected(prefix + "input_layernorm.weight", (hidden,), False)
        yield Expected(prefix + "post_attention_layernorm.weight", (hidden,), False)
        yield from _attention(config, prefix + "self_attn.")
        if layer < config.first_k_dense_replace:
            yield from _feed_forward(prefix + "mlp.", hidden, config.intermediate_size)
        else:
            yield from _experts(config, prefix + "mlp.")
    yield Expected("model.norm.weight", (hidden,), False)
    if not config.tie_word_embeddings:
        yield Expected("lm_head.weight", (config.vocab_size, hidden), False)


def _attention(config: ModelConfig, prefix: str) -> Iterator[Expected]:
    hidden, heads, latent = config.hidden_size, config.num_attention_heads, config.kv_lora_rank
    query = heads * (config.qk_nope_head_dim + config.qk_rope_head_dim)
    if config.q_lora_rank is None:
        yield Expected(prefix + "q_proj.weight", (query, hidden), True)
    else:
        yield Expected(prefix + "q_a_proj.weight", (config.q_lora_rank, hidden), True)
        yield Expected(prefix + "q_a_layernorm.weight", (config.q_lora_rank,), False)
        yield Expected(prefix + "q_b_proj.weight", (query, config.q_lora_rank), True)
    yield Expected(prefix + "kv_a_proj_with_mqa.weight", (latent + config.qk_rope_head_dim, hidden), True)
    yield Expected(prefix + "kv_a_layernorm.weight", (latent,), False)
    yield Expected(prefix + "kv_b_proj.weight", (heads * (config.qk_nope_head_dim + config.v_head_dim), latent), True)
    yield Expected(prefix + "o_proj.weight", (hidden, heads * config.v_head_dim), True)


def _experts(config: ModelConfig, prefix: str) -> Iterator[Expected]:
    hidden, width = config.hidden_size, config.moe_intermediate_size
    yield Expected(prefix + "gate.weight", (config.n_routed_experts, hidden), False)
    yield Expected(prefix + "gate.e_score_correction_bias", (config.n_routed_experts,), False)
    if config.n_shared_experts:
        yield from _feed_forward(prefix + "shared_experts.", hidden, width * config.n_shared_experts)
    for expert in range(config.n_routed_experts):
        yield from _feed_forward(f"{prefix}experts.{expert}.", hidden, width)


def _feed_forward(prefix: str, hidden: int, width: int) -> Iterator[Expected]:
    yield Expected(prefix + "gate_proj.weight", (width, hidden), True)
    yield Expected(prefix + "up_proj.weight", (width, hidden), True)
    yield Expected(prefix + "down_proj.weight", (hidden, width), True)
