"""Compiling: cached, safe in threads, quick; and what the vocabulary knows about spelling."""

import json
import threading
import time
from typing import Any

import numpy as np
import pytest

from karakoram.engine.constrain import compiled as compiled_module
from karakoram.engine.constrain.shape import OutputShape, ToolShape
from karakoram.engine.constrain.validate import validate_call
from karakoram.engine.constrain.vocabulary import OPTIONAL
from karakoram.errors import SchemaError
from tests.engine.constrain.random_schemas import random_schema
from tests.engine.constrain.writing import Setting, check_calls, shape_for, write


def test_threads_compile_and_write_at_once(setting: Setting) -> None:
    failures: list[BaseException] = []

    def work(offset: int) -> None:
        try:
            for seed in range(12):
                shape = shape_for(random_schema(20 + (seed + offset) % 6), "required")
                constraint = setting.compiler.compile(shape)
                check_calls(setting, write(setting, constraint, 2 * constraint.shortest, seed + offset), shape)
        except BaseException as error:  # noqa: BLE001 - told to the test
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures[0]


def test_grammars_are_kept_and_dropped(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled_module, "MAX_GRAMMARS", 3)
    cache = compiled_module.GrammarCache(setting.compiler._vocabulary)
    first = cache.schema({"const": 0}, True, False)
    assert cache.schema({"const": 0}, True, False) is first
    assert cache.schema({"const": 0}, False, False) is not first
    for number in range(1, 4):
        cache.schema({"const": number}, True, False)
    assert len(cache._kept) == 3
    assert cache.schema({"const": 0}, True, False) is not first


def test_a_schema_is_read_when_it_is_compiled(setting: Setting) -> None:
    schema: dict[str, Any] = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    shape = OutputShape(tools=(ToolShape("t", schema),), tool_choice="required")
    before = setting.compiler.compile(shape)
    schema["properties"]["a"] = {"type": "null"}
    assert check_calls(setting, write(setting, setting.compiler.compile(shape), 60, 1), shape) >= 1
    schema["properties"]["a"] = {"type": "integer"}
    assert check_calls(setting, write(setting, before, 60, 1), shape) >= 1


