"""From a checkpoint and a budget to a model that runs: all in memory where it fits, with a store where it does not."""

import gc
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from karakoram.checkpoint import Checkpoint, open_checkpoint
from karakoram.checkpoint.experts import ExpertSource, open_expert_source
from karakoram.engine.expert_store.budget import CACHE_TOKENS, Budget, budget_of
from karakoram.engine.expert_store.card import Card
from karakoram.engine.expert_store.policy import policy_named
from karakoram.engine.expert_store.shadow import shadow_bytes
from karakoram.engine.expert_store.store import ExpertStore
from karakoram.engine.expert_store.trace import TraceWriter
from karakoram.env import resident_bytes
from karakoram.errors import InputError
from karakoram.model.load import load_model
from karakoram.model.packed.assemble import can_run_packed
from karakoram.model.transformer import Transformer

FLOOR_SHARE = 0.5  # of a layer's even share of the slots that eviction leaves it


@dataclass(frozen=True)
class StoreOptions:
    """What a user may say about memory. All None: the store serves where the model does not fit."""

    ram_bytes: int | None = None  # of the whole process
    expert_bytes: int | None = None  # of the experts alone
    vram_bytes: int | None = None  # of a CUDA device, for the experts that are wanted most
    policy: str | None = None
    guessing: bool = True
    shadow_ms: float | None = None  # a layer's wait, after which two-bit copies stand in for what is not there
    trace: Path | None = None

    @property
    def asked(self) -> bool:
        """Whether anything was said that needs a store."""
        said = (self.ram_bytes, self.expert_bytes, self.vram_bytes, self.policy, self.trace, self.shadow_ms)
        return any(one is not None for one in said)


@dataclass(frozen=True)
class Fed:
    """A model and the store that feeds it. Close the store when the model has run."""

    model: Transformer
    store: ExpertStore
    budget: Budget


def open_fed(
    path_or_hub_id: str | Path | Checkpoint,
    options: StoreOptions,
    allow_config_keys: tuple[str, ...] = (),
    cache_tokens: int = CACHE_TOKENS,
) -> Fed | None:
    """The model fed by a store; None where nothing asks for one: all fits, or it is no model that a store can feed.

    An opened checkpoint is taken as it is, checked by who opened it: K2.5's headers take 6 s.
    Raises InputError for a budget below the least, or where a store was asked for and cannot be.
    """
    if isinstance(path_or_hub_id, Checkpoint):
        checkpoint = path_or_hub_id
    else:
        checkpoint = open_checkpoint(path_or_hub_id, allow_config_keys)
        checkpoint.check()
    c = checkpoint.config
    can = can_run_packed(checkpoint, torch.device("cpu"), torch.bfloat16) and c.num_moe_layers > 0
    if not can:
        if options.asked:
            raise InputError(
                f"{checkpoint.dir} cannot have its experts on disk.",
                "That needs routed experts, the CPU kernels (`k2 doctor`), and bfloat16 on a CPU.",
            )
        return None
    source = open_expert_source(checkpoint)
    try:
        budget = _budget(checkpoint, source, options, cache_tokens)
        if not options.asked and budget.holds(len(source.layers) * source.experts):
            source.close()
            return None
        budget.slots()  # refuses what is too little before the time of loading is spent
        return _load(checkpoint, source, options, cache_tokens)
    except BaseException:
        source.close()
        raise


def _load(checkpoint: Checkpoint, source: ExpertSource, options: StoreOptions, cache_tokens: int) -> Fed:
    model = load_model(checkpoint, routed_experts=False)
    gc.collect()
    budget = _budget(checkpoint, source, options, cache_tokens, resident_bytes())
    slots = budget.slots()
    layers = len(source.layers)
    trace = None if options.trace is None else _trace(options.trace, source, checkpoint.config.num_experts_per_tok)
    card = None if options.vram_bytes is None else Card(_cuda(), options.vram_bytes, source)
    floor = int(FLOOR_SHARE * min(slots, layers * source.experts) / layers)
    name = options.policy or "hybrid"
    policy = policy_named(name, layers, source.experts)
    store = ExpertStore(
        source, slots, policy, floor, options.guessing, trace=trace, limit_bytes=budget.total_bytes, card=card,
        shadow_after_s=None if options.shadow_ms is None else options.shadow_ms / 1e3,
    )  # fmt: skip
    store.policy = name
    try:
        if store.shadow is not None:
            store.shadow.fill(store.readers)
        store.attach(model)
    except BaseException:
        store.close()
        raise
    return Fed(model, store, budget)


def _budget(
    checkpoint: Checkpoint,
    source: ExpertSource,
    options: StoreOptions,
    cache_tokens: int,
    others_bytes: int | None = None,
) -> Budget:
    """With room for the shadows, where there are any: beside the experts' own memory."""
    found = budget_of(
        checkpoint, source, options.ram_bytes, options.expert_bytes, cache_tokens, others_bytes=others_bytes
    )
    if options.shadow_ms is None:
        return found
    shadows = shadow_bytes(source)
    total = found.total_bytes + (shadows if options.expert_bytes is not None else 0)
    return replace(found, total_bytes=total, others_bytes=found.others_bytes + shadows)


def _trace(path: Path, source: ExpertSource, chosen: int) -> TraceWriter:
    try:
        return TraceWriter(path, source.layers, source.experts, chosen)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}.", "Name another file for --trace.") from error


def _cuda() -> torch.device:
    if not torch.cuda.is_available():
        raise InputError("There is no CUDA device here for --vram.", "Leave it out; `k2 doctor` lists what there is.")
    return torch.device("cuda")
