"""The built-in tools: exact, bounded, and never raising on what a model writes."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from karakoram.tools import BUILTIN, ToolError, call, validate
from karakoram.tools.calculator import evaluate, format_number
from karakoram.tools.dates import add_days, days_between, weekday
from karakoram.tools.units import convert


@pytest.mark.parametrize(
    ("expression", "result"),
    [
        ("27*14", "378"),
        ("0.1+0.2", "0.3"),
        ("(12+5)*3", "51"),
        ("1/3", "0.333333"),
        ("2/3", "0.666667"),
        ("-7/2", "-3.5"),
        ("1/8", "0.125"),
        ("2**10", "1024"),
        ("2^10", "1024"),
        ("3 × 4 ÷ 2", "6"),
        ("7%4", "3"),
        ("19.99+5.01", "25"),
        ("-1/3000000", "0"),
        ("10**20+1", "100000000000000000001"),
        ("1e3", "1000"),
    ],
)
def test_calculator(expression: str, result: str) -> None:
    assert format_number(evaluate(expression)) == result


@pytest.mark.parametrize(
    "expression",
    ["", "1+", "1/0", "0**-1", "9**9**9", "2**65", "2**0.5", "abs(1)", "x", "'a'*9", "[1]", "True", "1j",
     "1 if 1 else 2",
     "(" * 200, "9" * 400, "1e999999999", "1e-999999999", "1e065", "0x10", "__import__('os')", "1;2", "a=1", "1\x00"],
)  # fmt: skip
def test_calculator_refuses(expression: str) -> None:
    with pytest.raises(ToolError):
        evaluate(expression)


@given(st.integers(-(10**9), 10**9), st.integers(-(10**9), 10**9), st.sampled_from("+-*"))
def test_calculator_agrees_with_python(left: int, right: int, sign: str) -> None:
    expected = {"+": left + right, "-": left - right, "*": left * right}[sign]
    assert evaluate(f"({left}){sign}({right})") == expected


def test_exponents_of_literals() -> None:
    assert evaluate("1.5e3") == 1500
    assert evaluate("1e-2") * 100 == 1
    assert evaluate("1e+03") == 1000


def test_bounds_on_growth() -> None:
    with pytest.raises(ToolError, match="too large"):
        evaluate("*".join(["9**60"] * 12))


def test_dates() -> None:
    assert add_days("2024-02-28", 2) == "2024-03-01"
    assert add_days("2023-01-01", -1) == "2022-12-31"
    assert days_between("2024-01-01", "2025-01-01") == 366
    assert weekday("2024-03-05") == "Tuesday"


@pytest.mark.parametrize("text", ["", "2024-2-3", "2024-02-30", "20240203", "5 March 2024", "2024-W01-1"])
def test_dates_refuse(text: str) -> None:
    with pytest.raises(ToolError):
        weekday(text)


def test_dates_out_of_the_calendar() -> None:
    assert call(BUILTIN["date_add"], '{"date": "9999-12-31", "days": 1}').startswith("error: ")
    assert call(BUILTIN["date_add"], '{"date": "2024-01-01", "days": 99999999}').startswith("error: ")


@pytest.mark.parametrize(
    ("value", "source", "target", "result"),
    [
        (1, "mi", "km", "1.609344"),
        (12, "feet", "inches", "144"),
        (100, "C", "F", "212"),
        (32, "fahrenheit", "celsius", "0"),
        (0, "C", "K", "273.15"),
        (2.5, "hours", "min", "150"),
        (1, "GB", "MB", "1000"),
        (1, "Kilogram", "G", "1000"),
    ],
)
def test_units(value: float, source: str, target: str, result: str) -> None:
    assert format_number(convert(value, source, target)) == result


@pytest.mark.parametrize(("source", "target"), [("km", "kg"), ("C", "m"), ("m", "F"), ("parsnip", "m"), ("m", "")])
def test_units_refuse(source: str, target: str) -> None:
    with pytest.raises(ToolError):
        convert(1, source, target)


def test_conversion_is_exact_both_ways() -> None:
    assert convert(convert(Fraction(7), "lb", "oz"), "oz", "lb") == 7


@given(st.text(max_size=60) | st.recursive(st.none() | st.integers() | st.text(max_size=5), st.lists).map(str))
def test_call_never_raises(arguments: str) -> None:
    for tool in BUILTIN.values():
        assert isinstance(call(tool, arguments), str)


@pytest.mark.parametrize(
    "arguments",
    ["", "[]", "3", "{", '{"expression": 3}', "{}", '{"expression": "1", "x": 1}', "[" * 5000, '{"expression": "1/0"}'],
)
def test_call_reports_errors(arguments: str) -> None:
    assert call(BUILTIN["calculator"], arguments).startswith("error: ")


def test_results_are_bounded() -> None:
    assert call(BUILTIN["calculator"], '{"expression": "' + "1" * 30_000 + '"}').startswith("error: ")


def test_declarations_have_openai_shape_and_sorted_required_names() -> None:
    for name, tool in BUILTIN.items():
        declaration = tool.declaration()
        assert declaration["type"] == "function"
        assert declaration["function"]["name"] == name == tool.name
        assert sorted(tool.parameters["required"]) == sorted(tool.parameters["properties"])


@pytest.mark.parametrize(
    ("schema", "value", "good"),
    [
        ({"type": "integer"}, 3, True),
        ({"type": "integer"}, 3.0, True),
        ({"type": "integer"}, 3.5, False),
        ({"type": "integer"}, True, False),
        ({"type": "number"}, 3.5, True),
        ({"type": "number"}, "3", False),
        ({"type": ["string", "null"]}, None, True),
        ({"type": "boolean"}, 1, False),
        ({"enum": ["a", "b"]}, "b", True),
        ({"enum": ["a", "b"]}, "c", False),
        ({"const": 3}, 4, False),
        ({"anyOf": [{"type": "string"}, {"type": "integer"}]}, 4, True),
        ({"anyOf": [{"type": "string"}, {"type": "integer"}]}, 4.5, False),
        ({"type": "array", "items": {"type": "number"}}, [1, 2], True),
        ({"type": "array", "items": {"type": "number"}}, [1, "2"], False),
        ({"type": "array", "minItems": 2}, [1], False),
        ({"type": "array", "maxItems": 1}, [1, 2], False),
        ({"type": "integer", "minimum": 2, "maximum": 4}, 5, False),
        ({"type": "integer", "minimum": 2, "maximum": 4}, 2, True),
        ({"type": "string", "minLength": 2}, "a", False),
        ({"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}, {"a": "x"}, True),
        ({"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}, {}, False),
        ({"type": "object", "properties": {"a": {"type": "string"}}}, {"b": 1}, False),
        ({"type": "object", "properties": {"a": {}}, "additionalProperties": True}, {"b": 1}, True),
        ({"type": "object", "properties": {"a": {}}, "additionalProperties": {"type": "string"}}, {"b": 1}, False),
        ({"type": "object"}, {"b": 1}, True),
        (True, object(), True),
        (False, 1, False),
    ],
)
def test_schema(schema: object, value: object, good: bool) -> None:
    assert (validate(schema, value) == []) is good


def test_schema_depth_is_bounded() -> None:
    schema: dict = {"type": "array"}
    schema["items"] = schema
    value: list = []
    for _ in range(100):
        value = [value]
    assert "nested deeper" in validate(schema, value)[0]
