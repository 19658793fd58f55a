"""GSM8K as calculator calls, and plain text in pieces."""

import json
from pathlib import Path

import pytest

from karakoram.chat import ChatFormat
from karakoram.errors import TrainingError
from karakoram.tools import BUILTIN, call
from karakoram.train.data import gsm8k
from karakoram.train.data.pack import document_samples
from karakoram.train.data.plain_text import cut, read_texts

QUESTION = "Natalia sold 48 clips in April and half as many in May. How many clips in all?"
ANSWER = "She sold 48/2 = <<48/2=24>>24 clips in May.\nShe sold 48+24 = <<48+24=72>>72 clips altogether.\n#### 72"


def test_each_calculation_becomes_a_call() -> None:
    scenario = gsm8k.rewrite(QUESTION, ANSWER)
    assert scenario is not None
    roles = [message["role"] for message in scenario.document.messages]
    assert roles == ["user", "assistant", "tool", "assistant", "tool", "assistant"]
    calls = [call for message in scenario.document.messages for call in message.get("tool_calls") or []]
    assert [call["id"] for call in calls] == ["functions.calculator:0", "functions.calculator:1"]
    assert [json.loads(call["function"]["arguments"])["expression"] for call in calls] == ["48/2", "48+24"]
    assert scenario.document.messages[-1]["content"] == "The answer is 72."
    assert scenario.expected == ("72",)


@pytest.mark.parametrize(
    "answer",
    [
        "no calculation\n#### 72",
        "<<48/2=25>>25\n#### 25",  # wrong
        "<<48/2=24>>24\n#### 25",  # another final answer
        "<<48/x=24>>24\n#### 24",
        "<<1+1=2>>" * 7 + "#### 2",  # too many
        "<<48/2=24>>24\n####",
    ],
)
def test_what_the_calculator_does_not_reproduce_is_left_out(answer: str) -> None:
    assert gsm8k.rewrite(QUESTION, answer) is None


def test_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="gsm8k"):
        gsm8k.find_gsm8k(tmp_path)
    with pytest.raises(TrainingError, match="No text files"):
        read_texts(tmp_path)


def test_the_real_file(shared_dir: Path, fmt: ChatFormat) -> None:
    documents = gsm8k.read_gsm8k(shared_dir / "data")
    assert len(documents) > 5500
    held_out = gsm8k.held_out(shared_dir / "data")
    assert len(held_out) == gsm8k.HELD_OUT
    asked = {document.messages[0]["content"] for document in documents}
    assert not asked & {scenario.document.messages[0]["content"] for scenario in held_out}
    for document in documents[:200]:
        for position, message in enumerate(document.messages):
            for tool_call in message.get("tool_calls") or []:
                result = call(BUILTIN["calculator"], tool_call["function"]["arguments"])
                assert result == document.messages[position + 1]["content"]
        assert document_samples(fmt, document)


def test_text_is_cut_without_loss() -> None:
    text = "\n".join(f"Line {number} of a text." for number in range(300))
    pieces = cut(text, 500)
    assert all(len(piece) <= 500 for piece in pieces)
    assert "\n".join(pieces).split() == text.split()
    assert "".join(cut("x" * 1234, 500)) == "x" * 1234
