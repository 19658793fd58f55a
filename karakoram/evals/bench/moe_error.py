"""How far a layer of experts is from the exact result, beside the error of torch's own bf16 arithmetic.

A few tokens are followed through every row of the benchmark. They choose the same few experts everywhere, so that their
exact results (float64, on the bf16 weights that the codes mean) are computed once: at K2's shape an expert is 44
million weights, 352 MB in float64. Two kinds of activations: Gaussian, and with one channel in a hundred fifty times
larger, as language models have them; those show where a format or an accumulation runs out of bits.

Error: max|Δ| / max|exact| over the followed tokens of a row; of the two kinds the worse. torch's chain: the same bf16
weights, F.linear and silu in bf16, the experts' results summed in float32 and rounded once, as transformers does it.

Legend: T tokens, D hidden, K experts per token, F followed tokens.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from karakoram.kernels.packed import PackedExperts

FOLLOWED = 4  # tokens: more would show the same, and float64 is slow
OUTLIER_SHARE, OUTLIER_FACTOR = 0.01, 50.0


def relative_error(found: Tensor, exact: Tensor) -> float:
    """max|found − exact| / max|exact|, in float64."""
    return ((found.double() - exact).abs().max() / exact.abs().max()).item()


@dataclass(frozen=True)
class Followed:
    """Tokens of one kind of activations: x bf16 [F, D], their exact results and those of torch's bf16, [F, D]."""

    x_FD: Tensor
    exact_FD: Tensor
    torch_FD: Tensor


def follow(experts: PackedExperts, ids_FK: Tensor, weights_FK: Tensor, draw: torch.Generator) -> list[Followed]:
    """Draw the followed tokens, Gaussian ones and those with outliers, and compute what they should become."""
    x_FD = torch.randn(ids_FK.shape[0], experts.hidden, generator=draw)
    outliers = max(1, round(OUTLIER_SHARE * experts.hidden))
    factor_D = torch.ones(experts.hidden)
    factor_D[torch.randperm(experts.hidden, generator=draw)[:outliers]] = OUTLIER_FACTOR
    kinds = [x_FD.bfloat16(), (x_FD * factor_D).bfloat16()]
    exact, in_bf16 = _results(experts, ids_FK, weights_FK, torch.cat(kinds))
    tokens = len(x_FD)
    return [
        Followed(x, exact[i * tokens : (i + 1) * tokens], in_bf16[i * tokens : (i + 1) * tokens])
        for i, x in enumerate(kinds)
    ]


def _results(experts: PackedExperts, ids_FK: Tensor, weights_FK: Tensor, x_TD: Tensor) -> tuple[Tensor, Tensor]:
    """Exact and bf16 results; x holds the tokens of every kind, one kind after another, all routed alike."""
    repeats = len(x_TD) // len(ids_FK)
    ids_TK, weights_TK = ids_FK.repeat(repeats, 1), weights_FK.repeat(repeats, 1)
    exact_TD = torch.zeros(x_TD.shape, dtype=torch.float64)
    bf16_TD = torch.zeros(x_TD.shape)
    for expert in ids_FK.unique().tolist():
        rows, slots = (ids_TK == expert).nonzero(as_tuple=True)
        weight = weights_TK[rows, slots, None]
        gate, up, down = (part.dense() for part in experts.parts(expert))
        bf16_TD.index_add_(0, rows, weight * _mlp(x_TD[rows], gate, up, down).float())
        gate, up, down = gate.double(), up.double(), down.double()
        exact_TD.index_add_(0, rows, weight.double() * _mlp(x_TD[rows].double(), gate, up, down))
    return exact_TD, bf16_TD.bfloat16()


def _mlp(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)
