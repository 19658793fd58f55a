"""Causal attention for training: values and gradients against float64, whatever lengths, spans, layouts and threads."""

import ctypes

import pytest
import torch
from torch import Tensor

from karakoram.errors import InputError
from karakoram.kernels import causal, ops
from karakoram.kernels.cpu.library import Library, describe
from karakoram.model.backward.causal import causal_attention

Spans = list[tuple[int, int, int]]
# one token, less and more than a panel, than three panels of queries and than a block of keys; wide and narrow heads
CASES = [
    (1, 1, 1, 16, 16), (2, 3, 15, 48, 32), (1, 2, 17, 16, 48), (1, 2, 48, 32, 64), (1, 1, 49, 64, 16),
    (2, 2, 130, 192, 128), (1, 1, 333, 48, 32),
]  # fmt: skip
# P, dS and what is summed are rounded to bfloat16 (2^-9 each), the result once more: seen at 0.0017 to 0.0035, where
# torch's products, whose scores are rounded too, are at 0.003 to 0.008
TOLERANCE = 0.005


@pytest.fixture(autouse=True)
def fast(lib: Library) -> Library:
    if causal.library() is None:
        pytest.skip(f"{lib.isa} has no causal attention: torch's products serve")
    return lib


def drawn(B: int, H: int, T: int, X: int, V: int) -> list[Tensor]:
    """q, k, v and a gradient, as a model has them: [B, T, H, width] in memory."""
    made = [torch.randn(B, T, H, width).bfloat16().transpose(1, 2) for width in (X, X, V, V)]
    return [x.requires_grad_() for x in made[:3]] + made[3:]


def exact(q: Tensor, k: Tensor, v: Tensor, scale: float, spans: Spans) -> tuple[Tensor, Tensor]:
    """In float64: what attention gives, and each head's largest logit."""
    pieces, largest = [], []
    for row, start, stop in spans:
        here = (row, slice(None), slice(start, stop))
        scores = q[here] @ k[here].mT * scale
        future = torch.ones(stop - start, stop - start, dtype=torch.bool).triu(1)
        scores = scores.masked_fill(future, -torch.inf)
        largest.append(scores.detach().amax((1, 2)))
        pieces.append(torch.nn.functional.pad(scores.softmax(-1) @ v[here], (0, 0, start, q.shape[2] - stop)))
    rows = [sum(p for p, span in zip(pieces, spans, strict=True) if span[0] == row) for row in range(len(q))]
    return torch.stack([row for row in rows if isinstance(row, Tensor)]), torch.stack(largest).amax(0)


def compare(inputs: list[Tensor], scale: float, spans: Spans | None, tolerance: float = TOLERANCE) -> None:
    q, k, v, gradient = inputs
    largest, whole = torch.empty(q.shape[1]), [(row, 0, q.shape[2]) for row in range(len(q))]
    assert causal.takes(q, k, v)
    out = causal_attention(q, k, v, scale, spans, largest)
    got = torch.autograd.grad(out, (q, k, v), gradient)
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    expected, most = exact(wide[0], wide[1], wide[2], scale, spans or whole)
    wanted = torch.autograd.grad(expected, wide, gradient.double())
    for name, mine, theirs in zip(("out", "q", "k", "v"), (out, *got), (expected, *wanted), strict=True):
        assert mine.dtype == torch.bfloat16 and not mine.isnan().any(), name
        # one token's gradients of q and k are 0, and stay so
        assert (mine.double() - theirs).norm() <= tolerance * theirs.norm() + 1e-12, name
    assert all(a.stride() == b.stride() for a, b in zip(got, (q, k, v), strict=True) if a.shape[2] > 1)
    assert torch.allclose(largest.double(), most, rtol=1e-6, atol=1e-6)  # sums of 192 products in float32


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients(case: tuple[int, int, int, int, int]) -> None:
    compare(drawn(*case), 0.2, None)


def test_documents_in_a_row_see_only_themselves() -> None:
    compare(drawn(2, 2, 100, 32, 16), 0.3, [(0, 0, 33), (0, 33, 34), (0, 34, 100), (1, 0, 64), (1, 64, 100)])


