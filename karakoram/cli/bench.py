"""`k2 bench`: kernels against the limits of this machine. The measuring is in `karakoram.evals.bench`.

A report whose numbers cannot be trusted is still shown, with one line for each reason on stderr, and exit code 1.
"""

import json
from collections.abc import Callable
from enum import StrEnum
from typing import Annotated, Any

import typer

from karakoram.cli import options
from karakoram.errors import InputError

bench_command = typer.Typer(
    add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False, no_args_is_help=False
)


class Isa(StrEnum):
    """Instruction sets of the kernels; the last is plain torch."""

    amx = "amx"
    avx512 = "avx512"
    avx512f = "avx512f"
    avx2 = "avx2"
    scalar = "scalar"
    reference = "reference"


Threads = Annotated[int | None, typer.Option(min=1, help="Of the kernels and of torch; by default every core.")]
IsaOption = Annotated[Isa | None, typer.Option("--isa", help="Instruction set; by default the one in use.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object instead of a table.")]


@bench_command.callback(invoke_without_command=True)
def benches(ctx: typer.Context) -> None:
    """Measure kernels against the limits of this machine.

    Memory is measured before and after every benchmark. Exit code 1 if the two differ by more than 10 %: something else
    was running.

    \b
    Examples:
      k2 bench memory --threads 1
      k2 bench moe --tokens 1,64 --json
      k2 bench attention --context 8192 --batch 1,8
    """
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())


@bench_command.command("memory")
def memory(
    threads: Threads = None,
    matmul: Annotated[
        list[str] | None, typer.Option("--matmul", metavar="M,K,N", help="Another product of torch; repeatable.")
    ] = None,
    as_json: Json = False,
) -> None:
    """How fast memory is read, and how fast torch multiplies in bf16.

    \b
    Example:
      k2 bench memory --threads 1 --matmul 64,7168,4096
    """
    shapes = [_shape(text) for text in matmul or ()]
    from karakoram.evals.bench.report import memory_bench

    _finish(memory_bench(_threads(threads), shapes, _progress()), as_json)


@bench_command.command("moe")
def moe(
    hidden: Annotated[int, typer.Option(min=32, help="Width of the model.")] = 7168,
    intermediate: Annotated[int, typer.Option(min=32, help="Width of an expert.")] = 2048,
    experts: Annotated[int, typer.Option(min=1, help="How many; K2 has 384, 24 are enough to leave every cache.")] = 24,
    top_k: Annotated[int, typer.Option("--top-k", min=1, help="Experts for a token.")] = 8,
    tokens: Annotated[str, typer.Option(metavar="N,N,…", help="Tokens of a call, a row for each.")] = (
        "1,4,16,64,256,1024"
    ),
    threads: Threads = None,
    isa: IsaOption = None,
    as_json: Json = False,
) -> None:
    """The routed experts of a layer, in int4; by default of K2's shape.

    Exit code 1 if the error is more than 1.5 times that of torch's own bf16 arithmetic.

    \b
    Example:
      k2 bench moe --tokens 1,64 --threads 1 --json
    """
    counts = _numbers(tokens, "--tokens")
    from karakoram.evals.bench.moe import Shape, moe_bench

    shape = Shape(hidden, intermediate, experts, top_k)
    _finish(moe_bench(shape, counts, _threads(threads), isa and isa.value, _progress()), as_json)


@bench_command.command("attention")
def attention(
    heads: Annotated[int, typer.Option(min=1, help="Query heads.")] = 64,
    context: Annotated[str, typer.Option(metavar="N,N,…", help="Cached tokens of a sequence.")] = (
        "1024,8192,32768,131072"
    ),
    batch: Annotated[str, typer.Option(metavar="N,N,…", help="Sequences; a row for each context and batch.")] = "1,8",
    threads: Threads = None,
    isa: IsaOption = None,
    as_json: Json = False,
) -> None:
    """A decoding step of latent attention: latent 512, rope key 64.

    \b
    Example:
      k2 bench attention --context 8192,32768 --batch 1,8 --threads 1
    """
    contexts, batches = _numbers(context, "--context"), _numbers(batch, "--batch")
    from karakoram.evals.bench.attention import attention_bench

    _finish(attention_bench(heads, contexts, batches, _threads(threads), isa and isa.value, _progress()), as_json)


