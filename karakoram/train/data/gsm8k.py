"""GSM8K as conversations with a calculator: each `<<48/2=24>>` of a worked answer becomes a call and its result.

Thoughts are those of generated word problems: the result so far is quoted, then comes the next calculation. A problem
is kept only if the calculator reproduces every result, so that the model never learns to distrust the tool. The last
500 problems are held out and only scored.
Source: openai/grade-school-math (MIT), `train.jsonl`, which the user supplies with `--data DIR`.
"""

import json
import re
from functools import cache
from pathlib import Path

from karakoram.errors import TrainingError
from karakoram.tools import BUILTIN, ToolError
from karakoram.tools.calculator import CALCULATOR, evaluate, format_number
from karakoram.train.data.documents import Document, Message, Scenario

HELD_OUT = 500
MAX_CALLS = 6
MAX_FILE_BYTES = 50_000_000
_MARK = re.compile(r"<<([^<>=]+)=([^<>]*)>>")


def find_gsm8k(data_dir: Path) -> Path:
    """`data_dir/gsm8k/train.jsonl` or `data_dir/train.jsonl`."""
    for file in (data_dir / "gsm8k" / "train.jsonl", data_dir / "train.jsonl"):
        if file.is_file() and file.stat().st_size <= MAX_FILE_BYTES:
            return file
    raise TrainingError(
        f"No gsm8k/train.jsonl below {data_dir}.", "Get it from openai/grade-school-math, or leave GSM8K out."
    )


def rewrite(question: str, answer: str) -> Scenario | None:
    """The problem as a conversation, or None when the calculator does not reproduce the worked answer."""
    body, _, final = answer.partition("####")
    final = final.strip().replace(",", "").replace("$", "")
    marks = list(_MARK.finditer(body))
    if not 1 <= len(marks) <= MAX_CALLS:
        return None
    messages: list[Message] = [{"role": "user", "content": question.strip()}]
    for index, mark in enumerate(marks):
        expression = mark[1].replace(" ", "").replace(",", "")
        try:
            result = format_number(evaluate(expression))
            if abs(evaluate(mark[2].replace(",", "").strip() or "x") - evaluate(expression)) > evaluate("0.01"):
                return None
        except ToolError:
            return None
        call_id = f"functions.{CALCULATOR.name}:{index}"
        call = {
            "id": call_id,
            "type": "function",
            "function": {"name": CALCULATOR.name, "arguments": json.dumps({"expression": expression})},
        }
        before = f"The result is {messages[-1]['content']}. Now" if index else "First"
        thought = f"{before} {expression}. Use {CALCULATOR.name}: expression = {expression}."
        messages.append({"role": "assistant", "content": "", "reasoning_content": thought, "tool_calls": [call]})
        messages.append({"role": "tool", "tool_call_id": call_id, "content": result})
    if not re.fullmatch(r"-?\d+(\.\d+)?", final) or format_number(evaluate(final)) != messages[-1]["content"]:
        return None
    final = format_number(evaluate(final))
    messages.append(
        {"role": "assistant", "content": f"The answer is {final}.", "reasoning_content": f"The result is {final}."}
    )
    document = Document(messages, [tool.declaration() for tool in BUILTIN.values()][:1], True)
    return Scenario(document, [CALCULATOR], (final,), "gsm8k")


def _problems(data_dir: Path) -> list[tuple[str, str]]:
    lines = find_gsm8k(data_dir).read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines if line.strip()]
    return [(record["question"], record["answer"]) for record in records]


@cache
def read_gsm8k(data_dir: Path) -> list[Document]:
    """Training conversations: all problems but the last 500 that can be rewritten."""
    scenarios = [rewrite(question, answer) for question, answer in _problems(data_dir)[:-HELD_OUT]]
    return [scenario.document for scenario in scenarios if scenario is not None]


def held_out(data_dir: Path) -> list[Scenario]:
    """The last 500 problems, all of them, with the calculator and the final number; their solutions are not needed."""
    scenarios = []
    for question, answer in _problems(data_dir)[-HELD_OUT:]:
        final = answer.partition("####")[2].strip().replace(",", "").replace("$", "")
        messages: list[Message] = [{"role": "user", "content": question.strip()}]
        scenarios.append(
            Scenario(Document(messages, [CALCULATOR.declaration()], True), [CALCULATOR], (final,), "gsm8k")
        )
    return scenarios
