"""The last 500 problems of GSM8K's training file, held out from our training, solved with the calculator."""

from collections.abc import Callable
from pathlib import Path

from karakoram.chat import ChatFormat
from karakoram.evals.nano_tools import Report, report
from karakoram.evals.tool_loop import GenerateBatch, live
from karakoram.train.data.gsm8k import MAX_CALLS, held_out


def evaluate(
    fmt: ChatFormat,
    generate_batch: GenerateBatch,
    data_dir: Path,
    limit: int = 500,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """`data_dir` holds `gsm8k/train.jsonl`. Problems take up to six calls and an answer."""
    return report(live(fmt, held_out(data_dir)[:limit], generate_batch, max_rounds=MAX_CALLS + 1, progress=progress))
