"""`k2 eval`: score a model. The tasks are in `karakoram.evals`; here they get a model, a progress bar and a printer."""

import json
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from karakoram.cli import options
from karakoram.errors import InputError

BATCH = 64  # conversations at a time: beyond that a small model on a CPU gets no faster, and memory grows

eval_command = typer.Typer(
    add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False, no_args_is_help=False
)

Model = Annotated[str, typer.Argument(metavar="MODEL", help="'nano', a checkpoint directory, or a Hugging Face id.")]
Json = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the numbers to this file, too.")]
Failures = Annotated[int, typer.Option("--failures", min=0, help="Show so many conversations that went wrong.")]


@eval_command.callback(invoke_without_command=True)
def tasks(ctx: typer.Context) -> None:
    """Score a model.

    \b
    Examples:
      k2 eval nano-tools
      k2 eval arithmetic ./my-checkpoint
      k2 eval gsm8k --data ../shared/data --json gsm8k.json
    """
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())


@eval_command.command("nano-tools")
def nano_tools(
    model: Model = "nano",
    dialogs: Annotated[int, typer.Option(min=1, max=100_000, help="How many held-out dialogs.")] = 500,
    edition: Annotated[int, typer.Option(min=1, max=2, help="1: at most two calls; 2: chains of up to five.")] = 2,
    json_file: Json = None,
    failures: Failures = 0,
    dialect: options.Dialect = None,
    device: options.Device = "cpu",
    dtype: options.DtypeOption = options.Dtype.bfloat16,
    allow_config_key: options.AllowConfigKey = None,
) -> None:
    """Held-out dialogs with tools that really run, greedy.

    \b
    Example:
      k2 eval nano-tools --dialogs 500 --json nano-tools.json
    """

    def task(fmt: Any, generate_batch: Any, progress: Any) -> Any:
        from karakoram.evals.nano_tools import evaluate

        return evaluate(fmt, generate_batch, dialogs, progress=progress, edition=edition)

    _run("nano-tools", task, model, dialect, device, dtype.value, allow_config_key or [], json_file, failures)


@eval_command.command("arithmetic")
def arithmetic(
    model: Model = "nano",
    json_file: Json = None,
    failures: Failures = 0,
    dialect: options.Dialect = None,
    device: options.Device = "cpu",
    dtype: options.DtypeOption = options.Dtype.bfloat16,
    allow_config_key: options.AllowConfigKey = None,
) -> None:
    """Fifty arithmetic questions with the demo tools, greedy.

    \b
    Example:
      k2 eval arithmetic --failures 5
    """

    def task(fmt: Any, generate_batch: Any, progress: Any) -> Any:
        from karakoram.evals.arithmetic import evaluate

        return evaluate(fmt, generate_batch, progress=progress)

    _run("arithmetic", task, model, dialect, device, dtype.value, allow_config_key or [], json_file, failures)


@eval_command.command("gsm8k")
def gsm8k(
    model: Model = "nano",
    data: Annotated[
        Path | None,
        typer.Option("--data", metavar="DIR", help="The folder of gsm8k/train.jsonl; else problems of ours."),
    ] = None,
    limit: Annotated[int, typer.Option(min=1, max=500, help="How many of the 500 held-out problems.")] = 500,
    json_file: Json = None,
    failures: Failures = 0,
    dialect: options.Dialect = None,
    device: options.Device = "cpu",
    dtype: options.DtypeOption = options.Dtype.bfloat16,
    allow_config_key: options.AllowConfigKey = None,
) -> None:
    """Held-out word problems with the calculator, greedy: GSM8K's, or generated ones.

    \b
    Example:
      k2 eval gsm8k --data ../shared/data
    """
    if data is not None and not (data / "gsm8k" / "train.jsonl").is_file():
        raise InputError(f"--data {data} holds no gsm8k/train.jsonl.", "Give the folder that holds gsm8k/.")

    def task(fmt: Any, generate_batch: Any, progress: Any) -> Any:
        from karakoram.evals.gsm8k import evaluate

        return evaluate(fmt, generate_batch, data, limit, progress=progress)

    _run("gsm8k", task, model, dialect, device, dtype.value, allow_config_key or [], json_file, failures)


def _run(
    name: str,
    task: Callable[[Any, Any, Any], Any],
    model: str,
    dialect: str | None,
    device: str,
    dtype: str,
    allow_config_keys: list[str],
    json_file: Path | None,
    failures: int,
) -> None:
    from karakoram.cli.opening import open_for_chat
    from karakoram.cli.terminal.progress import count_progress

    if json_file is not None and not json_file.absolute().parent.is_dir():
        raise InputError(f"--json {json_file}: there is no directory to write into.", "Make it first.")
    opened = open_for_chat(model, dialect, device, dtype, allow_config_keys)
    started = time.perf_counter()
    with count_progress(f"{name}, {model}") as report_batch:
        result = task(opened.fmt, in_batches(opened.model, report_batch), None)
    seconds = time.perf_counter() - started
    for outcome in result.failures(failures) if failures else ():
        _show(outcome)
    typer.echo(f"{name} · {model} · {opened.where} · {seconds:.0f} s")
    typer.echo(str(result))
    if json_file is not None:
        numbers = {"task": name, "model": model, "seconds": round(seconds, 1), **result.to_dict()}
        json_file.write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")


def in_batches(model: Any, report: Callable[[int, int], None]) -> Any:
    """`generate_batch` of the evals over a real model: prompts of like lengths together, `BATCH` at a time.

    `report(done, total)` counts the prompts of the present round.
    """
    from karakoram.model.generate import generate_batch

    def batched(prompts: list[list[int]], most: int, stop_ids: Collection[int]) -> Sequence[Sequence[int]]:
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        written: list[list[int]] = [[] for _ in prompts]
        for start in range(0, len(order), BATCH):
            chosen = order[start : start + BATCH]
            found = generate_batch(model, [prompts[index] for index in chosen], most, stop_ids)
            for index, ids in zip(chosen, found, strict=True):
                written[index] = ids
            report(start + len(chosen), len(prompts))
        return written

    return batched


def _show(outcome: Any) -> None:
    """A conversation that went wrong, one line a message."""
    from karakoram.cli.terminal.view import printable

    for message in outcome.messages:
        if message.get("reasoning_content"):
            typer.echo(f"thinking: {printable(message['reasoning_content'])}")
        if message.get("content"):
            typer.echo(f"{message['role']}: {printable(message['content'])}")
        for call in message.get("tool_calls") or ():
            typer.echo(f"call: {printable(call['function']['name'])} {printable(call['function']['arguments'])}")
    typer.echo(f"expected: {', '.join(outcome.scenario.expected)}\n")
