"""`k2 inspect`: what a model is and what it costs, from its configuration and, where there are files, their headers.

Parameters, KV cache and FLOPs come from the configuration alone (`karakoram.model.cost`). Bytes are counted from the
tensors where there is a checkpoint, and predicted from the declared format where there is only a configuration.
The report is one JSON-ready dictionary; the tables are a view of it. A hub id that is not in the local cache costs one
small download, its config.json: weights are fetched by the commands that need them.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from karakoram.cli import options
from karakoram.config import PRESETS, ModelConfig, load_json_object
from karakoram.errors import CheckpointError, InputError, KarakoramError

MOONSHOT_ACTIVE = 32.6e9  # the activated parameters that Moonshot states for K2

CONVENTION = (
    "active = parameters one token multiplies with: attention, norms, router, dense, shared and its routed experts;"
    " then with the output head; then with the input embedding too. Scales of fp8 and int4 are bytes, not parameters."
)


@dataclass(frozen=True)
class _Found:
    """What the argument turned out to be; `checkpoint` is None where there is only a configuration."""

    name: str
    config: ModelConfig
    checkpoint: Any = None
    notes: tuple[str, ...] = ()
    problem: KarakoramError | None = None


def inspect_command(
    model: Annotated[
        str,
        typer.Argument(
            metavar="PATH|PRESET",
            help=f"A checkpoint directory, a config.json, a Hugging Face id, or one of {', '.join(PRESETS)}.",
        ),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of tables.")] = False,
    allow_config_key: options.AllowConfigKey = None,
) -> None:
    """Sizes and costs of a checkpoint or preset.

    Reads headers only. Exit code 2 if tensors are missing, unexpected, or of the wrong shape or dtype.

    \b
    Examples:
      k2 inspect k2
      k2 inspect ./my-checkpoint --json
    """
    found = _find(model, allow_config_key or [])
    report = describe(found.name, found.config, found.checkpoint)
    report["notes"] += found.notes
    report["problem"] = str(found.problem) if found.problem else None
    if as_json:
        typer.echo(json.dumps(report, indent=2, ensure_ascii=False))
    else:
        _print(report)
    if found.problem:
        raise found.problem


# ------------------------------------------------------------------------------------------ what the argument means


def _find(model: str, allow_keys: list[str]) -> _Found:
    from karakoram.env import bundled_model_dir

    if model == "nano" and (bundled_model_dir() / "config.json").is_file():
        return _find_directory("nano (bundled)", bundled_model_dir(), allow_keys)
    if model in PRESETS:
        return _Found(model, ModelConfig.preset(model), notes=("a preset: bytes are predicted from its format",))
    try:
        path = Path(model).expanduser()
        kind = "directory" if model and path.is_dir() else "file" if path.is_file() else None
    except (OSError, RuntimeError):  # a name longer than the system allows, an unknown ~user
        kind, path = None, Path()
    if kind == "directory":
        return _find_directory(str(path), path, allow_keys)
    if kind == "file":
        if path.suffix != ".json":
            raise InputError(f"{path} is a file.", "Name the directory of a checkpoint, or its config.json.")
        config = ModelConfig.from_dict(load_json_object(path), allow_keys)
        return _Found(str(path), config, notes=("a configuration alone: bytes are predicted from its format",))
    return _find_on_hub(model, allow_keys)


def _find_directory(name: str, directory: Path, allow_keys: list[str]) -> _Found:
    """A damaged or incomplete checkpoint is still described from its configuration; the problem is told at the end."""
    config = ModelConfig.from_dir(directory, allow_keys)
    from karakoram.checkpoint import open_checkpoint

    try:
        checkpoint = open_checkpoint(directory, allow_config_keys=allow_keys)
    except CheckpointError as error:
        return _Found(name, config, problem=error)
    notes = tuple(note for note in checkpoint.notes if "vision" not in note)  # those have a line of their own
    try:
        checkpoint.check()
    except CheckpointError as error:
        return _Found(name, config, checkpoint, notes, error)
    return _Found(name, config, checkpoint, notes)


def _find_on_hub(hub_id: str, allow_keys: list[str]) -> _Found:
    from karakoram.checkpoint.hf import HUB_ID, hub_errors
    from karakoram.env import hub_cache_dir

    if not HUB_ID.fullmatch(hub_id):
        raise InputError(
            f"{hub_id[:200]!r} is neither a directory nor a preset.",
            f"Name a checkpoint directory, a Hugging Face id owner/name, or one of {', '.join(PRESETS)}.",
        )
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    cache = hub_cache_dir()
    for name in ("model.safetensors.index.json", "model.safetensors"):
        file = try_to_load_from_cache(hub_id, name, cache_dir=cache)
        if isinstance(file, str):
            return _find_directory(hub_id, Path(file).parent, allow_keys)
    try:
        endpoint = os.environ.get("HF_ENDPOINT") or None
        file = hf_hub_download(hub_id, "config.json", cache_dir=cache, endpoint=endpoint)
    except hub_errors() as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{hub_id} is not in the cache and its config.json could not be fetched: {reason}.",
            "Check the spelling and the network; a gated model needs HF_TOKEN.",
        ) from error
    config = ModelConfig.from_dict(load_json_object(Path(file)), allow_keys)
    return _Found(hub_id, config, notes=("its weights are not in the cache: bytes are predicted from its format",))


# --------------------------------------------------------------------------------------------------------- the report


def describe(name: str, config: ModelConfig, checkpoint: Any = None) -> dict[str, Any]:
    """The report on a configuration, and on the headers of an opened `checkpoint` if one is given. JSON-ready."""
    from karakoram.model import cost

    count = cost.parameters(config)
    bill = cost.components(config)
    if checkpoint is None:
        stored = {part.name: part.bytes_by_format for part in bill}
    else:
        stored = _stored_bytes(checkpoint.tensors)
    by_format: dict[str, int] = {}
    for formats in stored.values():
        for weight_format, size in formats.items():
            by_format[weight_format] = by_format.get(weight_format, 0) + size
    return {
        "name": name,
        "family": config.family,
        "model_type": config.wrapper_model_type or config.model_type,
        "declared_format": config.weight_format,
        "layers": config.num_hidden_layers,
        "max_position_embeddings": config.max_position_embeddings,
        "parameters": {
            "total": count.total,
            "without_embeddings": count.without_embeddings,
            "active": count.active,
            "active_with_head": count.active_with_head,
            "active_with_head_and_embedding": count.active_with_both,
        },
        "convention": CONVENTION,
        "moonshot_active": MOONSHOT_ACTIVE if _is_k2(count.total) else None,
        "components": _components(bill, stored),
        "bytes": sum(by_format.values()),
        "bytes_by_format": by_format,
        "bytes_if_stored_as": {kind: cost.stored_bytes(config, kind) for kind in cost.FORMATS},
        "kv_bytes_per_token": cost.kv_bytes_per_token(config),
        "read_bytes_per_token": _read_bytes(config, stored) if checkpoint else cost.decode_bytes_per_token(config),
        "flops_per_token": cost.flops_per_token(config),
        "checkpoint": None if checkpoint is None else _files(checkpoint),
        "notes": list(config.notes),
    }


def _components(bill: list[Any], stored: Mapping[str, dict[str, int]]) -> list[dict[str, Any]]:
    rows = [
        {
            "name": part.name,
            "parameters": part.parameters,
            "active_parameters": part.active_parameters,
            "bytes": stored.get(part.name, {}),
        }
        for part in bill
    ]
    if "other" in stored:  # tensors the model does not know; `check` names them
        rows.append({"name": "other", "parameters": 0, "active_parameters": 0, "bytes": stored["other"]})
    return rows


def _is_k2(total_parameters: int) -> bool:
    from karakoram.model import cost

    return total_parameters == cost.parameters(ModelConfig.preset("k2")).total


def _files(checkpoint: Any) -> dict[str, Any]:
    return {
        "directory": str(checkpoint.dir),
        "shards": len(checkpoint.files),
        "tensors": len(checkpoint.tensors),
        "vision_tensors": len(checkpoint.vision),
        "vision_bytes": sum(entry.nbytes for entry in checkpoint.vision.values()),
    }


def _stored_bytes(tensors: Mapping[str, Any]) -> dict[str, dict[str, int]]:
    """Component -> format -> bytes. One pass: K2.5 has 208,550 tensors."""
    stored: dict[str, dict[str, int]] = {}
    for name, entry in tensors.items():
        formats = stored.setdefault(_component(name), {})
        kind = _format(name, entry.dtype)
        formats[kind] = formats.get(kind, 0) + entry.nbytes
    return stored


def _component(name: str) -> str:
    """The component of `karakoram.model.cost` that a canonical tensor name belongs to."""
    if ".mlp.experts." in name:
        return "routed experts"
    if "norm" in name:
        return "norms"
    for mark, component in (
        (".self_attn.", "attention"),
        (".mlp.shared_experts.", "shared experts"),
        (".mlp.gate.", "router"),
        (".mlp.", "dense layers"),
        ("model.embed_tokens.", "embedding"),
        ("lm_head.", "output head"),
    ):
        if mark in name:
            return component
    return "other"


def _format(name: str, dtype: str) -> str:
    """The format a stored tensor is a part of: scales count with the weights they scale."""
    if name.endswith(("weight_packed", "weight_scale", "weight_shape")):
        return "int4"
    if dtype.startswith("F8") or name.endswith("weight_scale_inv"):
        return "fp8"
    return {"BF16": "bf16", "F16": "fp16", "F32": "fp32"}.get(dtype, dtype.lower())


def _read_bytes(config: ModelConfig, stored: Mapping[str, Mapping[str, int]]) -> int:
    """Bytes one token alone reads: all weights, but one row of the embedding and only the chosen routed experts."""
    sizes = {name: sum(formats.values()) for name, formats in stored.items() if name != "other"}
    embedding = sizes.pop("embedding", 0)
    routed = sizes.pop("routed experts", 0)
    head = embedding if config.tie_word_embeddings else 0
    row = embedding // config.vocab_size
    return sum(sizes.values()) + head + row + routed * config.num_experts_per_tok // config.n_routed_experts


# ----------------------------------------------------------------------------------------------------------- the view


def _gb(size: int) -> str:
    """Decimal units: 1 GB is 10^9 bytes."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:,.1f} {unit}"
    return f"{size} B"


