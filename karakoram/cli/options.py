"""Options that several commands share, and what they mean in one place."""

import re
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from karakoram.errors import InputError

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", re.IGNORECASE)
_STEPS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}


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
Ram = Annotated[
    str | None,
    typer.Option("--ram", metavar="SIZE", help="Memory of the whole process, e.g. 16GiB, or most of what is free."),
]
ExpertRam = Annotated[
    str | None, typer.Option("--expert-ram", metavar="SIZE", help="Memory of the routed experts alone.")
]
Vram = Annotated[
    str | None, typer.Option("--vram", metavar="SIZE", help="Memory of the CUDA device for the experts wanted most.")
]
TraceFile = Annotated[
    Path | None, typer.Option("--trace", metavar="FILE", help="Record which experts every token visits.")
]
ExpertPolicy = Annotated[
    str | None, typer.Option("--expert-policy", metavar="NAME", help="Which experts stay in memory: hybrid, lru, lfu.")
]
ShadowMs = Annotated[
    float | None,
    typer.Option(
        "--shadow", metavar="MS", min=0, help="Approximate experts that a layer waits for longer, from 2-bit copies."
    ),
]
NoPrefetch = Annotated[bool, typer.Option("--no-prefetch", help="Read no expert before it is needed.")]


def store_options(
    ram: str | None,
    expert_ram: str | None,
    vram: str | None,
    trace: Path | None,
    policy: str | None,
    no_prefetch: bool,
    shadow: float | None,
) -> Any:
    """The seven options above as one `StoreOptions`."""
    from karakoram.engine.expert_store.opening import StoreOptions

    return StoreOptions(
        None if ram is None else size_in_bytes(ram, "--ram"),
        None if expert_ram is None else size_in_bytes(expert_ram, "--expert-ram"),
        None if vram is None else size_in_bytes(vram, "--vram"),
        policy,
        not no_prefetch,
        shadow,
        trace,
    )


def size_in_bytes(text: str, option: str) -> int:
    """16GiB, 16G (the same), 16GB (decimal), 500MB or plain bytes. Raises InputError for anything else."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise InputError(f"{option} {text!r} is no size.", "Write it like 16GiB, 16GB or 500MB.")
    number, step, binary = match.groups()
    decimal = text.strip().upper().endswith("B") and not binary
    return int(float(number) * (1000 if decimal else 1024) ** _STEPS[step.upper()])
