"""From a model's name to its plan: what `k2 plan` and the one line of a starting model call."""

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from karakoram import env
from karakoram.checkpoint import Checkpoint, open_checkpoint
from karakoram.checkpoint.experts import ExpertSource, open_expert_source
from karakoram.config import ModelConfig
from karakoram.engine.expert_store.budget import AUTO_SHARE, CACHE_TOKENS, PROCESS_BYTES
from karakoram.engine.expert_store.store import ExpertStore
from karakoram.engine.expert_store.trace import read_trace
from karakoram.errors import InputError, KarakoramError
from karakoram.evals.plan import machine, report, workload
from karakoram.evals.plan.hits import Hits, hits_of
from karakoram.evals.plan.report import DECODED_AFTER, Means
from karakoram.evals.plan.workload import Workload

LEAST_TOKENS = 64  # of a trace
MOST_VISITS = 30_000  # layers of passes that are replayed: some seconds


def silent(_: str) -> None:
    """Progress for nobody."""


def plan_of_checkpoint(
    path: str | Path,
    means: Means | None = None,
    disk: Path | None = None,
    trace: Path | None = None,
    again: bool = False,
    allow_config_keys: Collection[str] = (),
    say: machine.Say = silent,
) -> dict[str, Any]:
    """The report of a checkpoint directory or hub id. disk: where its experts would lie, if not where they are.

    Raises CheckpointError and InputError, for dense models too.
    """
    checkpoint = open_checkpoint(path, allow_config_keys)
    checkpoint.check()
    if not checkpoint.config.num_moe_layers:
        raise InputError(f"{checkpoint.dir} has no routed experts.", "It runs as it is, all in memory.")
    source = open_expert_source(checkpoint)
    try:
        load = workload.of_checkpoint(checkpoint, source)
        place = checkpoint.dir if disk is None else disk
        return _plan(load, means, place, source if disk is None else None, trace, again, say)
    finally:
        source.close()


def plan_of_config(
    name: str,
    config: ModelConfig,
    weight_format: str | None = None,
    means: Means | None = None,
    disk: Path | None = None,
    trace: Path | None = None,
    again: bool = False,
    say: machine.Say = silent,
) -> dict[str, Any]:
    """The report of a model whose weights are not here. disk: where they would lie; the current folder by default."""
    if not config.num_moe_layers:
        raise InputError(f"{name} has no routed experts.", "It runs as it is, all in memory.")
    load = workload.of_config(name, config, weight_format)
    return _plan(load, means, disk or Path.cwd(), None, trace, again, say)


def means_of(
    ram_bytes: int | None = None,
    vram_bytes: int | None = None,
    expert_bytes: int | None = None,
    context: int | None = None,
) -> Means:
    """What is given, else what is free now. More than this machine has is allowed: it is a plan.

    Raises InputError where the system does not tell what is free.
    """
    if ram_bytes is None:
        free = env.memory().available_bytes
        if free is None:
            raise InputError("This system does not tell how much memory is free.", "Give --ram SIZE.")
        ram_bytes = int(AUTO_SHARE * (free + (env.resident_bytes() or PROCESS_BYTES)))
    if vram_bytes is None:
        vram_bytes = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else 0
    wanted = DECODED_AFTER if context is None else context
    return Means(ram_bytes, vram_bytes, expert_bytes, max(CACHE_TOKENS, wanted), wanted)


def plan_line(model: str | Path | Checkpoint, store: ExpertStore) -> str | None:
    """One line for a model that a store feeds already; None where this machine has not been measured for it.

    Measures nothing, and never raises: who starts a model wants it started.
    """
    try:
        checkpoint = model if isinstance(model, Checkpoint) else open_checkpoint(model)
        load, kept = workload.of_checkpoint(checkpoint, store.source), machine.Kept()
        rates, hits = machine.kept_rates(kept, load, checkpoint.dir), machine.kept_hits(kept, load.config)
        if rates is None or hits is None:
            return None
        experts = store.capacity * load.slot_bytes
        fixed = report.budget(load, Means(0)).fixed_bytes
        return report.line(report.report(load, rates, hits, Means(fixed + experts, expert_bytes=experts)))
    except (KarakoramError, OSError, ArithmeticError):
        return None


def _plan(
    load: Workload,
    means: Means | None,
    place: Path,
    source: ExpertSource | None,
    trace: Path | None,
    again: bool,
    say: machine.Say,
) -> dict[str, Any]:
    means = means or means_of()
    report.place(load, means)  # too small a budget is refused before anything is measured
    hits = None if trace is None else trace_hits(trace, load.config)
    kept = machine.Kept()
    rates = machine.rates(kept, load, place, source, again, say)
    if hits is None:
        hits = machine.hits(kept, load.config, say)
    return report.report(load, rates, hits, means, (kept.note,) if kept.note else ())


def trace_hits(path: Path, c: ModelConfig) -> Hits:
    """Of the last passes of a recorded trace. FormatError for what is none, InputError for another model's."""
    trace = read_trace(path)
    recorded, wanted = (trace.experts, trace.top_k), (c.n_routed_experts, c.num_experts_per_tok)
    if recorded != wanted:
        raise InputError(
            f"{path} is a trace of a model with {recorded[1]} of {recorded[0]} experts a token; this one has "
            f"{wanted[1]} of {wanted[0]}.",
            "Record one with this model: --trace FILE.",
        )
    if len(trace.passes) < LEAST_TOKENS:
        raise InputError(f"{path} has {len(trace.passes)} passes.", f"Record at least {LEAST_TOKENS} tokens.")
    last = trace.passes[-max(LEAST_TOKENS, MOST_VISITS // len(trace.layers)) :]
    return hits_of(replace(trace, passes=last), f"the trace {path.name}")
