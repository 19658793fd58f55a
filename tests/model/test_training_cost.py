"""Each formula of training's cost against a count made the long way on a small shape."""

import subprocess
import sys
from itertools import combinations
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from karakoram.config import ModelConfig
from karakoram.errors import InputError
from karakoram.model import cost
from karakoram.model.cost import layout as spread
from karakoram.model.cost import traffic
from karakoram.model.cost import training as training
from karakoram.model.cost.gpus import GPUS
from karakoram.model.cost.layout import Layout, Stage, stages
from karakoram.model.cost.step import batch_of, owner_flops, step
from karakoram.model.transformer import Transformer

K2 = ModelConfig.preset("k2")
NANO = ModelConfig.preset("nano").to_dict()
TINY: dict[str, Any] = {
    **NANO, "hidden_size": 64, "num_hidden_layers": 3, "vocab_size": 96, "intermediate_size": 80,
    "moe_intermediate_size": 24, "n_routed_experts": 8, "num_experts_per_tok": 2, "num_attention_heads": 4,
    "q_lora_rank": 40, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12,
    "tie_word_embeddings": False,
}  # fmt: skip


def tiny(**changes: Any) -> ModelConfig:
    return ModelConfig.from_dict({**TINY, **changes})


@pytest.mark.parametrize("changes", [{}, {"q_lora_rank": None}, {"n_shared_experts": 2}, {"first_k_dense_replace": 3}])
def test_flops_are_those_that_torch_counts(changes: dict[str, Any]) -> None:
    """Forward and backward of the model itself; up to 256 tokens it multiplies the future too, so T instead of
    (T+1)/2."""
    config, tokens, rows = tiny(**changes), 48, 2
    torch.manual_seed(0)
    model = Transformer(config, device="cpu", dtype=torch.float32)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.05)
    counter = FlopCounterMode(display=False)
    with counter:
        model(torch.randint(config.vocab_size, (rows, tokens))).sum().backward()
    moe = config.num_moe_layers
    layers = [training.layer_total(config, at >= config.num_hidden_layers - moe, tokens) for at in range(3)]
    assert counter.get_total_flops() == 3 * rows * tokens * (sum(layers) + training.head_flops(config))


def test_flops_of_the_whole_are_those_of_prefill() -> None:
    forward = sum(training.forward_flops(K2, 4095).values())
    assert forward == cost.flops_per_token(K2, 2048, absorbed=False)
    assert training.training_flops(K2, 4095) == 3 * forward


def test_recomputed_flops_are_those_of_the_products_named() -> None:
    config, context = tiny(), 8.5
    assert training.recomputed_flops(config, True, context, "none") == 0
    assert training.recomputed_flops(config, True, context, "full") == training.layer_total(config, True, context)
    up = 4 * (16 + 8) * 40 + 4 * (16 + 12) * 32  # q_b_proj and kv_b_proj
    assert training.recomputed_flops(config, False, context, "selective") == 2 * up
    assert training.recomputed_flops(config, True, context, "selective") == 2 * (up + 2 * 24 * 64)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (32, 32)])
def test_newton_schulz_flops_are_those_that_torch_counts(shape: tuple[int, int]) -> None:
    x = torch.randn(shape)
    x = x if shape[0] <= shape[1] else x.mT
    with FlopCounterMode(display=False) as counter:
        for _ in range(5):
            gram = x @ x.mT
            x = x + (gram + gram @ gram) @ x
    assert counter.get_total_flops() == training.newton_schulz_flops(*shape)


def test_newton_schulz_is_what_was_published() -> None:
    """Against forward and backward of the same matrix: 0.56 % for an expert of K2, 0.05 % for its output projection."""
    expert = training.newton_schulz_flops(2048, 7168) / (6 * 2048 * 7168 * 2**26 * 8 / 384)
    output = training.newton_schulz_flops(7168, 8192) / (6 * 7168 * 8192 * 2**26)
    assert (round(100 * expert, 2), round(100 * output, 2)) == (0.56, 0.05)


def test_muon_has_every_matrix_but_embedding_and_head() -> None:
    config = tiny()
    model = Transformer(config, device=torch.device("meta"), dtype=torch.bfloat16)
    flops = 0
    for name, weight in model.named_parameters():
        if weight.ndim >= 2 and "embed_tokens" not in name and "lm_head" not in name:
            *stack, rows, columns = weight.shape
            flops += (stack[0] if stack else 1) * training.newton_schulz_flops(rows, columns)
    assert training.muon_flops(config) == flops


class _FusedNorm(torch.autograd.Function):
    """Keeps its input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


class _FusedSwiglu(torch.autograd.Function):
    """Keeps its two inputs."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate) * up

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        return grads[0], grads[0]


