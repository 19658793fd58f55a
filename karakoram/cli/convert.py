"""`k2 convert`: write a checkpoint in another format. The work is in `karakoram.quantize.convert`."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from karakoram.cli import options


class Format(StrEnum):
    """The formats a checkpoint can be written in."""

    bf16 = "bf16"
    fp8 = "fp8"
    int4 = "int4"


def convert_command(
    src: Annotated[str, typer.Argument(metavar="SRC", help="Checkpoint directory, Hugging Face id, or 'nano'.")],
    dst: Annotated[Path, typer.Argument(metavar="DST", help="Directory to write; it must not exist yet.")],
    format: Annotated[Format, typer.Option("--format", help="Format of the weights.")],
    allow_config_key: options.AllowConfigKey = None,
) -> None:
    """Write a checkpoint in another format, losing no bit.

    Only the representation changes; what would lose bits is refused. A killed conversion leaves no half-valid
    directory and can be run again.

    \b
    Examples:
      k2 convert nano ./nano-bf16 --format bf16
      k2 convert moonshotai/Kimi-K2-Thinking ./k2-thinking-bf16 --format bf16
    """
    from karakoram.cli.opening import open_directory
    from karakoram.cli.terminal.progress import byte_progress

    source = open_directory(src)
    from karakoram.quantize.convert import convert

    with byte_progress(f"{source.name} → {format.value}") as progress:
        convert(source, dst, format.value, progress=progress, allow_config_keys=allow_config_key or ())
    typer.echo(f"wrote {dst} in {format.value}")
