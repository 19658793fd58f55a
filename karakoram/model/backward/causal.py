"""Causal attention for training on a CPU: the scores of one document at a time, so that they stay in the cache.

torch's fused CPU kernel spends eight times its forward on the backward (at 256 tokens of 64-wide heads: 13 ms and 100
ms for 256 heads on two cores); batched bfloat16 products with the fused softmax backward take a third of that. The
probabilities are kept for the backward: t² · 2 bytes per head and document of t tokens, which is right for training
lengths up to a few thousand tokens. Documents packed into one row cost their own squares, not the row's.

Legend: B batch, H heads, T tokens, X key width, V value width, t tokens of one document.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Span = tuple[int, int, int]  # row, first token, token behind the last: who attends to one another


def causal_attention(
    q_BHTX: Tensor,
    k_BHTX: Tensor,
    v_BHTV: Tensor,
    scale: float,
    spans: Sequence[Span] | None = None,
    largest_H: Tensor | None = None,
) -> Tensor:
    """softmax(q·kᵀ·scale, causal) · v -> [B, H, T, V], differentiable; softmax in float32, rounded to v's dtype.

    spans      documents within the rows, which together cover them; None: each row is one
    largest_H  float32 [H], written: the largest logit of each head (one more pass over scores that are in the cache)
    """
    if spans is None:
        spans = [(row, 0, q_BHTX.shape[2]) for row in range(q_BHTX.shape[0])]
    return _CausalAttention.apply(q_BHTX, k_BHTX, v_BHTV, scale, spans, largest_H)  # pyright: ignore[reportReturnType]


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, spans: Sequence[Span], largest_H: Tensor | None
    ) -> Tensor:
        B, H, T, _ = q.shape
        longest = max(stop - start for _, start, stop in spans)
        future_TT = torch.full((longest, longest), float("-inf"), dtype=q.dtype, device=q.device).triu_(1)
        p = q.new_empty(H * sum((stop - start) ** 2 for _, start, stop in spans))
        maxima: list[Tensor] = []
        # laid out [B, T, H, V], as the output projection reads it
        out_BHTV = v.new_empty(B, T, H, v.shape[-1]).transpose(1, 2)
        for (b, start, stop), p_Htt in zip(spans, _pieces(p, spans, H)):
            piece, t = slice(start, stop), stop - start
            scores_Htt = torch.baddbmm(future_TT[:t, :t], q[b, :, piece], k[b, :, piece].mT, alpha=scale)
            if largest_H is not None:
                maxima.append(scores_Htt.amax((1, 2)))
            torch.softmax(scores_Htt, -1, out=p_Htt)
            out_BHTV[b, :, piece] = p_Htt @ v[b, :, piece]
        if largest_H is not None:
            largest_H.copy_(torch.stack(maxima).amax(0))
        ctx.save_for_backward(q, k, v, p)
        ctx.scale, ctx.spans = scale, spans
        return out_BHTV

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, p = ctx.saved_tensors
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        for (b, start, stop), p_Htt in zip(ctx.spans, _pieces(p, ctx.spans, q.shape[1])):
            piece = slice(start, stop)
            grad_HtV = grads[0][b, :, piece]
            grad_v[b, :, piece] = p_Htt.mT @ grad_HtV
            grad_p_Htt = grad_HtV @ v[b, :, piece].mT
            grad_s_Htt = torch._softmax_backward_data(grad_p_Htt, p_Htt, -1, p_Htt.dtype)  # pyright: ignore[reportPrivateImportUsage]
            grad_q[b, :, piece] = (grad_s_Htt @ k[b, :, piece]).mul_(ctx.scale)
            grad_k[b, :, piece] = (grad_s_Htt.mT @ q[b, :, piece]).mul_(ctx.scale)
        return grad_q, grad_k, grad_v, None, None, None


def _pieces(p: Tensor, spans: Sequence[Span], heads: int) -> list[Tensor]:
    """Views [H, t, t] of one flat block, a document each."""
    sizes = [stop - start for _, start, stop in spans]
    return [flat.view(heads, size, size) for flat, size in zip(p.split([heads * size * size for size in sizes]), sizes)]
