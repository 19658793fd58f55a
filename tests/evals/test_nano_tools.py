"""The loop: a model that knows everything scores 100 %, and each way to fail costs what it should."""

import json
import sys
from collections import Counter
from collections.abc import Collection
from hashlib import sha256
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))
from oracle import oracle

from karakoram.chat import ChatFormat, Tokenizer
from karakoram.errors import InputError
from karakoram.evals import arithmetic, gsm8k, nano_tools
from karakoram.evals.tool_loop import MAX_ROUNDS, live
from karakoram.tools import BUILTIN, call
from karakoram.train.data.bpe import DIALECT, byte_order, special_ids
from karakoram.train.data.documents import Scenario

EDITIONS = {  # of 500 dialogs each
    1: "77abc270f688aa3a4fe80c0c5d6fab0671d7c2ba527aedbd639366f138abd59a",
    2: "43d1d55d5620aebb0466cc3061f6ac2748f064857b0c17278a504e14996c4c22",
}


@pytest.fixture(scope="module")
def fmt() -> ChatFormat:
    """Bytes as tokens: the loop does not care."""
    ranks = {bytes([byte]): rank for rank, byte in enumerate(byte_order())}
    return ChatFormat(DIALECT, Tokenizer(ranks, special_ids(256)))


def test_the_reference_scores_all(fmt: ChatFormat) -> None:
    seen: list[tuple[int, int]] = []
    known = oracle(fmt, nano_tools.scenarios(500))
    report = nano_tools.evaluate(fmt, known, progress=lambda done, total: seen.append((done, total)))
    assert report.answers.trials == 500
    assert report.calls.value == 1.0
    assert report.answers.value == 1.0, [outcome.messages for outcome in report.failures(1)]
    assert report.without_call == report.unfinished == 0
    assert seen[-1] == (500, 500)
    assert "95 % interval" in str(report)
    assert report.to_dict()["answers"] == [500, 500]
    assert len(report.families) >= 10


@pytest.mark.parametrize("edition", [1, 2])
def test_the_evaluation_is_the_same_for_everyone(edition: int) -> None:
    first, again = nano_tools.scenarios(20, edition=edition), nano_tools.scenarios(20, edition=edition)
    assert [scenario.document for scenario in first] == [scenario.document for scenario in again]


@pytest.mark.parametrize("edition", [1, 2])
def test_an_edition_has_not_changed_since_it_was_first_measured(edition: int) -> None:
    digest = sha256()
    for scenario in nano_tools.scenarios(500, edition=edition):
        document = scenario.document
        seen = [document.messages, document.tools, document.thinking, scenario.expected, scenario.family]
        digest.update(json.dumps(seen, ensure_ascii=False, sort_keys=True).encode())
    assert digest.hexdigest() == EDITIONS[edition]


def test_the_second_edition_holds_chains_of_up_to_five_calls() -> None:
    scenarios = nano_tools.scenarios(500)
    numbers = Counter(nano_tools.wanted_calls(scenario) for scenario in scenarios)
    assert set(numbers) == {0, 1, 2, 3, 4, 5, 6}  # six: a chain of five whose first call fails once
    assert all(numbers[calls] >= 40 for calls in (3, 4, 5))
    assert numbers[2] >= 35
    first = {str(scenario.document) for scenario in nano_tools.scenarios(500, edition=1)}
    assert sum(str(scenario.document) in first for scenario in scenarios) == 340  # 68 %
    with pytest.raises(InputError, match="edition 3"):
        nano_tools.scenarios(1, edition=3)


def test_rows_by_number_of_calls(fmt: ChatFormat) -> None:
    scenarios = nano_tools.scenarios(60)
    report = nano_tools.evaluate(fmt, oracle(fmt, scenarios), 60)
    assert sum(answers.trials for _, answers in report.by_calls.values()) == 60
    assert all(calls.trials == number * answers.trials for number, (calls, answers) in report.by_calls.items())
    assert "  3 calls " in str(report)
    assert report.to_dict()["by_calls"]["3"]["answers"] == [report.by_calls[3][1].trials] * 2


def test_the_first_edition_is_run_within_its_own_limits(fmt: ChatFormat) -> None:
    scenarios = nano_tools.scenarios(40, edition=1)
    assert nano_tools.evaluate(fmt, oracle(fmt, scenarios), 40, edition=1).answers.value == 1.0


def _scripted(fmt: ChatFormat, texts: list[str]):
    """Writes the texts, one per round, in which special tokens are spelled out; then nothing."""
    left = list(texts)

    def generate_batch(prompts: list[list[int]], max_new_tokens: int, stop_ids: Collection[int]) -> list[list[int]]:
        text = left.pop(0) if left else ""
        return [fmt.tokenizer.encode(text, allow_special=True) for _ in prompts]

    return generate_batch


def _one(fmt: ChatFormat, *texts: str) -> nano_tools.Report:
    scenario = arithmetic.scenarios()[0]  # What is 17 times 23?
    return nano_tools.report(live(fmt, [scenario], _scripted(fmt, list(texts))))


