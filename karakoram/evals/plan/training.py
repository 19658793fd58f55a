"""`k2 plan --train`: how a model is spread over GPUs, whether it fits, and how long its tokens take; on paper.

The arithmetic is `karakoram.model.cost`'s. Here a layout is chosen and a report made, one JSON-ready dictionary whose
names are part of the interface.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from itertools import product
from math import prod
from typing import Any

from karakoram.config import ModelConfig
from karakoram.errors import InputError
from karakoram.model import cost
from karakoram.model.cost.gpus import EFFICIENCY, GPUS, LINK_SHARE, Gpu
from karakoram.model.cost.layout import Layout, Sharding, stages
from karakoram.model.cost.step import Step, batch_of, link_seconds, step
from karakoram.model.cost.training import RECOMPUTE, Recompute

VERSION = 1
BATCH_TOKENS = 2.0**26  # K2: 67 million, 16,384 sequences of 4,096
SEQUENCE_TOKENS = 4096
TOTAL_TOKENS = 15.5e12
CHUNKS = (1, 2, 4)
MOST_GPUS = 1 << 17
K2_SHAPE = (61, 7168, 384)
SHARDINGS: tuple[Sharding, ...] = ("zero1", "fsdp")
OFFLOADS = {"none": (False, False), "activations": (True, False), "optimizer": (False, True), "both": (True, True)}


@dataclass(frozen=True)
class Fixed:
    """What of a layout is given; None is free. offload: activations, optimizer."""

    pipeline: int | None = None
    experts: int | None = None
    replicas: int | None = None
    chunks: int | None = None
    sharding: Sharding | None = None
    recompute: Recompute | None = None
    offload: tuple[bool, bool] | None = None


@dataclass(frozen=True)
class Asked:
    """What the user asks."""

    gpus: int
    gpu: str = "h800"
    sequence_tokens: int = SEQUENCE_TOKENS
    batch_tokens: float = BATCH_TOKENS
    total_tokens: float = TOTAL_TOKENS
    efficiency: float = EFFICIENCY
    fixed: Fixed = Fixed()

    def check(self) -> None:
        """Raises InputError for what is no plan."""
        if self.gpu not in GPUS:
            raise InputError(f"There is no GPU {self.gpu!r} here.", f"Choose one of {', '.join(GPUS)}.")
        if not 1 <= self.gpus <= MOST_GPUS:
            raise InputError(f"{self.gpus:,} GPUs are no plan.", f"Give 1 to {MOST_GPUS:,}.")
        if not 0 < self.efficiency <= 1:
            raise InputError(f"An efficiency of {self.efficiency} is no share.", "Give more than 0 and at most 1.")
        if not 1 <= self.sequence_tokens <= self.batch_tokens <= self.total_tokens < float("inf"):
            raise InputError("A sequence, a batch and all tokens must grow in that order.", "Give larger numbers.")
        sizes = (self.fixed.pipeline, self.fixed.experts, self.fixed.replicas)
        given = [size for size in sizes if size is not None]
        made = prod(given)
        if made < 1 or self.gpus % made or (len(given) == 3 and made != self.gpus):
            raise InputError(
                f"Stages, experts' ranks and replicas of {given} do not make {self.gpus} GPUs.",
                "Their product must be the number of GPUs; leave one out.",
            )


@dataclass(frozen=True)
class Tried:
    """A layout and its step."""

    layout: Layout
    step: Step
    gpu: Gpu

    @property
    def over_bytes(self) -> float:
        """Beyond what a card has; 0 where it fits."""
        return max(0.0, self.step.memory.total - self.gpu.usable_bytes)

    @property
    def host_over_bytes(self) -> float:
        return max(0.0, self.step.memory.host - self.gpu.usable_host_bytes)

    @property
    def rank(self) -> tuple[float, float, float, float]:
        """Less is better: what fits, then what is faster, then what sends less to the host, then what needs less."""
        return (
            self.over_bytes + self.host_over_bytes,
            1 / self.step.tokens_per_s,
            self.layout.offload_activations + self.layout.offload_optimizer,
            self.step.memory.total,
        )


def read_asked(given: Mapping[str, Any]) -> Asked:
    """From fields of `Asked` and `Fixed` by name, `offload` in words. Raises InputError for words that are none."""
    words = {"sharding": SHARDINGS, "recompute": RECOMPUTE, "offload": tuple(OFFLOADS)}
    for name, known in words.items():
        if given.get(name, known[0]) not in known:
            raise InputError(f"--{name} {given[name]!r} is not known.", f"Choose one of {', '.join(known)}.")
    of_layout = {field.name for field in fields(Fixed)}
    fixed = {name: value for name, value in given.items() if name in of_layout}
    if "offload" in fixed:
        fixed["offload"] = OFFLOADS[fixed["offload"]]
    return Asked(**{name: value for name, value in given.items() if name not in of_layout}, fixed=Fixed(**fixed))


def plan_of_training(name: str, config: ModelConfig, asked: Asked) -> dict[str, Any]:
    """The report. Raises InputError for numbers that make no plan."""
    asked.check()
    best = _best(config, asked)
    published = _published(config, asked)
    chosen = _best(config, published) if published is not None else best
    return _report(name, config, asked, chosen, best, as_published=published is not None)


def _published(config: ModelConfig, asked: Asked) -> Asked | None:
    """K2's own layout, where nobody asks for another and the GPUs are whole groups of 256."""
    shape = config.num_hidden_layers, config.hidden_size, config.n_routed_experts
    if shape != K2_SHAPE or asked.gpus % 256 or asked.fixed != Fixed():
        return None
    # "virtual stages": two to a GPU are assumed, their number is not published. Activations go to the host, and where
    # there are few nodes (32), the optimizer's states too.
    offload = (True, asked.gpus == 256)
    return replace(asked, fixed=Fixed(16, 16, None, 2, "zero1", "selective", offload))


