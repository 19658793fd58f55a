"""Balance by bias: the sign rule, the quantile rule, the sequence-wise loss, and the numbers that tell of it."""

import pytest
import torch
from torch import Tensor

from karakoram.model.moe import MixtureOfExperts
from karakoram.model.router import Router
from karakoram.model.watch import MARGIN_BINS, MARGIN_RANGE, Watch, sequence_balance
from karakoram.train.balance import Loads, max_vio, quantile, quantile_step, sign_step
from tests.train import tiny

BIN = 2 * MARGIN_RANGE / MARGIN_BINS


def test_busy_experts_lose_idle_ones_gain_and_the_sum_stays() -> None:
    biases = {3: torch.tensor([0.5, -0.25, 0.0, 0.125])}
    before = biases[3].clone()
    sign_step(biases, {3: torch.tensor([90, 10, 20, 40])}, rate=0.01)
    change = biases[3] - before
    # signs of (mean 40 − load): −, +, +, 0; their mean is 1/4
    assert torch.allclose(change, 0.01 * torch.tensor([-1.25, 0.75, 0.75, -0.25]), atol=1e-7)
    assert float(biases[3].sum()) == pytest.approx(float(before.sum()), abs=1e-6)


def test_even_loads_move_nothing() -> None:
    biases = {1: torch.tensor([0.5, -0.5])}
    sign_step(biases, {1: torch.tensor([7, 7])}, 0.1)
    assert biases[1].tolist() == [0.5, -0.5]


def skewed() -> tuple[MixtureOfExperts, Tensor]:
    """A common part of all tokens prefers expert 0: it gets every token, until the biases have moved."""
    generator = torch.Generator().manual_seed(5)
    config = tiny.model_config(n_routed_experts=8)
    moe = MixtureOfExperts(config, 1, None, torch.float32)
    x_ND = torch.randn(512, config.hidden_size, generator=generator)
    x_ND[:, 0] = 1.0
    with torch.no_grad():
        moe.gate.weight.normal_(std=0.05, generator=generator)
        moe.gate.weight[:, 0] = torch.linspace(1.0, -1.0, 8)
        for weight in moe.experts.parameters():
            weight.zero_()
        moe.gate.e_score_correction_bias.zero_()
    assert moe.shared_experts is not None
    for weight in moe.shared_experts.parameters():
        weight.detach().zero_()
    return moe, x_ND


def test_a_skewed_router_becomes_balanced_by_signs() -> None:
    moe, x_ND = skewed()
    bias_E = moe.gate.e_score_correction_bias
    violations, sums = [], []
    with torch.no_grad():
        for _ in range(300):
            ids_NK, _ = moe.gate(x_ND)
            load_E = torch.bincount(ids_NK.flatten(), minlength=8)
            violations.append(max_vio(load_E))
            sign_step({1: bias_E}, {1: load_E}, 5e-3)
            sums.append(float(bias_E.sum()))
    assert violations[0] > 1.5
    assert max(violations[-20:]) < 0.25
    assert max(map(abs, sums)) < 1e-4  # 300 float32 sums of eight numbers below 1


def test_a_skewed_router_becomes_balanced_by_quantiles_at_once() -> None:
    """The edge moves with the biases, so a few rounds are needed; the sign rule took hundreds."""
    moe, x_ND = skewed()
    violations = []
    with torch.no_grad():
        for _ in range(8):
            watch = Watch(margins=True)
            moe(x_ND, watch=watch)
            violations.append(max_vio(watch.loads[1]))
            quantile_step({1: moe.gate.e_score_correction_bias}, watch.margin_counts, 2)
    assert violations[0] > 1.5
    assert violations[-1] < 0.15
    assert abs(float(moe.gate.e_score_correction_bias.mean())) < 1e-6


def test_margins_are_those_of_the_definition() -> None:
    """Against sorting: α is the (K+1)-th best biased score; b = −quantile of s − α at 1 − K/E, within a bin."""
    moe, x_ND = skewed()
    moe.gate.e_score_correction_bias.copy_(torch.linspace(-0.2, 0.2, 8))
    watch = Watch(margins=True)
    with torch.no_grad():
        moe(x_ND, watch=watch)
        scores_NE = torch.sigmoid(moe.gate.logits(x_ND))
    edge_N = (scores_NE + moe.gate.e_score_correction_bias).sort(descending=True).values[:, 2]
    margins_NE = scores_NE - edge_N[:, None]
    expected_E = torch.quantile(margins_NE, 1 - 2 / 8, dim=0)
    assert torch.allclose(quantile(watch.margin_counts[1], 1 - 2 / 8), expected_E, atol=2 * BIN)
    chosen_NE = scores_NE + moe.gate.e_score_correction_bias > edge_N[:, None]
    assert torch.equal(chosen_NE.sum(0), watch.loads[1]), "who is above the edge is chosen, and nobody else"


def test_examining_routes_as_not_examining_does() -> None:
    config = tiny.model_config(n_routed_experts=8)
    router = Router(config, None, torch.float32)
    x_ND = torch.randn(64, config.hidden_size)
    with torch.no_grad():
        router.weight.normal_()
        router.e_score_correction_bias.normal_(std=0.1)
        plain, examined = router(x_ND), router.examine(x_ND)[:2]
    (ids, weights), (plain_ids, plain_weights) = ((i.sort().values, w.sort().values) for i, w in (examined, plain))
    assert torch.equal(ids, plain_ids)
    # the sum over the chosen is taken in another order: a unit in the last place
    assert torch.allclose(weights, plain_weights, rtol=1e-6)


def test_the_sequence_loss_is_one_where_even_and_pushes_against_load() -> None:
    """f_i·P_i summed: E · (1/E) · 1 for even loads (DeepSeek-V3, eq. 17 to 20); its gradient lowers the busy one."""
    ids_BTK = torch.tensor([[[0], [1], [2], [3]]])
    assert float(sequence_balance(torch.full((1, 4, 4), 0.5), ids_BTK)) == pytest.approx(1.0)
    scores = torch.full((2, 4, 4), 0.5, requires_grad=True)
    loss = sequence_balance(scores, torch.zeros(2, 4, 1, dtype=torch.int64))
    assert float(loss.detach()) == pytest.approx(2.0)  # two sequences, each 4 · 1/4
    loss.backward()
    assert scores.grad is not None
    assert bool((scores.grad[..., 0] > 0).all()) and bool((scores.grad[..., 1:] < 0).all())


def test_loads_over_a_window_forget_what_is_older() -> None:
    loads = Loads(window=2)
    assert (loads.max_vio, loads.dead, loads.entropy) == (0.0, 0, {})
    for load in ([8, 0, 0, 0], [0, 8, 0, 0], [0, 0, 4, 4]):
        loads.add({2: torch.tensor(load)})
    assert loads.total[2].tolist() == [0, 8, 4, 4]
    assert loads.max_vio == pytest.approx(8 / 4 - 1)
    assert loads.dead == 1
    # entropy of (1/2, 1/4, 1/4) in units of log 4: 1.5 bits of 2
    assert loads.entropy[2] == pytest.approx(0.75)
