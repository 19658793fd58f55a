"""Tool schemas as the model reads them: TypeScript (K2.5 and later) or compact JSON (before, and as the fallback).

K2.5 was trained on tools written as TypeScript types in a `namespace functions`; K2 and K2-Thinking on the OpenAI
objects as JSON. In both, every object's keys are sorted first, at all levels, so that the same tools always give the
same prompt.

The TypeScript writer covers the part of JSON Schema that tools use. What it cannot say (`oneOf`, old-style
`definitions`, an enum that does not fit its type, …) makes the whole declaration fall back to JSON, as in the
official wrapper, because a prompt that mixes both was never seen in training. Oddities are kept where the model saw
them: booleans and null in enums and defaults appear as Python writes them (`True`, `None`), strings in enums are
quoted without escaping, an empty line of a description loses its `//`, and a self-reference (`"$ref": "#"`) makes the
parameters an interface in alphabetical order.

    type get_weather = (_: {
      // City name                   description
      // maxLength: 40               constraints, sorted
      // Default: "Paris"
      city: string,                  required first, then optional, each sorted by name
      days?: number
    }) => any;

Source: MoonshotAI/Kimi-Vendor-Verifier, `tool_declaration_ts.py` (MIT), read for its behaviour; written anew as one
pass.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, NoReturn, cast

INDENT = "  "

# JSON Schema's type names where TypeScript's differ; scalars that are not here keep their name.
_UNION_TYPES = {
    "string": "string",
    "number": "number",
    "integer": "number",
    "boolean": "boolean",
    "null": "null",
    "object": "{}",
    "array": "Array<any>",
}

# The only constraints that are written, per type.
_CONSTRAINTS = {
    "string": ("maxLength", "minLength", "pattern"),
    "number": ("maximum", "minimum"),
    "integer": ("maximum", "minimum"),
    "array": ("maxItems", "minItems"),
}


class Unsupported(ValueError):
    """A schema that TypeScript cannot express here."""


class _Unwritable(Unsupported):
    """A schema that can be read but not written: it only counts where it would be written."""


def declare_tools(tools: list[dict[str, Any]], style: Literal["json", "typescript"]) -> str:
    """The text of the tool declaration for checked, non-empty `tools`."""
    ordered = cast("list[dict[str, Any]]", deep_sorted(tools))
    if style == "typescript":
        try:
            text = typescript_declaration(ordered)
        except Unsupported:
            text = ""
        if text:
            return text
    return json.dumps(ordered, ensure_ascii=False, separators=(",", ":"))


def deep_sorted(value: Any) -> Any:
    """`value` with the keys of every dict in it in sorted order; lists keep theirs."""
    if isinstance(value, dict):
        items = cast("dict[str, Any]", value)
        return {key: deep_sorted(items[key]) for key in sorted(items, key=str)}
    if isinstance(value, list | tuple):
        return [deep_sorted(item) for item in cast("list[Any]", value)]
    return value


def typescript_declaration(tools: Iterable[dict[str, Any]]) -> str:
    """The TypeScript text of key-sorted `tools`, "" if none is a function; Unsupported if one cannot be said."""
    functions = [
        _function(cast("dict[str, Any]", tool["function"]))
        for tool in tools
        if tool.get("type") == "function" and tool.get("function")
    ]
    if not functions:
        return ""
    return "# Tools\n\n## functions\nnamespace functions {\n" + "\n".join(functions) + "\n}\n"


@dataclass
class _Scope:
    """What one function's schemas refer to. `definitions` fill up in reading order: references only look back."""

    definitions: dict[str, Any] = field(default_factory=dict[str, Any])
    refers_to_itself: bool = False


@dataclass(frozen=True)
class _Field:
    name: str
    optional: bool
    text: str


