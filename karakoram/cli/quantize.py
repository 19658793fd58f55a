"""`k2 quantize`: write a checkpoint in int4 and account for it. The work is in `karakoram.quantize.quantize`.

With `--text` the perplexity before is measured after every check and before the first byte is written: a model that
does not fit into memory is told at once, not after hours of writing. Both are measured with dense weights in the same
code, not one of them on int4 kernels: the weights are the only difference.
"""

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from karakoram.cli import options
from karakoram.errors import InputError

SHOWN = 5  # how many names a list shows


class Format(StrEnum):
    """Which weights become int4."""

    int4 = "int4"
    int4_all = "int4-all"


Source = Annotated[str, typer.Argument(metavar="SRC", help="Checkpoint directory, Hugging Face id, or 'nano'.")]
Target = Annotated[Path, typer.Argument(metavar="DST", help="Directory to write; it must not exist yet.")]
FormatOption = Annotated[
    Format, typer.Option("--format", help="int4: the routed experts. int4-all: every linear, the embedding, the head.")
]
Text = Annotated[
    Path | None, typer.Option("--text", metavar="FILE", help="Perplexity of this text's first 2,048 tokens, too.")
]
Json = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the report to this file, too.")]


def quantize_command(
    src: Source,
    dst: Target,
    format: FormatOption = Format.int4,
    text: Text = None,
    json_file: Json = None,
    device: options.Device = "cpu",
    dtype: options.DtypeOption = options.Dtype.bfloat16,
    allow_config_key: options.AllowConfigKey = None,
) -> None:
    """Write a checkpoint in int4, and say what it cost.

    Weights that are on an int4 grid already, as after int4-aware training, keep every number; the others get the
    nearest. Norms and the router are never quantized. A killed run leaves no half-valid directory and can be run again.
    --device and --dtype are those of the perplexity.

    \b
    Examples:
      k2 quantize ./my-checkpoint ./my-checkpoint-int4
      k2 quantize ./my-checkpoint ./small --format int4-all --text README.md --json report.json
    """
    from karakoram.cli.opening import open_directory

    if json_file is not None and not json_file.absolute().parent.is_dir():
        raise InputError(f"--json {json_file}: there is no directory to write into.", "Make it first.")
    source, dst, keys = open_directory(src), dst.expanduser(), allow_config_key or []
    measure = _measurement(source, text, device, dtype.value, keys)
    report = _quantize(source, dst, format.value, keys, measure)
    if json_file is not None:
        json_file.write_text(json.dumps(report.to_dict(), indent=1) + "\n", encoding="utf-8")
    typer.echo(f"wrote {dst} in {format.value}")


def _measurement(source: Path, text: Path | None, device: str, dtype: str, keys: list[str]) -> Any:
    """None without a text; else a function that takes the directories before and after, one by one, and tells the
    perplexities found so far, as (text, predicted tokens, [perplexity, …])."""
    if text is None:
        return None
    from karakoram.cli.opening import load
    from karakoram.quantize.perplexity import perplexity, read_token_ids

    ids = read_token_ids(source, text)
    found: list[float] = []

    def measure(directory: Path) -> tuple[str, int, list[float]]:
        found.append(perplexity(load(directory, device, dtype, keys, dense=True), ids))
        return str(text), len(ids) - 1, found

    return measure


def _quantize(source: Path, dst: Path, format: str, keys: list[str], measure: Any) -> Any:
    """The work and its account on the screen; returns the report."""
    from karakoram.cli.terminal.progress import byte_progress
    from karakoram.quantize.perplexity import Perplexity
    from karakoram.quantize.quantize import quantize

    before = None if measure is None else lambda: measure(source)
    with byte_progress(f"{source.name} → {format}") as progress:
        report = quantize(source, dst, format, progress, keys, before_writing=before)
    _show(report)
    if measure is not None:
        text, tokens, (first, second) = measure(dst)
        report.perplexity = Perplexity(text, tokens, first, second)
        _show_perplexity(report.perplexity)
    return report


def _show(report: Any) -> None:
    """The report without perplexity: a table of errors, and lines."""
    from rich.console import Console

    Console(highlight=False).print(_table(report))
    total = report.total
    already = f" ({report.groups_already_int4:,} were int4 already)" if report.groups_already_int4 else ""
    typer.echo(
        f"groups of 32: {total.exact_groups:,} exact{already}, {total.groups - total.exact_groups:,} rounded; "
        f"relative RMS error {_per_cent(total)}"
    )
    for name, error in report.worst[:SHOWN]:
        typer.echo(f"worst: {name} {_per_cent(error)}")
    if left := report.left_in_bf16:
        more = f" and {len(left) - SHOWN} more" if len(left) > SHOWN else ""
        typer.echo(f"left in bf16, inputs not divisible by 32: {', '.join(left[:SHOWN])}{more}")
    if report.narrowed_values:
        typer.echo(f"outside of int4, rounding to bf16 changed {report.narrowed_values:,} values")
    share = report.bytes_after / report.bytes_before
    typer.echo(f"{report.bytes_before:,} bytes → {report.bytes_after:,} bytes ({share:.1%})")


def _table(report: Any) -> Any:
    """Relative RMS error: a row for each layer, a column for each component."""
    from rich.table import Table

    errors = report.by_layer
    components = list(dict.fromkeys(component for _, component in errors))
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for column in ("layer", *components):
        table.add_column(column, justify="right")
    for layer in dict.fromkeys(layer for layer, _ in errors):
        found = [errors.get((layer, component)) for component in components]
        table.add_row("–" if layer is None else str(layer), *("" if e is None else _per_cent(e) for e in found))
    return table


def _per_cent(error: Any) -> str:
    return f"{error.relative_rms:.2%}" if error.squared_error else "0"


def _show_perplexity(found: Any) -> None:
    change = f" ({found.after / found.before - 1:+.2%})" if found.before and found.before < float("inf") else ""
    typer.echo(f"perplexity {found.before:.4g} → {found.after:.4g}{change} on {found.tokens:,} tokens of {found.text}")
