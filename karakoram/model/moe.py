"""Mixture of experts: a router, the experts it sends tokens to, and one shared expert that sees every token.

The model never learns where an expert lives: routed experts stand behind the `ExpertBank` seam. `LocalExperts` keeps
them as three stacks and serves both running and training: tokens are sorted by expert, each expert multiplies its own
rows, and the results go back to their places. A token's K partial results are summed in the order of its slots, in
float32, so that the sum does not depend on the order in which experts were run.

Legend: N tokens, D hidden, I expert width, E experts, K experts per token, M rows sorted by expert.
"""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from karakoram.config import ModelConfig
from karakoram.model.backward.grouped import PLAIN, assign, combine, grouped_linear, spread
from karakoram.model.layers import SwiGLU
from karakoram.model.router import Router
from karakoram.model.watch import Watch


class ExpertBank(Protocol):
    """Where the routed experts live: local stacks, other machines, or a store over memory and disk."""

    def __call__(self, layer: int, x_ND: Tensor, ids_NK: Tensor, weights_NK: Tensor) -> Tensor:
        """Sum over k of weights[n, k] · expert[ids[n, k]](x[n]), in x's dtype: [N, D]."""
        ...


class LocalExperts(nn.Module):
    """All routed experts of one layer: `gate_proj`, `up_proj` [E, I, D] and `down_proj` [E, D, I]."""

    def __init__(self, config: ModelConfig, device: torch.device | str | None, dtype: torch.dtype) -> None:
        super().__init__()
        E, D, I = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size  # noqa: E741
        self.gate_proj = nn.Parameter(torch.empty(E, I, D, device=device, dtype=dtype))
        self.up_proj = nn.Parameter(torch.empty(E, I, D, device=device, dtype=dtype))
        self.down_proj = nn.Parameter(torch.empty(E, D, I, device=device, dtype=dtype))
        self.pieces = PLAIN

    def forward(self, x_ND: Tensor, ids_NK: Tensor, weights_NK: Tensor) -> Tensor:
        """See `ExpertBank.__call__`."""
        to = assign(ids_NK, self.gate_proj.shape[0])
        x_MD = spread(x_ND, to, self.pieces)
        if torch.is_grad_enabled():
            # one product of twice the width, 8 % less time at 512 rows of 256 to 2 · 128; copying both matrices side by
            # side pays with the many rows of training only
            both = torch.cat((self.gate_proj, self.up_proj), 1)
            inner_MI = self.activate(grouped_linear(x_MD, both, to.rows_per_expert))
        else:
            gate_MI, up_MI = (grouped_linear(x_MD, w, to.rows_per_expert) for w in (self.gate_proj, self.up_proj))
            inner_MI = F.silu(gate_MI) * up_MI
        return combine(grouped_linear(inner_MI, self.down_proj, to.rows_per_expert), weights_NK, to, self.pieces)

    def activate(self, both_M2I: Tensor) -> Tensor:
        """silu(gate) · up of the two side by side: [M, 2·I] -> [M, I]."""
        gate_MI, up_MI = both_M2I.chunk(2, -1)
        return F.silu(gate_MI) * up_MI


class MixtureOfExperts(nn.Module):
    """Router, routed experts, shared experts: [..., D] -> [..., D]."""

    def __init__(self, config: ModelConfig, layer: int, device: torch.device | str | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.layer = layer
        self.gate = Router(config, device, dtype)
        self.experts = LocalExperts(config, device, dtype)
        shared = config.n_shared_experts * config.moe_intermediate_size
        self.shared_experts = SwiGLU(config.hidden_size, shared, device, dtype) if shared else None

    def forward(self, x: Tensor, experts: ExpertBank | None = None, watch: Watch | None = None) -> Tensor:
        """Routed sum plus the shared experts, which have no gate and are not scaled."""
        x_ND = x.flatten(0, -2)
        if watch is not None and watch.scores:
            ids_NK, weights_NK, scores_NE, edge_N = self.gate.examine(x_ND)
            rows = x.shape[:-1] if x.ndim == 3 else (1, len(x_ND))  # sequences, for the sequence-wise loss
            watch.see_scores(
                self.layer, scores_NE.unflatten(0, rows), ids_NK.unflatten(0, rows), edge_N.unflatten(0, rows)
            )
        else:
            ids_NK, weights_NK = self.gate(x_ND)
        if watch is not None:
            watch.see_routing(self.layer, ids_NK, self.gate.config.n_routed_experts)
        if experts is None:
            routed_ND = self.experts(x_ND, ids_NK, weights_NK)
        else:
            routed_ND = experts(self.layer, x_ND, ids_NK, weights_NK)
        routed = routed_ND.view_as(x)
        return routed if self.shared_experts is None else routed + self.shared_experts(x)
