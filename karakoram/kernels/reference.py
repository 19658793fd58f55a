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


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """x / rms(x), rounded to x's dtype, times weight: [T, D] -> [T, D]."""
    x = x_TD.float()
    unit = (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)).to(x_TD.dtype)
    return weight_D * unit
