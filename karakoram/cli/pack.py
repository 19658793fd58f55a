"""`k2 pack`: experts into one file of records, to be read one by one. The work is in `karakoram.checkpoint.pack`."""

from pathlib import Path
from typing import Annotated

import typer

from karakoram.cli import options


def pack_command(
    src: Annotated[str, typer.Argument(metavar="SRC", help="Checkpoint directory, Hugging Face id, or 'nano'.")],
    dst: Annotated[Path, typer.Argument(metavar="DST", help="Directory to write; it must not exist yet.")],
    allow_config_key: options.AllowConfigKey = None,
) -> None:
    """Write a checkpoint with its experts packed, to run from disk.

    DST is a checkpoint by itself, bit for bit the same model: every command takes it in SRC's place. Its experts lie as
    the kernels read them, each in one piece with a checksum. A run that ended early is continued by the same command.

    \b
    Examples:
      k2 pack moonshotai/Kimi-K2-Thinking /nvme/k2-thinking
      k2 chat /nvme/k2-thinking "Where is the Karakoram?"
    """
    from karakoram.cli.opening import open_directory
    from karakoram.cli.terminal.progress import byte_progress

    source = open_directory(src)
    from karakoram.checkpoint.pack import pack_checkpoint

    with byte_progress(f"{source.name} → packed") as progress:
        pack_checkpoint(source, dst, progress, allow_config_key or ())
    typer.echo(f"wrote {dst}")
