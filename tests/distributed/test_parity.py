"""Two and four processes train as one does: losses, norms, logits, loads, weights and momenta."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from karakoram.distributed.mesh import Alone
from tests.distributed.launch import run
from tests.distributed.work import ROWS, STEPS, train

# Sums run in another order on more ranks: 1 unit in float32's last place (6e-8) a sum, and 20 steps that feed on it.
LOSS_TOLERANCE = 1e-5
# AdamW divides by the root of the squared gradient: where that is nearly nothing, its last bits are the update's first.
WEIGHT_TOLERANCE = 1e-4

# Experts are cut whole over replicas, or by rows (6 over 4 ranks: gate and up; 3 over 2: down too), or unevenly (down).
RUNS: dict[int, list[dict[str, Any]]] = {
    2: [
        {"expert_ranks": 1, "tied": False, "experts": 8},
        {"expert_ranks": 2, "tied": True, "experts": 8, "held_out": True},
        {"expert_ranks": 1, "tied": False, "experts": 8, "dtype": "bfloat16"},
        {"expert_ranks": 2, "tied": True, "experts": 8, "dtype": "bfloat16"},
    ],
    4: [
        {"expert_ranks": 1, "tied": True, "experts": 6},
        {"expert_ranks": 2, "tied": False, "experts": 8},
        {"expert_ranks": 2, "tied": False, "experts": 6},
        {"expert_ranks": 4, "tied": False, "experts": 8},
    ],
}
Worlds = Callable[[int], tuple[list[dict[str, Any]], Path]]


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Worlds:
    """World size -> what its ranks told, and where the weights are; each started once."""
    ended: dict[int, tuple[list[dict[str, Any]], Path]] = {}

    def of(world: int) -> tuple[list[dict[str, Any]], Path]:
        if world not in ended:
            out = tmp_path_factory.mktemp(f"world{world}")
            ended[world] = run("parity", world, out, timeout_s=120, runs=RUNS[world]), out
        return ended[world]

    return of


@pytest.fixture(scope="module")
def one_process() -> Callable[[bool, int], dict[str, Any]]:
    """The same training alone; tied or not, with so many experts."""
    torch.set_num_threads(1)  # these products are too small for two
    return cache(lambda tied, experts: train(Alone(), tied, experts, held_out=True))


EXACT = [(world, n) for world, runs in RUNS.items() for n, run in enumerate(runs) if "dtype" not in run]
NAMES = ["{} ranks, ep {expert_ranks}, {experts} experts".format(world, **RUNS[world][n]) for world, n in EXACT]


@pytest.mark.parametrize(("world", "number"), EXACT, ids=NAMES)
def test_ranks_train_as_one_process(
    world: int, number: int, worlds: Worlds, one_process: Callable[[bool, int], dict[str, Any]]
) -> None:
    """Every rank tells the same, and it is what one process tells."""
    told, out = worlds(world)
    alone = one_process(RUNS[world][number]["tied"], RUNS[world][number]["experts"])
    assert len(alone["losses"]) == STEPS and alone["losses"][-1] < 0.8 * alone["losses"][0]
    for rank in told:
        found = rank[str(number)]
        for key in ("losses", "norms"):
            wanted, got = (torch.tensor(one[key], dtype=torch.float64) for one in (alone, found))
            assert ((got - wanted).abs() / wanted).max() <= LOSS_TOLERANCE, key
        assert torch.allclose(torch.tensor(found["logits"]), torch.tensor(alone["logits"]), rtol=1e-4)
        assert found["update_rms"] == pytest.approx(alone["update_rms"], rel=1e-3)
        assert found["loads"] == {str(layer): load for layer, load in alone["loads"].items()}
        assert found["margins"] == {
            str(layer): ROWS * 12 * RUNS[world][number]["experts"] for layer in alone["margins"]
        }
        if "held_out" in found:  # after the last step's new weights: nothing gathered before is used
            assert found["held_out"] == pytest.approx(alone["held_out"], rel=LOSS_TOLERANCE)
    saved = load_file(out / f"{number}.safetensors")
    assert len(saved) == len(alone["weights"]) + len(alone["momenta"])
    for kind in ("weights", "momenta"):
        for name, wanted in alone[kind].items():
            distance = (saved[f"{kind}/{name}"] - wanted).norm() / wanted.norm()
            assert distance <= WEIGHT_TOLERANCE, f"{kind}/{name}: {distance}"


@pytest.mark.parametrize("number", [2, 3], ids=["ep 1", "ep 2"])
def test_bfloat16_trains_with_float32_masters(number: int, worlds: Worlds) -> None:
    """Near to float32: one part in 256 is what a bfloat16 weight or gradient is rounded by, at every step."""
    for rank in worlds(2)[0]:
        exact, rounded = (torch.tensor(rank[str(n)]["losses"]) for n in (number - 2, number))
        assert not rounded.equal(exact)
        assert ((rounded - exact).abs() / exact).max() <= 0.05


@pytest.mark.parametrize("world", [2, 4])
def test_split_experts_equal_local_ones(world: int, worlds: Worlds) -> None:
    """Results and all gradients, with ranks that have no token, experts that get none, and one that gets all."""
    for rank, told in enumerate(worlds(world)[0]):
        for case, found in told["bank"].items():
            assert found["distance"] <= 1e-6, (rank, case)  # the products may sum in another order
            assert found["same_again"], (rank, case)
    assert worlds(world)[0][0]["bank"]["no tokens here"]["rows"] == 0
