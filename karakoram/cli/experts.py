"""`k2 experts`: what a recorded trace says about routing, and what any memory and policy would have made of it.

A trace comes from `--trace FILE` of `k2 chat`, `generate` and `serve`; its format and what was found in some is in
docs/expert-traces.md. The work is in `karakoram.engine.expert_store`; here are the options and the tables.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

experts_command = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    context_settings={"help_option_names": ["--help", "-h"]},
    help="What a trace says about routing, and which memory would serve it.",
)

TraceArgument = Annotated[
    Path, typer.Argument(metavar="FILE", exists=True, dir_okay=False, help="A trace, recorded with --trace.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON object instead of tables.")]


@experts_command.command("stats")
def stats_command(
    file: TraceArgument,
    picture: Annotated[
        Path | None, typer.Option("--png", metavar="FILE", help="Write the heat map as a picture: a row per layer.")
    ] = None,
    heat_map: Annotated[bool, typer.Option("--map/--no-map", help="Show the heat map in the terminal.")] = True,
    as_json: JsonOption = False,
) -> None:
    """Load, skew, repeats and predictability of a trace, and a heat map.

    \b
    Examples:
      k2 experts stats nano.trace
      k2 experts stats nano.trace --png nano.png --no-map
    """
    from karakoram.engine.expert_store.laboratory.statistics import heat, png, statistics_of
    from karakoram.engine.expert_store.trace import read_trace

    trace = read_trace(file)
    found = statistics_of(trace)
    if picture is not None:
        scale = max(1, min(16, 1600 // trace.experts))
        picture.write_bytes(png(heat(found.load_LE), scale))
    if as_json:
        typer.echo(json.dumps(_stats_report(trace, found), indent=2))
    else:
        _print_stats(trace, found, heat_map)


@experts_command.command("simulate")
def simulate_command(
    file: TraceArgument,
    policy: Annotated[
        str, typer.Option("--policy", metavar="NAMES", help="Of lru, lfu, hybrid, belady; with commas between.")
    ] = "lru,lfu,hybrid,belady",
    capacity: Annotated[
        str | None,
        typer.Option(
            "--capacity",
            metavar="SIZES",
            help="Counts or shares, with commas between. Without it 12%,25%,50%, each at least 1.5 × top-k per layer.",
        ),
    ] = None,
    floor: Annotated[int, typer.Option(min=0, help="Experts of each layer that eviction leaves in memory.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Hit rates that memories of several sizes would have had, under several policies.

    belady knows the future and is the most that any policy can reach. "closed" is a policy's way from lru to belady.

    \b
    Examples:
      k2 experts simulate nano.trace
      k2 experts simulate nano.trace --policy hybrid --capacity 24,40%
    """
    from karakoram.engine.expert_store.laboratory.simulate import BELADY, belady, capacity_of, replay
    from karakoram.engine.expert_store.trace import read_trace

    trace = read_trace(file)
    names = [name.strip() for name in policy.split(",")]
    sizes = [capacity_of(trace, text, least=capacity is None) for text in (capacity or "12%,25%,50%").split(",")]
    results = [
        [belady(trace, size) if name == BELADY else replay(trace, name, size, floor) for name in names]
        for size in dict.fromkeys(sizes)
    ]
    if as_json:
        typer.echo(json.dumps(_simulation_report(trace, results, floor), indent=2))
    else:
        _print_simulation(trace, results)


# ------------------------------------------------------------------------------------------------------- reports


def _stats_report(trace: Any, found: Any) -> dict[str, Any]:
    """JSON-ready; the load as counts per layer."""
    report = {name: value for name, value in vars(found).items() if name not in ("load_LE", "loads", "load")}
    return {
        "layers": list(trace.layers),
        "experts": trace.experts,
        "top_k": trace.top_k,
        "cut": trace.cut,
        **report,
        "load": asdict(found.load),
        "loads": [asdict(load) for load in found.loads],
        "counts": found.load_LE.tolist(),
    }


def _simulation_report(trace: Any, results: list[list[Any]], floor: int) -> dict[str, Any]:
    rows = [
        {**asdict(result), "hit_rate": result.hit_rate, "gap_closed": _closed(result, row)}
        for row in results
        for result in row
    ]
    return {"tokens": trace.tokens, "passes": len(trace.passes), "floor": floor, "results": rows}


def _closed(result: Any, row: list[Any]) -> float | None:
    """The way from lru to belady, where both were simulated."""
    from karakoram.engine.expert_store.laboratory.simulate import BELADY, gap_closed

    by_name = {one.policy: one for one in row}
    if "lru" not in by_name or BELADY not in by_name:
        return None
    return gap_closed(result, by_name["lru"], by_name[BELADY])


# -------------------------------------------------------------------------------------------------------- tables


