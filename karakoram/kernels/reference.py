"""The truth: every operation in plain torch, with the signature of its fast twin. Slow, short, float32 inside.

Legend: T tokens, D hidden, I expert width, E experts, K experts per token, H heads, L latent, R rope, S slots of
the cache; of Muon n matrices, A rows, B columns.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from karakoram.kernels.layer import DecoderLayer, Mixture, Stack
from karakoram.kernels.packed import PackedExperts, PackedMatrix


def linear(x_TK: Tensor, weight: PackedMatrix, out_dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """x · weightᵀ: [T, K] -> [T, N]."""
    return (x_TK.float() @ weight.dense().float().T).to(out_dtype)


def linear_by_head(x_THK: Tensor, weight: PackedMatrix, outputs: int, first: int = 0) -> Tensor:
    """x[t, h] · rowsᵀ, rows first … first + outputs of head h's share of the matrix: [T, H, K] -> [T, H, outputs]."""
    rows_HNK = weight.dense().float().unflatten(0, (x_THK.shape[1], -1))[:, first : first + outputs]
    return torch.einsum("thk,hnk->thn", x_THK.float(), rows_HNK).to(x_THK.dtype)


def mlp(x_TD: Tensor, gate: PackedMatrix, up: PackedMatrix, down: PackedMatrix) -> Tensor:
    """down(silu(gate(x)) · up(x)): bf16 [T, D] -> bf16 [T, D]."""
    return _mlp_float(x_TD, gate, up, down).to(x_TD.dtype)


def _mlp_float(x_TD: Tensor, gate: PackedMatrix, up: PackedMatrix, down: PackedMatrix) -> Tensor:
    x = x_TD.float()
    h = F.silu(x @ gate.dense().float().T) * (x @ up.dense().float().T)
    return h @ down.dense().float().T


def moe(
    x_TD: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    experts: PackedExperts,
    shared: tuple[PackedMatrix, PackedMatrix, PackedMatrix] | None = None,
) -> Tensor:
    """Σ_k weights · expert(x) (+ shared(x)), partials summed in the order of k in float32: bf16 [T, D]."""
    partial_TKD = torch.zeros(*ids_TK.shape, x_TD.shape[1])
    for expert in ids_TK.unique().tolist():
        rows, slots = (ids_TK == expert).nonzero(as_tuple=True)
        partial_TKD[rows, slots] = _mlp_float(x_TD[rows], *experts.parts(expert))
    out_TD = torch.zeros(x_TD.shape)
    for slot in range(ids_TK.shape[1]):
        out_TD += weights_TK[:, slot, None].float() * partial_TKD[:, slot]
    if shared is not None:
        out_TD += _mlp_float(x_TD, *shared)
    return out_TD.to(x_TD.dtype)


def moe_int4(
    x_TD: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    experts: PackedExperts,
    shared: tuple[PackedMatrix, PackedMatrix, PackedMatrix] | None = None,
) -> Tensor:
    """`moe` with int4 experts."""
    return moe(x_TD, ids_TK, weights_TK, experts, shared)


def mla_decode(
    q_BHx: Tensor, cache: Tensor, lengths_B: Tensor, latent: int, scale: float, blocks: Tensor | None = None
) -> Tensor:
    """softmax(q · cacheᵀ · scale) · cache[:, :L] over each sequence's own length: bf16 [B, H, L + R] -> [B, H, L].

    cache bf16 [B, S, L + R]; or [blocks, size, L + R] with `blocks` int32 [B, …], the blocks of each sequence in order.
    """
    out = []
    for b, length in enumerate(lengths_B.tolist()):
        rows_Sx = cache[b] if blocks is None else cache[blocks[b].long()].flatten(0, 1)
        rows_Sx = rows_Sx[:length].float()
        p_HS = (q_BHx[b].float() @ rows_Sx.T * scale).softmax(-1)
        out.append(p_HS @ rows_Sx[:, :latent])
    return torch.stack(out).to(q_BHx.dtype)


