"""From the JSON of a `config.json` to the arguments of `ModelConfig`, refusing at the door.

Steps: unwrap (`kimi_k25` and `kimi_vl` keep their text model in `text_config`), sort every key into used, harmless,
pinned or unknown (`keys.py`), then read each used key with its JSON type. Nothing is guessed from a path or a shape.
"""

import json
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Final, cast

from karakoram.config import keys
from karakoram.config.quantization import weight_format
from karakoram.config.rope import read_rope
from karakoram.errors import ConfigError

MAX_CONFIG_BYTES: Final = 4_000_000  # the longest published one is under 20 kB

_MISSING: Final = object()


def load_json_object(path: Path, limit_bytes: int = MAX_CONFIG_BYTES) -> dict[str, Any]:
    """The JSON object in file `path`. ConfigError if absent, too long, not an object, or with a double key."""
    try:
        with path.open("rb") as file:
            data = file.read(limit_bytes + 1)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(f"cannot read {path}: {reason}.", "Name a directory that holds a config.json.") from error
    if len(data) > limit_bytes:
        raise ConfigError(
            f"{path} is longer than {limit_bytes:,} bytes.", "That is no model configuration; check the file."
        )
    try:
        raw: object = json.loads(data.decode("utf-8-sig"), parse_constant=_no_constant, object_pairs_hook=_no_doubles)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid JSON: {error}.", "Download the file again.") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} holds a JSON {type(raw).__name__}, not an object.", "Download the file again.")
    return cast("dict[str, Any]", raw)


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is not a JSON number")


def _no_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        seen: set[str] = set()
        double = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"key {double!r} appears twice")
    return result


def read_config(raw: Mapping[str, Any], allow_keys: Collection[str]) -> dict[str, Any]:
    """Keyword arguments for `ModelConfig` from a parsed `config.json`. ConfigError names key, value and fix."""
    if not isinstance(raw, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ConfigError(f"a config must be a JSON object, not {type(raw).__name__}.", "Pass the parsed config.json.")
    notes: list[str] = []
    text, outer = _unwrap(raw, allow_keys, notes)
    _sort_keys(text, "text_config." if outer else "", keys.USED, keys.HARMLESS, allow_keys, notes)
    values: dict[str, Any] = {name: _int(text, name) for name in keys.REQUIRED_INTS}
    values["q_lora_rank"] = None if "q_lora_rank" in text and text["q_lora_rank"] is None else _int(text, "q_lora_rank")
    values["routed_scaling_factor"] = _float(text, "routed_scaling_factor")
    values["norm_topk_prob"] = _bool(text, "norm_topk_prob")
    values["rms_norm_eps"] = _float(text, "rms_norm_eps", 1e-6)
    values["max_position_embeddings"] = _int(text, "max_position_embeddings", 4096)
    values["rope_theta"], values["rope_scaling"] = read_rope(text, values["max_position_embeddings"], allow_keys)
    values["tie_word_embeddings"] = _tied(text, outer, notes)
    values["model_type"] = text.get("model_type", "deepseek_v3")
    values["wrapper_model_type"] = outer.get("model_type") if outer else None
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        holder = text if text.get(name) is not None else (outer or text)
        values[name] = _token_id(holder, name, several=name == "eos_token_id")
    values["num_nextn_predict_layers"] = _mtp_layers(text, notes)
    values["quantization_config"] = _quantization(text, outer)
    for level in (text, outer or {}):
        _check_pinned(level, values)
    values["notes"] = tuple(notes)
    return values


def _unwrap(
    raw: Mapping[str, Any], allow_keys: Collection[str], notes: list[str]
) -> tuple[Mapping[str, Any], Mapping[str, Any] | None]:
    model_type = raw.get("model_type", _MISSING)
    known = (*keys.TEXT_MODEL_TYPES, *keys.WRAPPER_MODEL_TYPES)
    if model_type is _MISSING:
        raise ConfigError("config key model_type is missing.", f"It must be one of {', '.join(known)}.")
    if model_type in keys.TEXT_MODEL_TYPES:
        return raw, None
    if model_type not in keys.WRAPPER_MODEL_TYPES:
        raise ConfigError(
            f"config key model_type is {model_type!r}: another architecture.",
            f"Karakoram runs {', '.join(known)}.",
        )
    text = raw.get("text_config", _MISSING)
    if not isinstance(text, Mapping):
        got = "missing" if text is _MISSING else _short(text)
        raise ConfigError(f"config key text_config is {got}.", f"A {model_type} config keeps its text model there.")
    text = cast("Mapping[str, Any]", text)
    inner = text.get("model_type", "deepseek_v3")
    if inner not in keys.TEXT_MODEL_TYPES:
        raise ConfigError(
            f"config key text_config.model_type is {inner!r}.", f"It must be one of {', '.join(keys.TEXT_MODEL_TYPES)}."
        )
    _sort_keys(raw, "", keys.WRAPPER_USED, keys.WRAPPER_HARMLESS, allow_keys, notes)
    return text, raw


def _sort_keys(
    raw: Mapping[str, Any],
    where: str,
    used: Collection[str],
    harmless: Collection[str],
    allow_keys: Collection[str],
    notes: list[str],
) -> None:
    for key, value in raw.items():
        if key in used or key in harmless or key in keys.PINNED or key in keys.REPEATS:
            continue
        if key in allow_keys or where + key in allow_keys:
            notes.append(f"config key {where}{key} = {_short(value)} is unknown and was ignored on request")
            continue
        raise ConfigError(
            f"config key {where}{key} = {_short(value)} is unknown and may change the model.",
            f"If it does not, pass --allow-config-key {key}.",
        )


def _check_pinned(raw: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    for key, (allowed, meaning) in keys.PINNED.items():
        if key in raw and not any(_same(raw[key], ok) for ok in allowed):
            raise ConfigError(
                f"config key {key} is {_short(raw[key])}, which asks for {meaning}.",
                f"Only {allowed[0]!r} is implemented.",
            )
    for key, readings in keys.REPEATS.items():
        if raw.get(key) is None:
            continue
        expected = [sum(values[name] for name in names) for names in readings]
        if not any(_same(raw[key], number) for number in expected):
            formula = " or ".join(" + ".join(names) for names in readings)
            raise ConfigError(
                f"config key {key} is {_short(raw[key])}.",
                f"It must equal {formula} = {' or '.join(map(str, expected))}.",
            )


def _same(value: object, expected: object) -> bool:
    return value == expected and isinstance(value, bool) == isinstance(expected, bool)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _get(raw: Mapping[str, Any], key: str, default: object) -> object:
    value = raw.get(key, default)
    if value is _MISSING:
        fix = "Write null for a model without a query latent." if key == "q_lora_rank" else "Add it to config.json."
        raise ConfigError(f"config key {key} is missing.", fix)
    return value


def _int(raw: Mapping[str, Any], key: str, default: object = _MISSING) -> int:
    value = _get(raw, key, default)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"config key {key} is {_short(value)}.", "It must be a whole number.")
    return value


def _float(raw: Mapping[str, Any], key: str, default: object = _MISSING) -> float:
    value = _get(raw, key, default)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"config key {key} is {_short(value)}.", "It must be a number.")
    if abs(value) > 1e30 or not math.isfinite(value):  # a long JSON integer would overflow float()
        raise ConfigError(f"config key {key} is {_short(value)}.", "It must be a finite number.")
    return float(value)


