"""From the header of a tool call to a tool name and an id, also where the model wrote it wrong.

A header is what stands between `<|tool_call_begin|>` and `<|tool_call_argument_begin|>`; white space in it means
nothing. `[functions.]NAME:N` is right and kept as it is, whether or not NAME is a known tool. Models also write,
mostly after a history with foreign ids: a bare counter `N`; `functions_NAME_N`, `functionsNAMEN`, `functions.NAMEN`;
ids of other vendors (`call_9`, UUIDs). Those are recovered where the tool is certain: NAME is known, or there is only
one tool, or the argument names fit one tool best. What cannot be resolved is no call.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

# Letters of any script with their combining marks, digits, `_ . - $ /`; no other ASCII punctuation, no controls.
_NAME = r"[^\x00-\x20!\"#%&'()*+,:;<=>?@\[\\\]^`{|}~\x7f]+"
_CANONICAL = re.compile(rf"(?:functions\.)?({_NAME}):[0-9]+")
_FOREIGN = re.compile(r"(?=[A-Za-z0-9_-]*[0-9]|call|toolu|chatcmpl)(?!functions)[A-Za-z0-9_-]+")
_WHITE_SPACE = re.compile(r"\s+")

# A counter with more digits than this is no counter.
MAX_COUNTER_DIGITS = 9


@dataclass(frozen=True)
class Header:
    """What a header says. `name` None: to be found from the arguments. `id` None: to be made from `counter`, or new."""

    name: str | None
    id: str | None = None
    counter: int | None = None


def tool_parameters(tools: list[dict[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Parameter schemas of checked function tools by tool name; {} for a tool without any."""
    known: dict[str, Mapping[str, Any]] = {}
    for tool in tools:
        if tool["type"] == "function":
            known[tool["function"]["name"]] = tool["function"].get("parameters") or {}
    return known


def read_header(text: str, tools: Mapping[str, Mapping[str, Any]]) -> Header | None:
    """The meaning of a header given the known tools, None if it has none."""
    header = _WHITE_SPACE.sub("", text)
    canonical = _CANONICAL.fullmatch(header)
    if canonical:
        return Header(canonical.group(1), id=header)
    only = next(iter(tools)) if len(tools) == 1 else None
    if header.isascii() and header.isdigit() and len(header) <= MAX_COUNTER_DIGITS:
        return Header(only, counter=int(header)) if tools else None
    for name in sorted(tools, key=len, reverse=True):
        known = re.fullmatch(rf"(?:functions[._:]?)?{re.escape(name)}[._:-]?([0-9]{{1,{MAX_COUNTER_DIGITS}}})?", header)
        if known:
            return Header(name, counter=int(known.group(1)) if known.group(1) else None)
    return Header(only) if tools and _FOREIGN.fullmatch(header) else None


def tool_of_arguments(arguments: str, tools: Mapping[str, Mapping[str, Any]]) -> str | None:
    """The tool whose parameters the argument names fit best: shared minus unknown names. None if none or several do."""
    keys = top_level_keys(arguments)
    scores: dict[str, int] = {}
    for name, schema in tools.items():
        properties: Any = schema.get("properties")
        known: set[str] = set(cast("dict[str, Any]", properties)) if isinstance(properties, dict) else set()
        if keys & known or not (keys or schema.get("required")):
            scores[name] = len(keys & known) - len(keys - known)
    best = [name for name, score in scores.items() if score == max(scores.values())]
    return best[0] if len(best) == 1 else None


def top_level_keys(text: str) -> set[str]:
    """The keys of a JSON object as far as it can be read; a cut-off object still gives the keys before the cut."""
    decoder = json.JSONDecoder()
    keys: set[str] = set()
    position = _skip_space(text, 0)
    if not text.startswith("{", position):
        return keys
    try:
        while position < len(text) and text[position] in "{,":
            key, position = decoder.raw_decode(text, _skip_space(text, position + 1))
            position = _skip_space(text, position)
            if not isinstance(key, str) or not text.startswith(":", position):
                break
            keys.add(key)
            _, position = decoder.raw_decode(text, _skip_space(text, position + 1))
            position = _skip_space(text, position)
    except (ValueError, RecursionError):
        pass  # cut off or not JSON: what was read so far counts
    return keys


def _skip_space(text: str, position: int) -> int:
    while position < len(text) and text[position].isspace():
        position += 1
    return position
