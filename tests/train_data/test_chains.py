"""Chains of calls and word problems: as many calls as asked for, every value from where the thought says it is from."""

import json
import re

import pytest

from karakoram.errors import TrainingError
from karakoram.tools.calculator import evaluate, format_number
from karakoram.train.data import dialogs
from karakoram.train.data.dialogs import records, steps, stories
from karakoram.train.data.dialogs.growing import MOST_CHARS, PLAN, planned
from karakoram.train.data.dialogs.phrases import Chance
from karakoram.train.data.dialogs.steps import KINDS
from karakoram.train.data.documents import Scenario
from karakoram.train.data.names import SPLITS, Split, split_of, words_of


@pytest.mark.parametrize("split", SPLITS)
def test_a_chain_has_as_many_calls_as_were_asked_for(split: Split) -> None:
    for calls in steps.CALLS:
        for index in range(60):
            rng = Chance(f"{split}{calls}{index}")
            assert steps.chain_of(rng, split, calls).calls == calls
            assert stories.story_of(rng, split, calls).calls == calls
    for _, make, fewest, most in KINDS:
        for calls in range(fewest, most + 1):
            assert make(Chance(f"{split}{calls}"), split, calls).calls == calls


def _chains(split: Split, count: int = 120) -> list[Scenario]:
    return [dialogs.scenario(3, index, split, mix=f"chain_{2 + index % 4}") for index in range(count)]


@pytest.mark.parametrize("split", SPLITS)
def test_a_result_is_quoted_before_it_is_used(split: Split) -> None:
    """Arguments come from the question or from the thought of the same message, never from a tool's message alone."""
    quoted = 0
    for scenario in _chains(split):
        messages = scenario.document.messages
        for number, message in enumerate(messages):
            if not message.get("tool_calls") or not message.get("reasoning_content"):
                continue
            for call in message["tool_calls"]:
                for value in json.loads(call["function"]["arguments"]).values():
                    text = value if isinstance(value, str) else json.dumps(value)
                    assert text in message["reasoning_content"]
            if messages[number - 1]["role"] == "tool":
                content = messages[number - 1]["content"]
                assert "failed" in message["reasoning_content"] or any(
                    part in content for part in re.findall(r"[\w.@-]+\w", message["reasoning_content"])
                )
                quoted += 1
    assert quoted > 100


def test_a_plan_lists_what_is_then_done() -> None:
    planned_chains = 0
    for scenario in _chains("train"):
        thoughts = [
            message["reasoning_content"]
            for message in scenario.document.messages
            if message.get("tool_calls") and "failed" not in message.get("reasoning_content", "failed")
        ]
        if thoughts and thoughts[0].startswith(PLAN):
            listed = thoughts[0].removeprefix(PLAN).partition(". First ")[0].split(", ")
            start = re.fullmatch(r"[\d.-]+", listed[0]) is not None  # the number or the date that it begins with
            assert len(listed) - start == len(thoughts)
            planned_chains += 1
    assert planned_chains > 30
    assert [planned("{v}-{n}"), planned("{v}+{v}*{t}/100"), planned("{v}/2")] == ["-{n}", "+{t}%", "/2"]


def test_word_problems_are_exact_and_positive() -> None:
    for index in range(300):
        task = stories.story(Chance(f"story{index}"), "train")
        results = [evaluate(use.values["expression"]) for step in task.steps for use in step]
        assert all(result > 0 and len(format_number(result)) <= MOST_CHARS for result in results)
        assert task.expected == (format_number(results[-1]),)
        assert "{" not in task.question + task.answer
        for before, step in zip(results, task.steps[1:], strict=False):
            assert f"The result is {format_number(before)}. Now" in step[0].thought


def test_tables_of_training_hold_names_that_are_alike_and_all_of_training() -> None:
    alike = 0
    for index in range(300):
        _, made = records._records(Chance(f"table{index}"), "train")
        assert 2 <= len(made) <= 6
        words = [word for name in made for word in words_of(name)]
        alike += len(set(words)) < len(words) or len({name[:2] for name in made}) < len(made)
        assert all(split_of(word) == "train" for name in made for word in words_of(name))
    assert alike > 100


def test_an_unknown_mix_is_refused() -> None:
    with pytest.raises(TrainingError, match="no mix"):
        dialogs.generate(1, 1, mix="third")


def test_shares_of_a_mix_sum_to_one() -> None:
    for mix, shares in dialogs.MIXES.items():
        wanted = 1.07 if mix == "first" else 1.0  # the first edition's are relative, and part of its dialogs
        assert sum(shares.values()) == pytest.approx(wanted, abs=1e-9), mix
        assert shares.keys() <= dialogs.FAMILIES.keys()
