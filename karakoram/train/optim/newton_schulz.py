"""Newton-Schulz: every matrix of a stack to about U·Vᵀ of its singular value decomposition, by products alone.

    X ← G / ‖G‖;   a few times   A = X·Xᵀ,  X ← a·X + (b·A + c·A²)·X

A step maps each singular value σ to aσ + bσ³ + cσ⁵ and leaves the singular vectors. Which (a, b, c), and how often, is
a choice: `SETS`. Keller Jordan's five steps, K2's and Moonlight's, do not converge to 1: values from 0.01 on land in
[0.7, 1.2] (arXiv 2502.16982, §2.2). Sets therefore differ in the RMS that a step of one learning rate has. `rms` tells
it per set, as `benchmarks/newton_schulz_spectra.py` measured it on known spectra; `calibrate` divides by it.

In bfloat16 the roundings are those of torch.optim.Muon, so both make the same numbers: the matrix is rounded, then its
norm, then their quotient. A scale by a power of two comes before, which moves no bit of that and keeps squares of
1e-20 from vanishing. On a CPU with AVX-512 BF16 the iteration is one call of `kernels.muon`, which makes the same bits.

Legend: n matrices of A rows and B columns, A ≤ B inside.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from karakoram.errors import TrainingError
from karakoram.kernels import muon

Spectrum = Literal["gaussian", "power_law"]
Step = tuple[float, float, float]


@dataclass(frozen=True)
class Coefficients:
    """Steps (a, b, c) in order.

    rms     spectrum -> RMS(O)·√max(A, B) after them, float32, 512 × 512: "gaussian", or "power_law" with σ_i ∝ i^-1.5
    shrink  the norm is taken this much larger: for steps that overshoot 1 and would diverge from rounding beyond it
    """

    steps: tuple[Step, ...]
    rms: dict[Spectrum, float]
    shrink: float = 1.0


_JORDAN: Step = (3.4445, -4.7750, 2.0315)
# Polar Express (arXiv 2505.16932), rounded as published; the first maps 1 to 1.76, from where 2 % more would diverge
_POLAR_EXPRESS: tuple[Step, ...] = (
    (8.2051, -22.9019, 16.4607), (4.0664, -2.8612, 0.5184), (3.9096, -2.8234, 0.5250), (3.2856, -2.4153, 0.4853),
    (2.2779, -1.6198, 0.3985), (1.8726, -1.2307, 0.3585), (1.8564, -1.2132, 0.3568), (1.8750, -1.2500, 0.3750),
)  # fmt: skip
_YOU: tuple[Step, ...] = (
    (4.0848, -6.8946, 2.9270), (3.9505, -6.3029, 2.6377), (3.7418, -5.5913, 2.3037), (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)  # fmt: skip

SETS: dict[str, Coefficients] = {
    "jordan": Coefficients((_JORDAN,) * 5, {"gaussian": 0.9396, "power_law": 0.4015}),
    "you": Coefficients(_YOU, {"gaussian": 0.9958, "power_law": 0.4134}),
    "polar_express_5": Coefficients(_POLAR_EXPRESS[:5], {"gaussian": 0.9988, "power_law": 0.5062}, 1.02),
    "polar_express_8": Coefficients(_POLAR_EXPRESS, {"gaussian": 0.9985, "power_law": 0.8503}, 1.02),
    # eight steps that pull small values up, two that converge
    "deepseek_8_2": Coefficients((_JORDAN,) * 8 + ((2.0, -1.5, 0.5),) * 2, {"gaussian": 1.0000, "power_law": 1.0004}),
}
# Numbers that are worked on at once: a step's inputs and results should stay in a last-level cache (32 MiB here).
CHUNK_NUMBERS = 1 << 21
# float32 products are summed in pieces, and a·X, b·A added last: of a long sum every term adds a rounding, and five
# steps multiply them. Against float64, 128 × 256: 1.4e-6 in one sum, 6.5e-7 so, for a tenth more time.
SUMMED_AT_ONCE = 16
# Norms between which squares neither vanish nor overflow: of 1e8 numbers alike, each is 1e-14 or 1e6 there.
SAFE_NORMS = (1e-10, 1e10)


def named(coefficients: str) -> Coefficients:
    """A set by name. Raises TrainingError for a name that is none."""
    if coefficients not in SETS:
        raise TrainingError(f"There is no set of coefficients {coefficients!r}.", f"Take one of {', '.join(SETS)}.")
    return SETS[coefficients]


@torch.no_grad()
def orthogonalize(
    stack_nAB: Tensor,
    coefficients: str = "jordan",
    dtype: torch.dtype = torch.bfloat16,
    calibrate: Spectrum | None = None,
) -> Tensor:
    """Each matrix of a stack [..., A, B], tall or wide -> about U·Vᵀ, in `dtype`; the stack stays as it is.

    Zero gives zero, and scale does not matter down to 1e-38. With `calibrate`, the RMS of a full-rank result is that of
    an exact U·Vᵀ, 1/√max(A, B), where the input has the spectrum named.
    """
    chosen, tall = named(coefficients), stack_nAB.shape[-2] > stack_nAB.shape[-1]
    turned = tall and dtype == torch.float32  # `muon.newton_schulz` turns its own
    given = stack_nAB.mT if turned else stack_nAB
    flat = given.reshape(-1, *given.shape[-2:])
    out = torch.empty(flat.shape, dtype=dtype, device=flat.device)
    count = max(1, CHUNK_NUMBERS // max(1, flat[0:1].numel())) if flat.device.type == "cpu" else max(1, len(flat))
    # all norms first: after an operation of torch's its OpenMP worker spins for 2.7 ms, where ours is to work
    x_nAB, norm_n = _rounded(flat, dtype, chosen.shrink)
    for x, norm, target in zip(x_nAB.split(count), norm_n.split(count), out.split(count), strict=True):
        if dtype == torch.float32:
            _iterate(x / norm[:, None, None], chosen.steps, target)
        else:
            muon.newton_schulz(x, norm, chosen.steps, target)
    if calibrate is not None:
        out.mul_(1 / chosen.rms[calibrate])
    return out.view(given.shape).mT if turned else out.view(given.shape)


def _rounded(flat_nAB: Tensor, dtype: torch.dtype, shrink: float) -> tuple[Tensor, Tensor]:
    """X in `dtype`, contiguous, perhaps the input itself, and its Frobenius norms (times `shrink`) [n]."""
    x = flat_nAB.to(dtype).contiguous()
    norm_n = _norms(x)
    # On a CPU a look at the norms is free, and spares ordinary matrices two passes.
    if x.device.type != "cpu" or not ((norm_n > SAFE_NORMS[0]) & (norm_n < SAFE_NORMS[1])).all():
        x = (flat_nAB.to(torch.promote_types(flat_nAB.dtype, torch.float32)) * _power_of_two(flat_nAB)).to(dtype)
        norm_n = _norms(x.contiguous())
    if shrink != 1:
        norm_n = norm_n * shrink
    return x, norm_n.clamp_min(torch.finfo(torch.float32).tiny)


def _norms(x_nAB: Tensor) -> Tensor:
    """Frobenius, [n]; of float32 rows by rows in float64: float32's own sum of a million squares is off by 1e-5."""
    if x_nAB.dtype == torch.float32:
        return torch.linalg.vector_norm(torch.linalg.vector_norm(x_nAB, dim=-1).double(), dim=-1).float()
    return torch.linalg.vector_norm(x_nAB.flatten(1), dim=1)


