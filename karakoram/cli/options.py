"""Options that several commands share, and what they mean in one place."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Dtype(StrEnum):
    """What the weights are computed in."""

    bfloat16 = "bfloat16"
    float32 = "float32"


ModelArgument = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="'nano' (bundled), a checkpoint directory, or a Hugging Face id owner/name."),
]
MaxTokens = Annotated[int | None, typer.Option("--max-tokens", min=1, help="At most so many new tokens.")]
Temperature = Annotated[float | None, typer.Option(help="0 is greedy.")]
TopP = Annotated[float | None, typer.Option("--top-p", help="Draw from the likeliest tokens that sum up to this.")]
Seed = Annotated[int | None, typer.Option(min=0, help="The same seed draws the same tokens.")]
ToolsFile = Annotated[
    Path | None, typer.Option("--tools", metavar="FILE", help="JSON list of OpenAI tool declarations.")
]
Dialect = Annotated[str | None, typer.Option(help="Chat dialect, where the checkpoint does not tell; e.g. kimi-k2.5.")]
NoThinking = Annotated[bool, typer.Option("--no-thinking", help="Answer without thinking, in dialects with a switch.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1 …; auto takes CUDA where there is one.")]
DtypeOption = Annotated[Dtype, typer.Option("--dtype", help="What to compute in.")]
AllowConfigKey = Annotated[
    list[str] | None,
    typer.Option("--allow-config-key", metavar="KEY", help="Accept this unknown key of config.json; repeatable."),
]
