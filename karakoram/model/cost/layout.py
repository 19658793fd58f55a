"""Which GPU holds what, and the bytes that takes: pipeline stages × experts' ranks × replicas.

Every rank of a stage sees its own sequences, so attention, shared experts, embedding and head are data parallel over
experts·replicas ranks, and each routed expert over the replicas alone. `zero1` keeps weights and float32 gradients
whole and spreads masters and momentum; `fsdp` spreads all four and gathers a layer when it is needed.

A weight takes 2 bytes (bf16), its gradient 4, its master 4, its momentum 4 with Muon, 8 in AdamW's group (embedding,
head, norms).
"""

from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Literal

from karakoram.config import ModelConfig
from karakoram.errors import InputError
from karakoram.model.cost.training import (
    ADAMW_COMPONENTS,
    Recompute,
    activation_bytes,
    head_flops,
    layer_total,
    mean_context,
)
from karakoram.model.cost.weights import BF16_BYTES, FP32_BYTES, matrices

Sharding = Literal["zero1", "fsdp"]
BUFFERED = 3  # chunks whose activations are on the card where they go to the host: running, leaving, coming
GATHERED = 2  # layers that FSDP holds whole: the one that runs and the next
LOGIT_ROWS = 1024  # of which logits and their gradients are there at once


@dataclass(frozen=True)
class Layout:
    """How a model is spread. Raises InputError for what cannot be.

    chunks: parts of the model that one GPU runs in turn (interleaved 1F1B); 1 is plain 1F1B
    """

    pipeline: int
    experts: int
    replicas: int
    chunks: int = 1
    sharding: Sharding = "zero1"
    recompute: Recompute = "selective"
    offload_activations: bool = False
    offload_optimizer: bool = False

    @property
    def gpus(self) -> int:
        return self.pipeline * self.experts * self.replicas

    @property
    def data(self) -> int:
        """Ranks with sequences of their own."""
        return self.experts * self.replicas

    def check(self, config: ModelConfig) -> None:
        """Raises InputError where the model cannot be cut so."""
        if self.pipeline * self.chunks > config.num_hidden_layers:
            raise InputError(
                f"{self.pipeline} stages of {self.chunks} parts are more than {config.num_hidden_layers} layers.",
                "Take fewer.",
            )
        experts = config.n_routed_experts if config.num_moe_layers else 1
        if experts % self.experts:
            raise InputError(
                f"{experts} experts cannot be spread evenly over {self.experts} ranks.", "Take a divisor for --ep."
            )


@dataclass(frozen=True)
class Stage:
    """Layers of one pipeline stage."""

    dense: int
    moe: int
    embedding: bool
    head: bool

    @property
    def layers(self) -> int:
        return self.dense + self.moe


@dataclass(frozen=True)
class Held:
    """Weights by kind: of every rank of a stage, and routed experts before they are spread."""

    muon: int  # of them, Muon's
    adamw: int
    routed: int


@lru_cache(maxsize=256)
def stages(config: ModelConfig, pipeline: int, sequence_tokens: int) -> tuple[Stage, ...]:
    """Contiguous layers, so that the longest stage is as short as can be, then the fullest as empty as can be."""
    context, dense = mean_context(sequence_tokens), config.num_hidden_layers - config.num_moe_layers
    times = tuple(layer_total(config, at >= dense, context) for at in range(config.num_hidden_layers))
    held = tuple(_weights(config, at >= dense) for at in range(config.num_hidden_layers))
    ends = (0.0, head_flops(config)), (_end(config, "embedding"), _end(config, "output head"))
    cuts = _cut(pipeline, times, held, *ends)
    return tuple(
        Stage(
            max(0, min(stop, dense) - start), stop - max(start, dense) if stop > dense else 0,
            start == 0, stop == len(times),
        )
        for start, stop in zip((0, *cuts), (*cuts, len(times)), strict=True)
    )  # fmt: skip


def _weights(config: ModelConfig, moe: bool) -> float:
    found = stage_weights(config, Stage(not moe, moe, embedding=False, head=False))
    return found.muon + found.adamw + found.routed


def _end(config: ModelConfig, component: str) -> float:
    return sum(row.count * row.rows * row.columns for row in matrices(config) if row.component == component)


@lru_cache(maxsize=64)
def _cut(
    pipeline: int,
    times: tuple[float, ...],
    held: tuple[float, ...],
    time_ends: tuple[float, float],
    held_ends: tuple[float, float],
) -> tuple[int, ...]:
    """Where stages begin, the first one's 0 left out."""
    shortest, _ = _least(pipeline, times, time_ends, None, 0.0)
    return _least(pipeline, held, held_ends, (times, time_ends), shortest * (1 + 1e-9))[1]


