"""Layers of packed modules for tokens that attend absorbed: the whole stack, or a layer, as one call of the kernels.

The modules compute the same, operation by operation, bit for bit; what is saved is Python between operations, which
takes three quarters of a small model's time. One call serves when every token of a pass attends absorbed over a bf16
cache: all tokens of a `PagedPass` single, or few enough a row over a `LatentCache` (`forms.py`). With experts from
elsewhere or a watch, attention is one call and the rest is modules; in every other case all is.

The one call sees neither hooks nor a `forward` that somebody put in a module's place. Hooks of layers run where
`one_by_one` is set.

Legend: B batch, T tokens, n = B · T, D hidden, P pairs, M most blocks of a sequence.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from karakoram.kernels import ops
from karakoram.kernels.layer import Attention, DecoderLayer, Mixture, Stack, Triple
from karakoram.kernels.packed import PackedMatrix
from karakoram.model.attention import LatentAttention
from karakoram.model.cache import Cache, LatentCache, PagedPass
from karakoram.model.documents import Documents
from karakoram.model.moe import ExpertBank, MixtureOfExperts
from karakoram.model.packed.modules import (
    PackedAttention,
    PackedBank,
    PackedFeedForward,
    PackedLinear,
    PackedMixture,
    PackedRouter,
)
from karakoram.model.transformer import Decoder, Layer
from karakoram.model.watch import Watch

Rotation = tuple[Tensor, Tensor]


class PackedLayer(Layer):
    """A layer whose modules have been replaced by packed ones; `stack` is its description."""

    stack: Stack

    def forward(
        self,
        x_BTD: Tensor,
        rotation: Rotation,
        positions_BT: Tensor,
        cache: Cache | PagedPass | None = None,
        experts: ExpertBank | None = None,
        watch: Watch | None = None,
        documents: Documents | None = None,
    ) -> Tensor:
        """As `Layer.forward`."""
        number = self.self_attn.layer
        places = singles(cache, positions_BT, self.self_attn, number, number + 1)
        if places is None:
            return super().forward(x_BTD, rotation, positions_BT, cache, experts, watch, documents)
        x_nD, (cos, sin) = x_BTD.flatten(0, 1), (part.flatten(0, 1) for part in rotation)
        if self.stack.whole and experts is None and watch is documents is None:
            return ops.decode_layers(self.stack, x_nD, cos, sin, *places).view(x_BTD.shape)
        halves = ops.decode_attention(self.stack, x_nD, cos, sin, *places)
        x, normed = (half.view(x_BTD.shape) for half in halves)
        return x + (self.mlp(normed, experts, watch) if isinstance(self.mlp, MixtureOfExperts) else self.mlp(normed))


class PackedDecoder(Decoder):
    """The stack of `PackedLayer`s.

    one_by_one  whether layers are called one after another in any case: to time them, or to hook into them
    """

    stack: Stack
    one_by_one = False

    def forward(
        self,
        x_BTD: Tensor,
        rotation: Rotation,
        positions_BT: Tensor,
        cache: Cache | PagedPass | None = None,
        experts: ExpertBank | None = None,
        watch: Watch | None = None,
        documents: Documents | None = None,
    ) -> Tensor:
        """As `Decoder.forward`."""
        together = self.stack.whole and not self.one_by_one and experts is None and watch is documents is None
        first: Any = self.layers[0]
        places = None if not together else singles(cache, positions_BT, first.self_attn, 0, len(self.layers))
        if places is None:
            return super().forward(x_BTD, rotation, positions_BT, cache, experts, watch, documents)
        cos, sin = (part.flatten(0, 1) for part in rotation)
        x_nD = ops.decode_layers(self.stack, x_BTD.flatten(0, 1), cos, sin, *places)
        return self.norm(x_nD.view(x_BTD.shape))


def join(decoder: Decoder) -> None:
    """A decoder whose modules are packed ones becomes a `PackedDecoder`."""
    packed: Any = decoder
    packed.__class__ = PackedDecoder
    packed.stack = Stack(tuple(describe(layer) for layer in packed.layers))
    for layer, described in zip(packed.layers, packed.stack.layers, strict=True):
        layer.__class__ = PackedLayer
        layer.stack = Stack((described,))


class Places(NamedTuple):
    """Where single tokens stand: `ops.decode_layers`' last arguments."""

    lengths_n: Tensor
    cache: Tensor
    blocks_nM: Tensor | None = None


def singles(
    cache: Cache | PagedPass | None, positions_BT: Tensor, attention: LatentAttention, first: int, end: int
) -> Places | None:
    """For layers `first` to `end`: None where not every token attends absorbed in the kernels.

    Raises InputError as `LatentCache.reserve` does.
    """
    if isinstance(cache, PagedPass):
        if cache.spans or cache.rows.dtype != torch.bfloat16:
            return None
        return Places(cache.seen_T, cache.rows[first:end], cache.tables)
    if not isinstance(cache, LatentCache) or cache.rows.dtype != torch.bfloat16 or not positions_BT.numel():
        return None
    if not attention.absorbs(positions_BT.shape[1], int(positions_BT.max()) + 1):
        return None
    for layer in range(first, end):
        cache.reserve(layer, positions_BT)
    return Places(positions_BT.flatten() + 1, cache.rows[first:end])


def describe(layer: Layer) -> DecoderLayer:
    """Its modules' weights and numbers as one operation takes them; no `feed` where it has no such experts."""
    c, attention = layer.self_attn.config, layer.self_attn
    assert isinstance(attention, PackedAttention)
    low_rank = c.q_lora_rank is not None
    described = Attention(
        q_a=_matrix(attention.q_a_proj) if low_rank else None,
        q_a_norm=attention.q_a_layernorm.weight if low_rank else None,
        q=_matrix(attention.q_b_proj if low_rank else attention.q_proj),
        kv_a=_matrix(attention.kv_a_proj_with_mqa),
        kv_a_norm=attention.kv_a_layernorm.weight,
        keys=attention.keys,
        kv_b=_matrix(attention.kv_b_proj),
        o=_matrix(attention.o_proj),
        heads=c.num_attention_heads,
        scale=attention.scale,
        eps=attention.kv_a_layernorm.eps,
    )
    first, second = layer.input_layernorm, layer.post_attention_layernorm
    return DecoderLayer(first.weight, described, second.weight, _feed(layer.mlp), first.eps)


def _feed(module: nn.Module) -> Triple | Mixture | None:
    if isinstance(module, PackedFeedForward):
        return module.matrices
    if not isinstance(module, PackedMixture):
        return None
    gate, bank, shared = module.gate, module.experts, module.shared_experts
    if not (isinstance(gate, PackedRouter) and isinstance(bank, PackedBank)):
        return None
    assert shared is None or isinstance(shared, PackedFeedForward)
    c = gate.config
    return Mixture(
        gate.matrix, gate.e_score_correction_bias, bank.packed, None if shared is None else shared.matrices,
        c.num_experts_per_tok, c.n_group, c.topk_group, c.norm_topk_prob, c.routed_scaling_factor,
    )  # fmt: skip


def _matrix(projection: nn.Module) -> PackedMatrix:
    assert isinstance(projection, PackedLinear)
    return projection.matrix
