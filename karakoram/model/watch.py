"""What a trainer must see of a forward pass: each head's largest attention logit, and each expert's load.

QK-Clip (Kimi K2 report, arXiv 2507.20534, §2.1) needs the first, the balance of experts the second. A `Watch` is handed
to the model like any other argument; without one nothing is measured.

Legend: B batch, T tokens, H heads, E experts, K experts per token.
"""

import torch
from torch import Tensor

# norms are rounded to bfloat16 (1/256 each): the bound stays above the truth with 1 % on top
BOUND_MARGIN = 1.01


class Watch:
    """Collects over any number of forward passes; `reset` begins anew.

    max_logits  layer -> float32 [H]: largest value fed to softmax, all scales included, masked positions excluded
    loads       layer -> int64 [E]: how many tokens each expert received
    """

    def __init__(self, threshold: float = 100.0) -> None:
        self.threshold = threshold
        self.reset()

    def reset(self) -> None:
        """Forget what was seen."""
        self.max_logits: dict[int, Tensor] = {}
        self.loads: dict[int, Tensor] = {}

    @torch.no_grad()
    def see_attention(self, layer: int, q_BHTx: Tensor, k_BHTx: Tensor, scale: float) -> None:
        """Queries and keys of one causal pass (T = S).

        The Cauchy-Schwarz bound max‖q‖·max‖k‖·scale costs next to nothing; only heads whose bound passes the threshold
        are measured exactly. For the others the bound stands in, which is below the threshold too: clipping decides the
        same.
        """
        longest_q_H, longest_k_H = (x.norm(dim=-1).amax((0, 2)).float() for x in (q_BHTx, k_BHTx))
        most_H = longest_q_H * longest_k_H * scale * BOUND_MARGIN
        for head in (most_H > self.threshold).nonzero().flatten().tolist():
            most_H[head] = _largest_causal(q_BHTx[:, head], k_BHTx[:, head], scale)
        before = self.max_logits.get(layer)
        self.max_logits[layer] = most_H if before is None else torch.maximum(before, most_H)

    def see_routing(self, layer: int, ids_NK: Tensor, experts: int) -> None:
        """Expert ids chosen in one pass."""
        load_E = torch.bincount(ids_NK.flatten(), minlength=experts)
        self.loads[layer] = self.loads[layer] + load_E if layer in self.loads else load_E


def _largest_causal(q_BTx: Tensor, k_BTx: Tensor, scale: float) -> Tensor:
    scores_BTT = (q_BTx.float() @ k_BTx.float().mT) * scale
    future_TT = torch.ones(scores_BTT.shape[-2:], dtype=torch.bool, device=scores_BTT.device).triu(1)
    return scores_BTT.masked_fill_(future_TT, float("-inf")).max()