def _print_stats(trace: Any, found: Any, heat_map: bool) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    console.print(_head(trace))
    console.print(_loads_table(trace, found))
    for text in _sentences(trace, found):
        console.print(text)
    if heat_map:
        _print_map(console, trace, found.load_LE)


def _head(trace: Any) -> str:
    cut = ", cut off at its end" if trace.cut else ""
    shape = f"{len(trace.layers)} layers of {trace.experts} experts, {trace.top_k} per token"
    return f"{trace.tokens:,} tokens in {len(trace.passes):,} passes{cut}; {shape}"


def _loads_table(trace: Any, found: Any) -> Any:
    """A row per layer, and their mean."""
    from rich.table import Table

    from karakoram.engine.expert_store.laboratory.statistics import TOP_SHARES

    table = Table(box=None, padding=(0, 1, 0, 0), header_style="dim")
    table.add_column("layer", justify="right")
    columns = [*(f"≤{share:.3g}%" for share in (100 * one for one in TOP_SHARES)), "entropy", "gini", "unused"]
    for column in [*columns, "repeat", "foretold", "popular"]:
        table.add_column(column, justify="right")
    for index, (layer, load) in enumerate(zip(trace.layers, found.loads, strict=True)):
        table.add_row(str(layer), *_load_cells(load), *(_of(values, at) for values, at in _by_layer(found, index)))
    means = [_mean(values) for values in (found.repeat, found.next_layer, found.popular)]
    table.add_row("mean", *_load_cells(found.load), *means, style="bold")
    return table


def _by_layer(found: Any, index: int) -> list[tuple[Any, int]]:
    return [(found.repeat, index), (found.next_layer, index - 1), (found.popular, index - 1)]


def _load_cells(load: Any) -> list[str]:
    return [*(f"{share:.1%}" for share in load.top), f"{load.entropy:.3f}", f"{load.gini:.3f}", f"{load.unused:.1%}"]


def _of(values: Any, at: int) -> str:
    return f"{values[at]:.1%}" if values is not None and at >= 0 else "–"


def _mean(values: Any) -> str:
    return f"{sum(values) / len(values):.1%}" if values else "–"


def _sentences(trace: Any, found: Any) -> list[str]:
    """What the columns mean, and what the trace has besides."""
    lines = [
        "≤3% …: share of the load that so many of the experts take, most popular first; entropy: 1 is even; gini: 0 is",
        f"repeat: of a token's experts, those of the token before it; by chance {trace.top_k / trace.experts:.1%}",
        "foretold, popular: of a token's experts, those among the best by co-occurrence with the layer before, and the"
        " most popular; learned on the first half, measured on the second",
    ]
    if found.guess_recall is not None:
        lines.append(f"guesses found {found.guess_recall:.1%} of the experts, {found.guess_precision:.1%} of them true")
    if found.rank_scores is not None:
        lines.append("scores by rank: " + " ".join(f"{share:.1%}" for share in found.rank_scores))
    return lines


def _print_map(console: Any, trace: Any, load_LE: Any) -> None:
    """Two layers to a line: the upper half of each character is one, the lower half the next."""
    import numpy as np
    from rich.color import Color
    from rich.style import Style
    from rich.text import Text

    from karakoram.engine.expert_store.laboratory.statistics import heat

    columns = min(trace.experts, max(8, console.width - 8))
    edges = np.arange(columns) * trace.experts // columns
    wide = np.diff([*edges, trace.experts])
    colours_LCx = heat(np.add.reduceat(load_LE, edges, axis=1) / wide)
    if not console.color_system:
        console.print("(the heat map needs a terminal with colours, or --png FILE)")
        return
    for top in range(0, len(trace.layers), 2):
        line = Text(f"{trace.layers[top]:>5} ", style="dim")
        rows = [[Color.from_rgb(*pixel) for pixel in row] for row in colours_LCx[top : top + 2].tolist()]
        for column, above in enumerate(rows[0]):
            below = rows[1][column] if len(rows) > 1 else None
            line.append("▀", Style(color=above, bgcolor=below))
        console.print(line, soft_wrap=True)


def _print_simulation(trace: Any, results: list[list[Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    console.print(_head(trace))
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("capacity", justify="right")
    table.add_column("share", justify="right")
    for result in results[0]:
        table.add_column(result.policy, justify="right")
    total = len(trace.layers) * trace.experts
    for row in results:
        cells = [f"{one.hit_rate:.1%}{_way(one, row)}" for one in row]
        table.add_row(f"{row[0].capacity:,}", f"{row[0].capacity / total:.0%}", *cells)
    console.print(table)


def _way(result: Any, row: list[Any]) -> str:
    """How much of the way from lru to belady is closed, for policies between them."""
    closed = None if result.policy in ("lru", "belady") else _closed(result, row)
    return "" if closed is None else f" ({closed:.0%} closed)"
