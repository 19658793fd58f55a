"""`key=value` on the command line, into any nested frozen dataclasses: `optimizer.learning_rate=3e-3`.

The dataclass is the only list of what there is: its annotations say how a value is read, its `__post_init__` what is
refused. All changes of one dataclass are made at once, so that two keys which only fit together can be given together.
Where several groups have the same keys, as the stages of a plan, `*.seed=3` means all of them.
"""

import dataclasses
import difflib
import json
import math
import types
from collections.abc import Callable, Iterator, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

from karakoram.errors import InputError, KarakoramError

T = TypeVar("T")

_NEAR = 3
_WORDS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
_NOTHING = ("none", "null")


class Setting(NamedTuple):
    """One key: its value now, and the type that it takes, in words."""

    key: str
    value: Any
    kind: str


def settings_of(config: Any) -> list[Setting]:
    """Every key of a dataclass and of the dataclasses in it, dotted, in the order in which they are declared."""
    return [Setting(key, value, type_words(hint)) for key, value, hint in _walk(config)]


def apply_overrides(config: T, overrides: Sequence[str]) -> T:
    """A copy of the dataclass `config` with `key=value` changes made.

    Values: numbers (2e6 is an integer too), true and false, none, one of a choice, tuples as 1,2,3, JSON for a mapping.
    Raises InputError for an unknown key (near ones are named, and all), a value of another type, a key given twice, and
    what the dataclasses refuse.
    """
    if not (dataclasses.is_dataclass(config) and not isinstance(config, type)):
        raise TypeError(f"overrides need an instance of a dataclass, not {config!r}")
    known = {key: hint for key, _, hint in _walk(config)}
    changes: dict[str, Any] = {}
    for override in overrides:
        key, sign, text = override.partition("=")
        key = key.strip()
        if not sign or not key:
            raise InputError(f"{override!r} is no setting.", "Write key=value, as steps=1000; --show lists the keys.")
        meant = [name for name in known if name.partition(".")[2] == key[2:]] if key.startswith("*.") else [key]
        if not meant or meant[0] not in known:
            raise _unknown(config, key, list(known))
        for name in meant:
            if name in changes:
                raise InputError(f"{name} is given twice.", "Give it once.")
            changes[name] = _read(known[name], text.strip(), name)
    return _rebuilt(config, changes)


