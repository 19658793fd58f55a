"""The sliced head loss against torch's cross-entropy: value and gradients, weights and zeros included."""

import pytest
import torch
import torch.nn.functional as F

from karakoram.train import fuse
from karakoram.train.loss import ROWS, head_loss, loss_and_gradient

HIDDEN, VOCABULARY = 16, 50


def _inputs(rows: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    x_ND = torch.randn(rows, HIDDEN).to(dtype).requires_grad_()
    head_VD = torch.randn(VOCABULARY, HIDDEN).to(dtype).requires_grad_()
    weights_N = torch.rand(rows)
    weights_N[::3] = 0
    return x_ND, head_VD, torch.randint(0, VOCABULARY, (rows,)), weights_N / weights_N.sum()


@pytest.mark.parametrize("rows", [1, 7, ROWS, ROWS + 1, 2 * ROWS + 500])
def test_value_and_gradients_are_those_of_cross_entropy(rows: int) -> None:
    x_ND, head_VD, targets_N, weights_N = _inputs(rows + 2, torch.float32)
    loss = head_loss(x_ND, head_VD, targets_N, weights_N, loss_and_gradient)
    (loss * 3).backward()
    x_2, head_2 = x_ND.detach().double().requires_grad_(), head_VD.detach().double().requires_grad_()
    expected = (F.cross_entropy(x_2 @ head_2.mT, targets_N, reduction="none") * weights_N.double()).sum()
    (expected * 3).backward()
    # float32 against float64; sums of up to 2,548 rows
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for mine, theirs in ((x_ND.grad, x_2.grad), (head_VD.grad, head_2.grad)):
        assert mine is not None
        assert theirs is not None
        assert torch.allclose(mine.double(), theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))


def test_a_frozen_head_gets_no_gradient() -> None:
    x_ND, head_VD, targets_N, weights_N = _inputs(64, torch.float32)
    head_loss(x_ND, head_VD, targets_N, weights_N, loss_and_gradient).backward()
    expected, x_ND.grad = x_ND.grad, None
    head_VD = head_VD.detach()
    head_loss(x_ND, head_VD, targets_N, weights_N, loss_and_gradient).backward()
    assert head_VD.grad is None and x_ND.grad is not None and expected is not None
    assert torch.equal(x_ND.grad, expected)


def test_rows_without_weight_have_no_gradient() -> None:
    x_ND, head_VD, targets_N, weights_N = _inputs(64, torch.float32)
    head_loss(x_ND, head_VD, targets_N, weights_N, loss_and_gradient).backward()
    assert x_ND.grad is not None
    assert not x_ND.grad[::3].any()
    assert x_ND.grad[1::3].any(-1).all()


def test_bfloat16_differs_by_its_rounding_only() -> None:
    x_ND, head_VD, targets_N, weights_N = _inputs(600, torch.bfloat16)
    loss = head_loss(x_ND, head_VD, targets_N, weights_N, loss_and_gradient)
    loss.backward()
    wide_x, wide_head = x_ND.detach().float().requires_grad_(), head_VD.detach().float().requires_grad_()
    expected = head_loss(wide_x, wide_head, targets_N, weights_N, loss_and_gradient)
    expected.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=4e-3)  # logits rounded to 8 bits: 1/256
    for mine, theirs in ((x_ND.grad, wide_x.grad), (head_VD.grad, wide_head.grad)):
        assert mine is not None
        assert theirs is not None
        assert mine.dtype == torch.bfloat16
        assert float((mine.float() - theirs).norm() / theirs.norm()) < 0.02  # a few roundings of 1/256 each


def test_the_compiled_twin_equals_the_plain_one() -> None:
    if not fuse._compiler_works():
        pytest.skip("torch.compile finds no working C++ compiler here")
    compiled = fuse._compiled(loss_and_gradient)
    for rows in (40, 64):  # two shapes, one compilation
        logits_NV, targets_N = torch.randn(rows, VOCABULARY) * 4, torch.randint(0, VOCABULARY, (rows,))
        weights_N = torch.rand(rows)
        loss, gradient = loss_and_gradient(logits_NV, targets_N, weights_N)
        twin_loss, twin_gradient = compiled(logits_NV, targets_N, weights_N)
        assert twin_loss.item() == pytest.approx(loss.item(), rel=1e-5)  # float32, another order of sums
        assert torch.allclose(twin_gradient, gradient, atol=1e-6)
