"""Word problems with the calculator: GSM8K's last 500, held out from our training, or held-out ones of our own.

Ours (`stories`) are generated as the training ones are, of one to five calculations, with sentences, names and tools
that training never shows; they need no data.
"""

from collections.abc import Callable
from pathlib import Path

from karakoram.chat import ChatFormat
from karakoram.evals.nano_tools import SEED, Report, report
from karakoram.evals.tool_loop import GenerateBatch, live
from karakoram.train.data import dialogs
from karakoram.train.data.documents import Scenario
from karakoram.train.data.gsm8k import MAX_CALLS, held_out


def stories(count: int, seed: int = SEED) -> list[Scenario]:
    """The first `count` held-out word problems; the same for everyone."""
    return [dialogs.scenario(seed, index, "eval", mix="stories") for index in range(count)]


def evaluate(
    fmt: ChatFormat,
    generate_batch: GenerateBatch,
    data_dir: Path | None = None,
    limit: int = 500,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """`data_dir` holds `gsm8k/train.jsonl`; without it the problems are ours. Up to six calls and an answer."""
    asked = stories(limit) if data_dir is None else held_out(data_dir)[:limit]
    return report(live(fmt, asked, generate_batch, max_rounds=MAX_CALLS + 1, progress=progress))
