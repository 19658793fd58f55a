"""A model's parameters split over ranks by torch's FSDP2.

Dense parts (embedding, head, norms, attention, router, shared experts, dense MLP) are split along their rows over
`everyone` by torch's FSDP2, a layer at a time: gathered before the layer runs, forgotten after, gathered again for its
backward. Experts are split by `experts` first (`expert_parallel.py`), and what a rank answers for with its `replicas`
over those, by FSDP2 again (`layout.py` says how). Every number is held by one rank, gradients and optimizer states too.

Gradients are *summed*: the loss is divided by the whole batch's weight already. Sums run in float32 where parameters
are bfloat16. Rows need not divide evenly, and a rank may hold none of a small matrix (torch 2.13, gloo and NCCL).
"""

from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from karakoram.distributed.expert_parallel import SpreadExperts, split_experts
from karakoram.distributed.layout import Layout, alone, among
from karakoram.distributed.mesh import Alone, Ranks
from karakoram.model.transformer import Transformer


def split(model: Transformer, ranks: Alone | Ranks, gather_again: bool = True) -> dict[str, Layout]:
    """Split a model in place over the ranks; returns each parameter's layout, by name.

    Every rank gives the same, whole model. Its parameters become DTensors (`local` is this rank's part), and
    `model.hidden` gathers them as it goes; on one rank nothing changes.

    gather_again  gather a layer a second time for its backward; False keeps it: faster, and as much memory as the
                  whole model for the length of a step
    Raises TrainingError where the experts cannot be split.
    """
    if isinstance(ranks, Alone):
        return {name: alone(parameter.shape) for name, parameter in model.named_parameters()}
    layouts = {name: among(ranks, parameter.shape) for name, parameter in model.named_parameters()}
    split_experts(model, ranks.experts.get_group())
    options: dict[str, Any] = {
        "mp_policy": MixedPrecisionPolicy(reduce_dtype=torch.float32),
        "ignored_params": _stacks(model) if ranks.replicas.size() == 1 else set(),
    }
    for where, module in model.named_modules():
        if isinstance(module, SpreadExperts) and ranks.replicas.size() > 1:
            cut = {p: layouts[f"{where}.{name}"].placements[1] for name, p in module.named_parameters()}
            options["shard_placement_fn"] = cut.__getitem__
            fully_shard(module, mesh=ranks.replicas, reshard_after_forward=gather_again, **options)
    options["shard_placement_fn"] = None  # rows
    for layer in model.model.layers:
        fully_shard(layer, mesh=ranks.everyone, reshard_after_forward=gather_again, **options)
    fully_shard(model, mesh=ranks.everyone, reshard_after_forward=False, **options)  # its head is used after `hidden`
    register_fsdp_forward_method(model, "hidden")
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    return layouts


def gather_anew(model: Transformer) -> None:
    """Forget gathered parameters. Before new weights are published: after a pass without a backward (a held-out loss)
    embedding, norm and head are still whole, and would be used as they were."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _stacks(model: Transformer) -> set[nn.Parameter]:
    return {p for module in model.modules() if isinstance(module, SpreadExperts) for p in module.parameters()}
