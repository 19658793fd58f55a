"""No less exact than torch in bf16, measured from float64.

Both compute with the same weights as the checkpoint means them, rounded to bf16: float64 gives the truth, torch's own
chain (bf16 weights, bf16 products, bf16 between) the error that is usual. Every instruction set must stay within 1.5 of
it, with Gaussian activations and with one channel in a hundred fifty times as large, as trained models have them.
"""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from karakoram.kernels import ops, reference
from karakoram.kernels.packed import Kind, PackedExperts, PackedMatrix
from tests.kernels import drawn

WORSE = 1.5
OUTLIERS = pytest.mark.parametrize("outliers", [False, True], ids=["gaussian", "outliers"])
TOKENS = pytest.mark.parametrize("tokens", [3, 40])  # decoded on the fly, and through tiles


def activations(tokens: int, width: int, outliers: bool) -> Tensor:
    x = torch.randn(tokens, width)
    if outliers:
        x[:, torch.randperm(width)[: max(1, width // 100)]] *= 50
    return x.to(torch.bfloat16)


def no_worse(found: Tensor, exact: Tensor, usual: Tensor) -> bool:
    error = float((found.double() - exact).norm() / exact.norm())
    allowed = WORSE * float((usual.double() - exact).norm() / exact.norm())
    print(f"error {error:.2e}, {error / allowed * WORSE:.2f} of torch's in bf16")
    return error <= allowed


def feed_forward(x: Tensor, parts: tuple[PackedMatrix, ...]) -> Tensor:
    """In the precision of x."""
    gate, up, down = (part.dense().to(x.dtype) for part in parts)
    return (F.silu(x @ gate.T) * (x @ up.T)) @ down.T


def mixture(
    x: Tensor, ids: Tensor, weights: Tensor, experts: PackedExperts, shared: tuple[PackedMatrix, ...]
) -> Tensor:
    """Experts in the precision of x, weighted and summed in that of the weights, as the released model code does."""
    every = torch.stack([feed_forward(x, experts.parts(e)) for e in range(experts.experts)], 1)
    chosen = every.gather(1, ids[..., None].expand(-1, -1, x.shape[1]))
    routed = (chosen.to(weights.dtype) * weights[..., None]).sum(1).to(x.dtype)
    return routed + feed_forward(x, shared)


def attention(q: Tensor, cache: Tensor, latent: int, scale: float) -> Tensor:
    """One sequence, in the precision of q, the softmax in float32 or better."""
    scores = (q @ cache.T * scale).to(torch.promote_types(q.dtype, torch.float32))
    return scores.softmax(-1).to(q.dtype) @ cache[:, :latent]


@OUTLIERS
@TOKENS
@pytest.mark.parametrize("kind", drawn.KINDS)
def test_linear(isa: str, kind: Kind, tokens: int, outliers: bool) -> None:
    x, weight = activations(tokens, 1024, outliers), drawn.matrix(kind, 96, 1024)
    dense = weight.dense()
    assert no_worse(ops.linear(x, weight), x.double() @ dense.double().T, x @ dense.T)


@OUTLIERS
@TOKENS
@pytest.mark.parametrize("kind", drawn.KINDS)
def test_mlp(isa: str, kind: Kind, tokens: int, outliers: bool) -> None:
    x, parts = activations(tokens, 512, outliers), drawn.feed_forward(kind, 512, 256)
    assert no_worse(ops.mlp(x, *parts), feed_forward(x.double(), parts), feed_forward(x, parts))


@OUTLIERS
@TOKENS
def test_moe_int4(isa: str, tokens: int, outliers: bool) -> None:
    x, experts = activations(tokens, 512, outliers), drawn.experts(3, 512, 128)
    shared = drawn.feed_forward("bf16", 512, 128)
    ids, weights = drawn.routing(tokens, 3, 2)
    exact = mixture(x.double(), ids, weights.double(), experts, shared)
    found = ops.moe_int4(x, ids, weights, experts, shared)
    assert no_worse(found, exact, mixture(x, ids, weights, experts, shared))


@OUTLIERS
@pytest.mark.parametrize("tokens", [200, 1500])
def test_mla_decode(isa: str, tokens: int, outliers: bool) -> None:
    q, cache = activations(16, 192, False), activations(tokens, 192, outliers)
    scale = 192**-0.5
    found = ops.mla_decode(q[None], cache[None], torch.tensor([tokens]), 128, scale)[0]
    exact = attention(q.double(), cache.double(), 128, scale)
    assert no_worse(found, exact, attention(q, cache, 128, scale))


@OUTLIERS
def test_rms_norm(isa: str, outliers: bool) -> None:
    x, weight = activations(40, 1000, outliers), activations(1, 1000, False)[0]
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()
    assert no_worse(ops.rms_norm(x, weight, 1e-6), exact, reference.rms_norm(x, weight, 1e-6))


def test_the_measure_itself_tells_worse_from_usual() -> None:
    exact = torch.randn(64, 64).double()
    off: Callable[[float], Tensor] = lambda by: exact + by * torch.randn(64, 64)  # noqa: E731
    assert no_worse(off(1e-3), exact, off(1e-3))
    assert not no_worse(off(2e-3), exact, off(1e-3))
