"""`k2 train`: run a training recipe. Each module of `karakoram.recipes` is one, by its `run`."""

from pathlib import Path
from typing import Annotated

import typer

from karakoram.errors import InputError


def train_command(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="Which recipe; 'nano' trains the bundled model.")],
    data: Annotated[
        Path | None, typer.Option("--data", metavar="DIR", help="More material: GSM8K and text, see the README.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Where the run goes; runs/RECIPE by default.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where the run in DIR stopped.")] = False,
    minutes: Annotated[float | None, typer.Option(min=0.01, help="Plan the run for so many minutes.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Plan the run for so many steps.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; all by default.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of weights and data.")] = None,
) -> None:
    """Train a model from a recipe.

    Ctrl-C saves the run and says how to go on.

    \b
    Examples:
      k2 train nano --out runs/nano
      k2 train nano --out runs/nano --resume
      k2 train nano --minutes 5 --threads 2
    """
    from importlib import import_module

    if minutes is not None and steps is not None:
        raise InputError("--minutes and --steps both set the length of the run.", "Give one of them.")
    if data is not None and not data.is_dir():
        raise InputError(f"--data {data} is not a directory.", "Give the folder that holds gsm8k/ and text/.")
    known = recipes()
    if recipe not in known:
        raise InputError(f"There is no recipe {recipe!r}.", f"Recipes: {', '.join(known)}.")
    given = {"minutes": minutes, "steps": steps, "threads": threads, "seed": seed}
    import_module(f"karakoram.recipes.{recipe.replace('-', '_')}").run(
        out or Path("runs") / recipe,
        data_dir=data,
        resume=resume,
        **{name: value for name, value in given.items() if value is not None},
    )


def recipes() -> list[str]:
    """The recipes' names, as `k2 train` takes them."""
    from pkgutil import iter_modules

    import karakoram.recipes

    return sorted(found.name.replace("_", "-") for found in iter_modules(karakoram.recipes.__path__))
