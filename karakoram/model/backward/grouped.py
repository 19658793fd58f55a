"""Tokens to experts and back: sort rows by expert, multiply each run by its own expert's matrix, return rows to their
places.

On a CPU products of each expert's own rows beat padding all runs to the longest (which wastes the imbalance). Runs are
laid out shortest first, so that those of equal length lie side by side and share one call: oneDNN needs about 20 µs to
start a product, a tenth of what 512 rows of 256 to 256 take on one core, and threads do not share a start.

Sorting and unsorting are permutations, so their backward is the opposite gather; autograd's own index backward would
scatter with atomics (10 times slower at 32,768 rows of 256).

Legend: N tokens, K experts per token, S = N·K slots, M ≥ S rows, D hidden, X in, Y out, E experts.
"""

from collections.abc import Callable, Sequence
from itertools import repeat
from typing import Any, NamedTuple

import torch
from torch import Tensor

from karakoram.model.backward.products import products, runs_onednn_float32

# oneDNN prepares a kernel for every new shape (about 1 ms) and keeps 1,024: runs of all lengths would mean a new one at
# every product. Rounded to 128 rows, the shapes of a training run are few; at 2,048 rows a run the padding costs 3 %.
ROUND_TO = 128
# Multiply-adds that share a call: a millisecond's worth on one core. Above it a start is no longer felt, and copying
# the batch's matrices side by side is.
BATCHED = 1 << 28


class Assignment(NamedTuple):
    """Rows sorted by expert: row m serves slot `order[m]` = token · K + k; slot s sits in row `place[s]`.

    Where `assign` made it, experts come in the order of `by_length(rows_per_expert)`.
    Rows in `idle` fill an expert's run up: they repeat some slot, nobody reads their results, their gradients are zero.
    """

    order_M: Tensor
    place_S: Tensor
    idle: Tensor
    rows_per_expert: list[int]
    experts_per_token: int

    @property
    def place_NK(self) -> Tensor:
        """`place_S` by token and slot."""
        return self.place_S.view(-1, self.experts_per_token)


def assign(ids_NK: Tensor, experts: int) -> Assignment:
    """Expert ids [N, K] -> the rows in runs by length, ties by token; runs are filled up where there are many rows."""
    flat_S = ids_NK.flatten()
    sorted_S = flat_S.argsort(stable=True)
    counts_E = torch.bincount(flat_S, minlength=experts)
    filled = flat_S.numel() >= ROUND_TO * experts
    rows_E = (counts_E + ROUND_TO - 1) // ROUND_TO * ROUND_TO if filled else counts_E
    rows_per_expert = rows_E.tolist()
    runs_E = torch.tensor(by_length(rows_per_expert), device=flat_S.device)
    start_E = torch.empty_like(rows_E)
    start_E[runs_E] = rows_E[runs_E].cumsum(0) - rows_E[runs_E]
    shift_E = start_E - (counts_E.cumsum(0) - counts_E)
    row_S = torch.arange(flat_S.numel(), device=flat_S.device) + shift_E[flat_S[sorted_S]]
    order_M = torch.full((sum(rows_per_expert),), -1, device=flat_S.device)
    order_M[row_S] = sorted_S
    idle = (order_M < 0).nonzero().flatten() if filled else row_S[:0]
    place_S = torch.empty_like(sorted_S)
    place_S[sorted_S] = row_S
    return Assignment(order_M.clamp_(min=0), place_S, idle, rows_per_expert, ids_NK.shape[1])


def by_length(rows_per_expert: Sequence[int]) -> list[int]:
    """The experts in the order of their runs: the shortest first, ties by number."""
    return sorted(range(len(rows_per_expert)), key=rows_per_expert.__getitem__)


class RowPieces(NamedTuple):
    """The passes over rows around the products, as plain functions; training puts compiled twins in their place.

    One compiled pass takes a sixth of the plain ones at 16,384 rows of 256: 1.2 ms -> 0.2 ms for `sum_slots`.
    """

    sum_slots: Callable[[Tensor, Tensor], Tensor]
    weighted_sum: Callable[[Tensor, Tensor, Tensor], Tensor]
    weighted_rows: Callable[[Tensor, Tensor, Tensor, int], Tensor]
    row_products: Callable[[Tensor, Tensor, Tensor], Tensor]


