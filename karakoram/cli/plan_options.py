"""The options of `k2 plan --train`. None is free: the plan chooses, or takes K2's."""

from typing import Annotated

import typer

Gpus = Annotated[int | None, typer.Option("--gpus", min=1, metavar="N", help="Training: cards to train on.")]
Gpu = Annotated[
    str | None,
    typer.Option("--gpu", metavar="NAME", help="Training: h800 (default), h100, h200 or b200."),
]
Sequence = Annotated[
    int | None,
    typer.Option("--sequence", min=1, metavar="TOKENS", help="Training: of a sequence; default 4096."),
]
BatchTokens = Annotated[
    float | None,
    typer.Option("--batch-tokens", metavar="TOKENS", help="Training: of a step; default 2^26."),
]
Tokens = Annotated[
    float | None,
    typer.Option("--tokens", metavar="TOKENS", help="Training: of all training; default 15.5e12."),
]
Stages = Annotated[int | None, typer.Option("--pp", min=1, metavar="N", help="Training: pipeline stages.")]
ExpertRanks = Annotated[
    int | None,
    typer.Option("--ep", min=1, metavar="N", help="Training: ranks that share a layer's experts."),
]
Replicas = Annotated[int | None, typer.Option("--dp", min=1, metavar="N", help="Training: replicas of all that.")]
Chunks = Annotated[
    int | None,
    typer.Option("--chunks", min=1, metavar="N", help="Training: parts of the model to a stage: virtual stages."),
]
Sharding = Annotated[str | None, typer.Option("--sharding", metavar="KIND", help="Training: zero1 or fsdp.")]
Recompute = Annotated[
    str | None,
    typer.Option("--recompute", metavar="KIND", help="Training: none, selective (K2's list) or full."),
]
Offload = Annotated[
    str | None,
    typer.Option("--offload", metavar="WHAT", help="Training: to the host: none, activations, optimizer or both."),
]
Efficiency = Annotated[
    float | None,
    typer.Option("--efficiency", metavar="SHARE", help="Training: of the peak, what a layer reaches; default 0.5."),
]
