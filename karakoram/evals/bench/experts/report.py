"""The report: a row for each budget, between two measurements of memory."""

from pathlib import Path
from typing import Any

from karakoram.checkpoint import open_checkpoint
from karakoram.checkpoint.experts import open_expert_source
from karakoram.engine.expert_store.opening import StoreOptions
from karakoram.evals.bench.experts.measure import Budgeted, measure
from karakoram.evals.bench.report import Say, bracketed, silent


def experts_bench(
    path: str | Path,
    shares: list[int],
    budgets_bytes: list[int],
    tokens: int,
    policy: str | None = None,
    guessing: bool = True,
    threads: int = 1,
    isa: str | None = None,
    say: Say = silent,
) -> dict[str, Any]:
    """A row for each share of the experts in memory (per cent), then for each budget of the whole process."""
    checkpoint = open_checkpoint(path)
    source = open_expert_source(checkpoint)
    everything = len(source.layers) * source.experts * source.slot_bytes
    source.close()
    options = [
        *(StoreOptions(expert_bytes=everything * share // 100, policy=policy, guessing=guessing) for share in shares),
        *(StoreOptions(ram_bytes=budget, policy=policy, guessing=guessing) for budget in budgets_bytes),
    ]

    def rows(_: str, notes: list[str]) -> list[Budgeted]:
        notes.append("Of ideal: per layer the larger of reading what was missing and computing, plus all else.")
        found = []
        for one in options:
            say(f"budget {one.ram_bytes or one.expert_bytes:,} bytes")
            found.append(measure(path, one, tokens, say))
        return found

    return bracketed(isa, threads, rows, say) | {"model": str(path), "experts_bytes": everything, "tokens": tokens}
