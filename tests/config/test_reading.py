"""What a `config.json` may say: every published key loads, every other one is refused by name, value and fix."""

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from karakoram.config import PRESETS, ModelConfig, RopeScaling, keys
from karakoram.config.presets import PRESETS as RAW
from karakoram.errors import ConfigError

# A small valid text config, in the spelling of the published files.
SMALL: dict[str, Any] = ModelConfig.preset("nano").to_dict()


def changed(**changes: Any) -> dict[str, Any]:
    return {**SMALL, **changes}


def refusal(raw: Any, *parts: str, allow: tuple[str, ...] = ()) -> str:
    with pytest.raises(ConfigError) as caught:
        ModelConfig.from_dict(raw, allow_keys=allow)
    text = str(caught.value)
    for part in parts:
        assert part in text, text
    assert caught.value.fix, "every refusal says what to do"
    return text


# ------------------------------------------------------------------------------------------------------- what loads


@pytest.mark.parametrize("name", PRESETS)
def test_presets_load_and_round_trip(name: str) -> None:
    config = ModelConfig.preset(name)
    again = ModelConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert again.quantization_config == config.quantization_config
    assert config.notes == ()


def test_presets_have_the_published_values() -> None:
    k2, k25, moonlight = (ModelConfig.preset(name) for name in ("k2", "k2.5", "moonlight-16b"))
    assert (k2.num_hidden_layers, k2.n_routed_experts, k2.num_experts_per_tok) == (61, 384, 8)
    assert k2.rope_scaling == RopeScaling(32.0, 4096, beta_fast=1.0, beta_slow=1.0, mscale=1.0, mscale_all_dim=1.0)
    assert k25.rope_scaling is not None
    assert (k25.rope_scaling.factor, k25.rope_scaling.beta_fast, k25.rms_norm_eps) == (64.0, 32.0, 1e-5)
    thinking = ModelConfig.preset("k2-thinking").rope_scaling
    assert thinking is not None
    assert (thinking.factor, thinking.beta_fast) == (64.0, 1.0)
    assert (moonlight.q_lora_rank, moonlight.n_shared_experts, moonlight.rope_scaling) == (None, 2, None)
    formats = {name: ModelConfig.preset(name).weight_format for name in PRESETS}
    assert formats["k2"] == "fp8" and formats["k2.6"] == "int4" and formats["kimi-vl-a3b"] == "bf16"
    families = {name: ModelConfig.preset(name).family for name in PRESETS}
    assert families["k2"] == "kimi-k2" and families["k2.5"] == "kimi-k2.5"
    assert families["kimi-vl-a3b"] == "kimi-vl" and families["moonlight-16b"] == "deepseek-v3"


def test_nano_fits_its_formats() -> None:
    nano = ModelConfig.preset("nano")
    assert nano.eos_token_ids == (3969, 3970) and nano.vocab_size == 4096
    for width in (nano.hidden_size, nano.moe_intermediate_size, nano.intermediate_size):
        assert width % 32 == 0, "an int4 group has 32 weights"


def test_unknown_preset_lists_the_known() -> None:
    with pytest.raises(ConfigError, match=r"no preset 'k3'.*k2-thinking"):
        ModelConfig.preset("k3")


@pytest.mark.shared
def test_the_official_k26_config_is_the_preset(shared_dir: Path) -> None:
    config = ModelConfig.from_dir(shared_dir / "data" / "kimi_tokenizer")
    assert config == ModelConfig.preset("k2.6")
    assert config.quantization_config == ModelConfig.preset("k2.6").quantization_config
    assert (config.family, config.model_type, config.notes) == ("kimi-k2.5", "kimi_k2", ())


