"""`k2 models`: the checkpoints on this machine, with their sizes, and the removal of those that were downloaded.

Downloads live in huggingface_hub's cache and are shared with every other program that uses it, so only repositories
whose config.json is of this family are listed unless --all is given, and removing asks first.
The bundled nano model is listed and cannot be removed.
"""

import json
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from karakoram.errors import ConfigError, InputError

models_command = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    invoke_without_command=True,
    context_settings={"help_option_names": ["--help", "-h"]},
)


@dataclass(frozen=True)
class CachedModel:
    """One repository of the cache, or the bundled model. `family` is None where no config.json of this family is."""

    name: str
    family: str | None
    size_bytes: int
    files: int
    revisions: int
    path: str


@models_command.callback()
def list_command(
    context: typer.Context,
    show_all: Annotated[bool, typer.Option("--all", help="Also cached models of other families.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON list instead of a table.")] = False,
) -> None:
    """List cached checkpoints and remove them.

    \b
    Examples:
      k2 models
      k2 models remove moonshotai/Moonlight-16B-A3B-Instruct
    """
    if context.invoked_subcommand is not None:
        return
    from karakoram.env import hub_cache_dir

    everything = cached()
    known = [model for model in everything if model.family]
    found = [*bundled(), *(everything if show_all else known)]
    if as_json:
        typer.echo(json.dumps([asdict(model) for model in found], indent=2, ensure_ascii=False))
        return
    _print(found, hub_cache_dir(), hidden=0 if show_all else len(everything) - len(known))


@models_command.command("remove")
def remove_command(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Hugging Face id owner/name, as `k2 models` lists it.")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Remove a downloaded checkpoint, all its revisions, from the cache.

    \b
    Example:
      k2 models remove moonshotai/Moonlight-16B-A3B-Instruct --yes
    """
    if name == "nano":
        raise InputError(
            "nano is bundled with the package and cannot be removed alone.", "Uninstall karakoram instead."
        )
    cache = _scan()
    repos = [repo for repo in (cache.repos if cache else ()) if repo.repo_type == "model" and repo.repo_id == name]
    if not repos:
        raise InputError(f"{name!r} is not in the cache.", "`k2 models --all` lists what is.")
    repo = repos[0]
    # Commits are looked up in all repositories, and a duplicate has its original's: so only this one is shown.
    plan = replace(cache, repos=frozenset({repo})).delete_revisions(
        *(revision.commit_hash for revision in repo.revisions)
    )
    size = _gb(plan.expected_freed_size)
    if not yes:
        if not sys.stdin.isatty():
            raise InputError(f"Removing {name} ({size}) needs a yes, and nobody can be asked here.", "Pass --yes.")
        if not typer.confirm(f"Remove {name}, {size}, from {repo.repo_path}?"):
            typer.echo("kept")
            return
    plan.execute()
    if Path(repo.repo_path).exists():
        raise InputError(f"{repo.repo_path} could not be removed entirely.", "Check its permissions.")
    typer.echo(f"removed {name}, {size} freed")


def bundled() -> list[CachedModel]:
    """The bundled model, if this installation has it."""
    from karakoram.env import bundled_model_dir

    folder = bundled_model_dir()
    if not (folder / "config.json").is_file():
        return []
    files = [file for file in folder.rglob("*") if file.is_file()]
    size = sum(file.stat().st_size for file in files)
    return [CachedModel("nano", _family(folder), size, len(files), 1, str(folder))]


def cached() -> list[CachedModel]:
    """Models in huggingface_hub's cache, by name."""
    cache = _scan()
    found: list[CachedModel] = []
    for repo in cache.repos if cache else ():
        if repo.repo_type != "model":
            continue
        families = [_family(Path(revision.snapshot_path)) for revision in repo.revisions]
        family = next((name for name in families if name), None)
        found.append(
            CachedModel(
                repo.repo_id, family, repo.size_on_disk, repo.nb_files, len(repo.revisions), str(repo.repo_path)
            )
        )
    return sorted(found, key=lambda model: model.name.lower())


def _scan() -> Any:
    """huggingface_hub's view of its cache; None where there is no cache yet."""
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    from karakoram.env import hub_cache_dir

    try:
        return scan_cache_dir(hub_cache_dir())
    except CacheNotFound:
        return None


def _family(folder: Path) -> str | None:
    """What the config.json in `folder` declares; None if it is not of this family. A refused one is still listed."""
    from karakoram.config import ModelConfig, load_json_object
    from karakoram.config.keys import TEXT_MODEL_TYPES, WRAPPER_MODEL_TYPES

    try:
        raw = load_json_object(folder / "config.json")
    except ConfigError:
        return None
    model_type = raw.get("model_type")
    if model_type not in (*TEXT_MODEL_TYPES, *WRAPPER_MODEL_TYPES):
        return None
    try:
        return ModelConfig.from_dict(raw).family
    except ConfigError:
        return f"{model_type} (refused: see `k2 inspect`)"


def _gb(size: int) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"


def _print(models: list[CachedModel], cache_dir: Path, hidden: int) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False)
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for column in ("model", "family", "size", "files"):
        table.add_column(column, justify="right" if column in ("size", "files") else "left", no_wrap=column == "model")
    for model in models:
        table.add_row(escape(model.name), model.family or "–", _gb(model.size_bytes), str(model.files))
    if models:
        console.print(table)
    else:
        console.print("no checkpoints here yet; `k2 chat owner/name` downloads one")
    total = sum(model.size_bytes for model in models if model.name != "nano")
    console.print(f"[dim]cache {escape(str(cache_dir))}, {_gb(total)} shown[/]", soft_wrap=True)
    if hidden > 0:
        console.print(f"[dim]{hidden} model(s) of other families not shown; --all shows them[/]")