def test_logits_far_apart() -> None:
    """Exponentials of −300 and less are 0, and the largest is found where it is.

    Where one key has nearly all, dS is a difference of numbers alike, one of them of a rounded output: seen at 0.006.
    """
    q, k, v, gradient = drawn(1, 2, 70, 32, 16)
    compare([(q * 12).detach().requires_grad_(), k, v, gradient], 0.9, None, 0.02)


def test_a_largest_logit_below_zero_is_told() -> None:
    q, k, v, _ = drawn(1, 1, 40, 16, 16)
    q, k = q.abs().detach().requires_grad_(), (-k.abs()).detach().requires_grad_()
    largest = torch.empty(1)
    causal_attention(q, k, v, 0.2, None, largest)
    assert float(largest) < 0


def test_layouts_of_other_models() -> None:
    """[B, H, T, width] in memory, and a gradient that was expanded from a number."""
    q, k, v, _ = (x.detach().contiguous().requires_grad_() for x in drawn(2, 3, 50, 32, 16))
    out = causal_attention(q, k, v, 0.2)
    got = torch.autograd.grad(out.sum(), (q, k, v))
    again = [x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in (q, k, v)]
    other = causal_attention(again[0], again[1], again[2], 0.2)
    assert torch.equal(out, other)
    for a, b in zip(got, torch.autograd.grad(other.sum(), again), strict=True):
        assert torch.equal(a, b)


def test_what_is_no_number_stays_with_its_head_and_its_future() -> None:
    q, k, v, gradient = drawn(1, 2, 40, 16, 16)
    with torch.no_grad():
        q[0, 1, 20, 3] = float("nan")
    out = causal_attention(q, k, v, 0.2)
    assert out[0, 1, 20].isnan().all() and not out[0, 0].isnan().any() and not out[0, 1, :20].isnan().any()
    grads = torch.autograd.grad(out, (q, k, v), gradient)
    assert all(not g[0, 0].isnan().any() for g in grads) and grads[1][0, 1].isnan().any()


def test_the_number_of_threads_changes_no_bit() -> None:
    q, k, v, gradient = drawn(2, 3, 70, 48, 32)
    before, seen = torch.get_num_threads(), list[list[Tensor]]()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            out = causal_attention(q, k, v, 0.2)
            seen.append([out, *torch.autograd.grad(out, (q, k, v), gradient)])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))


def test_what_it_does_not_take_is_torchs() -> None:
    q, k, v, _ = drawn(1, 2, 20, 32, 16)
    assert not causal.takes(q.float(), k.float(), v.float())
    assert not causal.takes(q[..., :24], k[..., :24], v) and not causal.takes(q.mT.contiguous().mT, k, v)
    with ops.using("scalar"):
        assert not causal.takes(q, k, v)
        twin = causal_attention(q, k, v, 0.2)
    ours = causal_attention(q, k, v, 0.2)
    assert (ours.float() - twin.float()).norm() < 0.01 * twin.float().norm()


def test_what_does_not_fit_is_refused(fast: Library) -> None:
    q, k, v, _ = (x.detach() for x in drawn(2, 2, 20, 32, 16))
    for words, arguments in (
        ("k has another shape", (q, k[:, :1], v, [(0, 0, 20)])),
        ("out has another shape", (q, k, v[:1], [(0, 0, 20)])),
        ("multiples of 16", (q[..., :24], k[..., :24], v, [(0, 0, 20)])),
        ("span 1, tokens 3 to 21 of row 1", (q, k, v, [(0, 0, 20), (1, 3, 21)])),
        ("span 0, tokens 5 to 5", (q, k, v, [(0, 5, 5)])),
        ("of row 2", (q, k, v, [(2, 0, 5)])),
        ("q is float32", (q.float(), k, v, [(0, 0, 20)])),
    ):
        with pytest.raises(InputError, match=words):
            causal.forward(arguments[0], arguments[1], arguments[2], 0.2, arguments[3])
    stats, rows = torch.zeros(2, 2, 20, 2), torch.tensor([[0, 0, 20]])
    with pytest.raises(InputError, match="stats is bfloat16"):
        fast.call(
            "k2_causal_backward", describe(q), describe(k), describe(v), describe(rows),
            ctypes.c_float(0.2), 1,
            describe(stats.bfloat16()), describe(v), describe(v), describe(q), describe(k), describe(v),
        )  # fmt: skip