def test_keys_of_the_published_k2_moonlight_and_kimi_vl_configs_load() -> None:
    dressing = {
        "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
        "aux_loss_alpha": 0.001,
        "ep_size": 1,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "pretraining_tp": 1,
        "seq_aux": True,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.48.3",
        "use_cache": True,
    }
    for name in ("k2", "moonlight-16b"):
        assert ModelConfig.from_dict({**RAW[name], **dressing}) == ModelConfig.preset(name)
    wrapped = RAW["kimi-vl-a3b"]
    wrapped = {
        **wrapped,
        "vision_config": {"model_type": "moonvit"},
        "text_config": {**wrapped["text_config"], **dressing},
    }
    assert ModelConfig.from_dict(wrapped) == ModelConfig.preset("kimi-vl-a3b")


def test_every_harmless_key_has_a_reason_and_one_list() -> None:
    assert all(len(reason) > 10 for reason in {**keys.HARMLESS, **keys.WRAPPER_HARMLESS}.values())
    lists = [keys.USED, keys.HARMLESS.keys(), keys.PINNED.keys(), keys.REPEATS.keys()]
    assert sum(map(len, lists)) == len(set().union(*lists)), "a key is on two lists"


# ---------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_act", "gelu"),
        ("scoring_func", "softmax"),
        ("topk_method", "group_limited_greedy"),
        ("moe_layer_freq", 2),
        ("attention_bias", True),
        ("attention_dropout", 0.1),
        ("rope_interleave", False),
        ("sliding_window", 4096),
        ("num_key_value_heads", 2),
        ("head_dim", 48),
        ("qk_head_dim", 65),
        ("num_local_experts", 8),
        ("is_encoder_decoder", True),
        ("pruned_heads", {"0": [1]}),
        ("partial_rotary_factor", 0.5),
    ],
)
def test_keys_with_one_good_value_refuse_others(key: str, value: Any) -> None:
    refusal(changed(**{key: value}), key, repr(value))
    refusal(changed(**{key: value}), key, allow=(key,))  # other mathematics cannot be waved through


@pytest.mark.parametrize(
    ("key", "value"), [("attention_dropout", 0), ("head_dim", 32), ("head_dim", 64), ("sliding_window", None)]
)
def test_keys_with_one_good_value_accept_it(key: str, value: Any) -> None:
    assert ModelConfig.from_dict(changed(**{key: value})) == ModelConfig.preset("nano")


def test_unknown_keys_are_refused_unless_allowed() -> None:
    refusal(changed(logit_softcap=30.0), "logit_softcap", "30.0", "--allow-config-key logit_softcap")
    config = ModelConfig.from_dict(changed(logit_softcap=30.0), allow_keys=["logit_softcap"])
    assert config == ModelConfig.preset("nano")
    assert any("logit_softcap" in note for note in config.notes)
    nested = {"model_type": "kimi_k25", "text_config": changed(odd=1)}
    refusal(nested, "text_config.odd")
    assert ModelConfig.from_dict(nested, allow_keys=["text_config.odd"]).family == "kimi-k2.5"
    refusal({"model_type": "kimi_k25", "text_config": SMALL, "audio_config": {}}, "audio_config")


@pytest.mark.parametrize("key", [*keys.REQUIRED_INTS, "q_lora_rank", "norm_topk_prob", "routed_scaling_factor"])
def test_missing_keys_are_named_not_guessed(key: str) -> None:
    refusal({name: value for name, value in SMALL.items() if name != key}, key, "missing")


