"""The promise: within any budget from the shortest on, every output ends, and every call satisfies its schema."""

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from karakoram.engine.constrain.guided import GuidedText
from karakoram.errors import SchemaError
from tests.engine.constrain.random_schemas import random_schema
from tests.engine.constrain.writing import Setting, allowed, begun, check_calls, shape_for, write

CHOICES = ("required", "named", "auto")


def _sweep(setting: Setting, seeds: range, full: bool) -> Iterator[int]:
    """Write outputs for schemas; how many calls each held. Not `full`: larger budgets for one choice of three, and 512
    for every other schema."""
    for seed in seeds:
        schema = random_schema(seed)
        if (shortest := _shortest(setting, schema, seed % 12)) is None:
            continue
        for number, choice in enumerate(CHOICES):
            shape = shape_for(schema, choice, first_index=seed % 12)
            for budget in (shortest, 2 * shortest, max(512, shortest)):
                often = budget < 512 or seed % 2 == 0
                if budget > shortest and not full and not (often and seed % 3 == number):
                    continue
                constraint = setting.compiler.compile(shape)
                written = write(setting, constraint, budget, seed * 7 + budget, begun(choice))
                assert constraint.complete
                yield check_calls(setting, written, shape)


def _shortest(setting: Setting, schema: Any, first_index: int) -> int | None:
    """None for a schema that asks for what cannot be enforced."""
    try:
        return setting.compiler.compile(shape_for(schema, "required", first_index=first_index)).shortest
    except SchemaError as error:
        return None if error.keyword == "minProperties" else pytest.fail(str(error))


def test_every_output_is_whole_and_valid(setting: Setting) -> None:
    calls = list(_sweep(setting, range(200), full=False))
    assert len(calls) >= 850
    assert sum(calls) > len(calls)


@pytest.mark.slow
def test_every_output_is_whole_and_valid_over_many_schemas(setting: Setting) -> None:
    assert len(list(_sweep(setting, range(1000, 1300), full=True))) >= 2600


@pytest.mark.shared
def test_every_output_is_whole_and_valid_with_k2s_tokens(k2: Setting) -> None:
    assert len(list(_sweep(k2, range(2000, 2016), full=False))) >= 60


@pytest.mark.shared
@pytest.mark.slow
def test_every_output_is_whole_and_valid_with_k2s_tokens_over_many_schemas(k2: Setting) -> None:
    assert len(list(_sweep(k2, range(3000, 3060), full=True))) >= 500


def _costly(setting: Setting, schema: Any, budget: int, seed: int) -> None:
    """Of some allowed tokens always take the one after which the end is farthest: the worst for the budget."""
    grammar = setting.compiler._grammars.schema(schema, True, True)
    vocabulary, text = grammar.vocabulary, GuidedText(grammar)
    random = np.random.default_rng(seed)
    row = np.empty(vocabulary.words, np.uint32)
    spelled = b""
    for left in range(budget, 0, -1):
        text.fill(row, left)
        known = text._planned is not None and len(grammar.plan) - text._planned <= left
        assert known or text._front.cost <= left, "the invariant is broken"
        tokens = allowed(row)
        if not len(tokens):
            break
        drawn = random.choice(tokens, min(12, len(tokens)), replace=False).tolist()
        openers = [vocabulary.ids[bytes([byte])] for byte in b'{[,"']
        drawn += [token for token in openers if row[token >> 5] >> np.uint32(token & 31) & 1]
        fronts = [(text._front.after(vocabulary.spellings[token]), token) for token in drawn]
        _, token = max((front.cost, token) for front, token in fronts if front is not None)
        text.accept(token)
        spelled += vocabulary.spellings[token]
    assert text.complete(), spelled[-200:]
    json.loads(spelled)


@pytest.mark.parametrize("seed", range(12))
def test_the_most_wasteful_writer_ends_too(setting: Setting, seed: int) -> None:
    schema = random_schema(5000 + seed)
    shortest = len(setting.compiler._grammars.schema(schema, True, True).plan)
    for budget in (shortest, shortest + 10, 3 * shortest + 20, 250):
        _costly(setting, schema, max(budget, shortest), seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(30))
def test_the_most_wasteful_writer_ends_too_over_many_schemas(setting: Setting, seed: int) -> None:
    schema = random_schema(6000 + seed)
    shortest = len(setting.compiler._grammars.schema(schema, True, True).plan)
    for budget in (shortest, shortest + 5, shortest + 30, 2 * shortest, 4 * shortest, 600):
        _costly(setting, schema, budget, seed)


WASTEFUL = {
    "long choice": {"type": "object", "properties": {"a": {"enum": ["s", "L" * 300]}}, "required": ["a"]},
    "long branch": {
        "type": "object",
        "properties": {
            "a": {
                "anyOf": [
                    {
                        "type": "object",
                        "properties": {f"p{n}": {"type": "string"} for n in range(40)},
                        "required": [f"p{n}" for n in range(40)],
                    },
                    {"type": "object", "properties": {"p0": {"type": "string"}, "z": {"type": "null"}}},
                ]
            }
        },
    },
    "long pattern": {"type": "object", "properties": {"a": {"type": "string", "pattern": "^(a|b[0-9]{400})$"}}},
    "long string": {
        "type": "object",
        "properties": {"a": {"anyOf": [{"type": "string", "minLength": 500}, {"const": 1}]}},
    },
    "openers": {"type": "object", "additionalProperties": {"type": "array", "items": {"type": "array", "items": {}}}},
    "anything": {},
}  # fmt: skip


@pytest.mark.parametrize("name", WASTEFUL)
def test_one_token_can_promise_much(setting: Setting, name: str) -> None:
    for budget in (20, 60, 150, 330):
        _costly(setting, WASTEFUL[name], budget, budget)


def test_ample_budgets_leave_the_choice_free(setting: Setting) -> None:
    """Where the budget is ample the mask is llguidance's own: every token that fits, whatever it leads to."""
    grammar = setting.compiler._grammars.schema(
        {"type": "object", "properties": {"name": {"type": "string"}}}, True, True
    )
    vocabulary = grammar.vocabulary
    ample, scarce = np.empty(vocabulary.words, np.uint32), np.empty(vocabulary.words, np.uint32)
    text = GuidedText(grammar)
    for token in vocabulary.spell(b'{"name": "'):
        text.accept(token)
    text.fill(ample, 10_000)
    text.fill(scarce, 5)
    assert len(allowed(ample)) > 3000
    assert set(allowed(scarce)) < set(allowed(ample))


def test_short_strings_run_until_the_budget_ends_them(setting: Setting) -> None:
    """Scarce is not forced: within a string plain text goes on while the close still fits."""
    schema = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}
    shape = shape_for(schema, "required", parallel=False)
    shortest = setting.compiler.compile(shape).shortest
    lengths = [len(write(setting, setting.compiler.compile(shape), shortest + 12, seed).tokens) for seed in range(20)]
    assert max(lengths) == shortest + 12
