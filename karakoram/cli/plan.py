"""`k2 plan`: what a model will do here, or with other means, before it is loaded (`karakoram.evals.plan`).

MODEL may be a preset, whose weights need not be there. What the machine can do is measured once and kept. With
`--train`, nothing is measured: how a model would be trained on many GPUs, on paper (`docs/scale.md`).
"""

import json
import sys
from collections.abc import Iterable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from karakoram.cli import options, plan_options
from karakoram.config import PRESETS, ModelConfig
from karakoram.errors import InputError


class Format(StrEnum):
    """What a preset's weights are planned as."""

    bf16 = "bf16"
    fp8 = "fp8"
    int4 = "int4"
    int4_all = "int4-all"


def plan_command(
    model: Annotated[
        str, typer.Argument(metavar="MODEL|PRESET", help=f"A checkpoint, or one of {', '.join(PRESETS)}.")
    ],
    ram: options.Ram = None,
    vram: Annotated[
        str | None,
        typer.Option("--vram", metavar="SIZE", help="Memory of the card, for experts; default: what is free."),
    ] = None,
    expert_ram: options.ExpertRam = None,
    disk: Annotated[
        Path | None, typer.Option("--disk", metavar="PATH", help="Folder on the disk that would hold the experts.")
    ] = None,
    context: Annotated[int | None, typer.Option("--context", min=1, help="Tokens before the decoded one.")] = None,
    trace: Annotated[
        Path | None, typer.Option("--trace", metavar="FILE", help="A recorded trace, for how often memory serves.")
    ] = None,
    format: Annotated[
        Format | None, typer.Option("--format", help="Of a preset's weights; default: as published.")
    ] = None,
    measure_again: Annotated[
        bool, typer.Option("--measure-again", help="Forget what was measured on this machine.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of lines.")] = False,
    allow_config_key: options.AllowConfigKey = None,
    train: Annotated[bool, typer.Option("--train", help="Plan its training on --gpus cards, on paper.")] = False,
    gpus: plan_options.Gpus = None,
    gpu: plan_options.Gpu = None,
    sequence: plan_options.Sequence = None,
    batch_tokens: plan_options.BatchTokens = None,
    tokens: plan_options.Tokens = None,
    pp: plan_options.Stages = None,
    ep: plan_options.ExpertRanks = None,
    dp: plan_options.Replicas = None,
    chunks: plan_options.Chunks = None,
    sharding: plan_options.Sharding = None,
    recompute: plan_options.Recompute = None,
    offload: plan_options.Offload = None,
    efficiency: plan_options.Efficiency = None,
) -> None:
    """How fast a model will be, where its experts will lie, what limits it, and what would help.

    The machine is measured once: memory, kernels, the disk past its cache (where no experts are there to be read, with
    a file of 1 GB that is removed afterwards). Budgets may be larger than what is here.

    \b
    Examples:
      k2 plan ./my-checkpoint
      k2 plan k2-thinking --ram 128GB --vram 24GB --disk /mnt/nvme
      k2 plan ./my-checkpoint --ram 16GiB --trace routed.k2trace --json
      k2 plan k2 --train --gpus 256
    """
    training = {
        "gpus": gpus, "gpu": gpu, "sequence_tokens": sequence, "batch_tokens": batch_tokens, "total_tokens": tokens,
        "efficiency": efficiency, "pipeline": pp, "experts": ep, "replicas": dp, "chunks": chunks,
        "sharding": sharding, "recompute": recompute, "offload": offload,
    }  # fmt: skip
    given = {name: value for name, value in training.items() if value is not None}
    if train:
        running = (ram, vram, expert_ram, disk, context, trace, format)
        if any(one is not None for one in running) or measure_again:
            raise InputError("Options of running do not go with --train.", "`k2 plan --help` says which are which.")
        return _train(model, given, allow_config_key or [], as_json)
    if given:
        raise InputError("--gpus and the like plan a training.", "Add --train.")
    from karakoram.evals.plan.plan import means_of, plan_of_checkpoint, plan_of_config

    def size(text: str | None, option: str) -> int | None:
        return None if text is None else options.size_in_bytes(text, option)

    means = means_of(size(ram, "--ram"), size(vram, "--vram"), size(expert_ram, "--expert-ram"), context)
    if disk is not None and not disk.expanduser().is_dir():
        raise InputError(f"--disk {disk} is no directory.", "Name a folder on that disk.")
    folder = None if disk is None else disk.expanduser().resolve()
    if model in PRESETS and not Path(model).is_dir():
        config = ModelConfig.preset(model)
        report = plan_of_config(model, config, format, means, folder, trace, measure_again, _say)
    elif format is not None:
        raise InputError("--format is for presets.", "A checkpoint has its own; k2 quantize writes another.")
    else:
        from karakoram.cli.opening import open_directory

        directory, keys = open_directory(model), allow_config_key or []
        report = plan_of_checkpoint(directory, means, folder, trace, measure_again, keys, _say)
    if as_json:
        typer.echo(json.dumps(report, indent=2, ensure_ascii=False))
    else:
        _print(report)


