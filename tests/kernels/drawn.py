"""What the tests of the kernels compute with: matrices, experts and caches drawn at random, and distances of results.

Weights are of the size of trained ones (about 1/√inputs), so that activations stay near 1 and a tolerance means the
same for every shape. Legend as in `karakoram.kernels.reference`.
"""

import torch
from torch import Tensor

from karakoram.formats import int4_group
from karakoram.kernels import ops
from karakoram.kernels.packed import Kind, PackedExperts, PackedMatrix, empty_experts

KINDS: tuple[Kind, ...] = ("int4", "bf16", "fp8")


def int4_parts(outputs: int, inputs: int) -> tuple[Tensor, Tensor]:
    """weight_packed and weight_scale as a checkpoint holds them."""
    q = torch.randint(-8, 8, (outputs, inputs), dtype=torch.int8)
    scale = (torch.rand(outputs, inputs // 32) + 0.5) / (4.6 * inputs**0.5)
    return int4_group.pack(q), scale.to(torch.bfloat16)


def fp8_parts(outputs: int, inputs: int) -> tuple[Tensor, Tensor]:
    """weight and weight_scale_inv as a checkpoint holds them."""
    weight = torch.randn(outputs, inputs).to(torch.float8_e4m3fn)
    return weight, (torch.rand(-(-outputs // 128), -(-inputs // 128)) + 0.5) / inputs**0.5


def matrix(kind: Kind, outputs: int, inputs: int) -> PackedMatrix:
    """A packed matrix; int4 takes inputs in multiples of 32."""
    if kind == "int4":
        return ops.pack_int4(*int4_parts(outputs, inputs))
    if kind == "fp8":
        return ops.pack_fp8(*fp8_parts(outputs, inputs))
    return ops.pack_bf16((torch.randn(outputs, inputs) / inputs**0.5).to(torch.bfloat16))


def feed_forward(kind: Kind, hidden: int, width: int, last: Kind | None = None) -> tuple[PackedMatrix, ...]:
    """Gate, up and down; `last` is the kind of down where that differs."""
    return matrix(kind, width, hidden), matrix(kind, width, hidden), matrix(last or kind, hidden, width)


def experts(count: int, hidden: int, intermediate: int, kind: Kind = "int4") -> PackedExperts:
    """The routed experts of a layer."""
    room = empty_experts(count, hidden, intermediate, kind)
    for e in range(count):
        for part in room.parts(e):
            part.data.copy_(matrix(kind, part.outputs, part.inputs).data)
    return room


def rows(tokens: int, width: int, stride: int | None = None) -> Tensor:
    """Activations bf16 [tokens, width], `stride` apart if that is given."""
    return torch.randn(tokens, stride or width).to(torch.bfloat16)[:, :width]


def routing(tokens: int, count: int, slots: int, dtype: torch.dtype = torch.int64) -> tuple[Tensor, Tensor]:
    """Ids [T, K], an expert perhaps in several slots of a token, and weights [T, K]."""
    return torch.randint(0, count, (tokens, slots)).to(dtype), torch.rand(tokens, slots)


def in_blocks(cache_BSx: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The same cache in blocks of `size` tokens in random order, the rest of the last ones NaN: (pool, block table)."""
    batch, tokens, width = cache_BSx.shape
    each = -(-tokens // size)
    table = torch.randperm(batch * each).view(batch, each).to(torch.int32)
    padded = torch.full((batch, each * size, width), float("nan"), dtype=cache_BSx.dtype)
    padded[:, :tokens] = cache_BSx
    pool = torch.empty(batch * each, size, width, dtype=cache_BSx.dtype)
    pool[table.flatten().long()] = padded.view(batch * each, size, width)
    return pool, table


def deviation(found: Tensor, expected: Tensor) -> float:
    """Of the row that is furthest off: |found - expected| / |expected|, no row counting as shorter than the average.

    Of a few numbers all may have cancelled to almost nothing; so the average of fewer than 16 counts as no less than 1,
    which is about what everything here is drawn to come to.
    """
    if not expected.numel():
        return 0.0
    expected_RN = expected.double().flatten(0, -2)
    off = (found.double().flatten(0, -2) - expected_RN).norm(dim=-1)
    average = float(expected_RN.square().mean().sqrt())
    least = max(average, 1.0) if expected.numel() < 16 else average
    return float((off / expected_RN.norm(dim=-1).clamp(min=least * expected_RN.shape[1] ** 0.5)).max())


def near(found: Tensor, expected: Tensor) -> bool:
    """Whether bf16 results are the same but for rounding: their own, and that of activations and weights before.

    Two neighbouring bf16 numbers are at most 2^-7 of themselves apart. Over a row that averages out to less than half
    of it; rows of a few numbers may be off by two such steps.
    """
    off, allowed = deviation(found, expected), 2**-7 if expected.shape[-1] >= 16 else 2**-6
    if off > allowed:
        print(f"{list(found.shape)} is off by {off:.2e}, allowed are {allowed:.2e}")
    return found.shape == expected.shape and off <= allowed
