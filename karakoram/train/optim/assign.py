"""Which weight is whose: matrices to Muon, the rest to AdamW.

Embedding, head and norm gains go to AdamW, everything with rows and columns to Muon, routers included: Moonlight's
division (arXiv 2502.16982, §2.4). Names are the checkpoint's.
"""

from collections.abc import Mapping

from torch import Tensor

from karakoram.distributed.layout import Layout
from karakoram.distributed.mesh import Alone, Ranks
from karakoram.train.config import TrainConfig
from karakoram.train.optim.adamw import AdamW
from karakoram.train.optim.muon import Muon
from karakoram.train.optim.owned import OwnedMuon

GROUPS = ("attention", "experts", "shared", "router", "dense", "embedding", "head", "norm")


def optimizers(
    weights: Mapping[str, Tensor], config: TrainConfig, layouts: Mapping[str, Layout], ranks: Alone | Ranks
) -> tuple[Muon | OwnedMuon, AdamW]:
    """Both over the masters they are to edit."""
    o = config.optimizer
    matrices = {n: w for n, w in weights.items() if o.name == "muonclip" and is_matrix(n, w, o.router == "muon")}
    others = {n: w for n, w in weights.items() if n not in matrices}
    if ranks.world > 1:
        return OwnedMuon(matrices, layouts, ranks, o.weight_decay, o.momentum), AdamW(others, o.weight_decay)
    return Muon(matrices, o.weight_decay, o.momentum), AdamW(others, o.weight_decay)


def is_matrix(name: str, weight: Tensor, routers: bool = True) -> bool:
    """Whether Muon takes this weight."""
    group = group_of(name)
    return weight.ndim >= 2 and group not in ("embedding", "head") and (routers or group != "router")


def group_of(name: str) -> str:
    """One of `GROUPS`, by the parameter's name."""
    for part, group in (
        ("embed_tokens", "embedding"), ("lm_head", "head"), ("norm", "norm"), ("self_attn", "attention"),
        (".gate.weight", "router"), ("shared_experts", "shared"), (".experts.", "experts"),
    ):  # fmt: skip
        if part in name:
            return group
    return "dense"
