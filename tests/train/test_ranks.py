"""The same run on one, two and four ranks: the losses are those of one process, and checkpoints fit any number."""

from pathlib import Path

import pytest
import torch

from karakoram.distributed.mesh import Alone
from tests.train import ranks

# float32 sums in another order, 20 steps of them: seen up to 2e-6
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Twenty steps in this process."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("alone")
    ranks.go(out, 20, Alone(), resume=False)
    return ranks.losses(out)


@pytest.mark.parametrize(("world", "expert_ranks"), [(2, 1), (2, 2), (4, 2)])
def test_ranks_train_as_one_process_does(alone: list[float], tmp_path: Path, world: int, expert_ranks: int) -> None:
    found = ranks.run(tmp_path, world, 20, expert_ranks)
    assert len(found) == 20
    assert found == pytest.approx(alone, rel=TOLERANCE)
    assert (tmp_path / "run/model/config.json").is_file()


def test_what_four_ranks_saved_goes_on_on_two_and_on_one(alone: list[float], tmp_path: Path) -> None:
    ranks.run(tmp_path, 4, 6, expert_ranks=2)
    ranks.run(tmp_path, 2, 12, expert_ranks=2, resume=True)
    ranks.go(tmp_path, 20, Alone(), resume=True)
    assert ranks.losses(tmp_path) == pytest.approx(alone, rel=TOLERANCE)
