"""How long the kernels take on this machine for a model's shapes, with weights by chance that no cache holds.

Each measurement walks through more weights than the last cache holds (`ROTATED_BYTES`), as decoding does. Of many calls
the one counts that a quarter were faster than: what else runs only takes away, and a plan is for a machine that is
otherwise idle.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from karakoram import env
from karakoram.config import ModelConfig
from karakoram.evals.bench import memory
from karakoram.evals.plan.rates import Card
from karakoram.formats import int4_group
from karakoram.kernels import ops
from karakoram.kernels.packed import Kind, PackedExperts, PackedMatrix, empty_experts, packed_bytes, record_bytes

BUDGET_S = 0.4  # of one point
LEAST_CALLS, WARM_UP = 8, 2
ROTATED_BYTES = 400_000_000  # more than the last cache of nearly every processor
EXPERT_ROWS = (4, 16, 64)  # beside one: prompts of 512 tokens give an expert 10 (K2) to 48 (Moonlight)
TOGETHER = 8  # experts in one call of several rows
LINEAR_ROWS = (1, 16, 512)
MATMUL = (512, 4096, 4096)
CONTEXTS = (64, 2048)  # of a decoded token; their difference is what a token of context costs
QUERIES = 256  # of a prompt's piece, all seeing 64 or so many
DECODED, TIMED = 32, 64  # tokens of the bundled model: before, and while it is timed
EVICTED_BYTES = 32 << 20  # K2 puts 200 MB of experts between two layers, Moonlight 29 MB


@dataclass(frozen=True)
class Memory:
    """Bytes/s read by one thread and by all, and torch's bf16 products/s."""

    one_bytes_per_s: float
    all_bytes_per_s: float
    matmul_flops_per_s: float


def memory_rates(threads: int) -> Memory:
    """See `bench/memory.py`. Raises InputError where memory is too short."""
    buffer = memory.buffer_to_read()
    one, every = (memory.measure(count, buffer).gb_per_s * 1e9 for count in (1, threads))
    return Memory(one, every, memory.matmul(*MATMUL, threads, BUDGET_S).tflops * 1e12)


def quick_seconds(call: Callable[[int], object], budget_s: float | None = None) -> float:
    """Of `call(0)`, `call(1)`, …, the first two aside; at least `LEAST_CALLS`, for `BUDGET_S`."""
    budget_s = BUDGET_S if budget_s is None else budget_s
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < LEAST_CALLS + WARM_UP or time.perf_counter() - began < budget_s:
        before = time.perf_counter()
        call(len(times))
        times.append(time.perf_counter() - before)
    return quarter(times[WARM_UP:])


