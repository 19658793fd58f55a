"""Which weight is whose: matrices to Muon, the rest to AdamW.

Embedding, head and norm gains go to AdamW, everything with rows and columns to Muon, routers included: Moonlight's
division (arXiv 2502.16982, §2.4). Names are the checkpoint's.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from karakoram.distributed.layout import Layout
from karakoram.distributed.mesh import Alone, Ranks
from karakoram.train.config import TrainConfig
from karakoram.train.optim.adamw import AdamW
from karakoram.train.optim.muon import Muon
from karakoram.train.optim.owned import OwnedMuon
from karakoram.train.optim.splits import splits_of

GROUPS = ("attention", "experts", "shared", "router", "dense", "embedding", "head", "norm")


def optimizers(
    weights: Mapping[str, Tensor],
    config: TrainConfig,
    layouts: Mapping[str, Layout],
    ranks: Alone | Ranks,
    dtype: torch.dtype,
) -> tuple[Muon | OwnedMuon, AdamW]:
    """Both over the masters they are to edit; `dtype` is the model's."""
    o = config.optimizer
    matrices = {n: w for n, w in weights.items() if o.name == "muonclip" and is_matrix(n, w, o.router == "muon")}
    others = {n: w for n, w in weights.items() if n not in matrices}
    options: dict[str, Any] = {
        "coefficients": o.coefficients, "calibrate": o.calibrate,
        "dtype": dtype if o.iteration is None else getattr(torch, o.iteration),
        "splits": splits_of(matrices, config.model, o.heads),
    }  # fmt: skip
    if ranks.world > 1:
        return OwnedMuon(matrices, layouts, ranks, o.weight_decay, o.momentum, **options), AdamW(others, o.weight_decay)
    return Muon(matrices, o.weight_decay, o.momentum, **options), AdamW(others, o.weight_decay)


def update_rms(muon: Muon | OwnedMuon, adamw: AdamW) -> dict[str, float]:
    """RMS of the last updates over the learning rate, decay left out, by group: AdamW's is about 0.2 to 0.4.

    Over ranks AdamW's are of the first rank's part.
    """
    of_muon = muon.update_rms() if isinstance(muon, OwnedMuon) else {n: muon.update_rms(n) for n in muon.weights}
    found = of_muon | {name: adamw.update_rms(name) for name in adamw.weights}
    sizes = {name: (muon.weights.get(name, adamw.weights.get(name))).numel() for name in found}  # pyright: ignore[reportOptionalMemberAccess]
    groups: dict[str, tuple[float, int]] = {}
    for name, rms in found.items():
        squares, count = groups.get(group_of(name), (0.0, 0))
        groups[group_of(name)] = squares + rms**2 * sizes[name], count + sizes[name]
    return {group: (squares / max(1, count)) ** 0.5 for group, (squares, count) in groups.items()}


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
