"""`ModelConfig`: the `config.json` keys of K2-shaped text models, by the checkpoint's own names."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from karakoram.config.presets import PRESETS
from karakoram.config.quantization import WeightFormat, weight_format
from karakoram.config.reading import load_json_object, read_config
from karakoram.config.rope import RopeScaling
from karakoram.errors import ConfigError

_FAMILIES: Final = {"kimi_k2": "kimi-k2", "deepseek_v3": "deepseek-v3", "kimi_k25": "kimi-k2.5", "kimi_vl": "kimi-vl"}

# Bounds keep a damaged file from asking for absurd allocations; each is far above the largest model of the family.
_MAX_LAYERS: Final = 1024  # K2 has 61
_MAX_EXPERTS: Final = 16384  # K2 has 384
_MAX_MATRIX_ELEMENTS: Final = 2**31  # K2's embedding has 1.17e9
_SIZES: Final = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "moe_intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "n_routed_experts",
    "num_experts_per_tok",
    "n_shared_experts",
    "n_group",
    "topk_group",
    "max_position_embeddings",
)


@dataclass(frozen=True)
class ModelConfig:
    """One text model. Fields are `config.json` keys, in its units; ConfigError if the values cannot form a model.

    `model_type` is that of the text model; `wrapper_model_type` that of an enclosing image-and-text model, or None.
    `notes` holds what a reader of the file should be told although it did not stop the reading.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    moe_intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    n_routed_experts: int
    num_experts_per_tok: int
    n_shared_experts: int
    q_lora_rank: int | None = None
    n_group: int = 1
    topk_group: int = 1
    first_k_dense_replace: int = 1
    routed_scaling_factor: float = 1.0
    norm_topk_prob: bool = True
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    max_position_embeddings: int = 4096
    tie_word_embeddings: bool = False
    model_type: str = "deepseek_v3"
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None
    num_nextn_predict_layers: int = 0
    quantization_config: dict[str, Any] | None = field(default=None, compare=False)
    wrapper_model_type: str | None = field(default=None, compare=False)
    notes: tuple[str, ...] = field(default=(), compare=False, repr=False)

    def __post_init__(self) -> None:
        _check_sizes(self)
        _check_router(self)
        weight_format(self.quantization_config)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], allow_keys: Collection[str] = ()) -> "ModelConfig":
        """Read a parsed `config.json`. `allow_keys` names unknown keys (bare or dotted) that may pass unread."""
        return cls(**read_config(raw, frozenset(allow_keys)))

    @classmethod
    def from_dir(cls, path: str | Path, allow_keys: Collection[str] = ()) -> "ModelConfig":
        """Read `config.json` in directory `path`."""
        return cls.from_dict(load_json_object(Path(path) / "config.json"), allow_keys)

    @classmethod
    def preset(cls, name: str) -> "ModelConfig":
        """A published model by its short name; the names are the keys of `PRESETS`."""
        if name not in PRESETS:
            raise ConfigError(f"there is no preset {name!r}.", f"Choose one of {', '.join(PRESETS)}.")
        return cls.from_dict(PRESETS[name])

    @property
    def family(self) -> str:
        """'kimi-k2', 'deepseek-v3' (Moonlight's too), 'kimi-k2.5' or 'kimi-vl': what the file itself declares."""
        return _FAMILIES.get(self.wrapper_model_type or self.model_type, self.model_type)

    @property
    def weight_format(self) -> WeightFormat:
        """The format `quantization_config` declares: 'bf16' without one."""
        return weight_format(self.quantization_config)

    @property
    def num_moe_layers(self) -> int:
        """Layers with routed experts; the first `first_k_dense_replace` layers are dense."""
        return max(0, self.num_hidden_layers - self.first_k_dense_replace)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """`eos_token_id` as a tuple, whichever way the file spells it."""
        if self.eos_token_id is None:
            return ()
        return (self.eos_token_id,) if isinstance(self.eos_token_id, int) else self.eos_token_id

    def to_dict(self) -> dict[str, Any]:
        """A flat, text-only `config.json` that transformers' `DeepseekV3Config` reads and `from_dict` gives back."""
        scaling = self.rope_scaling
        result: dict[str, Any] = {
            "architectures": ["DeepseekV3ForCausalLM"],
            "model_type": self.model_type,
            **{name: getattr(self, name) for name in _SIZES},
            "num_key_value_heads": self.num_attention_heads,
            "q_lora_rank": self.q_lora_rank,
            "first_k_dense_replace": self.first_k_dense_replace,
            "moe_layer_freq": 1,
            "scoring_func": "sigmoid",
            "topk_method": "noaux_tc",
            "norm_topk_prob": self.norm_topk_prob,
            "routed_scaling_factor": self.routed_scaling_factor,
            "hidden_act": "silu",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope_theta,
            "rope_scaling": None
            if scaling is None
            else {
                "type": "yarn",
                "factor": scaling.factor,
                "original_max_position_embeddings": scaling.original_max_position_embeddings,
                "beta_fast": scaling.beta_fast,
                "beta_slow": scaling.beta_slow,
                "mscale": scaling.mscale,
                "mscale_all_dim": scaling.mscale_all_dim,
            },
            "tie_word_embeddings": self.tie_word_embeddings,
            "num_nextn_predict_layers": self.num_nextn_predict_layers,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": list(self.eos_token_id) if isinstance(self.eos_token_id, tuple) else self.eos_token_id,
            "pad_token_id": self.pad_token_id,
            "use_cache": True,
        }
        if self.quantization_config is not None:
            result["quantization_config"] = self.quantization_config
        return result


