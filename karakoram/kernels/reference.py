"""The truth: every operation in plain torch, with the signature of its fast twin. Slow, short, float32 inside.

Legend: T tokens, D hidden, I expert width, E experts, K experts per token, H heads, L latent, R rope, S slots of
the cache.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

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


def moe_int4(
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