def _best(config: ModelConfig, asked: Asked) -> Tried:
    """The fastest that fits, or what is least too large. Raises InputError where no layout can be."""
    found = [_try(config, layout, asked) for layout in _layouts(config, asked)]
    if not found:
        raise InputError(
            f"{asked.gpus:,} GPUs and these sizes make no layout of {config.num_hidden_layers} layers and "
            f"{config.n_routed_experts} experts.",
            "Stages and their parts may not be more than layers; --ep must divide the experts.",
        )
    return min(found, key=lambda one: one.rank)


def _try(config: ModelConfig, layout: Layout, asked: Asked) -> Tried:
    gpu = GPUS[asked.gpu]
    batch = batch_of(asked.batch_tokens, asked.sequence_tokens, layout)
    return Tried(layout, step(config, layout, gpu, batch, asked.efficiency), gpu)


def _layouts(config: ModelConfig, asked: Asked) -> Iterator[Layout]:
    fixed, experts = asked.fixed, config.n_routed_experts if config.num_moe_layers else 1
    for p, e, r in _cuts(asked, config.num_hidden_layers, experts):
        # gathering weights for every micro-batch of every stage is not what anyone does: fsdp goes without stages
        shardings = SHARDINGS if p == 1 else SHARDINGS[:1]
        free = product(
            (1,) if p == 1 else CHUNKS if fixed.chunks is None else (fixed.chunks,),
            shardings if fixed.sharding is None else (fixed.sharding,),
            RECOMPUTE if fixed.recompute is None else (fixed.recompute,),
            OFFLOADS.values() if fixed.offload is None else (fixed.offload,),
        )
        for v, sharding, recompute, saving in free:
            if p * v <= config.num_hidden_layers:
                yield Layout(p, e, r, v, sharding, recompute, *saving)


