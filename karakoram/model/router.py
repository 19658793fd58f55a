"""The router: which experts a token visits, and with which weights.

`noaux_tc` of DeepSeek-V3 (arXiv 2412.19437, §2.1.2): sigmoid scores in float32; a per-expert correction bias that
balances the load enters the *selection only*; the weights are the plain scores of the chosen, normalised and scaled.
With groups, a group's rank is the sum of its two best biased scores, and only the experts of the best groups may be
chosen.

Legend: N tokens, D hidden, E experts, K experts per token, G groups.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from karakoram.config import ModelConfig


class Router(nn.Module):
    """Holds `weight` [E, D] and `e_score_correction_bias` float32 [E] (a buffer: balance moves it, not a gradient)."""

    e_score_correction_bias: Tensor

    def __init__(self, config: ModelConfig, device: torch.device | str | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.config = config
        shape = (config.n_routed_experts, config.hidden_size)
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        bias_E = torch.zeros(config.n_routed_experts, device=device, dtype=torch.float32)
        self.register_buffer("e_score_correction_bias", bias_E)

    def forward(self, x_ND: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states -> expert ids int64 [N, K] and weights float32 [N, K]; the order within K means nothing."""
        scores_NE = torch.sigmoid(self.logits(x_ND))
        ids_NK = choose(scores_NE.detach() + self.e_score_correction_bias, self.config)
        return ids_NK, weigh(scores_NE.gather(-1, ids_NK), self.config)

    def examine(self, x_ND: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """As `forward`, and what balancing asks for: scores [N, E], and the best biased score not chosen [N]."""
        scores_NE = torch.sigmoid(self.logits(x_ND))
        values_Nk, ids_Nk = best(scores_NE.detach() + self.e_score_correction_bias, self.config, spare=1)
        ids_NK = ids_Nk[:, :-1]
        return ids_NK, weigh(scores_NE.gather(-1, ids_NK), self.config), scores_NE, values_Nk[:, -1]

    def logits(self, x_ND: Tensor) -> Tensor:
        """Affinities before the sigmoid, in float32 from float32 operands: [N, E]."""
        return F.linear(x_ND.float(), self.weight.float())


def choose(biased_NE: Tensor, config: ModelConfig) -> Tensor:
    """The K best of the biased scores, within the best groups: ids int64 [N, K]."""
    return best(biased_NE, config)[1]


def best(biased_NE: Tensor, config: ModelConfig, spare: int = 0) -> tuple[Tensor, Tensor]:
    """Values and ids of the K + spare best biased scores within the best groups; sorted where there is a spare."""
    if config.n_group > 1:
        grouped_NGe = biased_NE.unflatten(-1, (config.n_group, -1))
        rank_NG = grouped_NGe.topk(2, dim=-1).values.sum(-1)
        best_NG = torch.zeros_like(rank_NG, dtype=torch.bool)
        best_NG.scatter_(-1, rank_NG.topk(config.topk_group, dim=-1, sorted=False).indices, True)
        biased_NE = grouped_NGe.masked_fill(~best_NG[..., None], float("-inf")).flatten(-2)
    return biased_NE.topk(config.num_experts_per_tok + spare, dim=-1, sorted=spare > 0)  # pyright: ignore[reportReturnType]


def weigh(scores_NK: Tensor, config: ModelConfig) -> Tensor:
    """Scores of the chosen -> their weights in the sum, float32 [N, K]."""
    if config.norm_topk_prob:
        scores_NK = scores_NK / (scores_NK.sum(-1, keepdim=True) + 1e-20)
    return scores_NK * config.routed_scaling_factor
