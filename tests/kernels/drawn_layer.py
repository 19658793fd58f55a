"""Decoder layers and passes drawn at random, for tests of whole layers; legend as in `karakoram.kernels.layer`."""

from typing import NamedTuple

import torch
from torch import Tensor

from karakoram.kernels.layer import Attention, DecoderLayer, Mixture, Triple
from karakoram.kernels.packed import Kind
from tests.kernels import drawn


class Shape(NamedTuple):
    """Of a layer; `rank` 0: no low-rank query, `shared` 0: no shared experts, `experts` 0: a dense layer."""

    hidden: int = 96
    heads: int = 3
    nope: int = 32
    rope: int = 32
    value: int = 48
    latent: int = 64
    rank: int = 64
    experts: int = 8
    groups: int = 1
    shared: int = 48
    kind: Kind = "bf16"


SHAPES = {
    "low-rank query": Shape(),
    "plain query, more heads than a panel": Shape(heads=17, rank=0),
    "groups, no shared experts": Shape(groups=4, shared=0),
    "dense": Shape(experts=0, shared=160),
    "int4": Shape(kind="int4", heads=2, nope=16, rope=16, value=32, latent=96),
    "fp8, odd widths": Shape(kind="fp8", hidden=160, rope=6, value=16, rank=32, nope=16, latent=48),
}


def vector(size: int) -> Tensor:
    """A norm's weight."""
    return (1 + torch.randn(size) / 8).to(torch.bfloat16)


def drawn_layer(s: Shape) -> DecoderLayer:
    """Weights of a shape."""

    def matrix(outputs: int, inputs: int):
        return drawn.matrix(s.kind, outputs, inputs)

    attention = Attention(
        q_a=matrix(s.rank, s.hidden) if s.rank else None,
        q_a_norm=vector(s.rank) if s.rank else None,
        q=matrix(s.heads * (s.nope + s.rope), s.rank or s.hidden),
        kv_a=matrix(s.latent + s.rope, s.hidden),
        kv_a_norm=vector(s.latent),
        keys=drawn.matrix("bf16", s.heads * s.latent, s.nope),
        kv_b=matrix(s.heads * (s.nope + s.value), s.latent),
        o=matrix(s.hidden, s.heads * s.value),
        heads=s.heads,
        scale=0.1,
        eps=1e-6,
    )
    beside: Triple | None = None
    if s.shared:
        beside = matrix(s.shared, s.hidden), matrix(s.shared, s.hidden), drawn.matrix("bf16", s.hidden, s.shared)
    feed = beside
    if s.experts:
        router, bias = drawn.matrix("bf16", s.experts, s.hidden), torch.randn(s.experts) / 16
        experts = drawn.experts(s.experts, s.hidden, 64)
        feed = Mixture(router, bias, experts, beside, 3, s.groups, max(1, s.groups // 2), True, 2.5)
    return DecoderLayer(vector(s.hidden), attention, vector(s.hidden), feed, 1e-5)


def clearly_routed(layer: DecoderLayer) -> DecoderLayer:
    """Whose router chooses the same experts whatever rounding does: by its biases."""
    if not isinstance(layer.feed, Mixture):
        return layer
    return layer._replace(feed=layer.feed._replace(bias=torch.arange(float(len(layer.feed.bias)))))


class Pass(NamedTuple):
    """Tokens and where they stand: the last arguments of `ops.decode_layers`."""

    x_nD: Tensor
    cos_nP: Tensor
    sin_nP: Tensor
    lengths_n: Tensor
    cache: Tensor
    blocks_nM: Tensor | None

    def copy(self) -> "Pass":
        """With a cache of its own, for a call that writes into it."""
        return self._replace(cache=self.cache.clone())


def drawn_pass(s: Shape, tokens: int, layers: int, size: int = 16, longest: int = 50) -> Pass:
    """Every token in a sequence of its own, in blocks of `size`; what no token sees is NaN."""
    lengths = torch.randint(1, longest + 1, (tokens,))
    contexts = torch.full((tokens, longest, s.latent + s.rope), float("nan"), dtype=torch.bfloat16)
    for t in range(tokens):
        contexts[t, : lengths[t] - 1] = drawn.rows(int(lengths[t]) - 1, contexts.shape[2])
    pool, blocks = drawn.in_blocks(contexts, size)
    for t in range(tokens):
        blocks[t, -(-int(lengths[t]) // size) :] = -1  # not given yet
    angles = torch.rand(tokens, s.rope // 2) * 6
    cache = pool.expand(layers, -1, -1, -1).clone()
    return Pass(drawn.rows(tokens, s.hidden), angles.cos(), angles.sin(), lengths, cache, blocks)


def layers_near(found: Tensor, expected: Tensor) -> bool:
    """As `drawn.near`, with twice the room: a layer rounds a dozen times, not once."""
    return drawn.deviation(found, expected) <= 2**-6
