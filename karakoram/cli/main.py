"""`k2`: the door.

One table names the commands; a command's module is imported only when that command runs, and what is heavy (torch,
huggingface_hub) is imported inside the command's function. So `k2 --help` needs Typer alone: about 0.1 s.
Help is plain text: Typer's Rich help costs another 0.15 s and reads worse in a log.

`run` turns whatever goes wrong into one line on stderr and an exit code: 2 for what the user can mend, 130 for Ctrl-C.
A traceback is a bug, and `K2_TRACEBACK=1` asks for it.
"""

import errno
import os
import sys
from importlib import import_module
from io import TextIOWrapper
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

import karakoram
from karakoram.errors import KarakoramError

# name: (module, attribute: a function or a typer.Typer, one line for the list)
COMMANDS = {
    "chat": ("karakoram.cli.chat", "chat_command", "Talk to a model; without arguments, to the bundled one."),
    "generate": ("karakoram.cli.generate", "generate_command", "Continue a text, greedily unless told otherwise."),
    "serve": ("karakoram.cli.serve", "serve_command", "Serve a model through OpenAI's and Anthropic's APIs."),
    "inspect": ("karakoram.cli.inspect", "inspect_command", "Sizes and costs of a checkpoint or preset."),
    "convert": ("karakoram.cli.convert", "convert_command", "Write a checkpoint in another format, losing no bit."),
    "quantize": ("karakoram.cli.quantize", "quantize_command", "Write a checkpoint in int4, and say what it cost."),
    "synth": ("karakoram.cli.synth", "synth_command", "Write a checkpoint by chance, in a preset's true shape."),
    "pack": ("karakoram.cli.pack", "pack_command", "Write a checkpoint with its experts packed, to run from disk."),
    "plan": ("karakoram.cli.plan", "plan_command", "How fast a model will be here, and what limits it."),
    "experts": (
        "karakoram.cli.experts",
        "experts_command",
        "What traces of routing say, and which memory would serve them.",
    ),
    "train": ("karakoram.cli.train", "train_command", "Train a model from a recipe."),
    "report": ("karakoram.cli.report", "report_command", "Curves, events and settings of a training run, as a page."),
    "eval": ("karakoram.cli.eval", "eval_command", "Score a model."),
    "bench": ("karakoram.cli.bench", "bench_command", "Measure kernels against the limits of this machine."),
    "models": ("karakoram.cli.models", "models_command", "List cached checkpoints and remove them."),
    "doctor": ("karakoram.cli.doctor", "doctor_command", "What this machine has, what is missing, how to get it."),
}

# Typer does not export the class of all usage errors, and where it lives changed in 0.26 (click became part of Typer).
UsageError: type[Any] = typer.BadParameter.__mro__[1]
ClickException: type[Any] = typer.BadParameter.__mro__[2]


class LazyCommands(TyperGroup):
    """Knows the commands by `COMMANDS`, and imports the one that is asked for."""

    _listing = False

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in COMMANDS:
            return None
        if self._listing:
            return TyperCommand(cmd_name, help=COMMANDS[cmd_name][2], rich_markup_mode=None)
        return load_command(cmd_name)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        self._listing = True
        try:
            super().format_commands(ctx, formatter)
        finally:
            self._listing = False


def load_command(name: str) -> Any:
    """Import one command of `COMMANDS` and return its Typer command or group."""
    module, attribute, _ = COMMANDS[name]
    found = getattr(import_module(module), attribute)
    if not isinstance(found, typer.Typer):
        single = _plain_typer()
        single.command(name)(found)
        found = single
    command: Any = typer.main.get_command(found)
    command.name = name
    return command


def _plain_typer(**options: Any) -> typer.Typer:
    return typer.Typer(
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["--help", "-h"]},
        **options,
    )


app = _plain_typer(cls=LazyCommands, name="k2", invoke_without_command=True)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"karakoram {karakoram.__version__}")
        raise typer.Exit()


@app.callback()
def root(
    ctx: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Run, train, shrink and put to work models of the Kimi K2 family.

    \b
    Examples:
      k2 chat                         talk to the bundled model
      k2 chat "What is 17 * 23?" --demo-tools
      k2 inspect k2                   what Kimi K2 weighs
      k2 COMMAND --help               more about one command
    """
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())


def run(arguments: list[str] | None = None) -> None:
    """Entry point of `k2`. Always leaves by `SystemExit`."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that is not UTF-8 shows "?" where it cannot show more
    try:
        code = typer.main.get_command(app).main(args=arguments, prog_name="k2", standalone_mode=False)
        sys.stdout.flush()
    except SystemExit:
        raise
    except BaseException as error:
        if os.environ.get("K2_TRACEBACK"):
            raise
        code = _report(error)
    sys.exit(code if isinstance(code, int) else 0)


def _report(error: BaseException) -> int:
    """Say what went wrong in one line; return the exit code."""
    if isinstance(error, KeyboardInterrupt | typer.Abort):
        return 130
    if isinstance(error, BrokenPipeError):
        # The reader has gone. Python would complain once more when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    line = _explain(error)
    if line is None:
        raise error
    print(f"k2: error: {' '.join(line.split())}", file=sys.stderr)
    return 2


def _explain(error: Any) -> str | None:
    """One line for what a user can mend; None for a bug."""
    if isinstance(error, KarakoramError):
        return str(error)
    if isinstance(error, UsageError):
        path = error.ctx.command_path if error.ctx else "k2"
        return f"{error.format_message().rstrip('.')}. Try '{path} --help'."
    if isinstance(error, ClickException):
        return error.format_message()
    if isinstance(error, OSError):
        name = f"{error.filename}: " if error.filename else ""
        fix = " Free some space, or write elsewhere." if error.errno == errno.ENOSPC else ""
        return f"{name}{error.strerror or error}.{fix}"
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # the latter is torch's
        return f"Out of memory: {error or 'the model does not fit'}. Use a smaller model, another --device or --dtype."
    return None
