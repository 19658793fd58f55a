"""The two nested blocks: RoPE in both spellings, and the three formats a `quantization_config` may declare."""

import contextlib
import copy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from karakoram.config import ModelConfig, RopeScaling, int4_quantization_config
from karakoram.config.quantization import weight_format
from karakoram.config.rope import read_rope
from karakoram.errors import ConfigError

YARN: dict[str, Any] = {
    "factor": 32.0,
    "original_max_position_embeddings": 4096,
    "beta_fast": 1.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
EXPECTED = (50000.0, RopeScaling(32.0, 4096, 1.0, 1.0, 1.0, 1.0))


@pytest.mark.parametrize(
    "raw",
    [
        {"rope_theta": 50000.0, "rope_scaling": {"type": "yarn", **YARN}},
        {"rope_theta": 50000, "rope_scaling": {"rope_type": "yarn", **YARN}},
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 50000.0, **YARN}},
        {"rope_theta": 50000.0, "rope_parameters": {"rope_type": "yarn", "type": "yarn", **YARN}},
        {
            "rope_theta": 50000.0,
            "rope_scaling": {"type": "yarn", **YARN},
            "rope_parameters": {"rope_type": "yarn", "rope_theta": 50000.0, **YARN},
        },
    ],
)
def test_both_spellings_mean_the_same(raw: dict[str, Any]) -> None:
    assert read_rope(raw, 131072) == EXPECTED


@pytest.mark.parametrize(
    "raw",
    [
        {},
        {"rope_scaling": None},
        {"rope_scaling": {"type": "default"}},
        {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}},
        {"rope_parameters": {}, "rope_theta": 10000},
    ],
)
def test_no_scaling(raw: dict[str, Any]) -> None:
    assert read_rope(raw, 4096) == (10000.0, None)