@pytest.mark.parametrize("value", ["256", 256.0, True, None, [256], {}, -1, 0, 2**31])
@pytest.mark.parametrize("key", keys.REQUIRED_INTS)
def test_wrong_types_and_sizes_name_the_key(key: str, value: Any) -> None:
    if key == "first_k_dense_replace" and value == 0 and not isinstance(value, bool):
        assert ModelConfig.from_dict(changed(first_k_dense_replace=0)).num_moe_layers == 6
        return
    refusal(changed(**{key: value}), key, repr(value))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rms_norm_eps", 0),
        ("rms_norm_eps", "1e-6"),
        ("rms_norm_eps", 10**400),
        ("rope_theta", 0),
        ("rope_theta", True),
        ("routed_scaling_factor", -1.0),
        ("norm_topk_prob", 1),
        ("tie_word_embeddings", "no"),
        ("q_lora_rank", 0),
        ("qk_rope_head_dim", 31),
        ("bos_token_id", -1),
        ("bos_token_id", [1]),
        ("eos_token_id", "end"),
        ("eos_token_id", []),
        ("num_nextn_predict_layers", -1),
        ("num_experts_per_tok", 17),
        ("n_group", 3),
        ("n_group", 16),  # one expert a group: nothing to sum up two of
        ("topk_group", 2),
        ("num_hidden_layers", 10**6),
        ("vocab_size", 2**30),  # × 256 is more than 2^31 elements
        ("model_type", "llama"),
        ("model_type", ["kimi_k2"]),
        ("quantization_config", "fp8"),
        ("rope_scaling", 32),
    ],
)
def test_values_out_of_bounds(key: str, value: Any) -> None:
    refusal(changed(**{key: value}), key)


def test_groups_must_hold_enough_experts() -> None:
    refusal(changed(n_group=4, topk_group=1, num_experts_per_tok=5), "num_experts_per_tok", "4 experts")
    assert ModelConfig.from_dict(changed(n_group=4, topk_group=2, num_experts_per_tok=8)).n_group == 4


def test_a_dense_model_is_allowed_and_its_router_is_not_checked() -> None:
    config = ModelConfig.from_dict(changed(first_k_dense_replace=6, num_experts_per_tok=99))
    assert config.num_moe_layers == 0


def test_multi_token_prediction_is_noted() -> None:
    for key in ("num_nextn_predict_layers", "num_mtp_layers"):
        config = ModelConfig.from_dict(changed(**{"num_nextn_predict_layers": 0, key: 1}))
        assert config.num_nextn_predict_layers == 1
        assert "multi-token" in config.notes[0]


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=5), lambda c: st.lists(c, max_size=2)))
def test_any_json_in_any_place_is_read_or_refused(value: Any) -> None:
    """Whatever stands behind a key: a ModelConfig or a ConfigError, never another exception."""
    for key in SMALL:
        with contextlib.suppress(ConfigError):
            ModelConfig.from_dict(changed(**{key: value}))


# ------------------------------------------------------------------------------------------------ nesting and damage


def test_wrapped_configs_take_ids_and_formats_from_either_level() -> None:
    inner = {key: value for key, value in SMALL.items() if key not in ("eos_token_id", "quantization_config")}
    raw = {"model_type": "kimi_k25", "text_config": inner, "eos_token_id": 7, "bos_token_id": 1}
    raw["quantization_config"] = SMALL["quantization_config"]
    config = ModelConfig.from_dict(raw)
    assert (config.eos_token_id, config.bos_token_id, config.weight_format) == (7, 3968, "int4")
    raw["text_config"] = {**inner, "quantization_config": RAW["k2"]["quantization_config"]}
    refusal(raw, "fp8", "int4")


def test_the_wrapper_owns_the_output_head() -> None:
    inner = changed(tie_word_embeddings=False)
    config = ModelConfig.from_dict({"model_type": "kimi_k25", "text_config": inner, "tie_word_embeddings": True})
    assert config.tie_word_embeddings
    assert "tie_word_embeddings" in config.notes[0]


@pytest.mark.parametrize("text_config", [None, [], "kimi_k2", {"model_type": "qwen2"}])
def test_bad_text_configs(text_config: Any) -> None:
    refusal({"model_type": "kimi_k25", "text_config": text_config}, "text_config")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe{}",
        b'{"a": NaN}',
        b'{"hidden_size": 1, "hidden_size": 2}',
        b"[" * 100_000,
        b" " * 4_000_001,
    ],
)
def test_damaged_files_are_config_errors(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"config\.json"):
        ModelConfig.from_dir(tmp_path)


def test_a_missing_file_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        ModelConfig.from_dir(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="JSON object"):
        ModelConfig.from_dict([])  # pyright: ignore[reportArgumentType]
