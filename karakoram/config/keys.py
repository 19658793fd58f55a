"""Every `config.json` key this package has an opinion about, as data.

Three lists decide the fate of a key. *Used* keys become fields of `ModelConfig`. *Harmless* keys cannot change the
logits of a forward pass; each carries its reason. *Pinned* keys are harmless with one value only: any other value names
mathematics that is not implemented here. Whatever is on no list may change the mathematics, so it is refused by name
and value, and only the user can wave it through (`--allow-config-key KEY`).

Sources: the published configs of Kimi-K2-Instruct, K2-Thinking, K2.5, K2.6, Moonlight and Kimi-VL; what transformers
5's `DeepseekV3Config` and `Kimi_K25Config` write; the full dumps of transformers 4's `PretrainedConfig`.
"""

from typing import Final

TEXT_MODEL_TYPES: Final = ("kimi_k2", "deepseek_v3")
WRAPPER_MODEL_TYPES: Final = ("kimi_k25", "kimi_vl")  # their text model lies in `text_config`

# Required although transformers has defaults: those are DeepSeek-V3's (q_lora_rank 1536, n_group 8, three dense layers,
# scaling 2.5) and would silently turn a file that forgot a key into another model.
REQUIRED_INTS: Final = (
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
    "first_k_dense_replace",
)

USED: Final = frozenset(
    {
        *REQUIRED_INTS,
        "q_lora_rank",
        "routed_scaling_factor",
        "norm_topk_prob",
        "rms_norm_eps",
        "rope_theta",
        "rope_scaling",
        "rope_parameters",
        "max_position_embeddings",
        "tie_word_embeddings",
        "model_type",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "num_nextn_predict_layers",
        "num_mtp_layers",
        "quantization_config",
    }
)

_SAMPLING = "a default of text generation from an old config dump; generation_config.json and the caller decide"
_LABELS = "names classes of a classifier head, which these models lack"
_OUTPUTS = "selects what the Python call returns, not what it computes"
_TRAINING = "acts on the training loss only"
_BOOKKEEPING = "says where the file came from or which class wrote it"

HARMLESS: Final[dict[str, str]] = {
    "architectures": "a class name; model_type decides here",
    "auto_map": "points to Python code in the checkpoint, which is never run",
    "_name_or_path": _BOOKKEEPING,
    "name_or_path": _BOOKKEEPING,
    "_commit_hash": _BOOKKEEPING,
    "transformers_version": _BOOKKEEPING,
    "tokenizer_class": _BOOKKEEPING,
    "finetuning_task": _BOOKKEEPING,
    "unsloth_fixed": "a mark left by a re-uploader",
    "unsloth_version": "a mark left by a re-uploader",
    "karakoram": "our own key: the chat dialect, read by karakoram.chat",
    "dtype": "every tensor states its own dtype in its header",
    "torch_dtype": "every tensor states its own dtype in its header",
    "use_bfloat16": "a TPU switch of old transformers; every tensor states its own dtype",
    "_attn_implementation": "chooses among kernels of the same mathematics",
    "_attn_implementation_autoset": "chooses among kernels of the same mathematics",
    "attn_implementation": "chooses among kernels of the same mathematics",
    "_experts_implementation": "chooses among kernels of the same mathematics",
    "initializer_range": "used only to draw fresh weights",
    "aux_loss_alpha": _TRAINING,
    "seq_aux": _TRAINING,
    "router_aux_loss_coef": _TRAINING,
    "ep_size": "expert parallelism of whoever runs the model; placement, not mathematics",
    "pretraining_tp": "tensor parallelism of the original training; same mathematics",
    "use_cache": "a switch of the caller",
    "chunk_size_feed_forward": "splits the feed-forward over time steps; same mathematics",
    "output_router_logits": _OUTPUTS,
    "output_attentions": _OUTPUTS,
    "output_hidden_states": _OUTPUTS,
    "output_scores": _OUTPUTS,
    "return_dict": _OUTPUTS,
    "return_dict_in_generate": _OUTPUTS,
    "torchscript": _OUTPUTS,
    "tf_legacy_loss": _OUTPUTS,
    "id2label": _LABELS,
    "label2id": _LABELS,
    "num_labels": _LABELS,
    "problem_type": _LABELS,
    "task_specific_params": _SAMPLING,
    "prefix": _SAMPLING,
    "decoder_start_token_id": "for encoder-decoder models",
    "sep_token_id": "a token id that these chat formats do not use",
    "unk_token_id": "a token id that these chat formats do not use",
    **dict.fromkeys(
        (
            "bad_words_ids",
            "begin_suppress_tokens",
            "diversity_penalty",
            "do_sample",
            "early_stopping",
            "encoder_no_repeat_ngram_size",
            "exponential_decay_length_penalty",
            "forced_bos_token_id",
            "forced_eos_token_id",
            "length_penalty",
            "max_length",
            "max_new_tokens",
            "min_length",
            "no_repeat_ngram_size",
            "num_beam_groups",
            "num_beams",
            "num_return_sequences",
            "remove_invalid_values",
            "repetition_penalty",
            "suppress_tokens",
            "temperature",
            "top_k",
            "top_p",
            "typical_p",
        ),
        _SAMPLING,
    ),
}