def _cuts(asked: Asked, layers: int, experts: int) -> Iterator[tuple[int, int, int]]:
    """Stages, ranks of experts, replicas; every rank has a sequence at least."""
    fixed = asked.fixed
    for p in _divisors(asked.gpus, fixed.pipeline, layers):
        for e in _divisors(asked.gpus // p, fixed.experts, experts):
            r = asked.gpus // p // e
            if experts % e == 0 and fixed.replicas in (None, r) and asked.batch_tokens >= asked.sequence_tokens * e * r:
                yield p, e, r


def _divisors(of: int, given: int | None, most: int) -> list[int]:
    if given is not None:
        return [given] if of % given == 0 else []
    return [n for n in range(1, min(of, most) + 1) if of % n == 0]


# ------------------------------------------------------------------------------------------------ the report


def _report(
    name: str, config: ModelConfig, asked: Asked, chosen: Tried, best: Tried, as_published: bool
) -> dict[str, Any]:
    count, now = cost.parameters(config), chosen.step
    cut = stages(config, chosen.layout.pipeline, asked.sequence_tokens)
    return {
        "version": VERSION,
        "model": name,
        "parameters": count.total,
        "active_parameters": count.active_with_head,
        "gpus": asked.gpus,
        "gpu": asdict(chosen.gpu),
        "layout": asdict(chosen.layout) | {"published": as_published, "layers": [one.layers for one in cut]},
        "batch": {
            "tokens": now.batch.tokens,
            "sequence_tokens": asked.sequence_tokens,
            "micro_batches": now.batch.per_rank,
        },
        "memory": _memory(chosen),
        "communication": _communication(chosen),
        "step": _seconds(now),
        "flops_per_token": now.flops_per_token,
        "computed_flops_per_token": now.computed_flops_per_token,
        "tokens_per_s": now.tokens_per_s,
        "mfu": now.mfu(chosen.layout, chosen.gpu),
        "days": asked.total_tokens / now.tokens_per_s / 86_400,
        "total_tokens": asked.total_tokens,
        "fastest": None if best.layout == chosen.layout else _short(best, asked),
        "would_fit": [] if fits(chosen) else _would_fit(config, asked, chosen),
        "assumptions": _assumptions(config, asked, chosen),
    }


def fits(tried: Tried) -> bool:
    """On card and host."""
    return not tried.over_bytes and not tried.host_over_bytes


def _memory(tried: Tried) -> dict[str, Any]:
    memory = tried.step.memory
    return {
        "items_bytes": {key: value for key, value in asdict(memory).items() if key != "host"},
        "states_bytes": memory.states,
        "mean_states_bytes": tried.step.mean_states_bytes,
        "total_bytes": memory.total,
        "usable_bytes": tried.gpu.usable_bytes,
        "host_bytes": memory.host,
        "usable_host_bytes": tried.gpu.usable_host_bytes,
        "fits": fits(tried),
        "over_bytes": tried.over_bytes,
        "host_over_bytes": tried.host_over_bytes,
    }


def _communication(tried: Tried) -> dict[str, dict[str, float]]:
    """By kind, of one GPU in one step; seconds on the link that takes longest, before any overlap."""
    return {
        kind: asdict(sent) | {"seconds": max(link_seconds(sent, tried.gpu))}
        for kind, sent in tried.step.traffic.items()
        if sent.nvlink or sent.network or sent.host
    }


def _seconds(now: Step) -> dict[str, float]:
    return {
        "compute_s": now.compute_s, "waited_s": now.waited_s, "bubble_s": now.bubble_s, "exposed_s": now.exposed_s,
        "optimizer_s": now.optimizer_s, "total_s": now.total_s,
    }  # fmt: skip


def _short(tried: Tried, asked: Asked) -> dict[str, Any]:
    return {
        "layout": asdict(tried.layout),
        "memory_bytes": tried.step.memory.total,
        "fits": fits(tried),
        "mfu": tried.step.mfu(tried.layout, tried.gpu),
        "days": asked.total_tokens / tried.step.tokens_per_s / 86_400,
    }


def _would_fit(config: ModelConfig, asked: Asked, chosen: Tried) -> list[dict[str, Any]]:
    """What would, one change at a time: another layout, another card, more of them."""
    free = replace(asked, fixed=Fixed())
    tries = [("another layout", free)] if free != asked else []
    for key, gpu in GPUS.items():
        if gpu.memory_bytes > chosen.gpu.memory_bytes:
            tries.append((f"{gpu.name} with {gpu.memory_bytes / 1e9:.0f} GB", replace(free, gpu=key)))
    found = [_short(tried, one) | {"what": what} for what, one in tries if fits(tried := _best(config, one))]
    more = asked.gpus
    while (more := 2 * more) <= MOST_GPUS and more * asked.sequence_tokens <= asked.batch_tokens:
        one = replace(free, gpus=more)
        if fits(tried := _best(config, one)):
            found.append(_short(tried, one) | {"what": f"{more:,} {chosen.gpu.name}"})
            break
    return found


def _assumptions(config: ModelConfig, asked: Asked, chosen: Tried) -> list[str]:
    found = [f"a layer reaches {asked.efficiency:.0%} of the peak, links {LINK_SHARE:.0%}; nobody measured that here"]
    if config.num_moe_layers:
        found.append("routing is even; a rank whose experts are more loaded makes all wait")
    if chosen.layout.pipeline > 1:
        found.append("what is sent for experts, stages and the host hides behind other micro-batches")
        found.append("the layers of a stage are cut for equal time; where K2 was cut is not published")
    found.append("no loader, checkpoint, straggler or failure takes time")
    return found