def parameters_of(function: Callable[..., Any], overrides: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Those of `key=value` that are a parameter of `function`, read as its annotations say; and the others."""
    hints = get_type_hints(function)
    parameters: dict[str, Any] = {}
    others: list[str] = []
    for override in overrides:
        key, _, text = override.partition("=")
        if key in hints and key != "return":
            parameters[key] = _read(hints[key], text, key)
        else:
            others.append(override)
    return parameters, others


def _walk(config: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(key, value, annotation) of every leaf; an absent (None) dataclass is a leaf."""
    hints = get_type_hints(type(config))
    for field in dataclasses.fields(config):
        if not field.init:
            continue
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            yield from _walk(value, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", value, hints[field.name]


def _rebuilt(config: Any, changes: dict[str, Any]) -> Any:
    """`config` with dotted `changes`, innermost dataclasses first, each through its own validation."""
    own: dict[str, Any] = {}
    inner: dict[str, dict[str, Any]] = {}
    for key, value in changes.items():
        name, dot, rest = key.partition(".")
        if dot:
            inner.setdefault(name, {})[rest] = value
        else:
            own[name] = value
    for name, below in inner.items():
        own[name] = _rebuilt(getattr(config, name), below)
    try:
        return dataclasses.replace(config, **own) if own else config
    except KarakoramError:
        raise
    except (ValueError, TypeError) as error:
        given = ", ".join(f"{name}={value}" for name, value in own.items() if name not in inner)
        raise InputError(f"{type(config).__name__} refuses {given}: {error}.", "Give other values.") from error


def _unknown(config: Any, key: str, known: list[str]) -> InputError:
    groups = {name.rpartition(".")[0] for name in known}
    if any(group == key or group.startswith(f"{key}.") for group in groups):
        below = ", ".join(name for name in known if name.startswith(f"{key}."))
        return InputError(f"{key} is a group of settings.", f"Set one of them: {below}.")
    for name in known:
        if key.startswith(f"{name}."):
            value = {at: value for at, value, _ in _walk(config)}[name]
            return InputError(f"There is no setting {key!r}: {name} is {value!r}.", f"{name} has no settings in it.")
    leaf = key.rpartition(".")[2]
    same = [name for name in known if name.rpartition(".")[2] == leaf]
    by_leaf = difflib.get_close_matches(leaf, [name.rpartition(".")[2] for name in known], _NEAR, 0.75)
    near = [name for name in known if name.rpartition(".")[2] in by_leaf]
    # of whole keys only where no last word is near: what all keys of a group have in common makes them look alike
    nearest = list(dict.fromkeys(same + near or difflib.get_close_matches(key, known, _NEAR, 0.75)))[:_NEAR]
    hint = f"Did you mean {' or '.join(nearest)}? " if nearest else ""
    return InputError(f"There is no setting {key!r}.", f"{hint}Settings: {', '.join(_listed(known))}.")


def _listed(known: list[str]) -> list[str]:
    """All keys; those that every group has alike once, by a star."""
    groups: dict[str, list[str]] = {}
    for name in known:
        group, _, rest = name.partition(".")
        groups.setdefault(group, []).append(rest)
    alike = list(groups.values())
    if len(alike) > 1 and all(keys == alike[0] != [""] for keys in alike):
        return [f"*.{rest}" for rest in alike[0]] + [f"where * is {' or '.join(groups)} or all of them"]
    return known


# -------------------------------------------------------------------------------------------- values


class _Refused(Exception):
    """This text is no such value; whoever asked may try another type."""


def _read(hint: Any, text: str, key: str) -> Any:
    try:
        return _parse(hint, text)
    except _Refused:
        raise InputError(f"{key}={text} does not fit.", f"{key} takes {type_words(hint)}.") from None


def _parse(hint: Any, text: str) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return _first(arguments, text)
    if origin is Literal:
        return _chosen({str(choice): choice for choice in arguments}, text)
    if origin in (tuple, list) or hint in (tuple, list):
        return _sequence(origin or hint, arguments, text)
    if origin is dict or hint is dict:
        return _mapping(text)
    if isinstance(hint, type) and issubclass(hint, Enum):
        return _chosen({str(member.value): member for member in hint} | {member.name: member for member in hint}, text)
    reader = _READERS.get(hint)
    if reader is None:
        raise _Refused
    return reader(text)


def _first(hints: Sequence[Any], text: str) -> Any:
    """The first member of a union that takes the text; None first, free text last."""
    order = {type(None): 0, bool: 1, int: 2, float: 3, str: 9, Path: 9}
    for hint in sorted(hints, key=lambda hint: order.get(hint, 4)):
        try:
            return _parse(hint, text)
        except _Refused:
            continue
    raise _Refused


def _chosen(choices: dict[str, Any], text: str) -> Any:
    if text not in choices:
        raise _Refused
    return choices[text]


def _sequence(kind: type, arguments: Sequence[Any], text: str) -> Any:
    if text[:1] + text[-1:] in ("()", "[]"):
        text = text[1:-1].strip()
    parts = [part.strip() for part in text.removesuffix(",").split(",")] if text else []
    if kind is tuple and arguments and arguments[-1] is not Ellipsis:
        if len(parts) != len(arguments):
            raise _Refused
        return tuple(_parse(hint, part) for hint, part in zip(arguments, parts))
    inner = arguments[0] if arguments else str
    return kind(_parse(inner, part) for part in parts)


def _mapping(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        raise _Refused from None
    if not isinstance(found, dict):
        raise _Refused
    return found


def _int(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        number = _float(text)  # 2.5e6 tokens are a whole number of tokens
    if not number.is_integer():
        raise _Refused
    return int(number)


def _float(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        raise _Refused from None
    if math.isnan(number):
        raise _Refused
    return number


def _bool(text: str) -> bool:
    return _chosen(_WORDS, text.lower())


def _none(text: str) -> None:
    if text.lower() not in _NOTHING:
        raise _Refused


_READERS: dict[Any, Any] = {int: _int, float: _float, bool: _bool, type(None): _none, str: str, Path: Path, Any: str}


def type_words(hint: Any) -> str:
    """A type as it is told to who types: 'int or none', 'wsd or cosine', 'int,int,…'."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(type_words(each) for each in arguments))
    if origin is Literal:
        return " or ".join(str(choice) for choice in arguments)
    if origin in (tuple, list):
        inner = [type_words(each) for each in arguments if each is not Ellipsis]
        many = origin is list or arguments[-1] is Ellipsis
        return f"{inner[0]},…" if many else ",".join(inner)
    if origin is dict or hint is dict:
        return "a JSON object"
    if isinstance(hint, type) and issubclass(hint, Enum):
        return " or ".join(str(member.value) for member in hint)
    if hint is type(None):
        return "none"
    return {bool: "true or false", str: "text", Any: "text", Path: "a path"}.get(
        hint, getattr(hint, "__name__", str(hint))
    )


def value_words(value: Any) -> str:
    """A value as `apply_overrides` reads it."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Enum):
        return str(value.value)
    if isinstance(value, tuple | list):
        return ",".join(value_words(each) for each in value) or "()"
    if isinstance(value, dict):
        return json.dumps(value)
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    return str(value)
