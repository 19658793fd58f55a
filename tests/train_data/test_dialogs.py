"""Generated dialogs: deterministic, executable, within bounds, and held out in names, arguments and sentences."""

import json
import re
from collections import Counter
from collections.abc import Iterable
from functools import cache
from itertools import product
from pathlib import Path

from karakoram.tools import BUILTIN, parse_arguments
from karakoram.tools import call as call_tool
from karakoram.train.data import dialogs
from karakoram.train.data.dialogs.chain_phrases import CHAINS
from karakoram.train.data.dialogs.more_phrases import MORE
from karakoram.train.data.dialogs.phrases import ALL
from karakoram.train.data.documents import Document, Scenario
from karakoram.train.data.names import Split, split_of, words_of

SEED, MANY = 11, 3000


@cache
def _documents(split: Split, count: int = MANY) -> list[Document]:
    return [dialogs.generate(SEED, index, split) for index in range(count)]


def _names(documents: list[Document]) -> tuple[set[str], set[str]]:
    """Names of tools, names of arguments."""
    functions = [tool["function"] for document in documents for tool in document.tools or []]
    arguments = {name for function in functions for name in function["parameters"]["properties"]}
    return {function["name"] for function in functions}, arguments


def test_the_nth_dialog_is_a_pure_function() -> None:
    first = [dialogs.generate(5, index) for index in range(50)]
    again = [dialogs.generate(5, index) for index in reversed(range(50))][::-1]
    assert first == again
    assert first[0] != dialogs.generate(6, 0)
    assert dialogs.generate(5, 0, "eval") != first[0]


def test_names_of_tools_and_arguments_are_held_out() -> None:
    train_tools, train_arguments = _names(_documents("train"))
    eval_tools, eval_arguments = _names(_documents("eval"))
    assert len(eval_tools) > 3000
    assert len(eval_arguments) > 2500
    assert not (train_tools | set(BUILTIN)) & eval_tools
    assert not train_arguments & eval_arguments
    fold = lambda names: {name.lower().replace("_", "").replace("-", "") for name in names}  # noqa: E731
    assert not fold(train_tools) & fold(eval_tools)
    assert not fold(train_arguments) & fold(eval_arguments)


def test_not_even_a_word_of_a_held_out_name_is_shared() -> None:
    train, evaluation = _names(_documents("train")), _names(_documents("eval"))
    words = [{word for names in side for name in names for word in words_of(name)} for side in (train, evaluation)]
    demo = {
        word
        for tool in BUILTIN.values()
        for name in (tool.name, *tool.parameters["properties"])
        for word in words_of(name)
    }
    assert not (words[0] | demo) & words[1]
    assert all(split_of(word) == "eval" for word in words[1])


def test_sentence_templates_are_held_out() -> None:
    """Templates are equal if they differ only in casing, punctuation or the names of slots. Choices are all tried."""

    def shapes(templates: Iterable[str]) -> set[str]:
        found: set[str] = set()
        for template in templates:
            parts = re.split(r"\[([^\]]*)\]", template)
            choices = [part.split("|") if index % 2 else [part] for index, part in enumerate(parts)]
            for chosen in product(*choices):
                slots = re.sub(r"\{\w+\}", "0", "".join(chosen).partition("|")[0].lower())
                found.add(re.sub(r"\W+", " ", slots).strip())
        return found

    assert len(ALL) > 60
    assert all(phrases.of[split] for phrases in ALL.values() for split in ("train", "eval"))
    train = shapes(template for phrases in ALL.values() for template in phrases.of["train"])
    train |= shapes(template for more in (MORE, CHAINS) for templates in more.values() for template in templates)
    evaluation = shapes(template for phrases in ALL.values() for template in phrases.of["eval"])
    assert len(evaluation) > 250
    assert MORE.keys() | CHAINS.keys() <= ALL.keys() and not MORE.keys() & CHAINS.keys()
    assert len(train) > 10_000
    assert not train & evaluation


def test_no_held_out_question_or_description_occurs_in_training() -> None:
    """The same with filled templates: numbers and copied values aside, no question of one split is one of the other."""
    known = {template for phrases in ALL.values() for template in phrases.of["train"]}
    described = {tool["function"]["description"] for document in _documents("eval") for tool in document.tools or []}
    assert not described & known


