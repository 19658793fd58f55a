"""How long a training step takes: computing, waiting in the pipeline, what cannot be hidden, and the optimizer.

What is assumed:

- The longest stage sets the pace; of the peak its layers reach `efficiency` (`gpus.py`), links `LINK_SHARE`.
- With a pipeline, sending tokens to experts, between stages and to the host runs beside other micro-batches'
  computing: the longest of computing and each link counts, not their sum. Without one there is no other micro-batch:
  the experts' traffic is waited for. FSDP's gathering and summing runs beside computing either way.
- zero1 sums gradients and sends new weights once a step, with nothing beside it; so do optimizer states that lie in
  the host's memory.
- Masters, momentum and gradients pass through the card's memory once; Newton-Schulz runs at the layers' efficiency,
  matrices spread over their ranks as evenly as whole ones can be.
- The loader, checkpoints, stragglers, failures and experts that are more loaded than others cost nothing.
"""

from dataclasses import dataclass
from functools import lru_cache
from math import ceil

from karakoram.config import ModelConfig
from karakoram.model.cost.gpus import EFFICIENCY, LINK_SHARE, Gpu
from karakoram.model.cost.layout import Layout, Memory, Stage, memory, stage_weights, stages
from karakoram.model.cost.traffic import Sent, step_traffic
from karakoram.model.cost.training import (
    head_flops,
    layer_total,
    mean_context,
    muon_matrices,
    newton_schulz_flops,
    recomputed_flops,
    training_flops,
)

OPTIMIZER_BYTES = 22  # to a weight: gradient 4, momentum and master in and out 16, weight out 2


@dataclass(frozen=True)
class Batch:
    """One step's tokens: sequences of equal length, `per_rank` of them on each data-parallel rank, one at a time."""

    sequence_tokens: int
    per_rank: int
    ranks: int

    @property
    def tokens(self) -> int:
        return self.sequence_tokens * self.per_rank * self.ranks


def batch_of(batch_tokens: float, sequence_tokens: int, layout: Layout) -> Batch:
    """As near to so many tokens as whole sequences on every rank come, but at least one."""
    return Batch(sequence_tokens, max(1, round(batch_tokens / sequence_tokens / layout.data)), layout.data)


@dataclass(frozen=True)
class Step:
    """One step, in seconds; bytes are those of the fullest GPU, traffic that of the busiest stage."""

    batch: Batch
    compute_s: float
    waited_s: float  # for links, beyond what computing hides
    bubble_s: float
    exposed_s: float  # gradients and new weights
    optimizer_s: float
    memory: Memory
    mean_states_bytes: float  # on a GPU, over all stages
    traffic: dict[str, Sent]
    flops_per_token: float
    computed_flops_per_token: float

    @property
    def total_s(self) -> float:
        return self.compute_s + self.waited_s + self.bubble_s + self.exposed_s + self.optimizer_s

    @property
    def tokens_per_s(self) -> float:
        return self.batch.tokens / self.total_s

    def mfu(self, layout: Layout, gpu: Gpu) -> float:
        """Model FLOPs, nothing computed again, of what the cards could do."""
        return self.tokens_per_s * self.flops_per_token / layout.gpus / gpu.flops_per_s


def link_seconds(sent: Sent, gpu: Gpu) -> tuple[float, float, float]:
    """NVLink, network, host."""
    rates = gpu.nvlink_bytes_per_s, gpu.network_bytes_per_s, gpu.host_bytes_per_s
    return tuple(
        size / rate / LINK_SHARE for size, rate in zip((sent.nvlink, sent.network, sent.host), rates, strict=True)
    )  # type: ignore[return-value]


