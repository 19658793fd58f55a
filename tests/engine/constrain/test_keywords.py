"""Every keyword is enforced, an annotation, or refused by name; and what nothing satisfies is an error."""

import json
from typing import Any

import pytest

from karakoram.engine.constrain.schema.document import ANNOTATIONS, ENFORCED, REFUSED
from karakoram.engine.constrain.shape import OutputShape, ToolShape
from karakoram.errors import SchemaError
from tests.engine.constrain.writing import Setting, shape_for, write_text

REFUSALS: dict[str, Any] = {
    "not": {"not": {"type": "string"}},
    "if": {"if": {"type": "string"}},
    "then": {"then": {"minLength": 1}},
    "else": {"else": {"minLength": 1}},
    "dependentRequired": {"dependentRequired": {"a": ["b"]}},
    "dependentSchemas": {"dependentSchemas": {"a": {}}},
    "dependencies": {"dependencies": {"a": ["b"]}},
    "contains": {"contains": {"type": "string"}},
    "minContains": {"minContains": 1},
    "maxContains": {"maxContains": 1},
    "uniqueItems": {"type": "array", "items": {"type": "string"}, "uniqueItems": True},
    "unevaluatedItems": {"unevaluatedItems": False},
    "unevaluatedProperties": {"unevaluatedProperties": False},
    "$dynamicRef": {"$dynamicRef": "#a"},
    "$dynamicAnchor": {"$dynamicAnchor": "a"},
    "$recursiveRef": {"$recursiveRef": "#"},
    "$recursiveAnchor": {"$recursiveAnchor": "a"},
    "$vocabulary": {"$vocabulary": {}},
    "nullable": {"type": "string", "nullable": True},
    "discriminator": {"discriminator": {"propertyName": "a"}},
    "minLenght": {"type": "string", "minLenght": 3},
    "format": {"type": "string", "format": "iri"},
    "pattern": {"type": "string", "pattern": "(?=a)b"},
    "patternProperties": {"patternProperties": {"(?!a)b": {}}},
    "multipleOf": {"type": "number", "multipleOf": 0.3},
    "oneOf": {"oneOf": [{"type": "string"}, {"type": "string", "minLength": 2}]},
    "$ref": {"$ref": "https://example.com/schema.json"},
    "$id": {"$id": "inner", "type": "string"},
    "minProperties": {"type": "object", "minProperties": 2},
    "propertyNames": {"type": "object", "propertyNames": {"anyOf": [{"minLength": 2}, {"pattern": "^a"}]}},
}


def _nested(part: Any) -> dict[str, Any]:
    return {"type": "object", "properties": {"a~/b": part}, "required": ["a~/b"]}


@pytest.mark.parametrize("keyword", REFUSALS)
def test_what_cannot_be_enforced_is_refused_by_name_and_place(setting: Setting, keyword: str) -> None:
    with pytest.raises(SchemaError, match=r"^Tool 'tool_1': ") as caught:
        setting.compiler.compile(shape_for(_nested(REFUSALS[keyword]), "required"))
    assert caught.value.keyword == keyword
    assert caught.value.where == "/properties/a~0~1b"


@pytest.mark.parametrize("keyword", REFUSALS)
def test_and_passed_over_where_the_tool_is_not_strict(setting: Setting, keyword: str) -> None:
    tool = ToolShape("tool_1", _nested(REFUSALS[keyword]), strict=False)
    setting.compiler.compile(OutputShape(tools=(tool,), tool_choice="required"))
    grammar = setting.compiler._grammars.schema(tool.parameters, False, True)
    for seed in range(3):
        value = json.loads(write_text(grammar, 60, seed))
        assert isinstance(value, dict) and "a~/b" in value


def test_the_tables_cover_all_refusals() -> None:
    assert set(REFUSED) <= set(REFUSALS)
    assert not (ENFORCED & ANNOTATIONS or ENFORCED & REFUSED or ANNOTATIONS & REFUSED)