def _attention(c: ModelConfig, x: Tensor, weight: Any) -> Tensor:
    norm, H = _FusedNorm.apply, c.num_attention_heads
    assert c.q_lora_rank is not None
    normed: Any = norm(x)
    query: Any = norm(F.linear(normed, weight(c.q_lora_rank, c.hidden_size)))
    width = c.qk_nope_head_dim + c.qk_rope_head_dim
    q = F.linear(query, weight(H * width, c.q_lora_rank)).unflatten(-1, (H, -1)).transpose(0, 1)
    latent = F.linear(normed, weight(c.kv_lora_rank, c.hidden_size))
    shared = F.linear(normed, weight(c.qk_rope_head_dim, c.hidden_size))
    image: Any = norm(latent)
    image = F.linear(image, weight(H * (c.qk_nope_head_dim + c.v_head_dim), c.kv_lora_rank)).unflatten(-1, (H, -1))
    nope, value = image.split((c.qk_nope_head_dim, c.v_head_dim), -1)
    k = torch.cat((nope, shared[:, None].expand(-1, H, -1)), -1).transpose(0, 1)
    value = value.contiguous().transpose(0, 1)
    out: Any = _Attention.apply(q, k, value)
    return x + F.linear(out.transpose(0, 1).flatten(1), weight(c.hidden_size, H * c.v_head_dim))