def test_outputs_do_not_share_what_they_have_written(setting: Setting) -> None:
    shape = shape_for({"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}, "required")
    one, two = setting.compiler.compile(shape), setting.compiler.compile(shape)
    write(setting, one, 60, 1)
    check_calls(setting, write(setting, two, 60, 2), shape)


# ------------------------------------------------------------------------------------------------ spelling


def _spelled(setting: Setting, tokens: list[int]) -> bytes:
    return b"".join(setting.compiler._vocabulary.spellings[token] for token in tokens)


def test_spelling_is_never_longer_than_the_tokenizers(setting: Setting) -> None:
    vocabulary = setting.compiler._vocabulary
    for text in ('{"location": "San Francisco"}', "aaaaaaaaaaaaaaaa", "日本語 naïve 😀", '[{"a":{"b":[1,2,3]}}]'):
        tokens = vocabulary.spell(text.encode())
        assert _spelled(setting, tokens) == text.encode()
        assert len(tokens) <= len(setting.fmt.tokenizer.encode(text))
        assert vocabulary.costs(text.encode())[0] == len(tokens)


def test_optional_spaces_are_taken_where_they_save_tokens(setting: Setting) -> None:
    vocabulary = setting.compiler._vocabulary
    marked = b'{"a":' + OPTIONAL + b'"",' + OPTIONAL + b'"b":' + OPTIONAL + b"0" + OPTIONAL + OPTIONAL + b"}"
    spelled = _spelled(setting, vocabulary.spell(marked))
    assert json.loads(spelled) == {"a": "", "b": 0}
    variants = [b'{"a":"","b":0}', b'{"a": "", "b": 0}', b'{"a":"", "b":0}', b'{"a": "","b": 0}']
    assert len(vocabulary.spell(marked)) <= min(len(vocabulary.spell(variant)) for variant in variants)
    vocabulary.spell(b"[" + (OPTIONAL + b"{" + OPTIONAL + b"}," + OPTIONAL) * 300)


def test_fillers_are_the_cheapest_runs(setting: Setting) -> None:
    vocabulary = setting.compiler._vocabulary
    for count in (0, 1, 2, 7, 100, 1000):
        tokens, char = vocabulary.filler(count)
        assert tokens == len(vocabulary.spell(char * count))
        assert tokens <= len(vocabulary.spell(b"a" * count))


def _smallest(schema: Any) -> Any:
    """The obvious smallest value of simple schemas."""
    if "enum" in schema:
        return min(schema["enum"], key=lambda value: len(json.dumps(value)))
    if schema["type"] == "object":
        return {name: _smallest(schema["properties"][name]) for name in schema.get("required", ())}
    if schema["type"] == "array":
        return [_smallest(schema["items"])] * schema.get("minItems", 0)
    return {"string": "a" * schema.get("minLength", 0), "integer": schema.get("minimum", 0), "boolean": True}[
        schema["type"]
    ]


def _object(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties)}


SIMPLE = [
    _object(a={"type": "string"}, b={"type": "integer", "minimum": 5}),
    _object(kind={"enum": ["green", "blue", "red"]}, n={"type": "boolean"}),
    _object(list={"type": "array", "items": {"type": "string", "minLength": 6}, "minItems": 3}),
    _object(o=_object(x={"type": "integer"})),
]


@pytest.mark.parametrize("schema", SIMPLE)
def test_the_shortest_is_not_longer_than_the_obvious(setting: Setting, schema: Any) -> None:
    grammar = setting.compiler._grammars.schema(schema, True, True)
    value = _smallest(schema)
    texts = [json.dumps(value), json.dumps(value, separators=(",", ":"))]
    assert len(grammar.plan) <= min(len(setting.fmt.tokenizer.encode(text)) for text in texts)
    assert validate_call(schema, _spelled(setting, list(grammar.plan)).decode()) is None


# ------------------------------------------------------------------------------------------------ the second opinion


@pytest.mark.parametrize(
    ("schema", "text", "says"),
    [
        ({"type": "object"}, '{"a": 1}', None),
        ({"type": "object"}, '{"a": 1', "not JSON"),
        ({"type": "object"}, "[]", "not of type"),
        ({"type": "number"}, "NaN", "no JSON"),
        ({"multipleOf": 0.01}, "0.07", None),
        ({"multipleOf": 0.01}, "0.075", "multiple"),
        ({"multipleOf": 2}, "1e999", "multiple"),
        ({"pattern": "^(a+)+$"}, '"' + "a" * 3000 + '!"', "$: "),
        ({"pattern": r"^\p{L}$"}, '"a"', None),
        ({"format": "date"}, '"2023-02-29"', "date"),
        ({"$ref": "#/nowhere"}, "1", None),
        ({"items": [{"type": "integer"}]}, '["a"]', "integer"),
        (False, "1", "False schema"),
        ({}, "[" * 100_000, "not JSON"),
    ],
)
def test_validation(schema: Any, text: str, says: str | None) -> None:
    wrong = validate_call(schema, text)
    assert wrong is None if says is None else wrong is not None and says in wrong


def test_validation_of_broken_schemas() -> None:
    with pytest.raises(SchemaError) as caught:
        validate_call({"properties": {"a": {"type": "strin"}}}, "{}")
    assert (caught.value.keyword, caught.value.where) == ("type", "/properties/a")


# ------------------------------------------------------------------------------------------------ time


@pytest.mark.slow
@pytest.mark.parametrize("tokens", ["nano", pytest.param("k2", marks=pytest.mark.shared)])
def test_masks_take_microseconds(request: pytest.FixtureRequest, tokens: str) -> None:
    """The median of ample and scarce masks together; the pass that they run beside takes milliseconds."""
    used: Setting = request.getfixturevalue("setting" if tokens == "nano" else tokens)
    times: list[float] = []
    for seed in range(30):
        try:
            constraint = used.compiler.compile(shape_for(random_schema(9000 + seed), "required"))
        except SchemaError:
            continue
        fill = constraint.fill

        def timed(row: Any, left: int, fill: Any = fill) -> bool:
            start = time.thread_time()
            masked = fill(row, left)
            times.append(time.thread_time() - start)
            return masked

        constraint.fill = timed
        write(used, constraint, 300, seed)
    assert np.median(times) < 200e-6