def test_every_call_satisfies_its_schema_and_every_tool_returns_what_the_document_shows() -> None:
    for split in ("train", "eval"):
        for index in range(600):
            _check_execution(dialogs.scenario(SEED, index, split))


def _check_execution(scenario: Scenario) -> None:
    tools = {tool.name: tool for tool in scenario.tools}
    results = {
        message["tool_call_id"]: message["content"]
        for message in scenario.document.messages
        if message["role"] == "tool"
    }
    counter = 0
    for index, message in enumerate(scenario.document.messages):
        if index in scenario.document.mistakes:
            counter += 1
            _check_mistake(message, tools, results)
            continue
        for call in message.get("tool_calls") or []:
            name = call["function"]["name"]
            assert call["id"] == f"functions.{name}:{counter}"
            counter += 1
            arguments, problems = parse_arguments(tools[name], call["function"]["arguments"])
            assert not problems
            assert json.dumps(arguments, ensure_ascii=False) == call["function"]["arguments"]
            required = tools[name].parameters["required"]
            assert list(arguments) == sorted(required)
            assert call["id"] in results


def _check_mistake(message: dict, tools: dict, results: dict[str, str]) -> None:
    """A call that names something that is not declared, and the error that the loop answers with."""
    [made] = message["tool_calls"]
    name, arguments = made["function"]["name"], made["function"]["arguments"]
    assert results[made["id"]].startswith("error: ")
    if name in tools:
        assert parse_arguments(tools[name], arguments)[1]
        assert results[made["id"]] == call_tool(tools[name], arguments)


def test_two_tools_of_a_dialog_never_have_the_same_name_or_description() -> None:
    for document in _documents("eval"):
        functions = [tool["function"] for tool in document.tools or []]
        assert len({function["name"] for function in functions}) == len(functions)


def test_shares_of_thinking_demo_tools_and_families() -> None:
    scenarios = [dialogs.scenario(SEED, index) for index in range(MANY)]
    thinking = sum(scenario.document.thinking for scenario in scenarios) / MANY
    assert 0.82 < thinking < 0.88
    names = set(BUILTIN)
    demo = sum(bool(scenario.tools) and scenario.tools[0].name in names for scenario in scenarios) / MANY
    assert demo > 0.15
    families = Counter(scenario.family for scenario in scenarios)
    assert families.keys() >= {
        "calculator", "dates", "units", "lookup", "lists", "files", "actions", "talk",
        "no_tool", "missing_tool", "chain", "parallel",
    }  # fmt: skip
    assert not any("reasoning_content" in m for s in scenarios if not s.document.thinking for m in s.document.messages)


def test_built_in_tools_are_never_declared_in_evaluation() -> None:
    tools, _ = _names(_documents("eval"))
    assert not tools & set(BUILTIN)


def test_shipped_arithmetic_questions_are_not_in_training(project_root: Path) -> None:
    records = json.loads((project_root / "karakoram/evals/arithmetic_questions.json").read_text())
    assert len(records) == 50
    plain = lambda text: re.sub(r"\W+", " ", text.lower()).strip()  # noqa: E731
    questions = {plain(record["question"]) for record in records}
    assert len(questions) == 50
    seen = {
        plain(message["content"])
        for index in range(8_000)
        for message in dialogs.generate(0, index, rich=index % 2 == 1).messages
        if message["role"] == "user"
    }
    assert not questions & seen


def test_rich_dialogs_say_more_and_only_what_training_may() -> None:
    """The same tasks in other words; held-out dialogs do not change."""

    def questions(rich: bool) -> set[str]:
        return {
            message["content"]
            for index in range(300)
            for message in dialogs.generate(SEED, index, rich=rich).messages
            if message["role"] == "user"
        }

    assert len(questions(True) - questions(False)) > 150
    assert dialogs.generate(SEED, 3, "eval", rich=True) == dialogs.generate(SEED, 3, "eval")
    for index in range(300):
        _check_execution(dialogs.scenario(SEED, index, rich=True))
