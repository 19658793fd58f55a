"""Causal attention for training on a CPU: a block of a document's queries at a time; its scores stay in the cache.

torch's fused CPU kernel spends eight times its forward on the backward (at 256 tokens of 64-wide heads: 13 ms and 100
ms for 256 heads on two cores); batched bfloat16 products with the fused softmax backward take a third of that. A block
of queries looks at the keys up to its own last one, so that most of what lies in the future is never computed (2,048
tokens: a third of the time). The probabilities are kept for the backward: about t²/2 · 2 bytes per head and document of
t tokens, which is right for training lengths up to a few thousand tokens. Documents packed into one row cost their own
squares, not the row's.

With AVX-512 BF16 and widths that are multiples of 16 one C++ call does all of this in 0.6 to 0.8 of the time (1.05 of
heads of 192 / 128) and keeps no probabilities (`kernels/causal.py`); `_CausalAttention` here is its twin.

Legend: B batch, H heads, T tokens, X key width, V value width, t tokens of one document, q queries of a block, s keys
up to its last.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from karakoram.kernels import causal as kernels

Span = tuple[int, int, int]  # row, first token, token behind the last: who attends to one another
# Queries of a block: fewer save more of the future, more make larger products. Forward + backward of 8 rows of 512
# tokens: 15.1 + 15.8 ms in one block, 7.8 + 10.7 in blocks of 256; of 2 rows of 2,048: 84 + 119 and 21 + 34.
BLOCK = 256


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
    largest_H  float32 [H], written: the largest logit of each head; from torch's products in bfloat16, 0 where all are
               negative (one more pass over scores that are in the cache)
    """
    if spans is None:
        spans = [(row, 0, q_BHTX.shape[2]) for row in range(q_BHTX.shape[0])]
    if kernels.takes(q_BHTX, k_BHTX, v_BHTV):
        return _Fused.apply(q_BHTX, k_BHTX, v_BHTV, scale, spans, largest_H)  # pyright: ignore[reportReturnType]
    return _CausalAttention.apply(q_BHTX, k_BHTX, v_BHTV, scale, spans, largest_H)  # pyright: ignore[reportReturnType]


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, spans: Sequence[Span], largest_H: Tensor | None
    ) -> Tensor:
        out, stats, of_heads_H = kernels.forward(q, k, v, scale, spans)
        if largest_H is not None:
            largest_H.copy_(of_heads_H)
        ctx.save_for_backward(q, k, v, out, stats)
        ctx.scale, ctx.spans = scale, spans
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, stats = ctx.saved_tensors
        return (*kernels.backward(q, k, v, ctx.scale, ctx.spans, out, stats, grads[0]), None, None, None)


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, spans: Sequence[Span], largest_H: Tensor | None
    ) -> Tensor:
        B, H, T, _ = q.shape
        blocks = [block for span in spans for block in _blocks(*span)]
        future = _future(max(stop - start for _, start, stop in spans), q)
        p = q.new_empty(H * sum(block.size for block in blocks))
        maxima: list[Tensor] = []
        # laid out [B, T, H, V], as the output projection reads it
        out_BHTV = v.new_empty(B, T, H, v.shape[-1]).transpose(1, 2)
        for (row, keys, queries, _), p_Hqs in zip(blocks, _views(p, blocks, H)):
            # one call that multiplies, scales and masks: 8 % less than three
            hidden_qs = future[: p_Hqs.shape[1], future.shape[1] - BLOCK - queries.start + keys.start :]
            k_HsX = k[row, :, keys].contiguous()  # oneDNN takes it transposed as it lies; a view it copies, transposing
            scores_Hqs = torch.baddbmm(hidden_qs[:, : p_Hqs.shape[2]], q[row, :, queries], k_HsX.mT, alpha=scale)
            if largest_H is not None:
                maxima.append(_largest(scores_Hqs))
            torch.softmax(scores_Hqs, -1, out=p_Hqs)
            out_BHTV[row, :, queries] = torch.bmm(p_Hqs, v[row, :, keys])
        if largest_H is not None:
            largest_H.copy_(torch.stack(maxima).amax(0).view(q.dtype))
        ctx.save_for_backward(q, k, v, p)
        ctx.scale, ctx.blocks = scale, blocks
        return out_BHTV

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, p = ctx.saved_tensors
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        sum_k = sum_v = None  # of the document's blocks so far, float32: the last block comes first and sees all keys
        for (row, keys, queries, only), p_Hqs in zip(reversed(ctx.blocks), reversed(_views(p, ctx.blocks, q.shape[1]))):
            grad_HqV = grads[0][row, :, queries].contiguous()
            # the scale goes into the smallest factor: [q, V] instead of the gradients of queries and keys
            grad_p_Hqs = torch.bmm(grad_HqV * ctx.scale, v[row, :, keys].contiguous().mT)
            grad_s_Hqs = torch._softmax_backward_data(grad_p_Hqs, p_Hqs, -1, p_Hqs.dtype)  # pyright: ignore[reportPrivateImportUsage]
            grad_q[row, :, queries] = torch.bmm(grad_s_Hqs, k[row, :, keys])
            part_k, part_v = torch.bmm(grad_s_Hqs.mT, q[row, :, queries]), torch.bmm(p_Hqs.mT, grad_HqV)
            if not only:
                if sum_k is None or sum_v is None:
                    sum_k, sum_v = part_k.float(), part_v.float()
                else:
                    count = keys.stop - keys.start
                    sum_k[:, :count] += part_k
                    sum_v[:, :count] += part_v
                if keys.start != queries.start:
                    continue
                part_k, part_v = sum_k, sum_v
                keys = slice(keys.start, keys.start + sum_k.shape[1])
                sum_k = sum_v = None
            grad_k[row, :, keys], grad_v[row, :, keys] = part_k, part_v
        return grad_q, grad_k, grad_v, None, None, None


class _Block(NamedTuple):
    """Queries of one document and the keys up to the last of them; `only`: they are the whole document."""

    row: int
    keys: slice
    queries: slice
    only: bool

    @property
    def size(self) -> int:
        return (self.keys.stop - self.keys.start) * (self.queries.stop - self.queries.start)


def _largest(scores_Hqs: Tensor) -> Tensor:
    """The largest score of each head [H], as bits that order alike: of bfloat16 the int16 of what is positive.

    torch compares bfloat16 numbers one by one: 172 µs for 8 × 256 × 512, 40 as integers (10 and 2 % of the attention).
    """
    if scores_Hqs.dtype != torch.bfloat16:
        return scores_Hqs.amax((1, 2))
    return scores_Hqs.view(torch.int16).flatten(1).amax(1).clamp_min_(0)


def _future(longest: int, like: Tensor) -> Tensor:
    """[BLOCK, longest + BLOCK]: zeros, then −∞ above the diagonal; a slice that ends at a block's last key masks it."""
    mask = like.new_zeros(BLOCK, longest + BLOCK)
    mask[:, longest:] = torch.full((BLOCK, BLOCK), float("-inf")).triu_(1)
    return mask


def _blocks(row: int, start: int, stop: int) -> list[_Block]:
    return [
        _Block(
            row, slice(start, min(stop, first + BLOCK)), slice(first, min(stop, first + BLOCK)), stop - start <= BLOCK
        )
        for first in range(start, stop, BLOCK)
    ]


def _views(p: Tensor, blocks: Sequence[_Block], heads: int) -> list[Tensor]:
    """Views [H, q, s] of one flat tensor, a block each."""
    pieces = p.split([heads * block.size for block in blocks])
    return [piece.view(heads, block.queries.stop - block.queries.start, -1) for piece, block in zip(pieces, blocks)]