def _bool(raw: Mapping[str, Any], key: str, default: object = _MISSING) -> bool:
    value = _get(raw, key, default)
    if not isinstance(value, bool):
        raise ConfigError(f"config key {key} is {_short(value)}.", "It must be true or false.")
    return value


def _token_id(raw: Mapping[str, Any], key: str, several: bool) -> int | tuple[int, ...] | None:
    value: object = raw.get(key)
    if value is None:
        return None
    listed = several and isinstance(value, list | tuple)
    ids = list(cast("list[object]", value)) if listed else [cast("object", value)]
    good = [one for one in ids if isinstance(one, int) and not isinstance(one, bool) and one >= 0]
    if not ids or len(good) < len(ids) or len(ids) > 1024:
        kind = "a token id or a list of them" if several else "a token id"
        raise ConfigError(f"config key {key} is {_short(raw[key])}.", f"It must be {kind} (0 or more), or null.")
    return tuple(good) if listed else good[0]


def _tied(text: Mapping[str, Any], outer: Mapping[str, Any] | None, notes: list[str]) -> bool:
    """In a wrapper the output head belongs to the wrapper, so its key decides, as in transformers."""
    inner = _bool(text, "tie_word_embeddings", False)
    if outer is None or "tie_word_embeddings" not in outer:
        return inner
    tied = _bool(outer, "tie_word_embeddings")
    if tied != inner and "tie_word_embeddings" in text:
        notes.append(f"tie_word_embeddings is {tied} outside text_config and {inner} inside; the outer one is used")
    return tied


def _mtp_layers(text: Mapping[str, Any], notes: list[str]) -> int:
    counts = [_int(text, key, 0) for key in ("num_nextn_predict_layers", "num_mtp_layers")]
    count = max(counts) if min(counts) >= 0 else min(counts)  # a negative one is refused with the other bounds
    if count:
        notes.append(
            f"config declares {count} multi-token-prediction layer(s), which are not run: the logits need none"
        )
    return count


def _quantization(text: Mapping[str, Any], outer: Mapping[str, Any] | None) -> dict[str, Any] | None:
    found: list[dict[str, Any]] = []
    for holder in (text, outer or {}):
        block = holder.get("quantization_config")
        if block is None or block == {}:
            continue
        if not isinstance(block, Mapping):
            raise ConfigError(f"config key quantization_config is {_short(block)}.", "It must be an object or null.")
        found.append(dict(cast("Mapping[str, Any]", block)))
    formats = [weight_format(block) for block in found]
    if len(set(formats)) > 1:
        raise ConfigError(
            f"quantization_config says {formats[0]} inside text_config and {formats[1]} outside.",
            "Keep the one that fits the tensors.",
        )
    return found[0] if found else None