def _count(number: float) -> str:
    for unit, scale, digits in (("B", 1e9, 1 if number >= 2e10 else 2), ("M", 1e6, 1), ("k", 1e3, 1)):
        if number >= scale:
            return f"{number / scale:,.{digits}f} {unit}"
    return f"{number:g}"


def _print(report: dict[str, Any]) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    shape = f"{report['layers']} layers, context {report['max_position_embeddings']:,}"
    console.print(f"[bold]{_plain(report['name'])}[/]  {report['family']}, {shape}, {report['declared_format']}")
    _print_parameters(console, report)
    console.print(_table(report))
    sizes = " · ".join(f"{kind} {_gb(size)}" for kind, size in report["bytes_if_stored_as"].items())
    _line(console, "if stored as", sizes)
    _line(console, "KV cache", f"{report['kv_bytes_per_token']:,} bytes per token in bf16")
    kv = _gb(report["kv_bytes_per_token"] * 1000)
    _line(console, "decoding reads", f"{_gb(report['read_bytes_per_token'])} per token, and {kv} per 1,000 of context")
    _line(console, "forward", f"{report['flops_per_token'] / 1e9:,.2f} GFLOP per token, without attention to context")
    if files := report["checkpoint"]:
        _line(console, "files", f"{files['shards']:,} shards, {files['tensors']:,} text tensors")
        if files["vision_tensors"]:
            _line(console, "set aside", f"{files['vision_tensors']:,} vision tensors, {_gb(files['vision_bytes'])}")
        _line(console, "missing", "nothing" if report["problem"] is None else report["problem"])
    elif report["problem"]:
        _line(console, "missing", report["problem"])
    for note in report["notes"]:
        _line(console, "note", note)


