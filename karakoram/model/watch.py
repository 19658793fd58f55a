"""What a trainer must see of a forward pass: attention logits, expert loads, router scores.

QK-Clip (Kimi K2 report, arXiv 2507.20534, §2.1) needs each head's largest logit, the balance of experts their loads or
the margins of their scores, the sequence-wise balance loss (DeepSeek-V3, arXiv 2412.19437, §2.1.2) the scores with
their gradient. A `Watch` is handed to the model like any other argument.

Legend: B batch, T tokens, N = B·T, H heads, E experts, K experts per token, Q bins.
"""

import torch
from torch import Tensor

# norms are rounded to bfloat16 (1/256 each): the bound stays above the truth with 1 % on top
BOUND_MARGIN = 1.01
# Margins score − edge lie in (−1 − b, 1 + b); biases stay within 1 of each other as scores do. 1/1024 is a tenth of the
# step that the sign rule takes at Moonlight's rate, and inside a bin the quantile is interpolated.
MARGIN_BINS, MARGIN_RANGE = 4096, 2.0


class Watch:
    """Collects over any number of forward passes; `reset` begins anew.

    margins        also count how far each expert's score is from the edge of being chosen (quantile balancing)
    sequence_loss  also sum the sequence-wise balance loss, with its gradient
    recording      False while a pass is repeated (activation checkpointing): what it shows was seen before

    max_logits     layer -> float32 [H]: largest value fed to softmax, all scales included, masked positions excluded
    loads          layer -> int64 [E]: how many tokens each expert received
    margin_counts  layer -> int64 [E, Q]: a histogram of score − edge over [−2, 2); the edge is the (K+1)-th best biased
                   score of the token: an expert whose bias exceeds −margin is chosen
    balance_loss   scalar: Σ over layers and sequences of Σ_i f_i·P_i, or None
    """

    def __init__(self, threshold: float = 100.0, margins: bool = False, sequence_loss: bool = False) -> None:
        self.threshold, self.margins, self.sequence_loss = threshold, margins, sequence_loss
        self.reset()

    def reset(self) -> None:
        """Forget what was seen."""
        self.recording = True
        self.max_logits: dict[int, Tensor] = {}
        self.loads: dict[int, Tensor] = {}
        self.margin_counts: dict[int, Tensor] = {}
        self.balance_loss: Tensor | None = None

    @property
    def scores(self) -> bool:
        """Whether the router's scores are wanted, not its choice alone."""
        return self.margins or self.sequence_loss

    def see_logits(self, layer: int, largest_H: Tensor) -> None:
        """The largest logit of each head in one pass, float32 [H]."""
        if self.recording:
            before = self.max_logits.get(layer)
            self.max_logits[layer] = largest_H if before is None else torch.maximum(before, largest_H)

    @torch.no_grad()
    def see_attention(self, layer: int, q_BHTx: Tensor, k_BHTx: Tensor, scale: float) -> None:
        """Queries and keys of one causal pass (T = S), where the kernel does not tell its largest logits.

        The Cauchy-Schwarz bound max‖q‖·max‖k‖·scale costs next to nothing; only heads whose bound passes the threshold
        are measured exactly. For the others the bound stands in, which is below the threshold too: clipping decides the
        same.
        """
        longest_q_H, longest_k_H = (x.norm(dim=-1).amax((0, 2)).float() for x in (q_BHTx, k_BHTx))
        most_H = longest_q_H * longest_k_H * scale * BOUND_MARGIN
        for head in (most_H > self.threshold).nonzero().flatten().tolist():
            most_H[head] = _largest_causal(q_BHTx[:, head], k_BHTx[:, head], scale)
        self.see_logits(layer, most_H)

    def see_routing(self, layer: int, ids_NK: Tensor, experts: int) -> None:
        """Expert ids chosen in one pass."""
        if self.recording:
            load_E = torch.bincount(ids_NK.flatten(), minlength=experts)
            self.loads[layer] = self.loads[layer] + load_E if layer in self.loads else load_E

    def see_scores(self, layer: int, scores_BTE: Tensor, ids_BTK: Tensor, edge_BT: Tensor) -> None:
        """Sigmoid scores (with gradient), chosen ids, and the best biased score that was not chosen."""
        if self.margins and self.recording:
            counts_EQ = _histogram(scores_BTE.detach().flatten(0, 1) - edge_BT.flatten()[:, None])
            before = self.margin_counts.get(layer)
            self.margin_counts[layer] = counts_EQ if before is None else before + counts_EQ
        if self.sequence_loss:  # repeated passes compute it too: checkpointing compares what both saved
            loss = sequence_balance(scores_BTE, ids_BTK)
            if self.recording:
                self.balance_loss = loss if self.balance_loss is None else self.balance_loss + loss


def sequence_balance(scores_BTE: Tensor, ids_BTK: Tensor) -> Tensor:
    """Σ over sequences of Σ_i f_i·P_i: 1 a sequence where all experts are used alike; differentiable in the scores.

    f_i is expert i's share of the sequence's choices times E, P_i its mean score, of scores normalised over all experts
    (DeepSeek-V3, arXiv 2412.19437, eq. 17 to 20).
    """
    B, T, E = scores_BTE.shape
    chosen_BE = torch.zeros(B, E, device=scores_BTE.device).scatter_add_(
        1, ids_BTK.flatten(1), torch.ones(ids_BTK.flatten(1).shape, device=scores_BTE.device)
    )
    f_BE = chosen_BE * (E / (ids_BTK.shape[-1] * T))
    p_BE = (scores_BTE / (scores_BTE.sum(-1, keepdim=True) + 1e-20)).mean(1)
    return (f_BE * p_BE).sum()


def _histogram(margin_NE: Tensor) -> Tensor:
    experts = margin_NE.shape[1]
    bins_NE = ((margin_NE + MARGIN_RANGE) * (MARGIN_BINS / (2 * MARGIN_RANGE))).long().clamp_(0, MARGIN_BINS - 1)
    bins_NE += torch.arange(experts, device=margin_NE.device) * MARGIN_BINS
    return torch.bincount(bins_NE.flatten(), minlength=experts * MARGIN_BINS).unflatten(0, (experts, -1))


def _largest_causal(q_BTx: Tensor, k_BTx: Tensor, scale: float) -> Tensor:
    scores_BTT = (q_BTx.float() @ k_BTx.float().mT) * scale
    future_TT = torch.ones(scores_BTT.shape[-2:], dtype=torch.bool, device=scores_BTT.device).triu(1)
    return scores_BTT.masked_fill_(future_TT, float("-inf")).max()