def _refuse(key: str, value: object, fix: str) -> ConfigError:
    return ConfigError(f"config key {key} is {value!r}.", fix)


def _check_sizes(config: ModelConfig) -> None:
    sizes = [(name, getattr(config, name)) for name in _SIZES]
    if config.q_lora_rank is not None:
        sizes.append(("q_lora_rank", config.q_lora_rank))
    for name, value in sizes:
        if not 1 <= value < 2**31:
            raise _refuse(name, value, "It must be between 1 and 2147483647.")
    if config.num_hidden_layers > _MAX_LAYERS:
        raise _refuse("num_hidden_layers", config.num_hidden_layers, f"At most {_MAX_LAYERS} are supported.")
    if config.n_routed_experts > _MAX_EXPERTS:
        raise _refuse("n_routed_experts", config.n_routed_experts, f"At most {_MAX_EXPERTS} are supported.")
    if not 0 <= config.first_k_dense_replace < 2**31:
        raise _refuse("first_k_dense_replace", config.first_k_dense_replace, "It must be 0 or more.")
    if not 0 <= config.num_nextn_predict_layers <= _MAX_LAYERS:
        raise _refuse("num_nextn_predict_layers", config.num_nextn_predict_layers, f"It must be 0 to {_MAX_LAYERS}.")
    if config.qk_rope_head_dim % 2:
        raise _refuse("qk_rope_head_dim", config.qk_rope_head_dim, "RoPE rotates pairs: it must be even.")
    if not 0 < config.rms_norm_eps < 1:
        raise _refuse("rms_norm_eps", config.rms_norm_eps, "It must lie between 0 and 1; K2 has 1e-6, K2.5 1e-5.")
    if not (math.isfinite(config.routed_scaling_factor) and 0 < config.routed_scaling_factor <= 1e4):
        raise _refuse("routed_scaling_factor", config.routed_scaling_factor, "It must be positive and at most 1e4.")
    _check_products(config)


def _check_products(config: ModelConfig) -> None:
    """The largest matrices; the rest are smaller by construction."""
    query = config.qk_nope_head_dim + config.qk_rope_head_dim
    per_head = max(query, config.qk_nope_head_dim + config.v_head_dim)
    width = max(config.hidden_size, config.kv_lora_rank + config.qk_rope_head_dim, config.q_lora_rank or 0)
    for keys, elements in (
        ("vocab_size × hidden_size", config.vocab_size * config.hidden_size),
        ("intermediate_size × hidden_size", config.intermediate_size * config.hidden_size),
        (
            "n_shared_experts × moe_intermediate_size × hidden_size",
            config.n_shared_experts * config.moe_intermediate_size * config.hidden_size,
        ),
        ("n_routed_experts × hidden_size", config.n_routed_experts * config.hidden_size),
        ("num_attention_heads × head size × latent or hidden size", config.num_attention_heads * per_head * width),
        ("kv_lora_rank × hidden_size", (config.kv_lora_rank + config.qk_rope_head_dim) * config.hidden_size),
        ("q_lora_rank × hidden_size", (config.q_lora_rank or 0) * config.hidden_size),
    ):
        if elements > _MAX_MATRIX_ELEMENTS:
            raise ConfigError(
                f"config asks for a matrix of {elements:,} elements ({keys}).",
                f"At most {_MAX_MATRIX_ELEMENTS:,} are supported; check the file for damage.",
            )


def _check_router(config: ModelConfig) -> None:
    if config.num_moe_layers == 0:
        return
    experts, groups = config.n_routed_experts, config.n_group
    if config.num_experts_per_tok > experts:
        raise _refuse("num_experts_per_tok", config.num_experts_per_tok, f"At most n_routed_experts = {experts}.")
    if experts % groups:
        raise _refuse("n_group", groups, f"It must divide n_routed_experts = {experts}.")
    if experts // groups < 2:
        raise _refuse("n_group", groups, "A group is scored by its two best experts, so it needs at least 2.")
    if config.topk_group > groups:
        raise _refuse("topk_group", config.topk_group, f"At most n_group = {groups}.")
    reachable = config.topk_group * (experts // groups)
    if config.num_experts_per_tok > reachable:
        raise _refuse(
            "num_experts_per_tok",
            config.num_experts_per_tok,
            f"topk_group = {config.topk_group} groups hold only {reachable} experts.",
        )