def quarter(times: list[float]) -> float:
    """What a quarter of them is below."""
    return sorted(times)[len(times) // 4]


# ------------------------------------------------------------------------------------------------ weights


def matrix_by_chance(kind: Kind, outputs: int, inputs: int, out: Tensor | None = None) -> PackedMatrix:
    """A packed matrix whose outputs are about as large as its inputs."""
    draw = torch.Generator().manual_seed(0)
    if kind == "int4":
        codes = torch.randint(-(2**31), 2**31, (outputs, inputs // 8), generator=draw).to(torch.int32)
        return ops.pack_int4(codes, torch.full((outputs, inputs // 32), inputs**-0.5 / 4.6).bfloat16(), out)
    weight = torch.randn(outputs, inputs, generator=draw) * inputs**-0.5
    if kind == "bf16":
        return ops.pack_bf16(weight.bfloat16(), out)
    scale = torch.ones(-(-outputs // 128), -(-inputs // 128))
    return ops.pack_fp8(weight.to(torch.float8_e4m3fn), scale, out)


def experts_by_chance(hidden: int, intermediate: int, kind: Kind, least: int) -> PackedExperts:
    """At least `least` equal experts, and as many as fill `ROTATED_BYTES`."""
    size = record_bytes(hidden, intermediate, kind)
    count = max(least, -(-ROTATED_BYTES // size))
    memory.require(count * size, "Experts to measure with", "Free some memory.")
    experts = empty_experts(count, hidden, intermediate, kind)
    for part in experts.parts(0):
        matrix_by_chance(kind, part.outputs, part.inputs, part.data)
    experts.records[1:] = experts.records[0]
    return experts


# ------------------------------------------------------------------------------------------------ times


def expert_seconds(c: ModelConfig, kind: Kind) -> list[tuple[float, float]]:
    """(rows that an expert gets, seconds for that expert). One row: a token with its K experts, as in decoding."""
    chosen = c.num_experts_per_tok
    experts = experts_by_chance(c.hidden_size, c.moe_intermediate_size, kind, max(2 * chosen, TOGETHER))
    total = experts.experts

    def seconds(ids_TK: Tensor, step: int) -> float:
        x_TD = torch.randn(len(ids_TK), c.hidden_size).bfloat16()
        weights_TK = torch.ones(ids_TK.shape) / ids_TK.shape[1]

        def call(number: int) -> object:
            return ops.moe(x_TD, (ids_TK + number * step) % total, weights_TK, experts)

        return quick_seconds(call)

    found = [(1.0, seconds(torch.arange(chosen)[None], chosen) / chosen)]
    for rows in EXPERT_ROWS:
        ids_TK = torch.arange(TOGETHER).repeat_interleave(rows)[:, None]
        found.append((float(rows), seconds(ids_TK, TOGETHER) / TOGETHER))
    return found


def token_of_experts(c: ModelConfig, kind: Kind) -> Callable[[], object]:
    """A layer's experts on one token, other ones every time."""
    chosen = c.num_experts_per_tok
    experts = experts_by_chance(c.hidden_size, c.moe_intermediate_size, kind, 2 * chosen)
    x_TD, weights_TK = torch.randn(1, c.hidden_size).bfloat16(), torch.ones(1, chosen) / chosen
    turn = 0

    def run() -> object:
        nonlocal turn
        turn += 1
        return ops.moe(x_TD, (torch.arange(chosen)[None] + turn * chosen) % experts.experts, weights_TK, experts)

    return run


def linear_seconds(width: int, kind: Kind) -> list[tuple[float, float]]:
    """(rows, seconds a weight) of matrices of `width` inputs and half as many outputs again, the family's mean."""
    outputs = 3 * width // 2 // 16 * 16
    size = packed_bytes(kind, outputs, width)
    count = max(2, -(-ROTATED_BYTES // size))
    memory.require(count * size, "Matrices to measure with", "Free some memory.")
    first = matrix_by_chance(kind, outputs, width)
    others = [PackedMatrix(first.data.clone(), kind, outputs, width) for _ in range(count - 1)]
    matrices = [first, *others]
    found = []
    for rows in LINEAR_ROWS:
        x = torch.randn(rows, width).bfloat16()
        seconds = quick_seconds(lambda number, x=x: ops.linear(x, matrices[number % count]))
        found.append((float(rows), seconds / (outputs * width)))
    return found


def attention_seconds(c: ModelConfig) -> tuple[float, float]:
    """Seconds a head and pair of tokens, in one layer: decoding absorbed, and of a prompt expanded."""
    heads, latent, rope = c.num_attention_heads, c.kv_lora_rank, c.qk_rope_head_dim
    short, long = CONTEXTS
    pool = torch.randn(8, long, latent + rope).bfloat16()
    q = torch.randn(1, heads, latent + rope).bfloat16()

    def decode(context: int) -> Callable[[int], object]:
        lengths = torch.tensor([context])
        return lambda number: ops.mla_decode(q, pool[number % 8, :context][None], lengths, latent, 0.1)

    kv_b = matrix_by_chance("bf16", heads * (c.qk_nope_head_dim + c.v_head_dim), latent)
    q_nope = torch.randn(QUERIES, heads, c.qk_nope_head_dim).bfloat16()
    q_rope = torch.randn(QUERIES, heads, rope).bfloat16()
    rows = pool[0, :QUERIES]

    def prefill(queries: int) -> Callable[[int], object]:
        lengths = torch.full((queries,), QUERIES)
        latents, keys = rows[:, :latent].contiguous(), rows[:, latent:].contiguous()
        return lambda _: ops.mla_prefill(q_nope[:queries], q_rope[:queries], latents, keys, kv_b, lengths, 0.1)

    decoding = (_seconds(decode(long)) - _seconds(decode(short))) / (heads * (long - short))
    few = QUERIES // 8
    prompt = (_seconds(prefill(QUERIES)) - _seconds(prefill(few))) / (heads * (QUERIES - few) * QUERIES)
    return max(decoding, 1e-15), max(prompt, 1e-15)  # noise may make a difference negative


def _seconds(call: Callable[[int], object]) -> float:
    return quick_seconds(call)


def layer_seconds() -> tuple[float, float] | None:
    """What a layer costs beside its weights: all layers in one call; and fed by a store, guesses of the next included.

    Of the bundled model, whose weights take next to nothing; None where it is not there. Before each layer is fed,
    weights go through the caches, as a large model's experts do: what Python and the store touch is cold then, which
    makes their part three times as long (0.14 and 0.45 ms here).
    """
    from karakoram.checkpoint import open_checkpoint
    from karakoram.checkpoint.experts import open_expert_source
    from karakoram.engine.expert_store.policy import policy_named
    from karakoram.engine.expert_store.store import ExpertStore
    from karakoram.model.load import load_model

    place = env.bundled_model_dir()
    if not (place / "config.json").is_file():
        return None
    whole = quarter(_decoded_s(load_model(place)))
    source = open_expert_source(open_checkpoint(place))
    layers = len(source.layers)
    store = ExpertStore(source, layers * source.experts * 3 // 4, policy_named("hybrid", layers, source.experts))
    try:
        model = load_model(place, routed_experts=False)
        store.attach(model)
        evicting, store.log = _Evicting(model), []
        tokens = _decoded_s(model, evicting)
        visits = store.log[-TIMED * layers :]
    finally:
        store.close()
    each = [sum(visit.feeding_s for visit in visits[at : at + layers]) for at in range(0, len(visits), layers)]
    beside = quarter([token - feeding for token, feeding in zip(tokens, each, strict=True)])
    feeding = quarter([visit.feeding_s for visit in visits if not visit.missed] or [0.0])
    total = model.config.num_hidden_layers
    return whole / total, max(beside + layers * feeding, whole) / total


class _Evicting:
    """Puts a product with `EVICTED_BYTES` of weights before each layer's feed, and counts its time apart."""

    def __init__(self, model: Any) -> None:
        width = int((EVICTED_BYTES / 2) ** 0.5) // 64 * 64
        self._weight = matrix_by_chance("bf16", width, width)
        self._x = torch.randn(1, width).bfloat16()
        self.spent_s = 0.0
        for layer in model.model.layers[model.config.first_k_dense_replace :]:
            layer.mlp.experts.feed = self._before(layer.mlp.experts.feed)

    def _before(self, feed: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(*arguments: Any) -> Tensor:
            began = time.perf_counter()
            ops.linear(self._x, self._weight)
            self.spent_s += time.perf_counter() - began
            return feed(*arguments)

        return run


@torch.inference_mode()
def _decoded_s(model: Any, evicting: _Evicting | None = None) -> list[float]:
    """Seconds of each of `TIMED` tokens, without what evicting took."""
    cache = model.new_cache(1, DECODED + TIMED)
    token = torch.tensor([[3]])
    times: list[float] = []
    for _ in range(DECODED + TIMED):  # at first, experts come into memory
        before, began = evicting.spent_s if evicting else 0.0, time.perf_counter()
        token = model(token, cache, logits_for="last").argmax(-1)
        times.append(time.perf_counter() - began - ((evicting.spent_s if evicting else 0.0) - before))
    return times[DECODED:]


def card_rates() -> Card:
    """Of the first CUDA device: int4 bytes that plain torch decodes and multiplies, and what comes from the host."""
    width = 4096
    codes = torch.randint(-(2**31), 2**31, (width, width // 8), device="cuda", dtype=torch.int64).int()
    scale = torch.full((width, width // 32), 0.01, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(1, width, device="cuda").bfloat16()
    host = torch.empty(256 << 20, dtype=torch.uint8, pin_memory=True)

    def timed(work: Callable[[], object]) -> float:
        def synchronous(_: int) -> None:
            work()
            torch.cuda.synchronize()

        return quick_seconds(synchronous)

    read = (codes.nbytes + scale.nbytes) / timed(lambda: F.linear(x, int4_group.dequantize(codes, scale)))
    transfer = host.numel() / timed(lambda: host.to("cuda", non_blocking=True))
    there_and_back = timed(lambda: host[: 2 * width].to("cuda").cpu())
    return Card(read, transfer, there_and_back)
