"""The menu, continued: causal attention for training, forward and backward, chosen as in `ops`.

In C++ with AVX-512 BF16; elsewhere, AMX included, callers have torch's products (`model/backward/causal.py`, its twin).
Scores stay in float32 and nobody keeps probabilities: the backward pass makes them anew (`docs/kernels.md`).

Legend: B batch, H heads, T tokens, X key width, V value width.
"""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from karakoram.kernels.cpu.library import Library, alone, describe
from karakoram.kernels.ops import chosen

WIDTHS = 16  # key and value widths are multiples of it


def library() -> Library | None:
    """The library where its instruction set has causal attention, else None."""
    found = chosen(None)
    return found if found is not None and found.c.k2_causal_here() else None


def takes(q_BHTX: Tensor, k_BHTX: Tensor, v_BHTV: Tensor) -> bool:
    """Whether `forward` can have these."""
    return (
        all(x.is_cpu and x.dtype == torch.bfloat16 and x.stride(-1) == 1 for x in (q_BHTX, k_BHTX, v_BHTV))
        and all(width >= WIDTHS and width % WIDTHS == 0 for width in (q_BHTX.shape[-1], v_BHTV.shape[-1]))
        and q_BHTX.shape == k_BHTX.shape
        and library() is not None
    )


def forward(
    q_BHTX: Tensor, k_BHTX: Tensor, v_BHTV: Tensor, scale: float, spans: Sequence[tuple[int, int, int]]
) -> tuple[Tensor, Tensor, Tensor]:
    """softmax(q·kᵀ·scale, causal) · v within each span (row, first token, token behind the last); bfloat16.

    Returns what it gives [B, H, T, V], laid out [B, T, H, V]; of each token the largest logit m and 1/Σ exp(logit − m),
    float32 [B, H, T, 2]; the largest logit of each head, float32 [H]. Tokens in no span are not written.
    """
    (B, H, T, _), V = q_BHTX.shape, v_BHTV.shape[-1]
    out_BHTV = v_BHTV.new_empty(B, T, H, V).transpose(1, 2)
    stats_BHT2 = torch.empty(B, H, T, 2)
    largest_H, spans_n3 = torch.zeros(H), _rows(spans)
    _library().call(
        "k2_causal_forward", describe(q_BHTX), describe(k_BHTX), describe(v_BHTV), describe(spans_n3),
        ctypes.c_float(scale), alone(), describe(stats_BHT2), describe(largest_H), describe(out_BHTV),
    )  # fmt: skip
    return out_BHTV, stats_BHT2, largest_H


def backward(
    q_BHTX: Tensor,
    k_BHTX: Tensor,
    v_BHTV: Tensor,
    scale: float,
    spans: Sequence[tuple[int, int, int]],
    out_BHTV: Tensor,
    stats_BHT2: Tensor,
    grad_BHTV: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v, laid out as these are; `out` and `stats` are what `forward` returned."""
    grads = torch.empty_like(q_BHTX), torch.empty_like(k_BHTX), torch.empty_like(v_BHTV)
    if grad_BHTV.stride(-1) != 1:
        grad_BHTV = grad_BHTV.contiguous()
    spans_n3 = _rows(spans)
    _library().call(
        "k2_causal_backward", describe(q_BHTX), describe(k_BHTX), describe(v_BHTV), describe(spans_n3),
        ctypes.c_float(scale), alone(), describe(stats_BHT2), describe(out_BHTV), describe(grad_BHTV),
        *map(describe, grads),
    )  # fmt: skip
    return grads


def _library() -> Library:
    found = library()
    assert found is not None, "`takes` says when there is one"
    return found


def _rows(spans: Sequence[tuple[int, int, int]]) -> Tensor:
    return torch.tensor(spans, dtype=torch.int64).reshape(-1, 3)