def test_annotations_say_nothing(setting: Setting) -> None:
    notes = {
        "$schema": "https://json-schema.org/draft/2020-12/schema", "$id": "urn:x", "$comment": "c", "title": "t",
        "description": "d", "default": {}, "examples": [{}], "example": 1, "deprecated": True, "readOnly": False,
        "writeOnly": False, "contentMediaType": "a/b", "contentEncoding": "base64", "x-order": 3, "$anchor": "here",
    }  # fmt: skip
    inner = {name: value for name, value in notes.items() if name not in ("$schema", "$id", "$anchor")}
    schema = {**notes, "type": "object", "properties": {"a": {**inner, "type": "integer"}}, "required": ["a"]}
    plain = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    annotated, bare = (setting.compiler.compile(shape_for(one, "required")) for one in (schema, plain))
    assert annotated.shortest == bare.shortest


HARMLESS = {
    "uniqueItems false": {"type": "array", "items": {"type": "string"}, "uniqueItems": False},
    "uniqueItems of one": {"type": "array", "items": {"type": "string"}, "uniqueItems": True, "maxItems": 1},
    "not beside enum": {"enum": ["a", "b"], "not": {"const": "a"}},
    "if beside const": {"const": 3, "if": {"minimum": 2}, "then": {"maximum": 4}},
    "own reference": {"$ref": "#/$defs/x"},
    "old definitions": {"$ref": "#/definitions/y"},
    "anchor": {"$ref": "#here"},
    "exclusive oneOf": {"oneOf": [{"type": "string"}, {"type": "integer"}, {"const": None}]},
}


@pytest.mark.parametrize("name", HARMLESS)
def test_what_is_harmless_is_not_refused(setting: Setting, name: str) -> None:
    schema = _nested(HARMLESS[name])
    schema["$defs"] = {"x": {"type": "string", "maxLength": 3}, "z": {"$anchor": "here", "const": 5}}
    schema["definitions"] = {"y": {"type": "boolean"}}
    grammar = setting.compiler._grammars.schema(schema, True, True)
    from karakoram.engine.constrain.validate import validate_call

    for seed in range(5):
        assert validate_call(schema, write_text(grammar, 40, seed).decode()) is None


IMPOSSIBLE: dict[str, tuple[Any, str]] = {
    "false": (False, ""),
    "types": ({"allOf": [{"type": "string"}, {"type": "integer"}]}, ""),
    "bounds": ({"type": "integer", "minimum": 3, "maximum": 2}, "minimum"),
    "no integer between": ({"type": "integer", "exclusiveMinimum": 1, "exclusiveMaximum": 2}, "minimum"),
    "no multiple": ({"type": "integer", "minimum": 8, "maximum": 9, "multipleOf": 7}, "minimum"),
    "length": ({"type": "string", "minLength": 3, "maxLength": 2}, "minLength"),
    "pattern and length": ({"type": "string", "pattern": "^a{5}$", "maxLength": 3}, "pattern"),
    "two patterns": ({"allOf": [{"type": "string", "pattern": "^ab*$"}, {"pattern": "^b+$"}]}, "pattern"),
    "items": ({"type": "array", "minItems": 3, "maxItems": 2}, "minItems"),
    "false items": ({"type": "array", "items": False, "minItems": 1}, "minItems"),
    "required false": ({"type": "object", "properties": {"b": False}, "required": ["b"]}, "required"),
    "required unknown": ({"type": "object", "additionalProperties": False, "required": ["b"]}, "required"),
    "too few": (
        {"type": "object", "properties": {"b": {}}, "additionalProperties": False, "minProperties": 2},
        "minProperties",
    ),
    "too many required": ({"type": "object", "required": ["b", "c"], "maxProperties": 1}, "minProperties"),
    "enum": ({"enum": ["a"], "type": "integer"}, ""),
    "without end": ({"$ref": "#/$defs/endless"}, "required"),
}  # fmt: skip


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_what_nothing_satisfies_is_an_error(setting: Setting, name: str, strict: bool) -> None:
    part, keyword = IMPOSSIBLE[name]
    endless = {"type": "object", "properties": {"next": {"$ref": "#/$defs/endless"}}, "required": ["next"]}
    tool = ToolShape("tool_1", {**_nested(part), "$defs": {"endless": endless}}, strict)
    with pytest.raises(SchemaError, match="Nothing satisfies") as caught:
        setting.compiler.compile(OutputShape(tools=(tool,), tool_choice="required"))
    assert caught.value.keyword in (keyword, "required")


