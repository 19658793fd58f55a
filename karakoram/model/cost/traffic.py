"""What one GPU sends in a step, by kind: how much over NVLink, over the network, and to its host.

Ranks lie on nodes with the experts' ranks of a group beside one another, then replicas, then stages. A collective over
n ranks, `local` of them on a node, sends in two levels: (local-1)/local of its bytes over NVLink, and of the rest
(nodes-1)/nodes over the network; together (n-1)/n, as in a ring. Routing is counted as uniform. A token crosses the
network once for each node that it needs and NVLink once for each card (as DeepEP does), in bf16, and comes back the
same way; backward does both again.
"""

from dataclasses import dataclass
from functools import lru_cache
from math import comb

from karakoram.config import ModelConfig
from karakoram.model.cost.gpus import GPUS_PER_NODE
from karakoram.model.cost.layout import Layout, Stage, stage_weights
from karakoram.model.cost.training import activation_bytes
from karakoram.model.cost.weights import BF16_BYTES, FP32_BYTES

KINDS = (
    "experts", "weights", "gradients", "new weights", "muon owners", "pipeline", "clip and balance", "activations",
    "optimizer states",
)  # fmt: skip


@dataclass(frozen=True)
class Sent:
    """Bytes that one GPU sends in a step. Over the host link: in the busier direction."""

    nvlink: float = 0.0
    network: float = 0.0
    host: float = 0.0

    def times(self, factor: float) -> "Sent":
        return Sent(self.nvlink * factor, self.network * factor, self.host * factor)

    def __add__(self, other: "Sent") -> "Sent":
        return Sent(self.nvlink + other.nvlink, self.network + other.network, self.host + other.host)


def collective(size_bytes: float, ranks: int, local: int) -> Sent:
    """Reduce-scatter, or all-gather, of a buffer of so many bytes; an all-reduce is two."""
    local = min(local, ranks)
    return Sent(size_bytes * (local - 1) / local, size_bytes / local * (1 - local / ranks))


@lru_cache(maxsize=256)
def copies_per_token(config: ModelConfig, ranks: int) -> tuple[float, float]:
    """Of a token that goes to its experts on `ranks` ranks: expected copies over NVLink and over the network."""
    E, K, local = config.n_routed_experts, config.num_experts_per_tok, min(ranks, GPUS_PER_NODE)
    nodes = ranks / local

    def needed(experts: float) -> float:
        """Chance that one of so many experts is among the token's."""
        return 1 - comb(round(E - experts), K) / comb(E, K)

    # in every node, the card with the sender's place passes it on to the others there that need it
    return nodes * (local - 1) * needed(E / ranks), (nodes - 1) * needed(E / nodes)


def exchange(config: ModelConfig, layout: Layout, stage: Stage, micro_tokens: int, micro_batches: int) -> Sent:
    """Tokens to their experts and back, forward and backward; full recomputation sends forward twice."""
    if layout.experts == 1 or not stage.moe:
        return Sent()
    nvlink, network = copies_per_token(config, layout.experts)
    passes = 6 if layout.recompute == "full" else 4
    row = config.hidden_size * BF16_BYTES
    return Sent(nvlink * row, network * row).times(passes * stage.moe * micro_tokens * micro_batches)


def step_traffic(
    config: ModelConfig, layout: Layout, stage: Stage, micro_tokens: int, micro_batches: int
) -> dict[str, Sent]:
    """Of a GPU of this stage in one step: each of `KINDS`."""
    held, fsdp = stage_weights(config, stage), layout.sharding == "fsdp"
    dense, experts = held.muon + held.adamw, held.routed / layout.experts
    local = min(GPUS_PER_NODE, layout.data), max(1, GPUS_PER_NODE // layout.experts)

    def summed(bytes_each: float) -> Sent:
        return collective(bytes_each * dense, layout.data, local[0]) + collective(
            bytes_each * experts, layout.replicas, local[1]
        )

    found = {name: Sent() for name in KINDS}
    found["experts"] = exchange(config, layout, stage, micro_tokens, micro_batches)
    if fsdp:  # gathered for the forward and for the backward pass of each micro-batch
        found["weights"] = summed(2 * BF16_BYTES * micro_batches)
        found["gradients"] = summed(FP32_BYTES * micro_batches)
        # a matrix's momentum in bf16 to the rank that owns it, its update back; experts are cut between matrices
        found["muon owners"] = collective(BF16_BYTES * held.muon, layout.data, local[0]).times(2 / layout.data)
    else:  # whole matrices are owned: gradients are summed where they are needed
        found["gradients"], found["new weights"] = summed(FP32_BYTES), summed(BF16_BYTES)
    found["pipeline"] = _pipeline(config, layout, stage, micro_tokens * micro_batches)
    found["clip and balance"] = _reductions(config, layout, stage, local[0])
    if layout.offload_activations:  # out, and in again: the link has two directions
        kept = [activation_bytes(config, moe, layout.recompute) for moe in (False, True)]
        found["activations"] = Sent(host=(stage.dense * kept[0] + stage.moe * kept[1]) * micro_tokens * micro_batches)
    if layout.offload_optimizer:  # masters and momentum, as above
        owned = dense / layout.data + experts / layout.replicas
        found["optimizer states"] = Sent(host=2 * FP32_BYTES * owned + FP32_BYTES * held.adamw / layout.data)
    return found


def _pipeline(config: ModelConfig, layout: Layout, stage: Stage, tokens: int) -> Sent:
    """A chunk's result to the next one, and its gradient to the one before."""
    sends = 2 * layout.chunks - stage.embedding - stage.head if layout.pipeline > 1 else 0
    size = sends * tokens * config.hidden_size * BF16_BYTES
    return Sent(nvlink=size) if layout.gpus <= GPUS_PER_NODE else Sent(network=size)


def _reductions(config: ModelConfig, layout: Layout, stage: Stage, local: int) -> Sent:
    """The largest logit of each head, and how many tokens each expert had: one all-reduce each."""
    numbers = stage.layers * config.num_attention_heads + stage.moe * config.n_routed_experts
    return collective(FP32_BYTES * numbers, layout.data, local).times(2)