def test_absent_yarn_keys_mean_what_they_mean_in_transformers() -> None:
    _, scaling = read_rope({"rope_scaling": {"type": "yarn", "factor": 4}}, 8192)
    assert scaling == RopeScaling(4.0, 8192, beta_fast=32.0, beta_slow=1.0, mscale=1.0, mscale_all_dim=0.0)
    block = {"type": "yarn", "factor": None, "original_max_position_embeddings": 1024, "beta_fast": None, "mscale": 0.7}
    _, scaling = read_rope({"rope_scaling": block}, 8192)
    assert scaling == RopeScaling(8.0, 1024)  # mscale alone counts for nothing
    _, scaling = read_rope({"rope_scaling": {"type": "yarn", "factor": 4, "mscale_all_dim": 1.0}}, 8192)
    assert scaling is not None
    assert (scaling.mscale, scaling.mscale_all_dim) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("raw", "named"),
    [
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "linear"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2}}, "dynamic"),
        ({"rope_scaling": {"type": "yarn", "rope_type": "linear", "factor": 2}}, "disagree"),
        ({"rope_scaling": {"factor": 2}}, "factor"),
        ({"rope_scaling": {"type": "yarn"}}, "factor"),
        ({"rope_scaling": {"type": "yarn", "factor": 0.5}}, "factor"),
        ({"rope_scaling": {"type": "yarn", "factor": "32"}}, "factor"),
        ({"rope_scaling": {"type": "yarn", "factor": 2, "original_max_position_embeddings": 0.5}}, "original"),
        ({"rope_scaling": {"type": "yarn", "factor": 2, "original_max_position_embeddings": -4}}, "original"),
        ({"rope_scaling": {"type": "yarn", "factor": 2, "beta_fast": 1, "beta_slow": 32}}, "beta"),
        ({"rope_scaling": {"type": "yarn", "factor": 2, "attention_factor": 1.5}}, "attention_factor"),
        ({"rope_scaling": {"type": "yarn", "factor": 2, "truncate": False}}, "truncate"),
        (
            {"rope_scaling": {"type": "yarn", "factor": 2, "long_factor": [1]}},
            "--allow-config-key rope_scaling.long_factor",
        ),
        ({"rope_theta": 1e4, "rope_parameters": {"rope_type": "default", "rope_theta": 5e4}}, "disagree"),
        (
            {
                "rope_scaling": {"type": "yarn", **YARN},
                "rope_parameters": {"rope_type": "yarn", **YARN, "factor": 64.0},
            },
            "disagree",
        ),
        ({"rope_scaling": {"type": "yarn", **YARN}, "rope_parameters": {"rope_type": "default"}}, "disagree"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "full_attention"),
    ],
)
def test_what_is_not_implemented_or_contradictory_is_refused(raw: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_rope(raw, 4096)
    assert named in str(caught.value)
    assert caught.value.fix


def test_an_unknown_rope_key_can_be_allowed() -> None:
    raw = {"rope_scaling": {"type": "yarn", **YARN, "extra": 1}, "rope_theta": 50000.0}
    assert read_rope(raw, 131072, ["rope_scaling.extra"]) == EXPECTED


@given(
    st.sampled_from(["type", "rope_type", "rope_theta", "partial_rotary_factor", "truncate", *YARN]),
    st.none() | st.booleans() | st.integers() | st.just(10**400) | st.floats() | st.text(max_size=5) | st.just([1]),
)
def test_any_value_in_any_place_is_read_or_refused(key: str, value: Any) -> None:
    for name in ("rope_scaling", "rope_parameters"):
        with contextlib.suppress(ConfigError):
            read_rope({name: {"type": "yarn", **YARN, key: value}}, 131072)


# --------------------------------------------------------------------------------------------------- the stored format


def int4(**changes: Any) -> dict[str, Any]:
    """K2-Thinking's block with `changes` to its weights."""
    block = int4_quantization_config()
    block["config_groups"]["group_0"]["weights"].update(changes)
    return block


def test_the_three_formats() -> None:
    assert weight_format(None) == "bf16"
    assert weight_format({}) == "bf16"
    assert weight_format({"quant_method": "fp8", "weight_block_size": [128, 128]}) == "fp8"
    assert weight_format(int4()) == "int4"


@pytest.mark.parametrize(
    ("block", "key"),
    [
        ({"quant_method": "gptq", "bits": 4}, "quant_method"),
        ({"quant_method": "awq"}, "quant_method"),
        ({"quant_method": "bitsandbytes"}, "quant_method"),
        ({"quant_method": ["fp8"]}, "quant_method"),
        ({"load_in_4bit": True}, "quant_method"),
        ({"quant_method": "fp8"}, "weight_block_size"),
        ({"quant_method": "fp8", "weight_block_size": [64, 64]}, "weight_block_size"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e5m2"}, "fmt"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "static"}, "activation_scheme"),
        ({**int4(), "format": "nvfp4-pack-quantized"}, "format"),
        ({**int4(), "quantization_status": "frozen"}, "quantization_status"),
        ({**int4(), "kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme"),
        ({**int4(), "config_groups": {}}, "config_groups"),
        ({**int4(), "config_groups": [1]}, "config_groups"),
        ({**int4(), "config_groups": {"g": {"weights": None}}}, "config_groups.g.weights"),
        (int4(num_bits=8), "num_bits"),
        (int4(group_size=128), "group_size"),
        (int4(symmetric=False), "symmetric"),
        (int4(strategy="channel"), "strategy"),
        (int4(type="float"), "type"),
        (int4(actorder="group"), "actorder"),
        (int4(dynamic=True), "dynamic"),
    ],
)
def test_other_formats_are_refused_and_the_supported_named(block: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        weight_format(block)
    assert key in str(caught.value)
    if not key.startswith("config_groups") or block["config_groups"] == {}:
        assert "groups of 32" in str(caught.value), "names what is supported"


def test_quantized_activations_are_refused() -> None:
    block = int4()
    block["config_groups"]["group_0"]["input_activations"] = {"num_bits": 8}
    with pytest.raises(ConfigError, match="input_activations"):
        weight_format(block)


def test_a_config_built_in_python_is_checked_too() -> None:
    raw = copy.deepcopy(ModelConfig.preset("nano").to_dict())
    raw["quantization_config"]["config_groups"]["group_0"]["weights"]["group_size"] = 64
    with pytest.raises(ConfigError, match="group_size"):
        ModelConfig.from_dict(raw)