def _least(
    pipeline: int,
    costs: tuple[float, ...],
    ends: tuple[float, float],
    bound: tuple[tuple[float, ...], tuple[float, float]] | None,
    limit: float,
) -> tuple[float, tuple[int, ...]]:
    """The least largest sum over a stage, and its cuts; none of `bound`'s sums above `limit`."""
    layers = len(costs)
    summed = [_sums(costs, ends)] if bound is None else [_sums(costs, ends), _sums(*bound)]

    best: list[tuple[float, tuple[int, ...]]] = [(float("inf"), ())] * (layers + 1)
    best[0] = (0.0, ())
    for stage in range(1, pipeline + 1):
        now: list[tuple[float, tuple[int, ...]]] = [(float("inf"), ())] * (layers + 1)
        for stop in range(stage, layers + 1):
            for start in range(stage - 1, stop):
                of_stage = [sums[stop] - (sums[start] if start else 0.0) for sums in summed]
                if bound is not None and of_stage[1] > limit:
                    continue
                largest = max(best[start][0], of_stage[0])
                if largest < now[stop][0]:
                    now[stop] = largest, (*best[start][1], start)
        best = now
    largest, cuts = best[layers]
    return largest, cuts[1:]


def _sums(values: tuple[float, ...], ends: tuple[float, float]) -> list[float]:
    """Of the first n layers, with what lies before the first and, for all of them, behind the last."""
    sums = [*accumulate(values, initial=ends[0])]
    sums[-1] += ends[1]
    return sums


@lru_cache(maxsize=1024)
def stage_weights(config: ModelConfig, stage: Stage) -> Held:
    """What a stage holds."""
    moe, layers = config.num_moe_layers, config.num_hidden_layers
    share = {
        "embedding": (stage.embedding, 1), "output head": (stage.head, 1), "attention": (stage.layers, layers),
        "dense layers": (stage.dense, layers - moe), "router": (stage.moe, moe), "shared experts": (stage.moe, moe),
        "routed experts": (stage.moe, moe),
    }  # fmt: skip
    muon = adamw = routed = 0
    for row in matrices(config):
        if row.component == "norms":  # the last one, behind all layers, goes with the head
            mine = row.rows * (row.count // layers * stage.layers + (row.count % layers) * stage.head)
        elif row.count:
            here, of = share[row.component]
            mine = row.count * row.rows * row.columns * here // of if of else 0
        else:
            mine = 0
        if row.component == "routed experts":
            routed += mine
        elif row.component in ADAMW_COMPONENTS or row.columns == 1:
            adamw += mine
        else:
            muon += mine
    return Held(muon, adamw, routed)


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU, by item, and in the host's memory for it."""

    parameters: float
    gradients: float
    masters: float
    momentum: float
    activations: float
    working: float  # one layer computed again, gathered layers, logits
    host: float

    @property
    def states(self) -> float:
        return self.parameters + self.gradients + self.masters + self.momentum

    @property
    def total(self) -> float:
        return self.states + self.activations + self.working


def in_flight(layout: Layout, stage_index: int, micro_batches: int) -> int:
    """Chunks of micro-batches whose backward pass is awaited at most: 1F1B's warm-up and the running one."""
    p, v = layout.pipeline, layout.chunks
    if v == 1:
        return min(p - stage_index, micro_batches)
    return min(2 * (p - stage_index - 1) + (v - 1) * p + 1, v * micro_batches)


def memory(
    config: ModelConfig, layout: Layout, stage: Stage, index: int, micro_tokens: int, micro_batches: int
) -> Memory:
    """Of a GPU of this stage, number `index`."""
    held, fsdp = stage_weights(config, stage), layout.sharding == "fsdp"
    dense, experts = held.muon + held.adamw, held.routed / layout.experts
    whole = dense / layout.data + experts / layout.replicas if fsdp else dense + experts
    owned = dense / layout.data + experts / layout.replicas
    momentum = FP32_BYTES * (owned + held.adamw / layout.data)  # AdamW keeps two
    masters = FP32_BYTES * owned
    kept = [activation_bytes(config, moe, layout.recompute) * micro_tokens for moe in (False, True)]
    of_pass = stage.dense * kept[0] + stage.moe * kept[1]
    chunks = in_flight(layout, index, micro_batches)
    here = min(chunks, BUFFERED) if layout.offload_activations else chunks
    away = chunks - here
    optimizer = masters + momentum
    return Memory(
        parameters=BF16_BYTES * whole,
        gradients=FP32_BYTES * whole,
        masters=0.0 if layout.offload_optimizer else masters,
        momentum=0.0 if layout.offload_optimizer else momentum,
        activations=here * of_pass / layout.chunks,
        working=_working(config, layout, stage, micro_tokens),
        host=away * of_pass / layout.chunks + (optimizer if layout.offload_optimizer else 0.0),
    )


def _working(config: ModelConfig, layout: Layout, stage: Stage, micro_tokens: int) -> float:
    """What is there for a moment: of a layer, all that was not kept; gathered layers; a slice of the logits."""
    again = max(
        activation_bytes(config, moe, "none") - activation_bytes(config, moe, layout.recompute)
        for moe, count in ((False, stage.dense), (True, stage.moe))
        if count
    )
    logits = min(LOGIT_ROWS, micro_tokens) * config.vocab_size * (BF16_BYTES + FP32_BYTES) if stage.head else 0
    gathered = 0.0
    if layout.sharding == "fsdp":
        layer = stage_weights(config, Stage(not stage.moe, bool(stage.moe), embedding=False, head=False))
        # weights of two layers, and of one its gradients before they are summed over ranks
        gathered = (GATHERED * BF16_BYTES + FP32_BYTES) * (layer.muon + layer.adamw + layer.routed / layout.experts)
        gathered = max(gathered, BF16_BYTES * config.vocab_size * config.hidden_size)
    return max(0.0, again) * micro_tokens + logits + gathered