# The loops over K are written out: a compiler that is not told K (shapes are dynamic) sums row by row, 70 times slower.
def sum_slots(rows_MD: Tensor, place_NK: Tensor) -> Tensor:
    """Each token's K rows summed, over k = 0…K-1 in float32: [N, D]."""
    sum_ND = rows_MD[place_NK[:, 0]].float()
    for k in range(1, place_NK.shape[1]):
        sum_ND = sum_ND + rows_MD[place_NK[:, k]].float()
    return sum_ND.to(rows_MD.dtype)


def weighted_sum(rows_MD: Tensor, place_NK: Tensor, weights_NK: Tensor) -> Tensor:
    """Each token's K rows times their weights summed, over k = 0…K-1 in float32: [N, D]."""
    sum_ND = rows_MD[place_NK[:, 0]].float() * weights_NK[:, :1]
    for k in range(1, place_NK.shape[1]):
        sum_ND = sum_ND + rows_MD[place_NK[:, k]].float() * weights_NK[:, k : k + 1]
    return sum_ND.to(rows_MD.dtype)


def weighted_rows(grad_ND: Tensor, weights_NK: Tensor, order_M: Tensor, experts_per_token: int) -> Tensor:
    """Each row's token's gradient times the row's weight: [M, D]."""
    row_MD = grad_ND[order_M // experts_per_token].float() * weights_NK.flatten()[order_M][:, None]
    return row_MD.to(grad_ND.dtype)


def row_products(rows_MD: Tensor, place_NK: Tensor, grad_ND: Tensor) -> Tensor:
    """The inner products of a token's rows with its gradient, float32 [N, K]."""
    wide_ND = grad_ND.float()
    slots = range(place_NK.shape[1])
    return torch.stack([(rows_MD[place_NK[:, k]].float() * wide_ND).sum(-1) for k in slots], 1)


PLAIN = RowPieces(sum_slots, weighted_sum, weighted_rows, row_products)


def spread(x_ND: Tensor, to: Assignment, pieces: RowPieces = PLAIN) -> Tensor:
    """Copy each token's row to its K experts' runs: [M, D]."""
    return _Spread.apply(x_ND, to, pieces)  # pyright: ignore[reportReturnType]


def combine(sorted_MD: Tensor, weights_NK: Tensor, to: Assignment, pieces: RowPieces = PLAIN) -> Tensor:
    """Bring the rows back to their tokens and sum them by weight: [N, D]; slots in the router's order, in float32."""
    return _Combine.apply(sorted_MD, weights_NK, to, pieces)  # pyright: ignore[reportReturnType]


def gather(sorted_MD: Tensor, to: Assignment) -> Tensor:
    """Bring the rows back to their tokens: [N, K, D], slots in the router's order."""
    return _Gather.apply(sorted_MD, to)  # pyright: ignore[reportReturnType]


def grouped_linear(x_MX: Tensor, weight_EYX: Tensor, rows_per_expert: Sequence[int]) -> Tensor:
    """Rows [M, X], in runs of `rows_per_expert` by length -> [M, Y]; expert e's run is multiplied by weight[e].T."""
    return _GroupedLinear.apply(x_MX, weight_EYX, rows_per_expert)  # pyright: ignore[reportReturnType]


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, to: Assignment, pieces: RowPieces) -> Tensor:
        ctx.to, ctx.pieces = to, pieces
        return x_ND.index_select(0, to.order_M // to.experts_per_token)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return ctx.pieces.sum_slots(grads[0].contiguous(), ctx.to.place_NK), None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, sorted_MD: Tensor, to: Assignment) -> Tensor:
        ctx.to = to
        return sorted_MD.index_select(0, to.place_S).unflatten(0, (-1, to.experts_per_token))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        grad_MD = grads[0].flatten(0, 1).index_select(0, ctx.to.order_M)
        return grad_MD.index_fill_(0, ctx.to.idle, 0), None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, sorted_MD: Tensor, weights_NK: Tensor, to: Assignment, pieces: RowPieces) -> Tensor:
        ctx.save_for_backward(sorted_MD, weights_NK)
        ctx.to, ctx.pieces = to, pieces
        return pieces.weighted_sum(sorted_MD, to.place_NK, weights_NK)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (sorted_MD, weights_NK), to = ctx.saved_tensors, ctx.to
        grad_ND = grads[0].contiguous()
        grad_MD = ctx.pieces.weighted_rows(grad_ND, weights_NK, to.order_M, to.experts_per_token)
        grad_weights_NK = ctx.pieces.row_products(sorted_MD, to.place_NK, grad_ND)
        return grad_MD.index_fill_(0, to.idle, 0), grad_weights_NK.to(weights_NK.dtype), None, None


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_MX: Tensor, weight_EYX: Tensor, rows: Sequence[int]) -> Tensor:
        ctx.save_for_backward(x_MX, weight_EYX)
        ctx.plan = plan = _Plan(rows, weight_EYX)
        y_MY = x_MX.new_empty(x_MX.shape[0], weight_EYX.shape[1])
        for x_bRX, w_bYX, y_bRY in zip(plan.runs(x_MX), plan.matrices(weight_EYX), plan.runs(y_MY)):
            products(x_bRX, w_bYX.mT, y_bRY, plan.filled)
        return y_MY

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (x_MX, weight_EYX), plan = ctx.saved_tensors, ctx.plan
        grad_MY = grads[0].contiguous()
        wants_x, wants_w = ctx.needs_input_grad[:2]  # experts may be frozen, and their gradients as large as themselves
        grad_x_MX = torch.empty_like(x_MX) if wants_x else None
        grad_w_EYX = torch.zeros_like(weight_EYX) if wants_w else None
        to_x = plan.runs(grad_x_MX) if grad_x_MX is not None else repeat(None)
        to_w = plan.places(grad_w_EYX) if grad_w_EYX is not None else repeat(None)
        given = plan.runs(x_MX), plan.runs(grad_MY), plan.matrices(weight_EYX)
        for x_bRX, grad_bRY, w_bYX, grad_x_bRX, grad_w_bYX in zip(*given, to_x, to_w):
            if grad_x_bRX is not None:
                products(grad_bRY, w_bYX, grad_x_bRX, plan.filled)
            if grad_w_bYX is not None:
                products(grad_bRY.mT, x_bRX, grad_w_bYX, plan.filled)
        if grad_w_EYX is not None:
            grad_w_EYX = plan.by_expert(grad_w_EYX)
        return grad_x_MX, grad_w_EYX, None


