"""The door: quick and torch-free help, one line for each mistake, and the exit codes."""

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import typer

from karakoram.cli import main
from karakoram.errors import CheckpointError

OURS = ["chat", "generate", "convert", "quantize", "train", "eval"]


def k2(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as left:
        main.run(list(arguments))
    out, err = capsys.readouterr()
    return left.value.code, out, err  # type: ignore[return-value]


def test_help_loads_nothing_heavy() -> None:
    heavy = "{'torch', 'numpy', 'huggingface_hub', 'rich', 'tiktoken', 'safetensors'}"
    program = (
        "import sys, karakoram.cli.main as main\n"
        "try: main.run(['--help'])\n"
        f"except SystemExit: print('heavy:', sorted({heavy} & sys.modules.keys()), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.stderr.strip() == "heavy: []"
    for name in main.COMMANDS:
        assert f"\n  {name} " in done.stdout


@pytest.mark.parametrize("name", OURS)
def test_each_command_has_help_with_an_example_and_says_the_same_in_the_list(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = k2(capsys, name, "--help")
    assert (code, err) == (0, "")
    assert "Example" in out
    assert f"k2 {name}" in out
    assert main.load_command(name).help.split("\n")[0] == main.COMMANDS[name][2]


def test_bare_k2_shows_help(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = k2(capsys)
    assert (code, err) == (0, "")
    assert out.startswith("Usage: k2")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    import karakoram

    assert k2(capsys, "--version") == (0, f"karakoram {karakoram.__version__}\n", "")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["chatt"], "No such command 'chatt'"),
        (["--nope"], "No such option: --nope"),
        (["chat", "--nope"], "Try 'k2 chat --help'"),
        (["generate", "nano"], "Missing option '--prompt'"),
        (["generate", "nano", "--prompt", "x", "--max-tokens", "zero"], "--max-tokens"),
        (["generate", "nano", "--prompt", "x", "--max-tokens", "0"], "--max-tokens"),
        (["generate", "nano", "--prompt", "x", "--temperature", "-1"], "no way to sample"),
        (["generate", "nano", "--prompt", "x", "--dtype", "int3"], "'int3'"),
        (["generate", "nano", "--prompt", "  "], "prompt is empty"),
        (["generate", "nano", "--prompt", "x", "--system", "s"], "Add --chat"),
        (["generate", "./no-such-model", "--prompt", "x"], "No model './no-such-model'"),
        (["generate", "k2", "--prompt", "x"], "'k2' is a preset"),
        (["chat", "no-such-model", "hello"], "No model 'no-such-model'"),
        (["chat", "nano", "hello", "--tools", "/no/such/file"], "/no/such/file"),
        (["convert", "./no-such-model", "out", "--format", "bf16"], "No model './no-such-model'"),
        (["convert", "nano", "out", "--format", "int2"], "'int2'"),
        (["train", "no-such-recipe"], "no recipe 'no-such-recipe'"),
        (["train", "nano", "--minutes", "1", "--steps", "1"], "--minutes and --steps"),
        (["train", "nano", "--data", "/no/such/dir"], "/no/such/dir"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = k2(capsys, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("k2: error: ")
    assert err.count("\n") == 1
    assert words in err


def raising(error: BaseException) -> Callable[[str], Any]:
    def command() -> None:
        raise error

    single = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False, add_completion=False)
    single.command("train")(command)
    return lambda name: typer.main.get_command(single)


class OutOfMemoryError(RuntimeError):
    """As torch's, by name."""


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (
            CheckpointError("a.safetensors ends\nearly.", "Fetch it."),
            2,
            "k2: error: a.safetensors ends early. Fetch it.\n",
        ),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "x.bin"), 2, "Free some space"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), 2, "k2: error: /x: Permission denied.\n"),
        (OutOfMemoryError("tried to allocate 9 GiB"), 2, "tried to allocate 9 GiB. Use a smaller model"),
        (KeyboardInterrupt(), 130, ""),
        (typer.Abort(), 130, ""),
    ],
)
def test_errors_and_exit_codes(
    error: BaseException, code: int, line: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(main, "load_command", raising(error))
    left, out, err = k2(capsys, "train")
    assert (left, out) == (code, "")
    assert line in err
    assert err.count("\n") == (1 if line else 0)


def test_a_bug_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(main, "load_command", raising(ZeroDivisionError("bug")))
    with pytest.raises(ZeroDivisionError):
        main.run(["train"])


def test_a_reader_that_leaves_and_a_full_disk() -> None:
    program = "from karakoram.cli.main import run; run()"
    command = [sys.executable, "-c", program, "--help"]
    read_end, write_end = os.pipe()
    os.close(read_end)
    gone = subprocess.run(command, stdout=write_end, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    os.close(write_end)
    assert gone.stderr == ""
    assert gone.returncode != 0
    if os.path.exists("/dev/full"):
        with open("/dev/full", "w") as full:
            done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        assert "No space left" in done.stderr
