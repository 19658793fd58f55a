"""A small JSON-schema checker: the part of the standard that tool declarations use.

Understood: type (one or a list), enum, const, anyOf, required, properties, additionalProperties, items, minimum,
maximum, minLength, maxLength, minItems, maxItems. Other keywords (descriptions, defaults, formats) do not restrict. The
checker is here, and not a package, because it decides what counts as a valid call in an evaluation and must not drift
with a version.
"""

from typing import Any

MAX_DEPTH = 32

_TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "number": (int, float),
    "integer": (int,),
    "boolean": (bool,),
    "null": (type(None),),
}


def validate(schema: Any, value: Any, path: str = "arguments", depth: int = 0) -> list[str]:
    """What is wrong with `value`, one short sentence each; empty when it satisfies `schema`."""
    if schema is True or schema == {}:
        return []
    if not isinstance(schema, dict):
        return [f"{path}: nothing is allowed here"]
    if depth > MAX_DEPTH:
        return [f"{path}: nested deeper than {MAX_DEPTH}"]
    problems = _type_and_enum(schema, value, path)
    if "anyOf" in schema and all(validate(option, value, path, depth + 1) for option in schema["anyOf"]):
        problems.append(f"{path}: none of the alternatives fits")
    if problems:
        return problems
    if isinstance(value, dict):
        return _object(schema, value, path, depth)
    if isinstance(value, list):
        return _array(schema, value, path, depth)
    return _bounds(schema, value, path)


def _is(name: str, value: Any) -> bool:
    if isinstance(value, bool):
        return name == "boolean"
    if name == "integer" and isinstance(value, float):
        return value.is_integer()
    return isinstance(value, _TYPES.get(name, (object,)))


def _type_and_enum(schema: dict[str, Any], value: Any, path: str) -> list[str]:
    names = schema.get("type")
    if names is not None:
        names = names if isinstance(names, list) else [names]
        if not any(_is(name, value) for name in names):
            return [f"{path}: must be {' or '.join(names)}"]
    if "enum" in schema and value not in schema["enum"]:
        return [f"{path}: must be one of {', '.join(map(str, schema['enum']))}"]
    if "const" in schema and value != schema["const"]:
        return [f"{path}: must be {schema['const']}"]
    return []


def _object(schema: dict[str, Any], value: dict[str, Any], path: str, depth: int) -> list[str]:
    properties = schema.get("properties", {})
    extra = schema.get("additionalProperties", not properties)  # a declared tool takes what it declares, no more
    problems = [f"{path}: {name} is missing" for name in schema.get("required", []) if name not in value]
    for name, item in value.items():
        if name in properties:
            problems += validate(properties[name], item, f"{path}.{name}", depth + 1)
        elif extra is False:
            problems.append(f"{path}: {name} is unknown")
        else:
            problems += validate(extra, item, f"{path}.{name}", depth + 1)
    return problems


def _array(schema: dict[str, Any], value: list[Any], path: str, depth: int) -> list[str]:
    problems = []
    if len(value) < schema.get("minItems", 0):
        problems.append(f"{path}: fewer than {schema['minItems']} items")
    if len(value) > schema.get("maxItems", len(value)):
        problems.append(f"{path}: more than {schema['maxItems']} items")
    for index, item in enumerate(value):
        problems += validate(schema.get("items", True), item, f"{path}[{index}]", depth + 1)
    return problems


def _bounds(schema: dict[str, Any], value: Any, path: str) -> list[str]:
    if isinstance(value, str):
        if not schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", len(value)):
            return [f"{path}: wrong length"]
        return []
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return []
    inside = schema.get("minimum", value) <= value <= schema.get("maximum", value)
    return [] if inside else [f"{path}: out of range"]