def step(config: ModelConfig, layout: Layout, gpu: Gpu, batch: Batch, efficiency: float = EFFICIENCY) -> Step:
    """A step of this model, so spread, on such cards. Raises InputError for a layout that cannot be."""
    layout.check(config)
    cut = stages(config, layout.pipeline, batch.sequence_tokens)
    first_of = {one: at for at, one in reversed([*enumerate(cut)])}  # of equal stages, the first waits for most
    computed = {one: stage_flops(config, one, layout, batch.sequence_tokens) for one in first_of}
    busiest = max(first_of, key=lambda one: computed[one])
    per_rank = batch.sequence_tokens * batch.per_rank
    compute_s = computed[busiest] * per_rank / gpu.flops_per_s / efficiency
    sizes = (batch.sequence_tokens, batch.per_rank)
    traffic = step_traffic(config, layout, busiest, *sizes)
    held = {one: memory(config, layout, one, at, *sizes) for one, at in first_of.items()}
    waited_s, exposed_s = _links(traffic, compute_s, layout, gpu)
    running_s = compute_s + waited_s
    return Step(
        batch=batch,
        compute_s=compute_s,
        waited_s=waited_s,
        bubble_s=running_s * (layout.pipeline - 1) / (layout.chunks * batch.per_rank),
        exposed_s=exposed_s,
        optimizer_s=max(_optimizer_s(config, one, layout, gpu, efficiency) for one in first_of),
        memory=max(held.values(), key=lambda one: one.total),
        mean_states_bytes=sum(held[one].states for one in cut) / len(cut),
        traffic=traffic,
        flops_per_token=training_flops(config, batch.sequence_tokens),
        computed_flops_per_token=sum(computed[one] for one in cut),
    )


def stage_flops(config: ModelConfig, stage: Stage, layout: Layout, sequence_tokens: int) -> float:
    """Of one token in one stage, forward, backward, and what is computed again."""
    context, total = mean_context(sequence_tokens), 3 * head_flops(config) * stage.head
    for moe, count in ((False, stage.dense), (True, stage.moe)):
        if count:
            total += count * (
                3 * layer_total(config, moe, context) + recomputed_flops(config, moe, context, layout.recompute)
            )
    return total


def _links(traffic: dict[str, Sent], compute_s: float, layout: Layout, gpu: Gpu) -> tuple[float, float]:
    """Seconds that computing does not hide, and those beside which nothing computes."""
    hidden = ["pipeline", "activations"]
    if layout.pipeline > 1:
        hidden.append("experts")
    if layout.sharding == "fsdp":
        hidden += ["weights", "gradients"]
    beside = sum((traffic[name] for name in hidden), Sent())
    after = sum((sent for name, sent in traffic.items() if name not in (*hidden, "experts")), Sent())
    waited_s = max(0.0, max(link_seconds(beside, gpu)) - compute_s)
    if layout.pipeline == 1:
        waited_s += max(link_seconds(traffic["experts"], gpu))
    return waited_s, max(link_seconds(after, gpu))


def _optimizer_s(config: ModelConfig, stage: Stage, layout: Layout, gpu: Gpu, efficiency: float) -> float:
    """Newton-Schulz of the GPU that owns most, and its masters' way through memory."""
    held = stage_weights(config, stage)
    owned = (held.muon + held.adamw) / layout.data + held.routed / layout.experts / layout.replicas
    flops = owner_flops(config, stage, layout.experts, layout.replicas)
    return flops / gpu.flops_per_s / efficiency + OPTIMIZER_BYTES * owned / gpu.memory_bytes_per_s


@lru_cache(maxsize=1024)
def owner_flops(config: ModelConfig, stage: Stage, experts: int, replicas: int) -> int:
    """Newton-Schulz on the GPU of a stage that owns most: of each kind of matrix, whole ones, as evenly as they go."""
    flops = 0
    moe, layers = config.num_moe_layers, config.num_hidden_layers
    of_layers = {"attention": (stage.layers, layers), "dense layers": (stage.dense, layers - moe)}
    for row in muon_matrices(config):
        here, of = of_layers.get(row.component, (stage.moe, moe))
        count = row.count * here // of if of else 0
        ranks = experts * replicas
        if row.component == "routed experts":
            count, ranks = count // experts, replicas
        flops += newton_schulz_flops(row.rows, row.columns) * ceil(count / ranks)
    return flops
