"""The hand-written backward passes against autograd of the plain formulas: causal attention and grouped experts."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from karakoram.config import ModelConfig
from karakoram.model.attention import scaled_attention
from karakoram.model.backward.causal import BLOCK, causal_attention
from karakoram.model.backward.grouped import (
    ROUND_TO,
    Assignment,
    assign,
    by_length,
    combine,
    gather,
    grouped_linear,
    spread,
)
from karakoram.model.backward.products import linear, products
from karakoram.model.documents import Documents
from karakoram.model.moe import LocalExperts
from karakoram.model.transformer import Transformer
from karakoram.train.initialize import initialize
from tests.model.reference import SHAPE, Case, distance, token_ids

TOLERANCE = 1e-5  # float32 products of at most a few hundred terms, summed in another order: a few 1e-7 each


def leaves(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]


def plain_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    future = torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool).triu(1)
    return ((q @ k.mT) * scale).masked_fill(future, float("-inf")).softmax(-1) @ v


@pytest.mark.parametrize(
    ("batch", "heads", "tokens", "width", "value_width"),
    [(2, 3, 65, 24, 16), (1, 1, 1, 8, 8), (3, 2, 40, 16, 32), (1, 2, 2 * BLOCK + 77, 12, 8)],
)
def test_causal_attention(batch: int, heads: int, tokens: int, width: int, value_width: int) -> None:
    shapes = ((batch, heads, tokens, width),) * 2 + ((batch, heads, tokens, value_width),)
    q, k, v = leaves(*shapes)
    ours, plain = causal_attention(q, k, v, 0.3), plain_attention(q, k, v, 0.3)
    assert distance(ours, plain) <= TOLERANCE
    upstream = torch.randn_like(plain)
    got = torch.autograd.grad(ours, (q, k, v), upstream)
    expected = torch.autograd.grad(plain, (q, k, v), upstream)
    for a, b in zip(got, expected):
        # one token: its probability is 1 whatever the score, and both sides must find that gradient to be zero
        assert distance(a, b) <= TOLERANCE if b.abs().max() > 1e-12 else a.abs().max() <= 1e-6


def test_causal_attention_by_finite_differences() -> None:
    q, k, v = leaves((2, 2, 5, 4), (2, 2, 5, 4), (2, 2, 5, 3), dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *x: causal_attention(*x, 0.4), (q, k, v))


def test_documents_in_a_row_are_rows_of_their_own() -> None:
    """Values, gradients and largest logits, with documents shorter and longer than a block of queries."""
    lengths = (5, BLOCK, 1, BLOCK + 30)
    q, k, v = leaves(*((1, 2, sum(lengths), 8),) * 3)
    ends = torch.tensor(lengths).cumsum(0).tolist()
    spans = [(0, end - length, end) for length, end in zip(lengths, ends)]
    largest_H = torch.empty(2)
    ours = causal_attention(q, k, v, 0.4, spans, largest_H)
    apart = torch.cat([plain_attention(*(x[:, :, a:b] for x in (q, k, v)), 0.4) for _, a, b in spans], 2)
    assert distance(ours, apart) <= TOLERANCE
    upstream = torch.randn_like(apart)
    for got, expected in zip(*(torch.autograd.grad(o, (q, k, v), upstream) for o in (ours, apart)), strict=True):
        assert distance(got, expected) <= TOLERANCE
    logits = [(q[0, :, a:b] @ k[0, :, a:b].mT * 0.4).tril() for _, a, b in spans]
    seen = [x.masked_fill(torch.ones_like(x[0], dtype=torch.bool).triu(1), -torch.inf).amax((1, 2)) for x in logits]
    # the same products in another order: a few units in the last place of float32
    assert torch.allclose(largest_H, torch.stack(seen).amax(0), rtol=1e-6)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_largest_logits_in_bfloat16(sign: float) -> None:
    """The largest of the very scores, over documents and blocks; 0 for a head that has negative ones only."""
    q, k, v = (x.detach().bfloat16().requires_grad_() for x in leaves(*((1, 2, BLOCK + 40, 8),) * 3))
    if sign < 0:
        q, k = (x.detach().abs().requires_grad_() for x in (q, k))
    largest_H = torch.empty(2)
    causal_attention(q, k, v, 0.4 * sign, None, largest_H)
    scores = torch.baddbmm(torch.zeros((), dtype=torch.bfloat16), q[0], k[0].mT, beta=0, alpha=0.4 * sign).detach()
    seen_H = scores.masked_fill(torch.ones_like(scores[0], dtype=torch.bool).triu(1), -torch.inf).amax((1, 2)).float()
    assert torch.equal(largest_H, seen_H.clamp_min(0))
    assert (seen_H < 0).all() if sign < 0 else (seen_H > 0).all()


def test_a_packed_row_gives_what_its_documents_give_alone() -> None:
    """Through the whole model: positions begin again, nobody sees another document; by spans and by mask."""
    model = initialize(
        Transformer(
            ModelConfig.from_dict({"model_type": "deepseek_v3", **SHAPE, **Case().changes}), dtype=torch.float32
        ),
        seed=3,
    )
    ids_BT = token_ids()[:, :30]
    index_BT = torch.tensor([[0] * 7 + [1] * 13 + [5] * 10])
    documents = Documents(index_BT)
    assert documents.spans == [(0, 0, 7), (0, 7, 20), (0, 20, 30)]
    with torch.no_grad():  # by mask
        masked = model.hidden(ids_BT, documents=documents)
        alone = torch.cat([model.hidden(ids_BT[:, a:b]) for _, a, b in documents.spans], 1)
    spans = model.hidden(ids_BT, documents=documents)  # with a gradient, by spans
    assert spans.requires_grad
    assert distance(masked, alone) <= TOLERANCE
    assert distance(spans.detach(), alone) <= TOLERANCE


def test_causal_attention_takes_views_and_is_the_training_path() -> None:
    """Heads come as a transposed view, keys and values as slices of one projection."""
    q = torch.randn(2, 7, 3, 8).transpose(1, 2).requires_grad_()
    kv = torch.randn(2, 7, 3, 20).transpose(1, 2)
    k, v = kv.split((8, 12), -1)
    ours = scaled_attention(q, k, v, None, 0.2)
    assert ours.grad_fn is not None and "CausalAttention" in type(ours.grad_fn).__name__
    assert distance(ours, plain_attention(q, k, v, 0.2)) <= TOLERANCE
    with torch.no_grad():
        assert distance(scaled_attention(q, k, v, None, 0.2), ours) <= TOLERANCE


def test_causal_attention_in_bfloat16() -> None:
    """Probabilities are rounded to 8 bits, sums are not: near float32 to 2 parts in 256."""
    q, k, v = (x.detach() for x in leaves((2, 4, 64, 32), (2, 4, 64, 32), (2, 4, 64, 16)))
    q, k, v = (x.bfloat16().requires_grad_() for x in (q, k, v))
    wide = [x.detach().float().requires_grad_() for x in (q, k, v)]
    ours, plain = causal_attention(q, k, v, 0.18), plain_attention(*wide, 0.18)
    assert ours.dtype == torch.bfloat16 and distance(ours, plain) <= 2 / 256
    upstream = torch.randn_like(plain).bfloat16()
    got = torch.autograd.grad(ours, (q, k, v), upstream)
    expected = torch.autograd.grad(plain, wide, upstream.float())
    assert all((a.float() - b).norm() <= 0.02 * b.norm() for a, b in zip(got, expected))


def choices(tokens: int, experts: int, per_token: int, skipped: tuple[int, ...] = ()) -> Tensor:
    """Different experts for each token, never one of `skipped`: [N, K]."""
    scores = torch.rand(tokens, experts)
    scores[:, list(skipped)] = -1
    return scores.topk(per_token).indices


@pytest.mark.parametrize(("tokens", "skipped"), [(1, ()), (19, (0, 3)), (400, ()), (400, (0, 5))])
def test_rows_find_their_expert_and_their_way_back(tokens: int, skipped: tuple[int, ...]) -> None:
    ids_NK = choices(tokens, 6, 3, skipped)
    to = assign(ids_NK, 6)
    assert sum(to.rows_per_expert) == len(to.order_M) and len(to.rows_per_expert) == 6
    runs = torch.tensor(by_length(to.rows_per_expert))
    expert_of_row = torch.repeat_interleave(runs, torch.tensor(to.rows_per_expert)[runs])
    real = torch.ones(len(to.order_M), dtype=torch.bool).index_fill(0, to.idle, False)
    assert int(real.sum()) == ids_NK.numel()
    assert torch.equal(expert_of_row[real], ids_NK.flatten()[to.order_M[real]])
    assert torch.equal(to.order_M[to.place_S], torch.arange(ids_NK.numel()))  # there and back
    assert all(to.rows_per_expert[expert] == 0 for expert in skipped)
    padded = tokens * 3 >= ROUND_TO * 6
    assert (len(to.idle) > 0) is padded
    assert not padded or all(count % ROUND_TO == 0 for count in to.rows_per_expert)


@pytest.mark.parametrize("tokens", [19, 400])
def test_spreading_and_gathering_backward(tokens: int) -> None:
    """Against autograd's own index; rows that only fill up must not reach the gradient."""
    (x,) = leaves((tokens, 8))
    ids_NK = choices(tokens, 6, 3, (2,))
    to = assign(ids_NK, 6)
    weight_M = torch.randn(len(to.order_M), 1)
    ours, plain = (
        gather(spread(x, to) * weight_M, to),
        (x[to.order_M // 3] * weight_M)[to.place_S].unflatten(0, (-1, 3)),
    )
    assert torch.equal(ours, plain)
    upstream = torch.randn_like(plain)
    (got,), (expected,) = torch.autograd.grad(ours, x, upstream), torch.autograd.grad(plain, x, upstream)
    assert distance(got, expected) <= TOLERANCE


@pytest.mark.parametrize("tokens", [19, 400])
def test_combining_is_gathering_and_a_weighted_sum(tokens: int) -> None:
    """The same sum, and both gradients; rows that only fill up get none."""
    ids_NK = choices(tokens, 6, 3, (2,))
    to = assign(ids_NK, 6)
    rows, weights = leaves((len(to.order_M), 8), (tokens, 3))
    ours, plain = combine(rows, weights, to), (gather(rows, to) * weights[..., None]).sum(1)
    assert torch.equal(ours, plain)
    upstream = torch.randn_like(plain)
    got = torch.autograd.grad(ours, (rows, weights), upstream)
    for a, b in zip(got, torch.autograd.grad(plain, (rows, weights), upstream)):
        assert distance(a, b) <= TOLERANCE
    assert not got[0][to.idle].any()


def test_grouped_linear_by_finite_differences() -> None:
    x, weight = leaves((7, 3), (4, 2, 3), dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x, w: grouped_linear(x, w, [2, 0, 5, 0]), (x, weight))


ROWS_OF_EXPERTS = [3 * ROUND_TO, ROUND_TO, 0, ROUND_TO, ROUND_TO, 3 * ROUND_TO, ROUND_TO, ROUND_TO, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [ROWS_OF_EXPERTS, [5, 0, 7, 5, 5, 1, 0, 2, 5], [0] * 9])
def test_experts_that_share_a_call_get_what_they_get_alone(rows: list[int], dtype: torch.dtype) -> None:
    """Values and both gradients, expert by expert; in bfloat16 bit for bit: the products are the same ones."""
    (x, weight), runs = leaves((sum(rows), 32), (len(rows), 24, 32)), by_length(rows)
    x, weight = (each.detach().to(dtype).requires_grad_() for each in (x, weight))
    ours, pieces = grouped_linear(x, weight, rows), x.split([rows[expert] for expert in runs])
    alone = torch.cat([piece @ weight[expert].T for expert, piece in zip(runs, pieces)])
    upstream = torch.randn_like(alone)
    got, expected = (torch.autograd.grad(y, (x, weight), upstream) for y in (ours, alone))
    for a, b in zip((ours, *got), (alone, *expected)):
        # float32: at most 3 · 128 terms, in the order of another library
        assert a.shape == b.shape and torch.allclose(a, b, rtol=0 if dtype == torch.bfloat16 else 1e-5, atol=1e-4)
        assert dtype == torch.float32 or torch.equal(a, b)
    assert all(not got[1][expert].any() for expert, count in enumerate(rows) if not count)


def test_frozen_experts_get_no_gradient() -> None:
    x, weight = leaves((sum(ROWS_OF_EXPERTS), 32), (len(ROWS_OF_EXPERTS), 24, 32))
    both = torch.autograd.grad(grouped_linear(x, weight, ROWS_OF_EXPERTS).sum(), (x, weight))
    of_x = torch.autograd.grad(grouped_linear(x, weight.detach(), ROWS_OF_EXPERTS).sum(), x)
    of_w = torch.autograd.grad(grouped_linear(x.detach(), weight, ROWS_OF_EXPERTS).sum(), weight)
    assert torch.equal(of_x[0], both[0]) and torch.equal(of_w[0], both[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_number_of_threads_changes_no_bit(dtype: torch.dtype) -> None:
    """Of experts, and of attention in bfloat16; MKL splits attention's float32 products by threads."""
    x, weight = leaves((sum(ROWS_OF_EXPERTS), 64), (len(ROWS_OF_EXPERTS), 48, 64))
    q, k, v = leaves((2, 3, BLOCK + 40, 24), (2, 3, BLOCK + 40, 24), (2, 3, BLOCK + 40, 16))
    x, weight, q, k, v = (each.detach().to(dtype).requires_grad_() for each in (x, weight, q, k, v))
    before, seen = torch.get_num_threads(), list[list[Tensor]]()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            rows = grouped_linear(x, weight, ROWS_OF_EXPERTS)
            seen.append([rows, *torch.autograd.grad(rows, (x, weight), torch.ones_like(rows))])
            if dtype == torch.bfloat16:
                attended = causal_attention(q, k, v, 0.2)
                seen[-1] += [attended, *torch.autograd.grad(attended, (q, k, v), torch.ones_like(attended))]
    finally:
        torch.set_num_threads(before)
    for again in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(again, seen[0], strict=True))


@pytest.mark.parametrize("comes_again", [True, False])
def test_products_in_float32(comes_again: bool) -> None:
    """Plain and transposed factors against float64, whichever library multiplies: sums of 300 terms of float32."""
    a, b = torch.randn(3, 64, 300), torch.randn(3, 40, 300)
    for left, right in ((a, b.mT), (a.mT.contiguous().mT, b.mT.contiguous())):
        out = torch.empty(3, 64, 40)
        products(left, right, out, comes_again)
        assert distance(out, left.double() @ right.double()) <= TOLERANCE


def test_linear_is_torchs_own() -> None:
    """Value and both gradients of rows [B, T]; a frozen weight gets none."""
    x, weight = leaves((3, 50, 48), (40, 48))
    ours, plain = linear(x, weight), F.linear(x, weight)
    upstream = torch.randn_like(plain)
    got, expected = (torch.autograd.grad(y, (x, weight), upstream) for y in (ours, plain))
    assert all(distance(a, b) <= TOLERANCE for a, b in zip((ours, *got), (plain, *expected)))
    frozen = weight.detach()
    assert distance(torch.autograd.grad(linear(x, frozen), x, upstream)[0], expected[0]) <= TOLERANCE
    with torch.no_grad():
        assert torch.equal(linear(x, weight), plain)


def by_the_formula(experts: LocalExperts, x_ND: Tensor, ids_NK: Tensor, weights_NK: Tensor) -> Tensor:
    """A loop over experts, autograd's own backward."""
    out_ND = torch.zeros_like(x_ND)
    for e in range(experts.gate_proj.shape[0]):
        token, slot = (ids_NK == e).nonzero(as_tuple=True)
        inner = F.silu(x_ND[token] @ experts.gate_proj[e].T) * (x_ND[token] @ experts.up_proj[e].T)
        out_ND = out_ND.index_add(0, token, inner @ experts.down_proj[e].T * weights_NK[token, slot, None])
    return out_ND


@pytest.mark.parametrize(("tokens", "skipped"), [(1, ()), (60, (0, 7)), (700, ()), (700, (3, 15))])
def test_experts_are_a_loop_over_experts(tokens: int, skipped: tuple[int, ...]) -> None:
    """700 tokens of 4 experts out of 16 pass 128 rows an expert: their runs are filled up; 60 tokens' are not."""
    config = ModelConfig.from_dict({"model_type": "deepseek_v3", **SHAPE, **Case().changes})
    experts = LocalExperts(config, "cpu", torch.float32)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.normal_(0, 0.08)
    x_ND, weights_NK = leaves((tokens, 64), (tokens, 4))
    ids_NK = choices(tokens, 16, 4, skipped)
    filled: Assignment = assign(ids_NK, 16)
    assert (len(filled.idle) > 0) is (tokens == 700)
    ours, plain = experts(x_ND, ids_NK, weights_NK), by_the_formula(experts, x_ND, ids_NK, weights_NK)
    assert distance(ours, plain) <= TOLERANCE
    upstream, inputs = torch.randn_like(plain), (x_ND, weights_NK, *experts.parameters())
    got, expected = torch.autograd.grad(ours, inputs, upstream), torch.autograd.grad(plain, inputs, upstream)
    assert all(distance(a, b) <= TOLERANCE for a, b in zip(got, expected))
    assert all(not gradient[e].any() for gradient in got[2:] for e in skipped)
