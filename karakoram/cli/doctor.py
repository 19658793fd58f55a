"""`k2 doctor`: what this machine has, what is missing, how to get it.

Each check gives one line: a mark, a name, what was found, and, where something is wanting, what to do. Nothing is
changed and nothing is downloaded. Only a torch that cannot be imported makes the exit code 1: all else is optional.
"""

import json
import platform
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

from karakoram import env
from karakoram.errors import KarakoramError

_NEEDED = ("numpy", "safetensors", "tiktoken", "huggingface_hub", "typer", "rich")
_LOW_MEMORY_BYTES = 4e9  # torch and the bundled model take about 1 GB, training it about 2
_LOW_DISK_BYTES = 5e9  # one output shard


@dataclass(frozen=True)
class Check:
    """One line of the report. `fix` says how to get what is wanting; empty where nothing is."""

    name: str
    status: Literal["ok", "note", "missing"]
    found: str
    fix: str = ""


def doctor_command(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON list instead of lines.")] = False,
) -> None:
    """What this machine has, what is missing, how to get it.

    \b
    Example:
      k2 doctor
    """
    checks = examine()
    if as_json:
        typer.echo(json.dumps([asdict(check) for check in checks], indent=2, ensure_ascii=False))
    else:
        _print(checks)
    if any(check.name == "torch" and check.status == "missing" for check in checks):
        raise typer.Exit(1)


def examine() -> list[Check]:
    """All checks in the order they are shown."""
    return [
        _python(),
        _torch(),
        _packages(),
        _processor(),
        _compiler(),
        _memory(),
        _kernels(),
        *_accelerators(),
        _bundled_model(),
        _hub_cache(),
        _hub(),
        _terminal(),
        _variables(),
    ]


def _python() -> Check:
    return Check("Python", "ok", f"{platform.python_version()} ({sys.executable})")


def _torch() -> Check:
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a shared library that does not load
        return Check("torch", "missing", str(error).splitlines()[0], "pip install 'torch>=2.11,<2.14'")
    threads = torch.get_num_threads()
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    return Check("torch", "ok", f"{torch.__version__}, {build}, {threads} thread{'s' if threads != 1 else ''}")


def _packages() -> Check:
    from importlib.metadata import PackageNotFoundError, version

    found: list[str] = []
    absent: list[str] = []
    for name in _NEEDED:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            absent.append(name)
    if absent:
        return Check("packages", "missing", f"no {', '.join(absent)}", f"pip install {' '.join(absent)}")
    return Check("packages", "ok", ", ".join(found))


def _processor() -> Check:
    cpu = env.processor()
    features = " ".join(name for name in env.CPU_FEATURES if name in cpu.features) or "no known vector features"
    found = f"{cpu.model}, {cpu.architecture}, {cpu.cores} core{'s' if cpu.cores != 1 else ''}: {features}"
    if not cpu.features & {"avx2", "asimd"}:
        return Check("processor", "note", found, "Without AVX2 or NEON everything works, slowly.")
    return Check("processor", "ok", found)


def _compiler() -> Check:
    path = env.compiler()
    if path is None:
        how = "xcode-select --install" if sys.platform == "darwin" else "apt install g++ (or your system's equivalent)"
        return Check("compiler", "note", "no C++ compiler", f"Only compiled kernels need one: {how}.")
    return Check("compiler", "ok", env.first_line([str(path), "--version"]) or str(path))


def _kernels() -> Check:
    """Which implementation the operations run on; the library is built here if it is not there yet."""
    import warnings

    try:
        from karakoram.kernels import ops
    except (ImportError, OSError):
        return Check("kernels", "note", "unknown without torch")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            found = ops.describe_choice()
        except KarakoramError as error:  # KARAKORAM_ISA names what is not here
            return Check("kernels", "missing", error.what, error.fix)
    if caught:
        return Check(
            "kernels", "note", str(caught[0].message), "Everything works without, slower; see docs/kernels.md."
        )
    return Check("kernels", "ok", found)