BROKEN: dict[str, tuple[Any, str]] = {
    "type": ({"type": "strin"}, "type"),
    "properties": ({"properties": []}, "properties"),
    "required": ({"required": "a"}, "required"),
    "minimum": ({"minimum": "3"}, "minimum"),
    "itself": ({"$ref": "#/$defs/loop"}, "$ref"),
    "itself by choice": ({"$ref": "#/$defs/choice"}, "$ref"),
    "laughs": ({"$ref": "#/$defs/l0"}, "anyOf"),
}


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("name", BROKEN)
def test_broken_schemas_are_errors(setting: Setting, name: str, strict: bool) -> None:
    part, keyword = BROKEN[name]
    definitions: dict[str, Any] = {
        "loop": {"allOf": [{"$ref": "#/$defs/loop"}]},
        "choice": {"anyOf": [{"$ref": "#/$defs/choice"}, {"$ref": "#/$defs/choice"}, {"type": "string"}]},
        "l40": {"type": "string"},
    }
    for number in range(40):
        definitions[f"l{number}"] = {"allOf": [{"$ref": f"#/$defs/l{number + 1}"}] * 2}
    tool = ToolShape("tool_1", {**_nested(part), "$defs": definitions}, strict)
    with pytest.raises(SchemaError) as caught:
        setting.compiler.compile(OutputShape(tools=(tool,), tool_choice="required"))
    assert caught.value.keyword == keyword


def _many(levels: int) -> Any:
    return {"type": "array", "minItems": 900, "items": _many(levels - 1)} if levels else {"type": "string"}


def _deep(levels: int) -> Any:
    return {"type": "object", "properties": {"a": _deep(levels - 1)}} if levels else {"type": "string"}


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        (_deep(40), "nested"),
        ({"type": "object", "description": "x" * 300_000}, "characters"),
        ({"type": "object", "properties": {"a": {"const": object()}}}, "no JSON"),
        ({"type": "object", "properties": {"a": {"const": float("inf")}}}, "no JSON"),
        ({"type": "object", "properties": {"a": {"type": "string", "minLength": 10**6}}}, "minLength"),
        ({"type": "object", "properties": {"a": {"type": "array", "items": {}, "minItems": 10**6}}}, "minItems"),
        ({"type": "object", "properties": {"a": {"const": "\ud800"}}}, "surrogate"),
        (
            {
                "type": "object",
                "properties": {f"p{n}": {"type": "string", "pattern": f"^.*{n}.{{15}}$"} for n in range(9)},
            },
            "pattern",
        ),
        (_many(4), "longer than"),
        ({"type": "object", "properties": {"a": {"type": "string", "pattern": "^(?:[a-z]{1,90}x){1,90}$"}}}, "pattern"),
    ],
)
def test_sizes_are_bounded(setting: Setting, schema: Any, says: str) -> None:
    with pytest.raises(SchemaError, match=says):
        setting.compiler._grammars.schema(schema, True, False)


def test_patterns_that_are_passed_over_cost_little_too(setting: Setting) -> None:
    hard = {f"p{n}": {"type": "string", "pattern": f"^(?:a|b{n})*a.{{19}}$"} for n in range(200)}
    with pytest.raises(SchemaError, match="too large"):
        setting.compiler._grammars.schema({"type": "object", "properties": hard}, False, True)


def test_large_schemas_are_fine(setting: Setting) -> None:
    schema = {
        "type": "object",
        "properties": {
            **{f"property_{n}": {"type": ["string", "null"], "maxLength": 5000} for n in range(200)},
            "choice": {"enum": [f"some value number {n}" for n in range(1000)]},
        },
        "required": ["choice", "property_7"],
    }
    grammar = setting.compiler._grammars.schema(schema, True, True)
    for budget in (len(grammar.plan), 90, 300):
        value = json.loads(write_text(grammar, budget, budget))
        assert {"choice", "property_7"} <= set(value)
