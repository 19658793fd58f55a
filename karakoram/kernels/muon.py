"""The menu, continued: what a Muon step does to all numbers of its matrices. Chosen as in `ops`.

    momentum       gradients into the momentum, and what is to be made orthogonal     one pass, torch takes four
    newton_schulz  a few times X ← aX + (bG + cG²)X with G = XXᵀ, for a whole stack    each matrix in one core's cache
    update         decay and step, and how long the step is                           one pass, torch takes five
    step           all three, for the matrices of many weights                        from gradient to weight in one go

In C++ with AVX-512 BF16; elsewhere, with AMX too, torch's own products. In C++ all make torch's bits: pairs are
summed in order, then one float32 scale, one fused addition, one rounding. That is oneDNN's order, found by trying; sums
longer than 512 are cut as there. `docs/kernels.md` has the numbers.

Legend: n matrices of A rows and B columns; X has the shorter side's number of rows.
"""

import ctypes
import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from karakoram.errors import InputError
from karakoram.kernels import reference
from karakoram.kernels.cpu.library import Library, alone, describe
from karakoram.kernels.ops import chosen

_RULE = struct.Struct("=5fi")  # k2_muon_rule
# Beyond these torch sums in another order still, and its products are as large as its cores want them.
MOST_SHORTER, MOST_LONGER = 512, 1024


def library(implementation: str | None = None) -> Library | None:
    """The library where its instruction set has Muon, else None. Raises InputError where "cpu" cannot be had."""
    found = chosen(implementation)
    if found is None or found.c.k2_muon_here():
        return found
    if implementation == "cpu":
        raise InputError(f"The instruction set {found.isa} has no Muon.", "Leave the implementation open.")
    return None


def newton_schulz(
    stack_nAB: Tensor,
    norms_n: Tensor,
    steps: Sequence[tuple[float, float, float]],
    out: Tensor | None = None,
    implementation: str | None = None,
) -> Tensor:
    """Of a stack over its norms [n], rounded to its dtype, one or more steps (a, b, c) -> [n, A, B], in `out` if given.

    The library takes bfloat16. It uses one thread where torch does, else the pool's.
    """
    out = torch.empty_like(stack_nAB, memory_format=torch.contiguous_format) if out is None else out
    lib = library(implementation) if stack_nAB.is_cpu and stack_nAB.dtype == torch.bfloat16 else None
    shorter, longer = sorted(stack_nAB.shape[1:])
    fits = shorter <= MOST_SHORTER and longer <= MOST_LONGER
    if lib is None or not (fits or implementation == "cpu"):
        return reference.newton_schulz(stack_nAB, norms_n, steps, out)
    stack_nAB, norms_n = stack_nAB.contiguous(), norms_n.to(stack_nAB.dtype).float().contiguous()
    rows = torch.tensor(steps, dtype=torch.float32)
    lib.call("k2_newton_schulz", describe(stack_nAB), describe(norms_n), describe(rows), alone(), describe(out))
    return out


def momentum(
    gradient: Tensor,
    buffer: Tensor,
    momentum: float,
    scale: float = 1.0,
    nesterov: bool = True,
    implementation: str | None = None,
) -> Tensor:
    """M ← M + (1 − μ)(scale·G − M), float32, in place -> M, or with `nesterov` G + μ(M − G), rounded to bfloat16."""
    lib = library(implementation) if _plain(buffer, torch.float32) and _plain(gradient, gradient.dtype) else None
    if lib is None or gradient.dtype not in (torch.float32, torch.bfloat16):
        return reference.momentum(gradient, buffer, momentum, scale, nesterov)
    out = torch.empty(buffer.shape, dtype=torch.bfloat16)
    lib.call(
        "k2_muon_momentum", describe(gradient.view(-1)), describe(buffer.view(-1)), ctypes.c_float(momentum),
        ctypes.c_float(1 - momentum), ctypes.c_float(scale), ctypes.c_int32(nesterov), alone(), describe(out.view(-1)),
    )  # fmt: skip
    return out


def update(weight: Tensor, step: Tensor, keep: float, by: float, implementation: str | None = None) -> Tensor:
    """W ← keep·W + by·step in place, float32 and bfloat16 -> Σ step², float32."""
    plain = _plain(weight, torch.float32) and _plain(step, torch.bfloat16) and weight.shape == step.shape
    if (lib := library(implementation) if plain else None) is None:
        return reference.update(weight, step, keep, by)
    squares = ctypes.c_float()
    lib.call(
        "k2_muon_update", describe(weight.view(-1)), describe(step.view(-1)), ctypes.c_float(keep), ctypes.c_float(by),
        alone(), ctypes.byref(squares),
    )  # fmt: skip
    return torch.tensor(squares.value)


def step(
    weights: Sequence[tuple[Tensor, Tensor, Tensor]],
    by: Sequence[float],
    keep: float,
    steps: Sequence[tuple[float, float, float]],
    rule: tuple[float, float, bool],
    shrink: float = 1.0,
) -> Tensor:
    """W ← keep·W + by·O of every (gradient, momentum, weight) [.., A, B], O the momentum made orthogonal -> Σ O² each.

    rule    μ, the gradients' scale, and whether Nesterov's: as in `momentum`
    shrink  norms are taken this much larger

    For weights that `takes` takes, where there is a library; all in one call and one round of the pool's threads.
    """
    lib = library("cpu")
    assert lib is not None
    mu, scale, nesterov = rule
    packed = _RULE.pack(mu, 1 - mu, scale, keep, shrink, nesterov)
    rows, squares = torch.tensor(steps, dtype=torch.float32), torch.empty(len(weights))
    described = [b"".join(map(describe, tensors)) for tensors in zip(*weights, strict=True)] or [b""] * 3
    lib.call(
        "k2_muon_step", packed, describe(rows), ctypes.c_int64(len(weights)), *described,
        struct.pack(f"{len(by)}f", *by), alone(), ctypes.c_void_p(squares.data_ptr()),
    )  # fmt: skip
    return squares


def takes(gradient: Tensor, buffer: Tensor, weight: Tensor) -> bool:
    """Whether `step` can have this weight: there is a library, it is not too large, its matrices lie in one piece."""
    shorter, longer = sorted(weight.shape[-2:])
    return (
        gradient.dtype in (torch.float32, torch.bfloat16)
        and buffer.dtype == weight.dtype == torch.float32
        and all(tensor.is_cpu and tensor.ndim <= 4 and _whole(tensor) for tensor in (gradient, buffer, weight))
        and shorter <= MOST_SHORTER
        and longer <= MOST_LONGER
        and library() is not None
    )


def _whole(tensor: Tensor) -> bool:
    """Whether its matrices lie row after row."""
    columns = tensor.shape[-1]
    return tensor.stride(-1) == 1 and (tensor.stride(-2) == columns or tensor.shape[-2] == 1)


def _plain(tensor: Tensor, dtype: torch.dtype) -> bool:
    return tensor.is_cpu and tensor.dtype == dtype and tensor.is_contiguous()
