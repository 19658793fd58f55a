"""Experts split over ranks: tokens travel to the rank that holds their expert, and their results travel back.

Rank r of ep holds experts r·E/ep … (r+1)·E/ep − 1 of every layer. A pass is three all-to-alls: how many rows each
expert gets, the rows, and the results; the backward is two. A token visits K experts as K rows, also where two of them
share a rank. Nothing is dropped and nothing padded: a rank may get no row, or all. The results are summed at home in
float32 in the order of the slots, as `LocalExperts` does, so that the split does not change the sum.

Each rank's experts see the tokens of all ep ranks, so the sum of their gradients over those is there already.

Legend: N tokens, K experts per token, S = N·K slots, D hidden, E experts, e = E/ep experts here, R rows that arrive.
"""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from karakoram.distributed.collectives import exchange
from karakoram.errors import TrainingError
from karakoram.model.backward.grouped import Assignment, combine, spread
from karakoram.model.moe import LocalExperts, MixtureOfExperts
from karakoram.model.transformer import Transformer


class SpreadExperts(LocalExperts):
    """One layer's experts of this rank, under the same names as all of them: `gate_proj`, `up_proj` [e, I, D] …

    In place of a layer's `LocalExperts`, called as it is; every rank of the group must call it.
    """

    def __init__(self, whole: LocalExperts, group: dist.ProcessGroup) -> None:
        nn.Module.__init__(self)
        self.group, self.ranks, self.pieces = group, group.size(), whole.pieces
        self.all_experts = whole.gate_proj.shape[0]
        if self.all_experts % self.ranks:
            raise TrainingError(
                f"{self.all_experts} experts cannot be split over {self.ranks} ranks.",
                "Let the number of expert ranks divide the number of experts.",
            )
        here = self.all_experts // self.ranks
        for name, stack in whole.named_parameters():
            mine = stack.detach()[group.rank() * here : (group.rank() + 1) * here].clone()
            self.register_parameter(name, nn.Parameter(mine, requires_grad=stack.requires_grad))

    def forward(self, x_ND: Tensor, ids_NK: Tensor, weights_NK: Tensor) -> Tensor:
        """See `ExpertBank.__call__`."""
        there = departures(ids_NK, self.all_experts)
        sent_We = torch.tensor(there.rows_per_expert, device=x_ND.device).view(self.ranks, -1)
        arriving_We = torch.empty_like(sent_We)
        dist.all_to_all_single(arriving_We, sent_We, group=self.group)
        send, receive = sent_We.sum(1).tolist(), arriving_We.sum(1).tolist()
        x_RD = exchange(spread(x_ND, there, self.pieces), send, receive, self.group)
        experts_e = torch.arange(arriving_We.shape[1], device=x_ND.device)
        ids_R = experts_e.repeat(self.ranks).repeat_interleave(arriving_We.flatten())
        one_R = torch.ones(ids_R.shape, device=x_ND.device)
        partial_RD = super().forward(x_RD, ids_R[:, None], one_R[:, None])  # one slot of weight 1: the partial itself
        return combine(exchange(partial_RD, receive, send, self.group), weights_NK, there, self.pieces)


class ExpertParallel:
    """The `ExpertBank` of a model whose layers hold `SpreadExperts`."""

    def __init__(self, layers: Mapping[int, SpreadExperts]) -> None:
        self.layers = dict(layers)

    def __call__(self, layer: int, x_ND: Tensor, ids_NK: Tensor, weights_NK: Tensor) -> Tensor:
        """See `ExpertBank.__call__`; on every rank of the group."""
        return self.layers[layer](x_ND, ids_NK, weights_NK)


def split_experts(model: Transformer, group: dist.ProcessGroup) -> ExpertParallel:
    """Replace every layer's experts by this rank's part of them, in place. The model may be on any device.

    Raises TrainingError where the group's size does not divide the number of experts.
    """
    layers: dict[int, SpreadExperts] = {}
    for layer in model.model.layers:
        if isinstance(layer.mlp, MixtureOfExperts):
            layer.mlp.experts = layers[layer.mlp.layer] = SpreadExperts(layer.mlp.experts, group)
    return ExpertParallel(layers)


def departures(ids_NK: Tensor, experts: int) -> Assignment:
    """Slots sorted by expert, so by rank too; ties by token. No run is filled up: every row is sent."""
    flat_S = ids_NK.flatten()
    order_S = flat_S.argsort(stable=True)
    place_S = torch.empty_like(order_S)
    place_S[order_S] = torch.arange(flat_S.numel(), device=flat_S.device)
    counts_E = torch.bincount(flat_S, minlength=experts)
    return Assignment(order_S, place_S, order_S[:0], counts_E.tolist(), ids_NK.shape[1])
