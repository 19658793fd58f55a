"""`k2 train`: run a training recipe.

A recipe is a module with a function `recipe(**parameters) -> Recipe`: one of `karakoram.recipes`, by its name, or a
Python file of the user's. Such a file is executed, as `python FILE.py` would; it is code that the user names, and never
comes out of a checkpoint. Parameters are those of the options --minutes, --steps, --seed, --data that the function has;
everything else in the recipe's plan is set by `key=value`, and `--show` lists it.
A module with `run(out, data_dir, resume, …)` instead does all of it by itself.
"""

import ast
import sys
from inspect import signature
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer
from typer.core import TyperCommand

from karakoram.errors import InputError

RUNS = Path("runs")
_SHOWN_LETTERS = 60


class TrainCommand(TyperCommand):
    """`--resume` alone means the run in --out, `--resume DIR` the one in DIR."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, explicit_resume(args))


def explicit_resume(arguments: list[str]) -> list[str]:
    """`--resume` without a directory behind it, as `--resume=`; an option, a key=value or a recipe is none."""
    given: list[str] = []
    for place, word in enumerate(arguments):
        if word == "--":
            return given + arguments[place:]
        following = arguments[place + 1] if place + 1 < len(arguments) else "-"
        is_recipe = (following in recipes() or following.endswith(".py")) and not Path(following).is_dir()
        alone = following.startswith("-") or "=" in following or is_recipe
        given.append("--resume=" if word == "--resume" and alone else word)
    return given


train_command = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["--help", "-h"]},
)


@train_command.command("train", cls=TrainCommand)
def train(
    recipe: Annotated[
        str | None, typer.Argument(metavar="NAME|FILE.py", help="Which recipe; 'nano' trains the bundled model.")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Settings; --show lists them.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option("--data", metavar="DIR", help="More material: GSM8K and text, see the README.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Where the run goes; runs/RECIPE by default.")
    ] = None,
    resume: Annotated[
        str | None,
        typer.Option("--resume", metavar="[DIR]", help="Go on where the run in DIR stopped; alone: the one in --out."),
    ] = None,
    minutes: Annotated[float | None, typer.Option(min=0.01, help="Plan the run for so many minutes.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Plan the run for so many steps.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; all by default.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of weights and data.")] = None,
    sink: Annotated[
        list[str] | None,
        typer.Option("--sink", metavar="NAME", help="Log to tensorboard or wandb, too; repeatable."),
    ] = None,
    expert_ranks: Annotated[
        int, typer.Option(min=1, metavar="N", help="Under torchrun: split each layer's experts over N ranks.")
    ] = 1,
    list_recipes: Annotated[bool, typer.Option("--list", help="The recipes that come along.")] = False,
    show: Annotated[bool, typer.Option("--show", help="All settings with their values; trains nothing.")] = False,
) -> None:
    """Train a model from a recipe.

    Ctrl-C saves the run and says how to go on. A FILE.py is run as Python: name only files that you trust.

    \b
    Examples:
      k2 train nano --out runs/nano
      k2 train nano --resume runs/nano
      k2 train nano --minutes 5 --threads 2
      k2 train my_recipe.py optimizer.learning_rate=3e-3
      k2 train nano --show
    """
    if list_recipes:
        return _print_recipes()
    if recipe is None:
        raise InputError("No recipe is named.", "Name one, as k2 train nano; k2 train --list shows them.")
    if minutes is not None and steps is not None:
        raise InputError("--minutes and --steps both set the length of the run.", "Give one of them.")
    if data is not None and not data.exists():
        raise InputError(f"--data {data} is not there.", "Give a file or a folder.")
    where = _directory(recipe, out, resume)
    given = {"minutes": minutes, "steps": steps, "seed": seed, "data": data}
    given = {name: value for name, value in given.items() if value is not None}
    _check_form(overrides or [])
    before, made = _planned(recipe, _module(recipe), overrides or [], given)
    if show:
        return _print_settings(before, made.plan)
    from karakoram.train.recipe import Manner, run_recipe

    manner = Manner(resume is not None, threads, sinks=tuple(sink or ()), expert_ranks=expert_ranks)
    run_recipe(made, where, manner)


def _directory(recipe: str, out: Path | None, resume: str | None) -> Path:
    """Where the run goes. Raises InputError where --out and --resume differ, or there is nothing to resume."""
    if not resume:
        return out or RUNS / Path(recipe).stem
    directory = Path(resume)
    if out is not None and out.resolve() != directory.resolve():
        raise InputError(f"--resume {resume} and --out {out} are two directories.", "Give one: a run goes on in place.")
    if not directory.is_dir():
        raise InputError(f"--resume {resume} is not a directory.", "Give the one that the run was started in by --out.")
    return directory


# -------------------------------------------------------------------------------------------- recipes


def recipes() -> list[str]:
    """The recipes' names, as `k2 train` takes them."""
    from pkgutil import iter_modules

    import karakoram.recipes

    return sorted(found.name.replace("_", "-") for found in iter_modules(karakoram.recipes.__path__))


