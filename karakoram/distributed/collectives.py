"""What ranks tell one another besides parameters: rows by an all-to-all, and what a step measured.

Legend: W ranks, H heads, E experts.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from karakoram.distributed.mesh import Mesh
from karakoram.model.watch import Watch


def exchange(rows: Tensor, send: Sequence[int], receive: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    """Rows in runs of `send[rank]` to the group's ranks -> the rows from them, in runs of `receive[rank]`.

    Differentiable: the gradient takes the way back.
    """
    return _Exchange.apply(rows, list(send), list(receive), group)  # pyright: ignore[reportReturnType]


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.send, ctx.receive, ctx.group = send, receive, group
        return _all_to_all(rows, send, receive, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return _all_to_all(grads[0], ctx.receive, ctx.send, ctx.group), None, None, None


def _all_to_all(rows: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup) -> Tensor:
    arrived = rows.new_empty(sum(receive), *rows.shape[1:])
    dist.all_to_all_single(arrived, rows.contiguous(), receive, send, group=group)
    return arrived


def share(watch: Watch, ranks: Mesh) -> None:
    """Make what a step's passes saw on this rank what all ranks saw: largest logits, loads, margins. In place.

    Every rank must have seen the same layers. Two reductions a step, three with margins.
    """
    _reduce(watch.max_logits, ranks.max_)
    _reduce(watch.loads, ranks.sum_)
    _reduce(watch.margin_counts, ranks.sum_)


def _reduce(by_layer: dict[int, Tensor], reduce: Any) -> None:
    if by_layer:
        layers = sorted(by_layer)
        together = reduce(torch.stack([by_layer[layer] for layer in layers]))
        by_layer.update(zip(layers, together.unbind(), strict=True))


def gradient_norm(gradients: Mapping[str, Tensor], ranks: Mesh) -> float:
    """Euclidean norm of all gradients of all ranks together; each rank gives its parts, and no part is held twice.

    Squares are summed in float64, so that the sum hardly depends on how it was divided.
    """
    squares = [torch.linalg.vector_norm(g, dtype=torch.float32).double().square() for g in gradients.values()]
    total = torch.stack(squares).sum() if squares else torch.zeros((), dtype=torch.float64, device=ranks.device)
    return math.sqrt(float(ranks.sum_(total)))
