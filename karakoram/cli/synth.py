"""`k2 synth`: write a checkpoint by chance, in a preset's true shape. The work is in `karakoram.evals.synth`."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer


class Format(StrEnum):
    """Which weights are int4."""

    int4 = "int4"
    int4_all = "int4-all"


def synth_command(
    preset: Annotated[str, typer.Argument(metavar="PRESET", help="Whose shape: k2-thinking, k2.5, moonlight-16b, …")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Directory to write; it must not exist yet.")],
    layers: Annotated[int | None, typer.Option("--layers", min=1, help="So many layers; all without it.")] = None,
    format: Annotated[
        Format,
        typer.Option("--format", help="int4: the routed experts. int4-all: every linear, the embedding, the head."),
    ] = Format.int4,
    packed: Annotated[
        bool, typer.Option("--packed", help="Experts as records in one file, as k2 pack writes them.")
    ] = False,
    tokenizer: Annotated[
        Path | None,
        typer.Option("--tokenizer", metavar="DIR", help="Copy this tokenizer; else one is generated."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of all that is drawn.")] = 0,
    measure: Annotated[
        bool, typer.Option("--measure/--no-measure", help="Run the model and measure the routing it has.")
    ] = True,
) -> None:
    """Write a checkpoint by chance, in a preset's true shape.

    True names, shapes and formats, random numbers, and experts chosen as published models choose them: the most popular
    quarter takes 71 % of the load, 33 % of a token's experts repeat from the token before, and the next layer's router,
    applied one layer early, finds 65 % of its experts. What was reached is measured, printed and stored in
    DIR/synth.json. Free space is checked first; a killed run leaves nothing that looks like a checkpoint.

    \b
    Examples:
      k2 synth moonlight-16b --format int4-all --out ./moonlight
      k2 synth k2-thinking --layers 3 --out ./k2-three-layers
    """
    from karakoram.cli.terminal.progress import byte_progress
    from karakoram.evals.synth.shape import Shape
    from karakoram.evals.synth.write import record, write

    shape = Shape(preset, layers, format.value)
    with byte_progress(f"{preset} → {out.name}") as progress:
        written = write(shape, out.expanduser(), seed, tokenizer, progress, packed)
    typer.echo(f"wrote {out}: {_size(written)} in {written.seconds:.0f} s ({written.bytes_per_s / 1e9:.2f} GB/s)")
    if measure:
        found = _measured(written.directory, seed)
        record(written.directory, found)
        _show(found)


def _measured(directory: Path, seed: int) -> Any:
    from karakoram.cli.terminal.progress import count_progress
    from karakoram.evals.synth.measure import measure

    with count_progress("measuring the routing, layers") as progress:
        return measure(directory, seed=seed, progress=progress)


def _show(found: Any) -> None:
    """Target and measurement side by side."""
    from karakoram.evals.synth.routing import TARGET

    rows = (
        ("load of the most popular quarter of experts", "top_quarter_load"),
        ("experts repeated from the token before", "repeat"),
        ("recall of the next layer's router, a layer early", "next_layer_recall"),
    )
    typer.echo(f"routing over {found.tokens:,} tokens, {len(found.by_layer)} layers with a mixture:")
    for words, name in rows:
        value = getattr(found.statistics, name)
        shown = "–" if value != value else f"{value:.1%}"
        typer.echo(f"  {words:<50} {shown:>6}  (published {getattr(TARGET, name):.0%})")


def _size(written: Any) -> str:
    return f"{written.nbytes / 1e9:,.1f} GB"