def _memory() -> Check:
    memory = env.memory()
    if memory.total_bytes is None:
        return Check("memory", "note", "unknown")
    found = f"{memory.total_bytes / 1e9:.1f} GB"
    if memory.available_bytes is not None:
        found += f", {memory.available_bytes / 1e9:.1f} GB available"
        if memory.available_bytes < _LOW_MEMORY_BYTES:
            return Check("memory", "note", found, "The bundled model runs in about 1 GB; larger ones need more.")
    return Check("memory", "ok", found)


def _accelerators() -> list[Check]:
    try:
        import torch
    except (ImportError, OSError):
        return [Check("accelerator", "note", "unknown without torch")]
    if torch.cuda.is_available():
        return [_cuda_device(index) for index in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        return [Check("accelerator", "note", "Apple GPU (MPS)", "It is not used yet; models run on the CPU.")]
    if Path("/dev/nvidiactl").exists():
        build = "a CPU build" if torch.version.cuda is None else f"for CUDA {torch.version.cuda}"
        fix = "Install the CUDA build of torch that fits the driver: pytorch.org/get-started."
        return [Check("accelerator", "missing", f"an NVIDIA GPU that torch, {build}, cannot use", fix)]
    return [Check("accelerator", "note", "none; models run on the CPU")]


def _cuda_device(index: int) -> Check:
    import torch

    properties = torch.cuda.get_device_properties(index)
    capability = f"{properties.major}.{properties.minor}"
    return Check(
        "accelerator",
        "ok",
        f"cuda:{index} {properties.name}, {properties.total_memory / 1e9:.1f} GB, compute capability {capability}",
    )


def _bundled_model() -> Check:
    folder = env.bundled_model_dir()
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) if folder.is_dir() else 0
    if not (folder / "config.json").is_file():
        return Check("nano model", "missing", "not in this installation", "Reinstall, or train it: k2 train nano.")
    return Check("nano model", "ok", f"bundled, {size / 1e6:.1f} MB")


def _hub_cache() -> Check:
    path = env.hub_cache_dir()
    disk = env.disk(path)
    if disk is None:
        return Check("hub cache", "note", f"{path}: free space unknown")
    state = "" if path.exists() else " (not there yet)"
    found = f"{path}{state}, {disk.free_bytes / 1e9:,.1f} GB free of {disk.total_bytes / 1e9:,.1f} GB"
    if disk.free_bytes < _LOW_DISK_BYTES:
        return Check("hub cache", "note", found, "Free some space, or set HF_HUB_CACHE to a folder on a larger disk.")
    return Check("hub cache", "ok", found)


def _hub() -> Check:
    import os

    endpoint = os.environ.get("HF_ENDPOINT") or "huggingface.co"
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
        return Check("hub", "note", f"{endpoint}, offline by HF_HUB_OFFLINE", "Unset it to download.")
    try:
        from huggingface_hub import get_token
    except ImportError:
        return Check("hub", "missing", "no huggingface_hub", "pip install huggingface_hub")
    return Check("hub", "ok", f"{endpoint}, {'with' if get_token() else 'without'} an access token")


def _terminal() -> Check:
    import shutil

    encoding = (sys.stdout.encoding or "unknown").lower()
    size = shutil.get_terminal_size()
    kind = "a terminal" if sys.stdout.isatty() else "no terminal (output is redirected)"
    found = f"{kind}, {size.columns} columns, {encoding}"
    if encoding.replace("-", "") != "utf8":
        return Check("terminal", "note", found, "Set a UTF-8 locale, e.g. export LANG=C.UTF-8.")
    return Check("terminal", "ok", found)


def _variables() -> Check:
    found = ", ".join(f"{name}={value}" for name, value in env.variables().items())
    return Check("variables", "ok", found or "none set")


def _print(checks: list[Check]) -> None:
    from rich.console import Console
    from rich.markup import escape

    console = Console(highlight=False)
    marks = {"ok": "[green]ok[/]     ", "note": "[yellow]note[/]   ", "missing": "[red]missing[/]"}
    width = max(len(check.name) for check in checks)
    for check in checks:
        console.print(f"{marks[check.status]} {check.name:<{width}}  {escape(check.found)}", soft_wrap=True)
        if check.fix:
            console.print(f"{'':<{width + 10}}[dim]→[/] {escape(check.fix)}", soft_wrap=True)
