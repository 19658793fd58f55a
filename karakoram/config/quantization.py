"""`quantization_config`: which of the three stored formats a checkpoint declares.

bf16 (no such key), fp8 in 128×128 blocks (K2-Base, K2-Instruct, 0905), or int4 in groups of 32, symmetric, in
compressed-tensors' `pack-quantized` layout (K2-Thinking, K2.5, K2.6). Everything else is refused by key and value,
since other bits under the same tensor names would be read as wrong numbers without any error.
"""

from collections.abc import Mapping
from typing import Any, Final, Literal, cast

from karakoram.errors import ConfigError

WeightFormat = Literal["bf16", "fp8", "int4"]

_SUPPORTED: Final = (
    "Supported are bf16 (no quantization_config), fp8 e4m3 in 128x128 blocks (quant_method fp8), and symmetric int4 in "
    "groups of 32 (quant_method compressed-tensors, format pack-quantized)."
)
_FP8: Final[dict[str, tuple[object, ...]]] = {
    "fmt": ("e4m3", "float8_e4m3fn", None),
    "activation_scheme": ("dynamic", None),
    "weight_block_size": ([128, 128], (128, 128)),
    "scale_fmt": ("float", None),
    "expert_dtype": ("fp8", None),
}
_INT4: Final[dict[str, tuple[object, ...]]] = {
    "format": ("pack-quantized",),
    "quantization_status": ("compressed", None),
    "kv_cache_scheme": (None,),
    "sparsity_config": (None, {}),
    "moe_sparsity_config": (None, {}),
    "transform_config": (None, {}),
}
_INT4_WEIGHTS: Final[dict[str, tuple[object, ...]]] = {
    "num_bits": (4,),
    "type": ("int",),
    "symmetric": (True,),
    "strategy": ("group",),
    "group_size": (32,),
    "dynamic": (False, None),
    "actorder": (None,),
    "block_structure": (None,),
    "zp_dtype": (None,),
}
_REQUIRED: Final = {"weight_block_size", "format", "num_bits", "type", "symmetric", "strategy", "group_size"}


def _pin(block: Mapping[str, Any], allowed: Mapping[str, tuple[object, ...]], where: str) -> None:
    for key, values in allowed.items():
        if key not in block and key not in _REQUIRED:
            continue
        value = block.get(key)
        if not any(value == ok and isinstance(value, bool) == isinstance(ok, bool) for ok in values):
            raise ConfigError(f"config key {where}{key} is {value!r}.", _SUPPORTED)


def _object(value: object, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"config key {where} is {value!r}.", "It must be an object.")
    return cast("Mapping[str, Any]", value)


def weight_format(quantization_config: Mapping[str, Any] | None) -> WeightFormat:
    """Validate a `quantization_config` and name its format. ConfigError names the first unsupported key and value."""
    if not quantization_config:
        return "bf16"
    where = "quantization_config."
    method = quantization_config.get("quant_method")
    if method == "fp8":
        _pin(quantization_config, _FP8, where)
        return "fp8"
    if method != "compressed-tensors":
        raise ConfigError(f"config key {where}quant_method is {method!r}.", _SUPPORTED)
    _pin(quantization_config, _INT4, where)
    groups = _object(quantization_config.get("config_groups"), f"{where}config_groups")
    if not groups:
        raise ConfigError(f"config key {where}config_groups is empty.", _SUPPORTED)
    for name, raw_group in groups.items():
        place = f"{where}config_groups.{name}."
        group = _object(raw_group, place.rstrip("."))
        _pin(
            group,
            {"input_activations": (None,), "output_activations": (None,), "format": ("pack-quantized", None)}
            if "format" in group
            else {"input_activations": (None,), "output_activations": (None,)},
            place,
        )
        _pin(_object(group.get("weights"), f"{place}weights"), _INT4_WEIGHTS, f"{place}weights.")
    return "int4"


def int4_quantization_config() -> dict[str, Any]:
    """The `quantization_config` of K2-Thinking and later: only the routed experts are int4. A fresh dict each time."""
    return {
        "config_groups": {
            "group_0": {
                "input_activations": None,
                "output_activations": None,
                "targets": ["Linear"],
                "weights": {
                    "actorder": None,
                    "block_structure": None,
                    "dynamic": False,
                    "group_size": 32,
                    "num_bits": 4,
                    "observer": "minmax",
                    "observer_kwargs": {},
                    "strategy": "group",
                    "symmetric": True,
                    "type": "int",
                },
            }
        },
        "format": "pack-quantized",
        "ignore": [
            "lm_head",
            "re:.*self_attn.*",
            "re:.*shared_experts.*",
            "re:.*mlp\\.(gate|up|gate_up|down)_proj.*",
        ],
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
    }


def fp8_quantization_config() -> dict[str, Any]:
    """The `quantization_config` of K2-Base, K2-Instruct and 0905. A fresh dict each time."""
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    }
