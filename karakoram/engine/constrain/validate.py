"""Whether a finished call satisfies its schema: a second opinion, from a library that had no part in writing it.

Calls satisfy their schemas by construction. The session asks here all the same, once per call, and counts what is
wrong: a number that must stay 0. The judge is `jsonschema`, with three settings: a multiple is one in decimal (as
doubles, 0.07 / 0.01 is 7.000000000000001); formats are checked where the library can; and patterns are matched by
automaton where possible, since Python's backtracking takes for ever on some that any client may send.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from fractions import Fraction
from functools import lru_cache
from math import isfinite
from typing import Any

from referencing.exceptions import Unresolvable

from karakoram.engine.constrain.automaton import occurs
from karakoram.engine.constrain.regex import PatternError
from karakoram.errors import SchemaError

MAX_SCHEMA_BYTES = 131_072
# Levels of JSON; a schema within a schema takes two. jsonschema checks a schema recursively and has room for 100.
MAX_SCHEMA_DEPTH = 64


def validate_call(schema: Mapping[str, Any] | bool, text: str) -> str | None:
    """None if `text` is JSON that satisfies `schema`, else what is wrong with it. SchemaError for a broken schema.

    What the library cannot check (a pattern in another dialect, a reference that leads nowhere) is not called wrong."""
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        return f"not JSON: {error}"
    validator = schema_validator(schema_text(schema))
    try:
        error = next(iter(validator.iter_errors(value)), None)
    except RecursionError:
        return "nested too deeply to be checked"
    except (re.error, Unresolvable):
        return None
    return None if error is None else f"{error.json_path}: {error.message[:200]}"


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def schema_text(schema: Mapping[str, Any] | bool) -> str:
    """The schema as JSON; SchemaError if it is none, or too large."""
    try:
        text = json.dumps(schema, default=dict, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise SchemaError(f"The schema is no JSON ({error}).", "Use JSON types only.", "", "") from error
    if len(text) > MAX_SCHEMA_BYTES:
        what = f"The schema has {len(text):,} characters."
        raise SchemaError(what, f"At most {MAX_SCHEMA_BYTES:,} are read; make it smaller.", "", "")
    return text


@lru_cache(256)
def schema_validator(text: str) -> Any:
    """The validator of a schema given as JSON, of the draft it names or else 2020-12. SchemaError if it is broken."""
    import jsonschema
    from jsonschema import FormatChecker, validators

    schema = json.loads(text)
    if (depth := _depth(schema)) > MAX_SCHEMA_DEPTH:
        raise SchemaError(f"The schema is nested {depth} levels deep.", "Use $ref to flatten it.", "", "")
    default = jsonschema.Draft7Validator if _has_item_lists(schema) else jsonschema.Draft202012Validator
    draft: Any = validators.validator_for(schema, default=default)
    try:
        # Patterns are read elsewhere: one in another dialect of regular expressions does not break the schema.
        draft.check_schema(schema, format_checker=FormatChecker(formats=()))
    except jsonschema.SchemaError as error:
        path = [str(step) for step in error.absolute_path]
        where = "".join("/" + step.replace("~", "~0").replace("/", "~1") for step in path[:-1])
        what = f"The schema is broken at {where or 'its root'}: {error.message[:200]}."
        raise SchemaError(what, "Correct it.", path[-1] if path else "", where) from error
    exact: Any = validators.extend(draft, {"multipleOf": _multiple_of, "pattern": _pattern})
    return exact(schema, format_checker=draft.FORMAT_CHECKER)


def _depth(part: Any) -> int:
    deepest = 0
    layer = [part]
    while layer:
        layer = [
            value
            for part in layer
            if isinstance(part, (dict, list))
            for value in (part.values() if isinstance(part, dict) else part)
        ]
        deepest += 1
    return deepest


def _has_item_lists(schema: Any) -> bool:
    """`items` is a list of schemas, as up to draft 2019-09."""
    if isinstance(schema, dict):
        return isinstance(schema.get("items"), list) or any(map(_has_item_lists, schema.values()))
    return isinstance(schema, list) and any(map(_has_item_lists, schema))


def _pattern(validator: Any, pattern: str, instance: Any, schema: Any) -> Iterator[Any]:
    from jsonschema import ValidationError

    if not validator.is_type(instance, "string"):
        return
    try:
        found = occurs(pattern, instance)
    except PatternError:
        found = re.search(pattern, instance) is not None
    if not found:
        yield ValidationError(f"{instance!r} does not match {pattern!r}")


def _multiple_of(validator: Any, divisor: Any, instance: Any, schema: Any) -> Iterator[Any]:
    from jsonschema import ValidationError

    if not validator.is_type(instance, "number"):
        return
    if not isfinite(instance) or (Fraction(repr(instance)) / Fraction(repr(divisor))).denominator != 1:
        yield ValidationError(f"{instance!r} is not a multiple of {divisor!r}")