@dataclass(frozen=True)
class _Object:
    """The lines between the braces of an object type."""

    fields: list[_Field]
    extra: str | _Unwritable | None

    def text(self, indent: str) -> str:
        if isinstance(self.extra, _Unwritable):
            raise self.extra
        required = sorted((f for f in self.fields if not f.optional), key=lambda f: f.name)
        optional = sorted((f for f in self.fields if f.optional), key=lambda f: f.name)
        lines = [f.text for f in [*required, *optional]]
        if self.extra is not None:
            lines.append(f"{indent}{INDENT}[k: string]: {self.extra}")
        return "{\n" + ",\n".join(lines) + f"\n{indent}}}" if lines else "{}"


def _function(function: dict[str, Any]) -> str:
    scope = _Scope()
    parameters = _object(cast("dict[str, Any]", function.get("parameters") or {}), "", scope)
    blocks: list[str] = []
    if not scope.refers_to_itself:
        signature = parameters.text("")
    else:
        fields = ",\n".join(f.text for f in parameters.fields)
        blocks.append("interface parameters {" + (f"\n{fields}\n" if fields else "") + "}")
        signature = "parameters"
    # A copy: definitions found inside definitions can be referred to, but get no interface of their own.
    for name, schema in dict(scope.definitions).items():
        text = _type(schema, "", scope)
        if not isinstance(schema, dict):
            _unsupported("a definition that is no object")
        comment = _comment(cast("dict[str, Any]", schema).get("description", ""), "")
        blocks.append(f"{comment}interface {name} {text}")
    blocks.append(_comment(function.get("description"), "").removesuffix("\n"))
    blocks.append(f"type {function['name']} = (_: {signature}) => any;")
    return "\n".join(block for block in blocks if block)


def _comment(description: object, indent: str) -> str:
    """Each line of a description behind `//`, closed by a newline; "" for none. Empty lines stay bare."""
    if not description:
        return ""
    if not isinstance(description, str):
        raise _Unwritable("a description that is no text")
    return "\n".join(f"{indent}// {line}" if line else "" for line in description.split("\n")) + "\n"


def _documentation(schema: Any, indent: str) -> str:
    """The comment lines above a type: its description, then its constraints."""
    if not isinstance(schema, dict):
        return ""
    known = cast("dict[str, Any]", schema)
    text = _comment(known.get("description", ""), indent)
    kind = known.get("type")
    if any(key in known for key in ("$ref", "anyOf", "enum")) or not isinstance(kind, str):
        return text
    constraints = [f"{key}: {known[key]}" for key in _CONSTRAINTS.get(kind, ()) if key in known]
    return text + (f"{indent}// {', '.join(constraints)}\n" if constraints else "")


def _type(schema: Any, indent: str, scope: _Scope) -> str:
    """The type that `schema` describes; continuation lines start at `indent`."""
    if isinstance(schema, bool):
        return "any" if schema else "null"
    if not isinstance(schema, dict):
        _unsupported(f"a schema that is {schema!r}")
    known = cast("dict[str, Any]", schema)
    if "$ref" in known:
        return _reference(known["$ref"], scope)
    if "anyOf" in known:
        return " | ".join([_type(choice, indent, scope) for choice in _list(known["anyOf"], "anyOf")])
    if "enum" in known:
        return _enum(known)
    if "type" not in known:
        return "any" if not known else _unsupported(f"a schema without type: {known!r}")
    kind = known["type"]
    if isinstance(kind, list):
        return " | ".join([_union_member(member) for member in cast("list[Any]", kind)])
    if kind == "object":
        return _object(known, indent, scope).text(indent)
    if kind == "array":
        return _array(known, indent, scope)
    return "number" if kind == "integer" else str(kind)


