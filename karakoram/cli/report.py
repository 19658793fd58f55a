"""`k2 report`: a training run as one page of HTML."""

from pathlib import Path
from typing import Annotated

import typer


def report_command(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="What k2 train wrote; parts one folder below count.")
    ],
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Where the page goes; DIR/report.html by default.")
    ] = None,
    show: Annotated[bool, typer.Option("--open", help="Show it in the browser.")] = False,
) -> None:
    """Curves, events and settings of a training run, as a page.

    One HTML file that needs no network; a run that is still going on may be looked at, too.

    \b
    Examples:
      k2 report runs/nano
      k2 report runs/nano --out nano.html --open
    """
    from karakoram.train.report import write_report

    path = write_report(directory, out)
    typer.echo(f"wrote {path}")
    if show:
        import webbrowser

        if not webbrowser.open(path.resolve().as_uri()):
            typer.echo("There is no browser here.", err=True)
