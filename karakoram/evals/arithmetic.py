"""Fifty arithmetic questions as a person types them, with the demo tools declared: does the right number come out?

The questions are shipped in `arithmetic_questions.json` and occur literally in no training data (a test proves it).
"""

import json
from collections.abc import Callable
from pathlib import Path

from karakoram.chat import ChatFormat
from karakoram.evals.nano_tools import Report, report
from karakoram.evals.tool_loop import GenerateBatch, live
from karakoram.tools import BUILTIN
from karakoram.train.data.documents import Document, Scenario

QUESTIONS = Path(__file__).with_name("arithmetic_questions.json")


def scenarios() -> list[Scenario]:
    """The questions with all built-in tools, thinking on, and the number that must be in the answer."""
    tools = list(BUILTIN.values())
    return [
        Scenario(
            Document([{"role": "user", "content": record["question"]}], [tool.declaration() for tool in tools], True),
            tools,
            (record["answer"],),
            "arithmetic",
        )
        for record in json.loads(QUESTIONS.read_text(encoding="utf-8"))
    ]


def evaluate(
    fmt: ChatFormat, generate_batch: GenerateBatch, progress: Callable[[int, int], None] | None = None
) -> Report:
    """Runs all fifty. `report.answers` is the number that counts."""
    return report(live(fmt, scenarios(), generate_batch, progress=progress))
