"""Which texts a schema allows: by hand for each keyword, and at random against the validator."""

import json
from pathlib import Path
from random import Random
from typing import Any

import pytest

from karakoram.engine.constrain.validate import validate_call
from karakoram.errors import SchemaError
from tests.engine.constrain.random_schemas import random_schema
from tests.engine.constrain.reading import prefix_read, reads
from tests.engine.constrain.writing import Setting, write_text

# name: a schema, texts in its language, texts outside
CASES: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("language.json").read_text(encoding="utf-8"))
TREE = CASES["recursion"]["schema"]


@pytest.mark.parametrize("name", CASES)
def test_language_of(setting: Setting, name: str) -> None:
    schema, inside, outside = (CASES[name][part] for part in ("schema", "inside", "outside"))
    grammar = setting.compiler._grammars.schema(schema, True, False)
    for text in inside:
        assert reads(grammar, text), text
        assert validate_call(schema, text) is None, text
    for text in outside:
        assert not reads(grammar, text), text


@pytest.mark.parametrize("name", CASES)
def test_what_is_written_is_valid(setting: Setting, name: str) -> None:
    schema = CASES[name]["schema"]
    grammar = setting.compiler._grammars.schema(schema, True, False)
    shortest = len(grammar.plan)
    for seed in range(6):
        text = write_text(grammar, (shortest, shortest + 4, 70)[seed % 3] + (shortest if seed % 3 == 2 else 0), seed)
        assert validate_call(schema, text.decode()) is None, text


def _agree(setting: Setting, seeds: range) -> int:
    """Mutilated texts: both readers must break off at the same byte, and what they accept must be valid."""
    taken = 0
    for seed in seeds:
        random = Random(seed)
        schema = random_schema(seed + 70_000)
        try:
            grammar = setting.compiler._grammars.schema(schema, True, True)
        except SchemaError:
            continue
        for budget in (40, 90):
            text = write_text(grammar, max(budget, len(grammar.plan)), seed)
            for _ in range(12):
                cut, end = sorted((random.randint(0, len(text)), random.randint(0, len(text))))
                piece = random.choice(
                    [b"", b"", text[cut : cut + 3], *(bytes([byte]) for byte in b'{}[]",: \n0-.e\\u')]
                )
                mutilated = text[:cut] + piece + text[random.choice([cut, cut + 1, end]) :]
                if prefix_read(grammar, mutilated)[1]:
                    taken += 1
                    assert validate_call(schema, mutilated.decode()) is None, mutilated
    return taken


def test_both_readers_agree_on_mutilated_texts(setting: Setting) -> None:
    assert _agree(setting, range(25)) > 40


@pytest.mark.slow
def test_both_readers_agree_on_many_mutilated_texts(setting: Setting) -> None:
    assert _agree(setting, range(1000, 1300)) > 500


def test_long_runs_of_a_set_are_counted_not_unrolled(setting: Setting) -> None:
    grammar = setting.compiler._grammars.schema({"type": "string", "pattern": "^.{2,700}$"}, True, False)
    assert reads(grammar, '"' + "é" * 700 + '"') and not reads(grammar, '"' + "é" * 701 + '"')


def test_depth_is_bounded_so_that_readers_can_follow(setting: Setting) -> None:
    grammar = setting.compiler._grammars.schema(True, True, False)
    assert reads(grammar, "[" * 12 + "]" * 12) and not reads(grammar, "[" * 13 + "]" * 13)
    tree = setting.compiler._grammars.schema(TREE, True, False)
    deep = '{"kids":[' * 11 + '{"kids":[]}' + "]}" * 11
    assert reads(tree, deep)
    assert validate_call(TREE, deep) is None
    json.loads(write_text(tree, 2000, 1))