def _object(schema: dict[str, Any], indent: str, scope: _Scope) -> _Object:
    definitions = schema.get("$defs")
    if definitions:
        if not isinstance(definitions, dict):
            _unsupported("$defs that are no object")
        scope.definitions.update(cast("dict[str, Any]", definitions))
    try:
        extra = _additional(schema.get("additionalProperties"), indent + INDENT, scope)
    except _Unwritable as error:
        extra = error
    if "properties" not in schema:
        return _Object([], extra)
    properties: Any = schema["properties"]
    if not isinstance(properties, dict):
        _unsupported("properties that are no object")
    try:
        required = set(schema.get("required", []))
    except TypeError:
        _unsupported("required that is no list")
    fields = [
        _field(str(name), prop, name not in required, indent + INDENT, scope)
        for name, prop in cast("dict[str, Any]", properties).items()
    ]
    return _Object(fields, extra)


def _field(name: str, schema: Any, optional: bool, indent: str, scope: _Scope) -> _Field:
    text = _type(schema, indent, scope)
    comment = _documentation(schema, indent)
    default = cast("dict[str, Any]", schema).get("default") if isinstance(schema, dict) else None
    if default is not None:
        # Numbers and booleans as Python writes them, everything else as JSON.
        written = repr(default) if isinstance(default, int | float) else json.dumps(default, ensure_ascii=False)
        comment += f"{indent}// Default: {written}\n"
    return _Field(name, optional, f"{comment}{indent}{name}{'?' if optional else ''}: {text}")


def _additional(schema: Any, indent: str, scope: _Scope) -> str | None:
    if schema is None:
        return None
    if schema is False:
        return "never"
    if schema is True or isinstance(schema, dict):
        return _type(cast("Any", schema), indent, scope)
    raise _Unwritable(f"additionalProperties {schema!r}")


def _array(schema: dict[str, Any], indent: str, scope: _Scope) -> str:
    items = schema.get("items")
    if not items:
        return "Array<any>"
    inner = indent + INDENT
    comment = _documentation(items, inner)
    if comment:
        return f"Array<\n{comment}{inner}{_type(items, inner, scope)}\n{indent}>"
    return f"Array<{_type(items, indent, scope)}>"


def _reference(target: Any, scope: _Scope) -> str:
    if target == "#":
        scope.refers_to_itself = True
        return "parameters"
    if not isinstance(target, str) or not target.startswith("#/$defs/"):
        _unsupported(f"the reference {target!r}")
    name = target.split("/")[-1]
    if not isinstance(scope.definitions.get(name), dict):
        _unsupported(f"the unknown reference {target!r}")
    return name


def _enum(schema: dict[str, Any]) -> str:
    values = _list(schema["enum"], "enum")
    if "type" in schema:
        allowed = _enum_type(schema["type"])
        for value in values:
            if value is not None and not _fits(value, allowed):
                _unsupported(f"the enum value {value!r} of type {allowed!r}")
    return " | ".join([f'"{value}"' if isinstance(value, str) else str(value) for value in values])


def _enum_type(kind: Any) -> Any:
    """The one type that enum values must have: given alone, or in a list of one, or of two of which one is null."""
    if not isinstance(kind, list):
        return kind
    kinds = cast("list[Any]", kind)
    if len(kinds) == 1:
        return kinds[0]
    if len(kinds) != 2 or "null" not in kinds:
        _unsupported(f"an enum of types {kinds!r}")
    return kinds[0] if kinds[0] != "null" else kinds[1]


def _fits(value: object, kind: object) -> bool:
    if kind == "string":
        return isinstance(value, str)
    if kind == "number":
        return isinstance(value, int | float)
    if kind == "integer":
        return isinstance(value, int)
    return isinstance(value, bool) if kind == "boolean" else True


def _union_member(kind: object) -> str:
    if not isinstance(kind, str) or kind not in _UNION_TYPES:
        _unsupported(f"the type {kind!r} in a list of types")
    return _UNION_TYPES[kind]


def _list(value: object, keyword: str) -> list[Any]:
    if not isinstance(value, list):
        _unsupported(f"{keyword} that is no list")
    return cast("list[Any]", value)


def _unsupported(what: str) -> NoReturn:
    raise Unsupported(what)
