"""The published models of the family and our own nano, as the `config.json` each would have.

Source: the configs in the model repositories (K2-Instruct, K2.5, K2.6, Moonlight, Kimi-VL) and, where those were not
at hand, settings derived from them: 0905's maximum length, epsilon and end token, K2-Thinking's `ignore` list and
Kimi-VL's epsilon follow the neighbouring releases and are not confirmed by a published file.
"""

from typing import Any, Final

from karakoram.config.quantization import fp8_quantization_config, int4_quantization_config

_COMMON: Final[dict[str, Any]] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "hidden_act": "silu",
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "moe_layer_freq": 1,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "norm_topk_prob": True,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "tie_word_embeddings": False,
    "num_nextn_predict_layers": 0,
}


def _yarn(factor: float, beta_fast: float) -> dict[str, Any]:
    return {
        "type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": 4096,
        "beta_fast": beta_fast,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    }


def _k2(**changes: Any) -> dict[str, Any]:
    return {
        **_COMMON,
        "model_type": "kimi_k2",
        "vocab_size": 163840,
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "num_hidden_layers": 61,
        "num_attention_heads": 64,
        "num_key_value_heads": 64,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "n_routed_experts": 384,
        "num_experts_per_tok": 8,
        "n_shared_experts": 1,
        "routed_scaling_factor": 2.827,
        "rms_norm_eps": 1e-6,
        "rope_theta": 50000.0,
        "rope_scaling": _yarn(32.0, 1.0),
        "max_position_embeddings": 131072,
        "bos_token_id": 163584,
        "eos_token_id": 163585,
        "quantization_config": fp8_quantization_config(),
        **changes,
    }


def _k2_thinking(beta_fast: float) -> dict[str, Any]:
    return _k2(
        rms_norm_eps=1e-5,
        rope_scaling=_yarn(64.0, beta_fast),
        max_position_embeddings=262144,
        eos_token_id=163586,
        pad_token_id=163839,
        quantization_config=int4_quantization_config(),
    )


def _k25(eos_token_id: int) -> dict[str, Any]:
    ids = {"bos_token_id": 163584, "eos_token_id": eos_token_id, "pad_token_id": 163839}
    return {
        "architectures": ["KimiK25ForConditionalGeneration"],
        "model_type": "kimi_k25",
        **ids,
        "tie_word_embeddings": False,
        "media_placeholder_token_id": 163605,
        "text_config": _k2_thinking(beta_fast=32.0) | ids,
    }


def _moonlight(**changes: Any) -> dict[str, Any]:
    return {
        **_COMMON,
        "model_type": "deepseek_v3",
        "vocab_size": 163840,
        "hidden_size": 2048,
        "intermediate_size": 11264,
        "moe_intermediate_size": 1408,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "q_lora_rank": None,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "n_routed_experts": 64,
        "num_experts_per_tok": 6,
        "n_shared_experts": 2,
        "routed_scaling_factor": 2.446,
        "rms_norm_eps": 1e-5,
        "rope_theta": 50000.0,
        "rope_scaling": None,
        "max_position_embeddings": 8192,
        "bos_token_id": 163584,
        "eos_token_id": 163586,
        **changes,
    }


def _kimi_vl() -> dict[str, Any]:
    return {
        "architectures": ["KimiVLForConditionalGeneration"],
        "model_type": "kimi_vl",
        "media_placeholder_token_id": 163605,
        "ignore_index": -100,
        "text_config": _moonlight(rope_theta=800000.0, max_position_embeddings=131072),
    }


# The K2 shape in miniature: a dense first layer, MLA with a query latent, routed experts in int4 beside a shared one.
# Every width is a multiple of 32 (the int4 group), so that each format of the big models fits the small one.
_NANO: Final[dict[str, Any]] = {
    **_COMMON,
    "model_type": "kimi_k2",
    "tie_word_embeddings": True,  # copying a token must not be learned anew for each: docs/decisions/nano-shape.md
    "vocab_size": 4096,  # 3968 byte-pair ranks + 128 special tokens
    "hidden_size": 256,
    "intermediate_size": 512,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 128,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "n_shared_experts": 1,
    "routed_scaling_factor": 2.0,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "max_position_embeddings": 2048,
    "bos_token_id": 3968,
    "eos_token_id": [3969, 3970],
    "pad_token_id": 4095,
    "quantization_config": int4_quantization_config(),
}

PRESETS: Final[dict[str, dict[str, Any]]] = {
    "nano": _NANO,
    "moonlight-16b": _moonlight(),
    "kimi-vl-a3b": _kimi_vl(),
    "k2": _k2(),
    "k2-0905": _k2(rope_scaling=_yarn(64.0, 1.0), max_position_embeddings=262144),
    "k2-thinking": _k2_thinking(beta_fast=1.0),
    "k2.5": _k25(eos_token_id=163585),
    "k2.6": _k25(eos_token_id=163586),
}
