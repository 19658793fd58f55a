"""RoPE settings: two spellings of `config.json`, one meaning.

Older files write `rope_theta` beside `rope_scaling {type | rope_type, factor, …}` (or null), transformers 5 writes
`rope_parameters {rope_type, rope_theta, factor, …}`. Both are read to `(theta, RopeScaling | None)`; a file with both
must say the same twice. Only YaRN and no scaling exist in this family.

What an absent YaRN key means follows transformers' `_compute_yarn_parameters` and DeepSeek-V3's `yarn_apply_mscale`:
`beta_fast` 32, `beta_slow` 1 (null and 0 count as absent); `original_max_position_embeddings` the declared maximum;
a null `factor` the ratio of the two. An absent, null or zero `mscale` or `mscale_all_dim` becomes 0 here: unless
both are given, cos and sin are scaled as if mscale were 1 (`karakoram.model.rope`).
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from karakoram.errors import ConfigError


@dataclass(frozen=True)
class RopeScaling:
    """YaRN settings (`rope_scaling` / `rope_parameters`), static at all lengths.

    `mscale` or `mscale_all_dim` of 0 means "not given".
    """

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0

    def __post_init__(self) -> None:
        for name in ("factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"):
            value: float = getattr(self, name)
            if not math.isfinite(value) or not 0 <= value <= 1e6:
                raise ConfigError(f"config key rope_scaling.{name} is {value!r}.", "It must lie between 0 and 1e6.")
        if self.factor < 1:
            raise ConfigError(f"config key rope_scaling.factor is {self.factor!r}.", "YaRN stretches: it must be ≥ 1.")
        if not 1 <= self.original_max_position_embeddings < 2**31:
            got = self.original_max_position_embeddings
            raise ConfigError(
                f"config key rope_scaling.original_max_position_embeddings is {got!r}.", "It must be a positive length."
            )
        if not 0 < self.beta_slow <= self.beta_fast:
            raise ConfigError(
                f"config key rope_scaling.beta_fast is {self.beta_fast!r} and beta_slow {self.beta_slow!r}.",
                "beta_fast must be at least beta_slow, and beta_slow above 0.",
            )


_YARN_NUMBERS = ("factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "original_max_position_embeddings")
_PINNED: dict[str, tuple[object, ...]] = {
    "attention_factor": (None,),  # an override that no model of this family uses
    "truncate": (True, None),
    "partial_rotary_factor": (1, None),
}
_KNOWN = frozenset({"type", "rope_type", "rope_theta", *_YARN_NUMBERS, *_PINNED})


def _number(raw: Mapping[str, Any], key: str, where: str) -> float | None:
    value = raw.get(key)
    if value is None:
        return None
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or abs(value) > 1e30 or not math.isfinite(value):  # a long JSON integer would overflow float()
        raise ConfigError(f"config key {where}{key} is {value!r}.", "It must be a finite number.")
    return float(value)


def _kind(block: Mapping[str, Any], where: str) -> str:
    kinds: list[object] = [block[key] or "default" for key in ("type", "rope_type") if key in block]
    if any(kind != kinds[0] for kind in kinds):
        raise ConfigError(
            f"config keys {where}type {block['type']!r} and {where}rope_type {block['rope_type']!r} disagree.",
            "Keep the one the model was trained with.",
        )
    kind = kinds[0] if kinds else "default"
    if not isinstance(kind, str) or kind not in ("yarn", "default"):
        raise ConfigError(
            f"config key {where}rope_type is {kind!r}.", "Only 'yarn' and 'default' (no scaling) are implemented."
        )
    if kind == "default" and block.get("factor") not in (None, 1):
        raise ConfigError(
            f"config key {where}factor is {block['factor']!r} with rope type 'default'.",
            "Name the type ('yarn') or drop the factor.",
        )
    return kind


def _read_block(
    block: Mapping[str, Any], name: str, max_positions: int, allow_keys: Collection[str]
) -> tuple[float | None, RopeScaling | None]:
    where = f"{name}."
    for key, value in block.items():
        if key in _PINNED and not any(value is ok or (value == ok and type(value) is not bool) for ok in _PINNED[key]):
            raise ConfigError(f"config key {where}{key} is {value!r}.", f"Only {_PINNED[key][0]!r} is implemented.")
        if key not in _KNOWN and not {key, where + key} & set(allow_keys):
            raise ConfigError(
                f"config key {where}{key} = {value!r} is unknown and may change the model.",
                f"If it does not, pass --allow-config-key {where}{key}.",
            )
    theta = _number(block, "rope_theta", where)
    if _kind(block, where) == "default":
        return theta, None
    numbers = {key: _number(block, key, where) for key in _YARN_NUMBERS}
    if "factor" not in block:
        raise ConfigError(f"config key {where}factor is missing.", "YaRN needs it; K2 has 32, K2.5 has 64.")
    original = numbers["original_max_position_embeddings"] or float(max_positions)
    if original != int(original):
        raise ConfigError(f"config key {where}original_max_position_embeddings is {original!r}.", "It must be whole.")
    factor = numbers["factor"] if numbers["factor"] is not None else max_positions / original
    mscale_all_dim = numbers["mscale_all_dim"] or 0.0
    return theta, RopeScaling(
        factor=factor,
        original_max_position_embeddings=int(original),
        beta_fast=numbers["beta_fast"] or 32.0,
        beta_slow=numbers["beta_slow"] or 1.0,
        # alone, without mscale_all_dim, mscale is ignored by transformers: one spelling for one meaning
        mscale=(numbers["mscale"] or 0.0) if mscale_all_dim else 1.0,
        mscale_all_dim=mscale_all_dim,
    )


def read_rope(
    raw: Mapping[str, Any], max_positions: int, allow_keys: Collection[str] = ()
) -> tuple[float, RopeScaling | None]:
    """Both spellings of the RoPE settings in `raw` -> (theta, YaRN or None). ConfigError where they disagree."""
    thetas: dict[str, float] = {}
    scalings: dict[str, RopeScaling | None] = {}
    flat_theta = _number(raw, "rope_theta", "")
    if flat_theta is not None:
        thetas["rope_theta"] = flat_theta
    for name in ("rope_scaling", "rope_parameters"):
        block = raw.get(name)
        if block is None:
            continue
        if not isinstance(block, Mapping):
            raise ConfigError(f"config key {name} is {block!r}.", "It must be an object or null.")
        theta, scalings[name] = _read_block(block, name, max_positions, allow_keys)  # pyright: ignore[reportUnknownArgumentType]
        if theta is not None:
            thetas[f"{name}.rope_theta"] = theta
    if len(set(thetas.values())) > 1:
        raise ConfigError(
            f"config keys disagree on the RoPE base: {thetas}.", "Keep the one the model was trained with."
        )
    if len(set(scalings.values())) > 1:
        raise ConfigError(
            f"config keys rope_scaling and rope_parameters disagree: {scalings}.",
            "Keep the one the model was trained with.",
        )
    theta = next(iter(thetas.values()), 10000.0)  # transformers' default_theta
    if not 1 < theta <= 1e12:
        raise ConfigError(f"config key rope_theta is {theta!r}.", "It must be above 1 and at most 1e12.")
    return theta, next(iter(scalings.values()), None)