def _calls(*calls: tuple[str, str]) -> str:
    inner = "".join(f"<|tool_call_begin|>{i}<|tool_call_argument_begin|>{a}<|tool_call_end|>" for i, a in calls)
    return f"Need it.</think><|tool_calls_section_begin|>{inner}<|tool_calls_section_end|><|im_end|>"


def test_call_then_answer(fmt: ChatFormat) -> None:
    report = _one(
        fmt, _calls(("functions.calculator:0", '{"expression": "17*23"}')), "Done.</think>It is 391.<|im_end|>"
    )
    assert (report.calls.successes, report.calls.trials) == (1, 1)
    assert report.answers.successes == 1
    messages = report.outcomes[0].messages
    assert messages[-2] == {"role": "tool", "tool_call_id": "functions.calculator:0", "content": "391"}


@pytest.mark.parametrize(
    "bad",
    [
        ("functions.calculator:0", '{"expression": 3}'),
        ("functions.calculator:0", '{"expr": "17*23"}'),
        ("functions.calculator:0", '{"expression": "17*23"'),
        ("functions.calculators:0", '{"expression": "17*23"}'),
        ("functions.calculator:0", '{"expression": "17*23", "x": 1}'),
    ],
)
def test_bad_calls_are_counted_and_reported_to_the_model(fmt: ChatFormat, bad: tuple[str, str]) -> None:
    good = ("functions.calculator:1", '{"expression": "17*23"}')
    report = _one(fmt, _calls(bad), _calls(good), "</think>391<|im_end|>")
    assert (report.calls.successes, report.calls.trials) == (1, 2)
    assert report.answers.successes == 1
    assert report.outcomes[0].messages[2]["content"].startswith("error: ")
    assert report.outcomes[0].problems


def test_parallel_calls(fmt: ChatFormat) -> None:
    calls = [
        ("functions.calculator:0", '{"expression": "17*20"}'),
        ("functions.calculator:1", '{"expression": "17*3"}'),
    ]
    report = _one(fmt, _calls(*calls), "</think>391<|im_end|>")
    assert report.calls.trials == 2
    assert [message["content"] for message in report.outcomes[0].messages if message["role"] == "tool"] == ["340", "51"]


def test_a_cut_off_call_is_not_valid(fmt: ChatFormat) -> None:
    header = "<|tool_calls_section_begin|><|tool_call_begin|>functions.calculator:0<|tool_call_argument_begin|>"
    cut = f'</think>{header}{{"expression": "17*23'
    report = _one(fmt, cut, "</think>391<|im_end|>")
    assert (report.calls.successes, report.calls.trials) == (0, 1)


def test_calling_for_ever_is_unfinished(fmt: ChatFormat) -> None:
    report = _one(fmt, *[_calls((f"functions.calculator:{n}", '{"expression": "1"}')) for n in range(9)])
    assert report.unfinished == 1
    assert report.answers.successes == 0
    assert report.calls.trials == MAX_ROUNDS


def test_empty_output_is_a_wrong_answer(fmt: ChatFormat) -> None:
    report = _one(fmt, "")
    assert report.answers.successes == 0
    assert report.unfinished == 0


def test_needed_calls_that_never_came_are_counted(fmt: ChatFormat) -> None:
    needing = [scenario for scenario in nano_tools.scenarios(40) if scenario.family == "calculator"]
    report = nano_tools.report(live(fmt, needing, _scripted(fmt, ["</think>7<|im_end|>"])))
    assert report.without_call == len(needing) > 3


def test_shipped_arithmetic_answers_are_right() -> None:
    def expression_free(scenario: Scenario) -> str:
        return scenario.document.messages[0]["content"]

    scenarios = arithmetic.scenarios()
    assert len(scenarios) == 50
    assert all(len(scenario.tools) == len(BUILTIN) for scenario in scenarios)
    by_question = {expression_free(scenario): scenario.expected[0] for scenario in scenarios}
    checked = {
        "What is 17 times 23?": "17*23", "How much is (18+24)*3?": "(18+24)*3", "What is 15% of 240?": "240*15/100",
        "Calculate (100-37)/9": "(100-37)/9", "What is 17 + 25 * 2?": "17+25*2", "Please calculate 58*47.": "58*47",
        "99 * 99": "99*99", "What is 2 to the power of 10?": "2**10", "Add 3.75 and 4.5": "3.75+4.5",
        "What is 4096 / 64?": "4096/64", "How much is 72 divided by 0.5?": "72/0.5",
        "Could you work out 3.2 * 5 for me?": "3.2*5",
    }  # fmt: skip
    for question, expression in checked.items():
        assert call(BUILTIN["calculator"], f'{{"expression": "{expression}"}}') == by_question[question]


def test_word_problems_of_our_own_need_no_data(fmt: ChatFormat) -> None:
    asked = gsm8k.stories(60)
    assert {nano_tools.wanted_calls(scenario) for scenario in asked} >= {1, 2, 3, 4, 5}
    report = gsm8k.evaluate(fmt, oracle(fmt, asked), limit=60)
    assert report.answers.value == report.calls.value == 1.0


def test_gsm8k_runs(fmt: ChatFormat, shared_dir: Path) -> None:
    report = gsm8k.evaluate(fmt, _scripted(fmt, ["</think>7<|im_end|>"]), shared_dir / "data", limit=10)
    assert report.answers.trials == 10