def _train(model: str, given: dict[str, Any], allow_config_keys: list[str], as_json: bool) -> None:
    from karakoram.evals.plan.training import plan_of_training, read_asked
    from karakoram.evals.plan.training_lines import lines

    if "gpus" not in given:
        raise InputError("--train needs to know on how many cards.", "Add --gpus, for instance --gpus 256.")
    asked = read_asked(given)
    if model in PRESETS and not Path(model).is_dir():
        config = ModelConfig.preset(model)
    else:
        from karakoram.cli.opening import open_directory

        config = ModelConfig.from_dir(open_directory(model), allow_config_keys)
    report = plan_of_training(model, config, asked)
    if as_json:
        typer.echo(json.dumps(report, indent=2, ensure_ascii=False))
        return
    _rows(lines(report))


def _rows(rows: Iterable[tuple[str, str]]) -> None:
    """Each name once."""
    last = ""
    for name, text in rows:
        typer.echo(f"{name if name != last else '':<12} {text}")
        last = name


def _say(what: str) -> None:
    """While something is measured, which takes seconds."""
    print(f"measuring, once: {what}", file=sys.stderr)


def _print(report: dict[str, Any]) -> None:
    from karakoram.evals.plan.report import limit

    machine, where, decode, prefill = report["machine"], report["placement"], report["decode"], report["prefill"]
    total = where["on_card"] + where["in_ram"] + where["on_disk"]
    experts = f"{total:,} experts of {report['expert_bytes'] / 1e6:.1f} MB ({report['expert_format']})"
    firsts = ", ".join(f"{s:.1f} s after {n} tokens" for n, s in report["first_token_s"].items())
    rows = [
        ("model", f"{report['model']}, {experts}"),
        ("machine", _machine(machine)),
        ("budget", _budget(report["budget"], where)),
        ("placement", _placement(where, total, report["hit_rate"])),
        ("decode", f"{decode['tokens_per_s']:.2f} tok/s after {decode['context']:,} tokens: {_parts(decode)}"),
        ("prefill", f"{prefill['tokens_per_s']:.1f} tok/s for {prefill['tokens']:,} tokens: {_parts(prefill)}"),
        ("first token", f"{firsts} (with nothing in memory)"),
        ("limit", limit(report)),
    ]  # fmt: skip
    now = decode["tokens_per_s"]
    rows += [
        ("would help", f"{one['description']}: {now:.2f} → {one['tokens_per_s']:.2f} tok/s") for one in report["helps"]
    ]
    rows += [("assumed", text) for text in report["assumptions"]]
    _rows(rows)


def _machine(machine: dict[str, Any]) -> str:
    first = next(iter(machine["disk_gb_per_s_by_burst"].values()))
    text = (
        f"memory {machine['memory_gb_per_s']:.0f} GB/s, experts {machine['expert_gb_per_s']:.0f} GB/s and "
        f"{machine['expert_tflops']:.2g} TFLOPS, bf16 {machine['matmul_tflops']:.2g} TFLOPS, "
        f"disk {first:.2f} GB/s by single experts, {machine['disk_gb_per_s']:.2f} by many"
    )
    if machine["card"] is not None:
        text += f", card {machine['card']['read_gb_per_s']:.0f} GB/s, {machine['card']['transfer_gb_per_s']:.0f} to it"
    return text


def _budget(budget: dict[str, Any], where: dict[str, Any]) -> str:
    text = f"RAM {budget['ram_bytes'] / 1e9:.1f} GB (at least {budget['least_ram_bytes'] / 1e9:.1f}, "
    text += f"all experts fit in {where['all_in_memory_ram_bytes'] / 1e9:.1f})"
    return text + (f", card {budget['vram_bytes'] / 1e9:.1f} GB" if budget["vram_bytes"] else "")


def _placement(where: dict[str, Any], total: int, hit_rate: dict[str, Any]) -> str:
    places = ("on_card", "the card", hit_rate["card"]), ("in_ram", "RAM", hit_rate["ram"])
    parts = [
        f"{where[key]:,} experts in {name} ({where[key] / total:.0%}, serving {share:.0%})"
        for key, name, share in places
        if where[key]
    ]
    return ", ".join([*parts, f"{where['on_disk']:,} on disk"])


def _parts(times: dict[str, Any]) -> str:
    """Where the time goes."""
    names = {
        "disk_s": "disk",
        "card_s": "card",
        "experts_s": "experts",
        "others_s": "other weights",
        "layers_s": "layers",
    }
    total = sum(times[key] for key in names)
    return ", ".join(f"{name} {times[key] / total:.0%}" for key, name in names.items() if times[key] > 0.005 * total)