class _Plan:
    """Which experts share a call: 1, 2, 4, … with equally long runs, as oneDNN prepares a kernel for each number.

    order         all experts by the length of their runs; the first `without_rows` have none
    counts        experts of each call
    lengths       rows of each of its experts
    filled        runs are multiples of `ROUND_TO`
    shares        some call has two experts: matrices lie in the order of the runs for that
    """

    def __init__(self, rows: Sequence[int], weight_EYX: Tensor) -> None:
        self.order = by_length(rows)
        self.filled = all(count % ROUND_TO == 0 for count in rows)
        self.without_rows = sum(count == 0 for count in rows)
        alone = not self.filled or runs_onednn_float32(weight_EYX)
        sorted_rows, first = [rows[expert] for expert in self.order], self.without_rows
        self.counts, self.lengths = list[int](), list[int]()
        while first < len(rows):
            count, each = 1, sorted_rows[first]
            most = 1 if alone else BATCHED // (each * weight_EYX[0].numel())
            while 2 * count <= most and sorted_rows[first + count : first + 2 * count] == [each] * count:
                count *= 2
            self.counts.append(count)
            self.lengths.append(each)
            first += count
        self.shares = len(self.counts) < len(rows) - self.without_rows

    def runs(self, rows_MX: Tensor) -> list[Tensor]:
        """Views [b, R, X], a call each."""
        sizes = [count * length for count, length in zip(self.counts, self.lengths)]
        return [rows.view(count, -1, rows.shape[1]) for count, rows in zip(self.counts, rows_MX.split(sizes))]

    def matrices(self, weight_EYX: Tensor) -> Sequence[Tensor]:
        """The experts' own [b, Y, X], a call each; copied where calls are shared."""
        if self.shares:
            weight_EYX = weight_EYX.index_select(0, torch.tensor(self.order, device=weight_EYX.device))
        return self.places(weight_EYX)

    def places(self, stack_EYX: Tensor) -> Sequence[Tensor]:
        """Views [b, Y, X] of a stack, a call each: in the order of the runs where calls are shared, else by expert."""
        if self.shares:
            return stack_EYX[self.without_rows :].split(self.counts)
        return [stack_EYX[expert : expert + 1] for expert in self.order[self.without_rows :]]

    def by_expert(self, stack_EYX: Tensor) -> Tensor:
        """A stack whose `places` were written, by expert."""
        if not self.shares:
            return stack_EYX
        return stack_EYX.index_select(0, torch.tensor(self.order, device=stack_EYX.device).argsort())