def _power_of_two(x_nAB: Tensor) -> Tensor:
    """[n, 1, 1] float32: 2^-e of each matrix's largest magnitude in [2^e, 2^(e+1)), by its exponent's bits."""
    largest_n = torch.maximum(x_nAB.amax((1, 2)), -x_nAB.amin((1, 2))).float()
    # fields of 8 bits, 127 for 2^0; the clamp keeps the inverse a normal number, for zero too
    field_n = (largest_n.view(torch.int32) >> 23).clamp(1, 253)
    return ((254 - field_n) << 23).view(torch.float32)[:, None, None]


def _iterate(x_nAB: Tensor, steps: tuple[Step, ...], out_nAB: Tensor) -> None:
    """All steps on contiguous float32 matrices A ≤ B, by way of `out`, where the result is; `x` is used up."""
    gram_nAA = x_nAB.new_empty(*x_nAB.shape[:-1], x_nAB.shape[-2])
    mix_nAA = torch.empty_like(gram_nAA)
    before, after = x_nAB, out_nAB
    for a, b, c in steps:
        _product(before, before.mT, gram_nAA)
        _product(gram_nAA, gram_nAA, mix_nAA).mul_(c).add_(gram_nAA, alpha=b)
        _product(mix_nAA, before, after).add_(before, alpha=a)
        before, after = after, before
    if before is not out_nAB:
        out_nAB.copy_(before)


def _product(left_nAK: Tensor, right_nKB: Tensor, out_nAB: Tensor) -> Tensor:
    """left @ right into `out`, summed in pieces of `SUMMED_AT_ONCE`."""
    torch.bmm(left_nAK[:, :, :SUMMED_AT_ONCE], right_nKB[:, :SUMMED_AT_ONCE], out=out_nAB)
    for at in range(SUMMED_AT_ONCE, left_nAK.shape[-1], SUMMED_AT_ONCE):
        piece = slice(at, at + SUMMED_AT_ONCE)
        torch.baddbmm(out_nAB, left_nAK[:, :, piece], right_nKB[:, piece], out=out_nAB)
    return out_nAB


@cache
def faster_dtype(n: int = 16, rows: int = 128, columns: int = 256) -> torch.dtype:
    """bfloat16 or float32: whichever iterates faster on such a stack here, on the CPU (best of 6).

    Without bfloat16 instructions a CPU emulates its products, at a tenth of float32's speed.
    """
    stack = torch.ones(n, rows, columns)
    return min((torch.bfloat16, torch.float32), key=lambda dtype: _best_s(lambda: orthogonalize(stack, dtype=dtype)))


def _best_s(call: Callable[[], object]) -> float:
    times = []
    for _ in range(6):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return min(times)  # what else runs on the machine only adds