def _print_parameters(console: Any, report: dict[str, Any]) -> None:
    count = report["parameters"]
    _line(
        console,
        "parameters",
        f"{_count(count['total'])} in total, {_count(count['without_embeddings'])} without embedding and head",
    )
    _line(
        console,
        "active",
        f"{_count(count['active'])} without embeddings · {_count(count['active_with_head'])} with the head"
        f" · {_count(count['active_with_head_and_embedding'])} with both",
    )
    if report["moonshot_active"]:
        _line(console, "", f"(Moonshot writes {_count(report['moonshot_active'])})")
    _line(console, "", report["convention"])


def _table(report: dict[str, Any]) -> Any:
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("component")
    for column in ("parameters", "active", "format", "bytes"):
        table.add_column(column, justify="right" if column != "format" else "left")
    for part in report["components"]:
        formats = [(kind, size) for kind, size in part["bytes"].items() if size] or [("–", 0)]
        for row, (kind, size) in enumerate(formats):
            first = (part["name"], _count(part["parameters"]), _count(part["active_parameters"]))
            table.add_row(*(first if row == 0 else ("", "", "")), kind, _gb(size))
    total = report["parameters"]
    kinds = "+".join(sorted(report["bytes_by_format"]))
    active = _count(total["active_with_head_and_embedding"])
    table.add_row("total", _count(total["total"]), active, kinds, _gb(report["bytes"]), style="bold")
    return table


def _line(console: Any, label: str, text: str) -> None:
    """A labelled line; what does not fit continues under its own text."""
    from rich.text import Text

    indent = 15
    for index, line in enumerate(Text(text).wrap(console, max(console.width - indent, 20))):
        margin = Text(f"{label if index == 0 else '':<{indent}}", style="dim")
        console.print(margin + line, soft_wrap=True)


def _plain(text: str) -> str:
    from rich.markup import escape

    return escape(text)
