"""Balance by bias, and the learning rate over a run."""

import pytest
import torch

from karakoram.model.router import Router
from karakoram.train.balance import balance
from karakoram.train.optim.schedule import rate_share
from tests.train import tiny


def test_busy_experts_lose_idle_ones_gain_and_the_sum_stays() -> None:
    biases = {3: torch.tensor([0.5, -0.25, 0.0, 0.125])}
    before = biases[3].clone()
    violation = balance(biases, {3: torch.tensor([90, 10, 20, 40])}, rate=0.01)
    assert violation == pytest.approx(90 / 40 - 1)
    change = biases[3] - before
    # signs of (mean 40 − load): −, +, +, 0; their mean is 1/4
    assert torch.allclose(change, 0.01 * torch.tensor([-1.25, 0.75, 0.75, -0.25]), atol=1e-7)
    assert float(biases[3].sum()) == pytest.approx(float(before.sum()), abs=1e-6)


def test_even_loads_move_nothing() -> None:
    biases = {1: torch.tensor([0.5, -0.5])}
    assert balance(biases, {1: torch.tensor([7, 7])}, 0.1) == 0
    assert biases[1].tolist() == [0.5, -0.5]


def test_a_skewed_router_becomes_balanced() -> None:
    """A common part of all tokens prefers expert 0: it gets every token, until the biases have moved."""
    config = tiny.model_config(n_routed_experts=8)
    router = Router(config, None, torch.float32)
    x_ND = torch.randn(512, config.hidden_size)
    x_ND[:, 0] = 1.0
    with torch.no_grad():
        router.weight.normal_(std=0.05)
        router.weight[:, 0] = torch.linspace(1.0, -1.0, 8)
    biases = {1: router.e_score_correction_bias}
    violations, sums = [], []
    with torch.no_grad():
        for _ in range(300):
            ids_NK, _ = router(x_ND)
            violations.append(balance(biases, {1: torch.bincount(ids_NK.flatten(), minlength=8)}, 5e-3))
            sums.append(float(router.e_score_correction_bias.sum()))
    assert violations[0] > 1.5
    assert max(violations[-20:]) < 0.25
    assert max(map(abs, sums)) < 1e-4  # 300 float32 sums of eight numbers below 1


def test_rates_rise_stay_and_fall() -> None:
    assert rate_share(0, 10, 0.0, 0.6) == pytest.approx(0.1)
    assert rate_share(4, 10, 0.01, 0.6) == pytest.approx(0.5)
    assert rate_share(9, 10, 0.02, 0.6) == 1.0
    assert rate_share(5000, 10, 0.6, 0.6) == 1.0
    assert rate_share(5000, 10, 0.7, 0.6) == pytest.approx(0.8535534)  # (1 + cos 45°) / 2
    assert rate_share(5000, 10, 0.8, 0.6) == pytest.approx(0.5)
    assert rate_share(5000, 10, 1.0, 0.6) == pytest.approx(0.0, abs=1e-12)
    assert rate_share(5000, 10, 1.5, 0.6) == pytest.approx(0.0, abs=1e-12), "past the end stays at the end"


def test_floor_and_no_warmup() -> None:
    assert rate_share(0, 0, 0.0, 0.6) == 1.0
    assert rate_share(9, 0, 1.0, 0.6, floor=0.1) == pytest.approx(0.1)
    assert rate_share(9, 0, 0.8, 0.6, floor=0.1) == pytest.approx(0.55)


def test_a_decay_never_rises() -> None:
    shares = [rate_share(100, 10, progress / 100, 0.5) for progress in range(101)]
    assert all(later <= earlier for earlier, later in zip(shares, shares[1:]))
