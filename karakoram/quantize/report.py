"""What quantizing did to a model: bytes, groups kept and rounded, and how far the numbers moved.

The error is the relative root mean square ‖new - old‖₂ / ‖old‖₂, float32 with float64 sums, where `old` is the number
the source stands for and `new` the bf16 number that the three int4 tensors mean. It is given per weight, and per layer
and component over all weights that were quantized there. Weights that were int4 already are copied bit for bit: their
groups count as exact and their error is 0. Groups from int4-aware training cost nothing; a normally distributed one
loses about 10 %: its largest magnitude is near 2.3 sigma, a step a seventh of that, the error step / sqrt(12).
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from karakoram.checkpoint import names
from karakoram.quantize.perplexity import Perplexity

SHOWN_WORST = 20

_COMPONENTS = (
    (".mlp.experts.", "routed experts"),
    (".mlp.shared_experts.", "shared experts"),
    (".self_attn.", "attention"),
    (".mlp.", "dense layers"),
    ("embed_tokens.", "embedding"),
    ("lm_head.", "output head"),
)


@dataclass(slots=True)
class Error:
    """Groups and squared sums over some weights; `+=` adds others."""

    groups: int = 0
    exact_groups: int = 0
    squared_error: float = 0.0
    squared_norm: float = 0.0

    def __iadd__(self, other: "Error") -> "Error":
        self.groups += other.groups
        self.exact_groups += other.exact_groups
        self.squared_error += other.squared_error
        self.squared_norm += other.squared_norm
        return self

    @property
    def relative_rms(self) -> float:
        """‖new - old‖₂ / ‖old‖₂; 0 where nothing moved."""
        return math.sqrt(self.squared_error / self.squared_norm) if self.squared_error else 0.0

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "relative_rms": self.relative_rms,
            "groups_exact": self.exact_groups,
            "groups_rounded": self.groups - self.exact_groups,
        }


def error_of(new: Tensor, old: Tensor, exact_groups: int, groups: int) -> Error:
    """The error of some rows, both float32 and of one shape."""
    squared_error, squared_norm = (float(t.square().sum(dtype=torch.float64)) for t in (new - old, old))
    return Error(groups, exact_groups, squared_error, squared_norm)


@dataclass(slots=True)
class Report:
    """The account of one quantization; `weights` holds an error for each int4 weight, by canonical name."""

    source: str
    target: str
    format: str
    bytes_before: int
    bytes_after: int
    weights: dict[str, Error] = field(default_factory=dict)
    groups_already_int4: int = 0
    narrowed_values: int = 0  # values outside of int4 weights that rounding to bf16 changed
    left_in_bf16: list[str] = field(default_factory=list)  # inputs not divisible by 32
    perplexity: Perplexity | None = None

    @property
    def total(self) -> Error:
        """Over all int4 weights."""
        return _sum(self.weights.values())

    @property
    def by_layer(self) -> dict[tuple[int | None, str], Error]:
        """(layer, component) -> error, in the order of the layers; None for embedding and head."""
        found: dict[tuple[int | None, str], list[Error]] = {}
        for name, error in self.weights.items():
            found.setdefault((names.layer_of(name), component_of(name)), []).append(error)
        order = sorted(found, key=lambda key: (key[0] is None, key[0] or 0, key[1]))
        return {key: _sum(found[key]) for key in order}

    @property
    def worst(self) -> list[tuple[str, Error]]:
        """Weights that moved, the largest relative error first; at most 20."""
        moved = [(name, error) for name, error in self.weights.items() if error.squared_error]
        return sorted(moved, key=lambda item: (-item[1].relative_rms, item[0]))[:SHOWN_WORST]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        total = self.total
        layers = [{"layer": at[0], "component": at[1], **error.to_dict()} for at, error in self.by_layer.items()]
        return {
            "source": self.source,
            "target": self.target,
            "format": self.format,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            **total.to_dict(),
            "groups_already_int4": self.groups_already_int4,
            "narrowed_values": self.narrowed_values,
            "left_in_bf16": self.left_in_bf16,
            "layers": layers,
            "worst": [{"name": name, **error.to_dict()} for name, error in self.worst],
            "perplexity": None if self.perplexity is None else self.perplexity.to_dict(),
        }


def component_of(name: str) -> str:
    """What a canonical name of a quantized weight is a part of."""
    return next((component for mark, component in _COMPONENTS if mark in name), "other")


def _sum(errors: Iterable[Error]) -> Error:
    total = Error()
    for error in errors:
        total += error
    return total
