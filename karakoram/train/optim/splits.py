"""Which blocks of a parameter are the matrices that Muon orthogonalises.

K2 and Moonlight take each parameter as it stands, experts one by one. A fused tensor is several matrices in one and
must be cut: gate and up in Hugging Face's `gate_up_proj` [E, 2·I, D]. K3's Per-Head Muon (arXiv 2607.24653, §2.5) cuts
queries, keys and values by heads as well, so that no head's singular values share a budget with another's.

A split maps a parameter (or a tensor shaped like it) to views that cover it once: it copies nothing, and what is
written to a view is written to the parameter.

Legend: E experts, I expert width, D inputs, H heads, N nope, R rope, V value, L latent.
"""

from collections.abc import Callable, Iterable
from typing import Literal

from torch import Tensor

from karakoram.config import ModelConfig
from karakoram.errors import TrainingError

Split = Callable[[Tensor], tuple[Tensor, ...]]
# "whole": K2. "head": a head's queries are a matrix, and its keys with its values. "part": keys and values apart, K3.
Heads = Literal["whole", "head", "part"]


def whole(weight: Tensor) -> tuple[Tensor, ...]:
    """The parameter as it stands."""
    return (weight,)


def fused(parts: int) -> Split:
    """[..., parts · I, D] -> one view [..., parts, I, D]."""
    return lambda weight: (weight.unflatten(-2, (parts, -1)),)


def per_head(heads: int) -> Split:
    """[H · X, D] -> one view [H, X, D]."""
    return lambda weight: (weight.unflatten(-2, (heads, -1)),)


def per_head_parts(heads: int, sizes: tuple[int, ...]) -> Split:
    """[H · Σ sizes, D] -> a view [H, size, D] for each size."""
    return lambda weight: weight.unflatten(-2, (heads, sum(sizes))).split(sizes, -2)


def splits_of(names: Iterable[str], config: ModelConfig, heads: Heads = "whole") -> dict[str, Split]:
    """The splits of those among `names` that are not one matrix, by the checkpoint's names; for `Muon(splits=...)`."""
    if heads not in ("whole", "head", "part"):
        raise TrainingError(f"There is no way {heads!r} to cut heads.", "Take whole, head or part.")
    found = {name: _split_of(name, config, heads) for name in names}
    return {name: split for name, split in found.items() if split is not None}


def _split_of(name: str, config: ModelConfig, heads: Heads) -> Split | None:
    kind = name.removesuffix(".weight").rsplit(".", 1)[-1]
    count = config.num_attention_heads
    if kind == "gate_up_proj":
        return fused(2)
    if heads == "whole":
        return None
    if kind in ("q_proj", "q_b_proj"):
        return per_head(count)
    if kind == "kv_b_proj":
        sizes = (config.qk_nope_head_dim, config.v_head_dim)
        return per_head_parts(count, sizes) if heads == "part" else per_head(count)
    return None
