"""The TypeScript writer beyond the golden prompts: each keyword, each oddity, each reason to fall back to JSON."""

import json
from typing import Any

import pytest

from karakoram.chat.tool_declarations import declare_tools, deep_sorted


def declare(parameters: Any, **function: Any) -> str:
    """The declaration of one function `f`, without the surrounding namespace if it is TypeScript."""
    tools = [{"type": "function", "function": {"name": "f", "parameters": parameters, **function}}]
    text = declare_tools(tools, "typescript")
    return text.removeprefix("# Tools\n\n## functions\nnamespace functions {\n").removesuffix("\n}\n")


def one(schema: Any, **more: Any) -> str:
    """The lines of one optional property `p`."""
    text = declare({"type": "object", "properties": {"p": schema}, **more})
    return text.removeprefix("type f = (_: {\n").removesuffix("\n}) => any;")


@pytest.mark.parametrize(
    ("schema", "lines"),
    [
        ({"type": "integer", "minimum": 0, "maximum": 9}, ["  // maximum: 9, minimum: 0", "  p?: number"]),
        ({"type": "boolean", "minimum": 0, "description": "B"}, ["  // B", "  p?: boolean"]),
        ({"type": ["string"], "minLength": 1}, ["  p?: string"]),
        ({"type": ["array", "null"]}, ["  p?: Array<any> | null"]),
        ({"type": "array", "items": True}, ["  p?: Array<any>"]),
        (
            {"type": "array", "items": {"anyOf": [{"type": "null"}]}, "maxItems": 2},
            ["  // maxItems: 2", "  p?: Array<null>"],
        ),
        (
            {"type": "array", "items": {"type": "array", "items": {"type": "string", "pattern": "x"}}},
            ["  p?: Array<Array<", "    // pattern: x", "    string", "  >>"],
        ),
        ({"enum": []}, ["  p?: "]),
        ({"enum": [1.5, 'a"b', None, False]}, ['  p?: 1.5 | "a"b" | None | False']),
        ({"type": ["null", "integer"], "enum": [1, None]}, ["  p?: 1 | None"]),
        ({"type": "number", "enum": [True, 1]}, ["  p?: True | 1"]),
        ({"type": "date"}, ["  p?: date"]),
        ({"type": "object", "additionalProperties": {}}, ["  p?: {", "    [k: string]: any", "  }"]),
        ({"type": "string", "default": False}, ["  // Default: False", "  p?: string"]),
        ({"type": "string", "default": [None, True]}, ["  // Default: [null, true]", "  p?: string"]),
        ({"type": "string", "description": "a\n\n b"}, ["  // a", "", "  //  b", "  p?: string"]),
        (
            {"anyOf": [{"type": "object", "properties": {"q": {"type": "string"}}}, {"type": "null"}]},
            ["  p?: {", "    q?: string", "  } | null"],
        ),
    ],
)
def test_one_property(schema: Any, lines: list[str]) -> None:
    assert one(schema) == "\n".join(lines)


def test_references_look_back_only() -> None:
    definition = {"$defs": {"T": {"type": "string"}}}
    before = {"type": "object", "properties": {"a": {"type": "object", **definition}, "b": {"$ref": "#/$defs/T"}}}
    assert declare(before) == "interface T string\ntype f = (_: {\n  a?: {},\n  b?: T\n}) => any;"
    after = {"type": "object", "properties": {"a": {"$ref": "#/$defs/T"}, "b": {"type": "object", **definition}}}
    assert declare(after).startswith('[{"function":')


def test_what_is_never_written_is_no_obstacle() -> None:
    parameters = {"type": "object", "properties": {"next": {"$ref": "#"}}, "additionalProperties": "x"}
    assert declare(parameters) == "interface parameters {\n  next?: parameters\n}\ntype f = (_: parameters) => any;"


def test_self_reference_in_a_definition_is_not_an_interface() -> None:
    parameters = {"type": "object", "$defs": {"T": {"type": "array", "items": {"$ref": "#"}}}, "properties": {}}
    assert declare(parameters) == "interface T Array<parameters>\ntype f = (_: {}) => any;"


@pytest.mark.parametrize(
    "schema",
    [
        {"title": "é, no type"},
        {"type": "string", "enum": [1]},
        {"type": "integer", "enum": [1.5]},
        {"type": "boolean", "enum": ["x"]},
        {"type": ["string", "integer"], "enum": ["x"]},
        {"type": ["string", "null", "integer"], "enum": ["x"]},
        {"type": ["string", "date"]},
        {"type": "object", "properties": []},
        {"type": "object", "properties": {"a": 1}},
        {"type": "object", "properties": {}, "required": True},
        {"type": "object", "additionalProperties": 1},
        {"type": "object", "$defs": [1]},
        {"type": "array", "items": [{"type": "string"}]},
        {"anyOf": {"type": "string"}},
        {"$ref": "#/definitions/T"},
        {"$ref": 1},
        {"type": "string", "description": 5},
    ],
)
def test_what_typescript_cannot_say_is_json(schema: dict[str, Any]) -> None:
    tools = [
        {
            "type": "function",
            "function": {"name": "f", "parameters": {"properties": {"p": schema}, "type": "object"}},
        }
    ]
    text = declare_tools(tools, "typescript")
    assert json.loads(text) == tools
    assert text == declare_tools(tools, "json")
    assert "\\u" not in text


def test_sorting_is_deep_and_keeps_lists() -> None:
    value = {"b": [{"z": 1, "a": 2}, 3], "a": {"d": 1, "c": {"f": 1, "e": 2}}}
    assert json.dumps(deep_sorted(value)) == '{"a": {"c": {"e": 2, "f": 1}, "d": 1}, "b": [{"a": 2, "z": 1}, 3]}'
    assert declare_tools([{"type": "builtin", "a": "ü"}], "json") == '[{"a":"ü","type":"builtin"}]'