def mla_prefill(
    q_nope_THN: Tensor,
    q_rope_THR: Tensor,
    latent_SL: Tensor,
    k_rope_SR: Tensor,
    kv_b: PackedMatrix,
    lengths_T: Tensor,
    scale: float,
) -> Tensor:
    """Keys and values multiplied out, rounded, then softmax(q · keysᵀ · scale) · values: [T, H, V].

    kv_b [H·(N + V), L] makes of a latent each head's N numbers of a key, which the rope key follows, and V of a value.
    Query t sees the first lengths[t] tokens.
    """
    heads, nope = q_nope_THN.shape[1:]
    kv_SHx = linear(latent_SL, kv_b, latent_SL.dtype).unflatten(-1, (heads, -1)).float()
    scores_HTS = torch.einsum("thn,shn->hts", q_nope_THN.float(), kv_SHx[..., :nope])
    scores_HTS = scores_HTS + torch.einsum("thr,sr->hts", q_rope_THR.float(), k_rope_SR.float())
    hidden_TS = torch.arange(len(latent_SL)) >= lengths_T[:, None]
    p_HTS = (scores_HTS * scale).masked_fill(hidden_TS, float("-inf")).softmax(-1)
    return torch.einsum("hts,shv->thv", p_HTS, kv_SHx[..., nope:]).to(q_nope_THN.dtype)


def latent_append(
    kv_nx: Tensor,
    norm_L: Tensor,
    eps: float,
    q_rope_nHR: Tensor,
    cos_nP: Tensor,
    sin_nP: Tensor,
    positions_n: Tensor,
    cache_BSx: Tensor,
    queries_nHx: Tensor,
) -> None:
    """New tokens, n/B for each row of the cache: normed latent and rotated rope key into the cache, queries' rope part
    into queries[:, :, L:]. Pairs (x[2i], x[2i+1]) are turned by angle i."""
    latent = len(norm_L)

    def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2).to(x.dtype)

    rows_n = torch.arange(len(kv_nx)) // (len(kv_nx) // len(cache_BSx))
    cache_BSx[rows_n, positions_n, :latent] = rms_norm(kv_nx[:, :latent], norm_L, eps)
    cache_BSx[rows_n, positions_n, latent:] = turned(kv_nx[:, latent:], cos_nP, sin_nP)
    queries_nHx[..., latent:] = turned(q_rope_nHR, cos_nP[:, None], sin_nP[:, None])


def route(
    logits_TE: Tensor, bias_E: Tensor, count: int, groups: int, best_groups: int, normalise: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """The `count` best of sigmoid(logits) + bias within the best groups (by their two best): ids int64 [T, K], and
    their plain scores, normalised and scaled: float32 [T, K]."""
    scores_TE = logits_TE.sigmoid()
    biased_TGe = (scores_TE + bias_E).unflatten(-1, (groups, -1))
    if groups > 1:
        rank_TG = biased_TGe.topk(2, -1).values.sum(-1)
        best_TG = torch.zeros_like(rank_TG, dtype=torch.bool).scatter_(-1, rank_TG.topk(best_groups, -1).indices, True)
        biased_TGe = biased_TGe.masked_fill(~best_TG[..., None], float("-inf"))
    ids_TK = biased_TGe.flatten(-2).topk(count, -1).indices
    weights_TK = scores_TE.gather(-1, ids_TK)
    if normalise:
        weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + 1e-20)
    return ids_TK, weights_TK * scale


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """x / rms(x), rounded to x's dtype, times weight: [T, D] -> [T, D]."""
    x = x_TD.float()
    unit = (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)).to(x_TD.dtype)
    return weight_D * unit


def newton_schulz(
    stack_nAB: Tensor, norms_n: Tensor, steps: Sequence[tuple[float, float, float]], out: Tensor | None = None
) -> Tensor:
    """X = stack / norms, lying; X ← aX + (bG + cG²)X, G = XXᵀ, each step. Roundings are torch.optim.Muon's."""
    stands = stack_nAB.shape[-2] > stack_nAB.shape[-1]
    before = stack_nAB / norms_n[:, None, None].to(stack_nAB.dtype)
    before = before.mT.contiguous() if stands else before.contiguous()
    after = torch.empty_like(before)
    gram_nAA = before.new_empty(*before.shape[:-1], before.shape[-2])
    mix_nAA = torch.empty_like(gram_nAA)
    for a, b, c in steps:
        torch.bmm(before, before.mT, out=gram_nAA)
        torch.baddbmm(gram_nAA, gram_nAA, gram_nAA, beta=b, alpha=c, out=mix_nAA)
        torch.baddbmm(before, mix_nAA, before, beta=a, out=after)
        before, after = after, before
    made = before.mT if stands else before
    return made if out is None else out.copy_(made)