@bench_command.command("model")
def model(
    preset: Annotated[str, typer.Option(help="Whose shape; see `k2 inspect`.")] = "moonlight-16b",
    weight_format: Annotated[
        str, typer.Option("--format", help="int4: experts only, as published; int4-all.")
    ] = "int4",
    prompt: Annotated[str, typer.Option(metavar="N,N,…", help="Prompt lengths, a row for each.")] = "128,512,2048",
    generate: Annotated[int, typer.Option(min=1, help="Tokens to decode after the first prompt.")] = 64,
    layers: Annotated[int | None, typer.Option(min=1, help="Run so many layers and estimate all from them.")] = None,
    threads: Threads = None,
    isa: IsaOption = None,
    as_json: Json = False,
) -> None:
    """A whole model of a preset's shape with random weights: prefill and decode.

    \b
    Examples:
      k2 bench model --preset moonlight-16b --format int4-all --threads 2
      k2 bench model --preset k2 --layers 2
    """
    prompts = _numbers(prompt, "--prompt")
    from karakoram.evals.bench.model import model_bench

    chosen = isa and isa.value
    report = model_bench(preset, weight_format, prompts, generate, layers, _threads(threads), chosen, _progress())
    _finish(report, as_json)
    if "estimate" in report and not as_json:
        typer.echo(f"{report['estimate']['what']}: {report['estimate']['decode_tokens_per_s']:.3g} tokens/s decoded.")


@bench_command.command("batch")
def batch(
    preset: Annotated[str, typer.Option(help="Whose shape; see `k2 inspect`.")] = "moonlight-16b",
    weight_format: Annotated[
        str, typer.Option("--format", help="int4: experts only, as published; int4-all.")
    ] = "int4-all",
    sequences: Annotated[str, typer.Option(metavar="N,N,…", help="How many advance together.")] = "1,8,16",
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of each prompt.")] = 128,
    generate: Annotated[int, typer.Option(min=2, help="Tokens to decode in each sequence.")] = 32,
    layers: Annotated[int | None, typer.Option(min=1, help="Run so many layers.")] = None,
    threads: Threads = None,
    isa: IsaOption = None,
    as_json: Json = False,
) -> None:
    """Batched decoding through the engine, at a preset's shape with random weights.

    \b
    Examples:
      k2 bench batch --preset moonlight-16b --sequences 1,8,16 --json
    """
    counts = _numbers(sequences, "--sequences")
    from karakoram.evals.bench.batch import batch_bench

    _finish(
        batch_bench(
            preset, weight_format, counts, prompt, generate, layers, _threads(threads), isa and isa.value, _progress()
        ),
        as_json,
    )


@bench_command.command("serve")
def serve(
    model: Annotated[str | None, typer.Argument(help="Checkpoint; by default the bundled one.")] = None,
    streams: Annotated[int, typer.Option(min=1, max=1000, help="Concurrent streams.")] = 32,
    generate: Annotated[int, typer.Option(min=2, help="Tokens of each stream.")] = 256,
    threads: Threads = None,
    isa: IsaOption = None,
    as_json: Json = False,
) -> None:
    """The server under load from another process, beside the engine called directly.

    \b
    Examples:
      k2 bench serve --json
      k2 bench serve --streams 8 --generate 512
    """
    from karakoram.evals.bench.serve import serve_bench

    _finish(serve_bench(model, streams, generate, _threads(threads), isa and isa.value, _progress()), as_json)