class _Attention(torch.autograd.Function):
    """Keeps what flash attention keeps: queries, keys, values, result, and a float32 a row and head."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = ((q @ k.mT).softmax(-1) @ v).transpose(0, 1).contiguous().transpose(0, 1)
        ctx.save_for_backward(q, k, v, out, torch.zeros(q.shape[:2], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return ctx.saved_tensors[:3]


def _feed_forward(c: ModelConfig, x: Tensor, inner: int, weight: Any) -> Tensor:
    gate, up = F.linear(x, weight(inner, c.hidden_size)), F.linear(x, weight(inner, c.hidden_size))
    mixed: Any = _FusedSwiglu.apply(gate, up)
    return F.linear(mixed, weight(c.hidden_size, inner))


class _Combine(torch.autograd.Function):
    """Keeps the experts' results and their weights; the router's scores and choice are kept beside them."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, scores: Tensor, chosen: Tensor, ids: Tensor) -> Tensor:
        ctx.save_for_backward(rows, scores, chosen, ids)
        return (rows.unflatten(0, chosen.shape) * chosen[..., None]).sum(1).to(rows.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.saved_tensors[0], None, None, None


@pytest.mark.parametrize("moe", [False, True])
def test_activations_are_what_autograd_keeps(moe: bool) -> None:
    """A layer of fused parts in bf16: every tensor that is kept, once, weights aside."""
    c, tokens = tiny(), 20
    weights: set[int] = set()

    def weight(rows: int, columns: int) -> Tensor:
        found = torch.zeros(rows, columns, dtype=torch.bfloat16, requires_grad=True)
        weights.add(found.untyped_storage().data_ptr())
        return found

    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    x = torch.zeros(tokens, c.hidden_size, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        middle = _attention(c, x, weight)
        normed: Any = _FusedNorm.apply(middle)
        if moe:
            K = c.num_experts_per_tok
            scores = torch.zeros(tokens, c.n_routed_experts)
            rows: Any = normed.repeat_interleave(K, 0)
            results = _feed_forward(c, rows, c.moe_intermediate_size, weight)
            chosen, ids = torch.zeros(tokens, K), torch.zeros(tokens, K, dtype=torch.int32)
            mixed: Any = _Combine.apply(results, scores, chosen, ids)
            shared = _feed_forward(c, normed, c.n_shared_experts * c.moe_intermediate_size, weight)
            out = middle + mixed + shared
        else:
            out = middle + _feed_forward(c, normed, c.intermediate_size, weight)
    assert out.shape == x.shape
    counted = sum(t.untyped_storage().nbytes() for at, t in kept.items() if at not in weights)
    assert counted == tokens * training.activation_bytes(c, moe, "none")


def test_recomputation_keeps_less() -> None:
    none, selective, full = (training.activation_bytes(K2, True, kind) for kind in training.RECOMPUTE)
    assert full == 2 * 7168 < selective < none / 3
    eight_bits = 1 + 4 / 128  # what enters the experts and SwiGLU
    in_fp8 = eight_bits * (8 * 7168 + 2 * 8 * 2048 + 2 * 2048)
    rest = 2 * (2 * 7168 + 1536 + 512 + 64 + 64 * 128) + 4 * (64 + 384 + 2 * 8)
    assert selective == in_fp8 + rest


def test_stages_hold_the_model_once() -> None:
    """Of any number of stages; and no cut is better than the one taken, by trying all."""
    config = tiny(num_hidden_layers=6)
    total = cost.parameters(config).total
    for pipeline in range(1, 7):
        cut = stages(config, pipeline, 64)
        assert len(cut) == pipeline and min(one.layers for one in cut) > 0
        held = [spread.stage_weights(config, one) for one in cut]
        assert sum(one.muon + one.adamw + one.routed for one in held) == total
    times = [training.layer_total(config, at >= 1, 32.5) for at in range(6)]
    times[-1] += training.head_flops(config)
    longest = min(
        max(sum(times[a:b]) for a, b in zip((0, *cuts), (*cuts, 6), strict=True))
        for cuts in combinations(range(1, 6), 2)
    )
    first = 0
    found = 0.0
    for one in stages(config, 3, 64):
        found, first = max(found, sum(times[first : first + one.layers])), first + one.layers
    assert found == pytest.approx(longest, rel=1e-12)  # sums in another order


def test_k2_is_cut_as_its_size_says() -> None:
    assert [one.layers for one in stages(K2, 16, 4096)] == [4] * 15 + [1]  # the head costs as much as two layers


def test_states_are_spread_as_counted_tensor_by_tensor() -> None:
    """Two stages, four ranks of experts, two replicas: what each kind of sharding leaves on a GPU."""
    config = tiny(num_hidden_layers=4)
    first, last = stages(config, 2, 64)
    model = Transformer(config, device=torch.device("meta"), dtype=torch.bfloat16)
    biases = "e_score_correction_bias"
    for index, stage in enumerate((first, last)):
        mine = range(first.layers) if index == 0 else range(first.layers, 4)
        whole = owned = two = 0.0
        for name, tensor in model.state_dict().items():
            at = int(name.split(".")[2]) if ".layers." in name else (0 if "embed" in name else 3)
            if at not in mine:
                continue
            here = tensor.numel() / (4 if ".experts." in name else 1)
            whole += here
            owned += here / (2 if ".experts." in name else 8)
            adamw = tensor.ndim == 1 or "embed" in name or "lm_head" in name or biases in name
            two += here / 8 if adamw else 0
        for sharding in ("zero1", "fsdp"):
            found = spread.memory(config, Layout(2, 4, 2, 1, sharding), stage, index, 64, 8)
            held = whole if sharding == "zero1" else owned
            assert (found.parameters, found.gradients) == pytest.approx((2 * held, 4 * held))
            assert (found.masters, found.momentum) == pytest.approx((4 * owned, 4 * owned + 4 * two))


def _most_in_flight(order: list[int]) -> int:
    """Of a sequence of +1 (forward) and -1 (backward)."""
    most = now = 0
    for change in order:
        now += change
        most = max(most, now)
    return most


@pytest.mark.parametrize(("pipeline", "chunks"), [(4, 1), (4, 2), (8, 4), (1, 1)])
def test_chunks_in_flight_are_those_of_the_schedule(pipeline: int, chunks: int) -> None:
    """1F1B played through: warm-up forwards, then one forward and one backward in turn."""
    micro = 3 * pipeline
    for rank in range(pipeline):
        warm_up = pipeline - rank - 1 if chunks == 1 else 2 * (pipeline - rank - 1) + (chunks - 1) * pipeline
        total = micro * chunks
        order = [1] * warm_up + [1, -1] * (total - warm_up) + [-1] * warm_up
        assert _most_in_flight(order) == spread.in_flight(Layout(pipeline, 1, 1, chunks), rank, micro)


def test_activations_in_the_host_leave_the_card() -> None:
    stage = stages(K2, 16, 4096)[0]
    here = spread.memory(K2, Layout(16, 16, 1, 2), stage, 0, 4096, 64)
    away = spread.memory(K2, Layout(16, 16, 1, 2, offload_activations=True), stage, 0, 4096, 64)
    assert here.activations == pytest.approx(away.activations + away.host)
    optimizer = spread.memory(K2, Layout(16, 16, 1, 2, offload_optimizer=True), stage, 0, 4096, 64)
    assert optimizer.host == here.masters + here.momentum and optimizer.masters == optimizer.momentum == 0


@pytest.mark.parametrize(("ranks", "local"), [(2, 2), (8, 4), (8, 8), (4, 1)])
def test_a_collective_sends_what_a_ring_does(ranks: int, local: int) -> None:
    """Reduce-scatter in two levels, counted send by send: within a node, then between nodes for one's own part."""
    size, nodes = 1 << 12, ranks // local
    nvlink = sum(size // local for _ in range(local - 1))
    network = sum(size // local // nodes for _ in range(nodes - 1))
    sent = traffic.collective(size, ranks, local)
    assert (sent.nvlink, sent.network) == (nvlink, network)
    assert nvlink + network == size * (ranks - 1) // ranks


def test_copies_of_a_token_are_the_mean_over_all_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    """8 experts on 4 cards in nodes of 2; a token on card 0 with each of the 28 pairs of experts."""
    monkeypatch.setattr(traffic, "GPUS_PER_NODE", 2)
    traffic.copies_per_token.cache_clear()
    nvlink = network = 0
    choices = list(combinations(range(8), 2))
    for chosen in choices:
        cards = {expert // 2 for expert in chosen}
        network += bool(cards & {2, 3})  # once to the card with the sender's place on the other node
        nvlink += (1 in cards) + (3 in cards)  # within the node; passed on there
    found = traffic.copies_per_token(tiny(), 4)
    traffic.copies_per_token.cache_clear()
    assert found == pytest.approx((nvlink / len(choices), network / len(choices)))


def test_traffic_of_a_step() -> None:
    """By kind, for a stage in the middle of K2's own layout with two replicas."""
    layout, stage = Layout(16, 16, 2, 2, "zero1", "selective", True, True), stages(K2, 16, 4096)[5]
    found = traffic.step_traffic(K2, layout, stage, 4096, 100)
    nvlink, network = traffic.copies_per_token(K2, 16)
    tokens, row = 4096 * 100, 2 * 7168
    assert found["experts"] == traffic.Sent(4 * 4 * tokens * row * nvlink, 4 * 4 * tokens * row * network)
    assert found["pipeline"] == traffic.Sent(network=4 * tokens * row)  # two parts, there and back
    held = spread.stage_weights(K2, stage)
    experts, dense = held.routed / 16, held.muon + held.adamw
    # 32 ranks on 4 nodes share what is dense; an expert's two replicas lie on two nodes
    network = 4 * (dense / 8 * 3 / 4 + experts / 2)
    assert found["gradients"].network == pytest.approx(network)
    assert found["new weights"].network == pytest.approx(network / 2)
    assert found["weights"] == found["muon owners"] == traffic.Sent()
    assert found["activations"].host == 4 * tokens * training.activation_bytes(K2, True, "selective")
    assert found["clip and balance"].network + found["clip and balance"].nvlink < 1e-5 * network
    gathered = traffic.step_traffic(K2, Layout(1, 16, 2, 1, "fsdp"), stage, 4096, 100)
    assert gathered["weights"].network == pytest.approx(100 * network)  # twice two bytes, each time
    assert gathered["gradients"].network == pytest.approx(100 * network)


def test_owners_hold_whole_matrices() -> None:
    """Two ranks of four experts, three replicas: the rank with most has two of each kind."""
    config = tiny()
    stage = Stage(0, 1, embedding=False, head=False)
    shapes = [(40, 64), (96, 40), (40, 64), (112, 32), (64, 48), (8, 64)]  # of a layer: each on one of six ranks
    shared = [(24, 64)] * 3
    flops = sum(training.newton_schulz_flops(*shape) for shape in shapes)
    # gate and up are alike: two on one rank at most of six → one; experts: 8 gates and ups, 4 downs over three replicas
    flops += training.newton_schulz_flops(*shared[0]) * 2 + training.newton_schulz_flops(24, 64) * (3 + 2)
    assert owner_flops(config, stage, 2, 3) == flops


def test_a_step_adds_up_and_reaches_less_than_its_layers_do() -> None:
    layout = Layout(16, 16, 8, 2, offload_activations=True)
    now = step(K2, layout, GPUS["h800"], batch_of(2**26, 4096, layout), efficiency=0.5)
    assert now.batch.tokens == 2**26 and now.batch.per_rank == 128
    mfu = now.mfu(layout, GPUS["h800"])
    # 16 stages wait 15/256 of the time; recomputation is 8.5 % more FLOPs
    assert 0.35 < mfu < 0.5 / 1.085 / (1 + 15 / 256)
    assert now.bubble_s == pytest.approx((now.compute_s + now.waited_s) * 15 / 256)
    # twice the efficiency: half the computing, the same links
    faster = step(K2, layout, GPUS["h800"], now.batch, efficiency=1.0)
    assert faster.compute_s == pytest.approx(now.compute_s / 2)
    assert faster.exposed_s == now.exposed_s


def test_layouts_that_cannot_be_are_refused() -> None:
    with pytest.raises(InputError, match="more than 61 layers"):
        Layout(32, 1, 1, 2).check(K2)
    with pytest.raises(InputError, match="384 experts cannot be spread"):
        Layout(1, 256, 1).check(K2)


def test_training_cost_needs_no_torch() -> None:
    code = "import karakoram.model.cost.step, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
