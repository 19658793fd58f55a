"""A whole decoder layer as one operation's argument: its weights and numbers, described to the library once.

Decoding one token, a layer is some fourteen small operations; each by itself costs more in Python (describing tensors,
allocating results) than it computes, in a small model. `ops.decode_layers` runs a `Stack` of layers in one call,
`ops.decode_attention` the first half of one layer, for experts that live elsewhere.

Legend: D hidden, H heads, N nope, R rope, V value, L latent, E experts.
"""

import ctypes
import struct
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

from torch import Tensor

from karakoram.errors import InputError
from karakoram.kernels.cpu.library import PANELS, describe, describe_packed
from karakoram.kernels.packed import PackedExperts, PackedMatrix

Triple = tuple[PackedMatrix, PackedMatrix, PackedMatrix]  # gate, up, down
_TENSOR_BYTES = 80  # k2_tensor
_NONE = bytes(_TENSOR_BYTES)
_NUMBERS = struct.Struct("=Q5qi4fi")  # k2_layer behind its tensors


class Attention(NamedTuple):
    """Of one layer; `q_a` and `q_a_norm` are None where the query has no low rank."""

    q_a: PackedMatrix | None  # [rank, D]
    q_a_norm: Tensor | None  # bf16 [rank]
    q: PackedMatrix  # [H·(N + R), rank or D]
    kv_a: PackedMatrix  # [L + R, D]
    kv_a_norm: Tensor  # bf16 [L]
    keys: PackedMatrix  # [H·L, N]: the key half of kv_b, transposed
    kv_b: PackedMatrix  # [H·(N + V), L]
    o: PackedMatrix  # [D, H·V]
    heads: int
    scale: float
    eps: float  # of its two norms


class Mixture(NamedTuple):
    """Router, routed experts, shared ones."""

    router: PackedMatrix  # [E, D]
    bias: Tensor  # float32 [E]
    experts: PackedExperts
    shared: Triple | None
    chosen: int
    groups: int
    best_groups: int
    normalise: bool
    scale: float


class DecoderLayer(NamedTuple):
    """norm, attention, norm, feed-forward.

    feed    a dense SwiGLU's gate, up, down, or a mixture; None: it is computed elsewhere
    """

    input_norm: Tensor  # bf16 [D]
    attention: Attention
    post_norm: Tensor  # bf16 [D]
    feed: Triple | Mixture | None
    eps: float


@dataclass(frozen=True)
class Stack:
    """Layers that are run one after another. Keeps what its description points to alive."""

    layers: tuple[DecoderLayer, ...]
    # by implementation, once: `k2_layer` after `k2_layer`, and the records that they point to
    described: dict[str, tuple[bytes, object]] = field(default_factory=dict, init=False, compare=False, repr=False)

    def __reduce__(self) -> tuple[type["Stack"], tuple[tuple[DecoderLayer, ...]]]:
        return Stack, (self.layers,)  # a copy lies elsewhere: not `described`

    @cached_property
    def whole(self) -> bool:
        """Whether all of its layers can be run from beginning to end."""
        return all(layer.feed is not None for layer in self.layers)

    def describe(self) -> bytes:
        """As the library sees it: an array of `k2_layer`."""
        found = self.described.get("cpu")
        if found is None:
            records = [_records(layer.feed) for layer in self.layers]
            parts = [_layer(layer, ctypes.addressof(r)) for layer, r in zip(self.layers, records, strict=True)]
            found = self.described["cpu"] = b"".join(parts), records
        return found[0]


def _records(feed: Triple | Mixture | None) -> "ctypes.Array[ctypes.c_void_p]":
    addresses = feed.experts.addresses if isinstance(feed, Mixture) else ()
    return (ctypes.c_void_p * len(addresses))(*addresses)


def _layer(layer: DecoderLayer, records: int) -> bytes:
    a, feed = layer.attention, layer.feed
    mixture = feed if isinstance(feed, Mixture) else None
    if mixture is not None:
        _check_experts(mixture, a.o.outputs)
    triple = feed.shared if isinstance(feed, Mixture) else feed
    tensors = (
        layer.input_norm, a.q_a, a.q_a_norm, a.q, a.kv_a, a.kv_a_norm, a.keys, a.kv_b, a.o, layer.post_norm,
        mixture and mixture.router, mixture and mixture.bias, *(triple or (None, None, None)),
    )  # fmt: skip
    numbers = (
        (mixture.experts.intermediate, mixture.chosen, mixture.groups, mixture.best_groups, mixture.normalise,
         mixture.scale)
        if mixture
        else (0, 0, 0, 0, 0, 0.0)
    )  # fmt: skip
    floats_and_kind = a.scale, layer.eps, a.eps, PANELS[mixture.experts.kind] if mixture else 0
    return b"".join(map(_tensor, tensors)) + _NUMBERS.pack(records, a.heads, *numbers, *floats_and_kind)


def _check_experts(mixture: Mixture, hidden: int) -> None:
    """What the library, which sees addresses, cannot."""
    experts, router = mixture.experts, mixture.router
    if experts.hidden != hidden or experts.experts != router.outputs:
        raise InputError(
            f"{experts.experts} experts of {experts.hidden} inputs do not fit a router of {router.outputs} and a layer "
            f"of {hidden}.",
            "Take this layer's experts.",
        )


def _tensor(given: Tensor | PackedMatrix | None) -> bytes:
    if given is None:
        return _NONE
    if isinstance(given, PackedMatrix):
        return describe_packed(given.data, given.kind, given.outputs, given.inputs)
    return describe(given)