@bench_command.command("experts")
def experts(
    model: Annotated[str, typer.Argument(help="Checkpoint directory; best one that `k2 pack` wrote.")],
    shares: Annotated[
        str, typer.Option("--shares", metavar="N,N,…", help="Per cent of the experts in memory, a row for each.")
    ] = "12,25,50",
    ram: Annotated[
        list[str] | None, typer.Option("--ram", metavar="SIZE", help="A row with this memory for all; repeatable.")
    ] = None,
    generate: Annotated[int, typer.Option(min=2, help="Tokens to decode, after 64 that warm up.")] = 200,
    policy: options.ExpertPolicy = None,
    no_prefetch: options.NoPrefetch = False,
    threads: Threads = None,
    isa: IsaOption = None,
    as_json: Json = False,
) -> None:
    """A model whose experts are read from disk as they are needed, under several budgets.

    \b
    Examples:
      k2 bench experts ./moonlight-packed
      k2 bench experts ./moonlight-packed --shares 25 --ram 4GiB --json
    """
    from karakoram.cli.opening import open_directory
    from karakoram.evals.bench.experts.report import experts_bench

    budgets = [options.size_in_bytes(size, "--ram") for size in ram or ()]
    found = experts_bench(
        open_directory(model), _numbers(shares, "--shares") if shares else [], budgets,
        generate, policy, not no_prefetch, _threads(threads), isa and isa.value, _progress(),
    )  # fmt: skip
    _finish(found, as_json)


@bench_command.command("train")
def train(
    layer: Annotated[bool, typer.Option("--layer", help="One layer of 64 experts instead of a whole step.")] = False,
    steps: Annotated[int, typer.Option(min=1, help="Steps of each candidate in a round.")] = 3,
    rounds: Annotated[int, typer.Option(min=1, help="How often the candidates take turns.")] = 5,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Training of a 29M model of K2's shape, beside transformers where that is installed.

    Every candidate runs in a process of its own, one at a time; all in turn.

    \b
    Examples:
      k2 bench train --json
      k2 bench train --layer --rounds 9
    """
    if layer:
        from karakoram.evals.bench.train.layer import layer_bench as bench
    else:
        from karakoram.evals.bench.train.step import train_bench as bench
    _finish(bench(steps, rounds, _threads(threads), _progress()), as_json)


# ------------------------------------------------------------------------------------------------ in and out


def _numbers(text: str, option: str) -> list[int]:
    """`1,4,16` as numbers of 1 or more."""
    words = [word.strip() for word in text.split(",")]
    if not all(word.isascii() and word.isdigit() and 1 <= len(word) <= 9 and int(word) for word in words):
        raise InputError(f"{option} {text!r} is no list of numbers.", f"Give numbers of 1 or more: {option} 1,8.")
    return [int(word) for word in words]


def _shape(text: str) -> tuple[int, int, int]:
    numbers = _numbers(text, "--matmul")
    if len(numbers) != 3:
        raise InputError(f"--matmul {text!r} is no shape.", "Give three numbers: --matmul 64,7168,4096.")
    return numbers[0], numbers[1], numbers[2]


def _threads(given: int | None) -> int:
    from karakoram.evals.bench.threads import default_threads

    return default_threads() if given is None else given


def _progress() -> Callable[[str], None]:
    """One line a step on stderr where that is a terminal; no moving bar, its thread would be measured too."""
    import sys

    return (lambda text: typer.echo(f"… {text}", err=True)) if sys.stderr.isatty() else (lambda text: None)


def _finish(report: dict[str, Any], as_json: bool) -> None:
    """Show the report, then its problems."""
    if as_json:
        typer.echo(json.dumps(report, indent=2, ensure_ascii=False))
    else:
        _print(report)
    for problem in report["problems"]:
        typer.echo(f"k2: error: {problem}", err=True)
    if report["problems"]:
        raise typer.Exit(1)


def _print(report: dict[str, Any]) -> None:
    from rich.console import Console

    from karakoram.evals.bench.table import heading, table

    console = Console(highlight=False)
    for line in heading(report):
        console.print(line, markup=False, soft_wrap=True)
    console.print(table(report["rows"]))
    for note in report["notes"]:
        console.print(note, style="dim", markup=False, soft_wrap=True)