def _module(recipe: str) -> Any:
    """A recipe's module: of the package, or the file that the user named, executed. InputError where there is none."""
    from importlib import import_module

    if recipe.endswith(".py"):
        return _loaded(Path(recipe))
    known = recipes()
    if recipe not in known:
        raise InputError(
            f"There is no recipe {recipe!r}.", f"Recipes: {', '.join(known)}; or name a file, as my_recipe.py."
        )
    return import_module(f"karakoram.recipes.{recipe.replace('-', '_')}")


def _loaded(path: Path) -> Any:
    """Execute a file as a module. What it raises is the user's to see in full, but for a mistake in its syntax."""
    from importlib.util import module_from_spec, spec_from_file_location

    if not path.is_file():
        raise InputError(f"There is no recipe file {path}.", "Name a Python file with a function run.")
    name = f"karakoram_recipe_{path.stem}"
    spec = spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise InputError(f"{path} cannot be loaded.", "Name a Python file with a function run.")
    module = module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise InputError(f"{error.filename or path}, line {error.lineno}: {error.msg}.", "Mend the file.") from error
    return module


def _planned(recipe: str, module: Any, overrides: list[str], given: dict[str, Any]) -> tuple[Any, Any]:
    """The plan as the recipe has it, and the recipe with the overrides in its plan."""
    from karakoram.cli.overrides import apply_overrides, parameters_of

    make: Any = getattr(module, "recipe", None)
    if make is None:
        raise InputError(f"{recipe} has no function recipe.", "A recipe file has recipe(**parameters) -> Recipe.")
    known = signature(make).parameters
    for name in given:
        if name not in known:
            raise InputError(f"The recipe {recipe} has no parameter {name}.", f"Leave out --{name}.")
    parameters, others = parameters_of(make, overrides)
    if twice := given.keys() & parameters.keys():
        raise InputError(f"{min(twice)} is given twice.", f"Give it as --{min(twice)} or as {min(twice)}=….")
    if "data" in given and get_type_hints(make).get("data") is str:
        given = given | {"data": str(given["data"])}
    made = make(**given, **parameters)
    return made.plan, made.with_plan(apply_overrides(made.plan, others))


# -------------------------------------------------------------------------------------------- listings


def _print_recipes() -> None:
    """Names and first lines of the docstrings; nothing is imported, so this is quick."""
    import karakoram.recipes

    names = recipes()
    for name in names:
        file = Path(karakoram.recipes.__path__[0]) / f"{name.replace('-', '_')}.py"
        try:
            told = (ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "").split("\n")[0]
        except (OSError, SyntaxError):  # a recipe that is a folder
            told = ""
        typer.echo(f"{name:{max(map(len, names))}}  {told.removeprefix(f'{name}: ')}")


def _check_form(overrides: list[str]) -> None:
    for override in overrides:
        if "=" not in override:
            raise InputError(f"{override!r} is no setting.", "After the recipe come settings as key=value, or options.")


def _print_settings(before: Any, after: Any) -> None:
    from karakoram.cli.overrides import settings_of

    rows = [
        (new.key, _short(new.value), new.kind, "" if new.value == old.value else f"; was {_short(old.value)}")
        for old, new in zip(settings_of(before), settings_of(after))
    ]
    width = max(len(key) for key, *_ in rows)
    for key, value, kind, was in rows:
        typer.echo(f"{key:{width}}  {value:16}  {kind}{was}")


def _short(value: Any) -> str:
    from karakoram.cli.overrides import value_words

    text = value_words(value)
    return text if len(text) <= _SHOWN_LETTERS else f"{text[:_SHOWN_LETTERS]} …"
