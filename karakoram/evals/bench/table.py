"""A report as a person reads it: the machine in a few lines, then a table with the shares of the limits."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

Show = Callable[[Any], str]


def _whole(value: int) -> str:
    return f"{value:,}"


def _number(value: float) -> str:
    return f"{value:.4g}" if value < 1000 else f"{value:,.0f}"


def _share(value: float) -> str:
    return f"{value:.0%}" if value >= 0.1 else f"{value:.1%}"


def _error(value: float) -> str:
    return f"{value:.1e}"


# key of a row: (heading, how it is shown); a row shows those that it has
COLUMNS: dict[str, tuple[str, Show]] = {
    "m": ("M", _whole),
    "k": ("K", _whole),
    "n": ("N", _whole),
    "phase": ("", str),
    "what": ("", str),
    "streams": ("streams", _whole),
    "sequences": ("sequences", _whole),
    "prompt_tokens": ("prompt", _whole),
    "tokens_per_s": ("tokens/s", _number),
    "slowest_tokens_per_s": ("slowest", _number),
    "fastest_tokens_per_s": ("fastest", _number),
    "tokens": ("tokens", _whole),
    "context": ("context", _whole),
    "batch": ("batch", _whole),
    "ms_median": ("ms", _number),
    "ms_per_pass": ("ms a pass", _number),
    "ttft_ms": ("first after ms", _number),
    "p99_ms": ("99 % within ms", _number),
    "p99_of_median": ("of the median", _number),
    "of_engine": ("of engine", _share),
    "of_one": ("of one stream", _number),
    "residency": ("in memory", _share),
    "hit_rate": ("hits", _share),
    "of_ideal": ("of ideal", _share),
    "of_simple_ideal": ("of max()", _share),
    "guesses_useful": ("guesses used", _share),
    "prefill_overlap": ("prefill overlap", _share),
    "disk_gb_per_s": ("disk GB/s", _number),
    "gb_per_s": ("GB/s", _number),
    "read_share": ("of reading", _share),
    "tflops": ("TFLOPS", _number),
    "matmul_share": ("of torch matmul", _share),
    "roofline_share": ("of roofline", _share),
    "max_rel_error": ("error", _error),
    "torch_bf16_error": ("torch bf16 error", _error),
}


def table(rows: list[dict[str, Any]]) -> "Table":
    """A Rich table of the rows of a report; where a row lacks what another has, the cell is empty."""
    from rich.table import Table

    keys = [key for key in COLUMNS if any(key in row for row in rows)]
    found = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for key in keys:
        found.add_column(COLUMNS[key][0], justify="right")
    for row in rows:
        found.add_row(*(COLUMNS[key][1](row[key]) if key in row else "" for key in keys))
    return found


def heading(report: dict[str, Any]) -> list[str]:
    """Machine, what it ran on, and how fast memory was read before and after."""
    machine, threads = report["machine"], report["threads"]
    before, after = report["memory_before"], report["memory_after"]
    readers = report["memory"]["before"]
    best = max(readers, key=lambda name: readers[name])
    kernels = "plain torch" if report["isa"] == "reference" else report["isa"]
    return [
        f"{machine['model']} · {kernels} · {threads} thread{'s' if threads != 1 else ''} · torch {machine['torch']}",
        f"memory read {before:.1f} GB/s before, {after:.1f} GB/s after"
        f" ({best}, {report['memory']['buffer_bytes'] / 1e9:.2g} GB)",
    ]