_IMAGES = "concerns images and video, which are set aside here; text positions are unaffected"

WRAPPER_HARMLESS: Final[dict[str, str]] = {
    **HARMLESS,
    **dict.fromkeys(
        (
            "vision_config",
            "media_placeholder_token_id",
            "image_token_id",
            "image_token_index",
            "video_token_id",
            "vision_start_token_id",
            "vision_end_token_id",
            "use_unified_vision_chunk",
            "video_placeholder",
            "projection_hidden_size",
            "projection_layer_norm_eps",
        ),
        _IMAGES,
    ),
    "ignore_index": _TRAINING,
    "vocab_size": "repeats text_config.vocab_size, which decides",
}
WRAPPER_USED: Final = frozenset(
    {
        "model_type",
        "text_config",
        "quantization_config",
        "tie_word_embeddings",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
    }
)

# key -> (the values that mean what is implemented, what any other value would need)
PINNED: Final[dict[str, tuple[tuple[object, ...], str]]] = {
    "hidden_act": (("silu",), "another activation in the feed-forward layers"),
    "scoring_func": (("sigmoid",), "another router score"),
    "topk_method": (("noaux_tc",), "another way to choose experts"),
    "moe_layer_freq": ((1,), "dense layers between the expert layers"),
    "attention_bias": ((False,), "biases in the attention projections"),
    "mlp_bias": ((False,), "biases in the feed-forward projections"),
    "attention_dropout": ((0, None), "dropout in attention"),
    "rope_interleave": ((True, None), "rotary pairs taken from two halves"),
    "partial_rotary_factor": ((1, None), "rotation of a part of the rope dimensions"),
    "sliding_window": ((None,), "attention limited to a window"),
    "use_sliding_window": ((False, None), "attention limited to a window"),
    "is_decoder": ((False, True, None), "nothing: the model is causal either way"),
    "is_encoder_decoder": ((False, None), "an encoder"),
    "add_cross_attention": ((False, None), "cross-attention"),
    "cross_attention_hidden_size": ((None,), "cross-attention"),
    "tie_encoder_decoder": ((False, None), "an encoder"),
    "pruned_heads": (({}, None), "attention heads cut out of the weights"),
}

# key -> the fields whose sum it must repeat, in each accepted reading
REPEATS: Final[dict[str, tuple[tuple[str, ...], ...]]] = {
    "num_key_value_heads": (("num_attention_heads",),),  # MLA expands its latent to every head
    "num_local_experts": (("n_routed_experts",),),
    "qk_head_dim": (("qk_nope_head_dim", "qk_rope_head_dim"),),
    # transformers writes the rotated width (64), other exporters the whole query width (192)
    "head_dim": (("qk_rope_head_dim",), ("qk_nope_head_dim", "qk_rope_head_dim")),
}