def momentum(gradient: Tensor, buffer: Tensor, momentum: float, scale: float, nesterov: bool) -> Tensor:
    """buffer ← lerp(buffer, G, 1 − μ) in place, G the scaled gradient -> lerp(G, buffer, μ) or the buffer, in bf16."""
    gradient = gradient.float() * scale
    buffer.lerp_(gradient, 1 - momentum)
    return (gradient.lerp(buffer, momentum) if nesterov else buffer).bfloat16()


def update(weight: Tensor, step: Tensor, keep: float, by: float) -> Tensor:
    """W ← keep·W + by·step, in place -> Σ step², float32."""
    weight.mul_(keep).add_(step, alpha=by)
    return torch.linalg.vector_norm(step, dtype=torch.float32).square()


def decode_layers(
    stack: Stack,
    x_nD: Tensor,
    cos_nP: Tensor,
    sin_nP: Tensor,
    lengths_n: Tensor,
    cache: Tensor,
    blocks_nM: Tensor | None = None,
) -> Tensor:
    """Tokens through layers: [n, D] -> [n, D], each a query of its own over its sequence's rows of the cache.

    cos, sin float32 [n, R/2]; lengths int64 [n], how many rows each token sees: the last of them is its own and is
    written; cache bf16 [layers, blocks, size, L + R]; blocks int32 [n, M]: those of each token's sequence in order;
    None: the cache is [layers, B, S, L + R], and n/B tokens in turn belong to each of its rows.
    """
    for layer, rows in zip(stack.layers, cache, strict=True):
        x_nD, normed_nD = _attend(layer, x_nD, cos_nP, sin_nP, lengths_n, rows, blocks_nM)
        x_nD = x_nD + _feed(layer, normed_nD)
    return x_nD


def decode_attention(
    stack: Stack,
    x_nD: Tensor,
    cos_nP: Tensor,
    sin_nP: Tensor,
    lengths_n: Tensor,
    cache: Tensor,
    blocks_nM: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The first half of one layer, as `decode_layers` has it: x + attention, and what router and experts read."""
    return _attend(stack.layers[0], x_nD, cos_nP, sin_nP, lengths_n, cache[0], blocks_nM)


def _attend(
    layer: DecoderLayer,
    x_nD: Tensor,
    cos_nP: Tensor,
    sin_nP: Tensor,
    lengths_n: Tensor,
    rows: Tensor,
    blocks_nM: Tensor | None,
) -> tuple[Tensor, Tensor]:
    a, size = layer.attention, rows.shape[1]
    if blocks_nM is None:
        blocks_nM = torch.arange(len(rows), dtype=torch.int32).repeat_interleave(len(x_nD) // len(rows))[:, None]
    latent, nope = len(a.kv_a_norm), a.keys.inputs
    normed_nD = rms_norm(x_nD, layer.input_norm, layer.eps)
    q_in = normed_nD
    if a.q_a is not None and a.q_a_norm is not None:
        q_in = rms_norm(linear(normed_nD, a.q_a), a.q_a_norm, a.eps)
    q_nHx = linear(q_in, a.q).unflatten(-1, (a.heads, -1))
    queries = torch.empty(*q_nHx.shape[:2], a.kv_a.outputs, dtype=x_nD.dtype)
    at_n = lengths_n - 1
    slots_n = blocks_nM.gather(1, (at_n // size)[:, None])[:, 0].long() * size + at_n % size
    latent_append(
        linear(normed_nD, a.kv_a), a.kv_a_norm, a.eps, q_nHx[..., nope:], cos_nP, sin_nP, slots_n,
        rows.flatten(0, 1)[None], queries,
    )  # fmt: skip
    queries[..., :latent] = linear_by_head(q_nHx[..., :nope], a.keys, latent)
    mixed = mla_decode(queries, rows, lengths_n, latent, a.scale, blocks_nM)
    values = linear_by_head(mixed, a.kv_b, a.kv_b.outputs // a.heads - nope, nope)
    x_nD = x_nD + linear(values.flatten(1), a.o)
    return x_nD, rms_norm(x_nD, layer.post_norm, layer.eps)


def _feed(layer: DecoderLayer, normed_nD: Tensor) -> Tensor:
    m = layer.feed
    assert m is not None
    if not isinstance(m, Mixture):
        return mlp(normed_nD, *m)
    logits = linear(normed_nD, m.router, torch.float32)
    ids, weights = route(logits, m.bias, m.chosen, m.groups, m.best_groups, m.normalise, m.scale)
    return moe(normed_nD, ids, weights, m.experts, m.shared)
