"""Many ranks over gloo: what 4 saved goes on on 2 and on 1, and one rank's trouble is told by all."""

import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from karakoram.train.checkpoints import find
from karakoram.train.checkpoints.dcp import read_tensors
from karakoram.train.checkpoints.state import read_state
from tests.train.checkpoints.processes import lines_of, start

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def _numbers(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


WHOLE = {  # as in child.py, which names the reasons
    "even": _numbers(1, 8, 6), "uneven": _numbers(2, 5, 3).bfloat16(), "few": _numbers(3, 2, 3),
    "columns": _numbers(4, 3, 8), "grid": _numbers(5, 6, 4), "replicated": _numbers(6, 4, 4),
    "scalar": torch.tensor(2.5), "plain": torch.arange(6), "empty": torch.empty(0, 3), "experts": _numbers(7, 8, 2, 3),
    "owned/a": _numbers(8, 4, 4), "owned/b": _numbers(9, 4, 4),
}  # fmt: skip


def _run(out: Path, *steps: str) -> list[dict[str, Any]]:
    return lines_of(start("ranks", out, *steps))


def _loads_alone(out: Path) -> None:
    path = find.newest(out)
    assert path is not None
    into: dict[str, Any] = {name: torch.full_like(tensor, 7) for name, tensor in WHOLE.items()}
    read_tensors(path, into)
    assert [name for name in WHOLE if not torch.equal(into[name], WHOLE[name])] == []
    assert read_state(path)[0] == {"step": 3, "rank": 0}


def _check(out: Path, saved_on: int, loaded_on: int) -> None:
    saved, *lines, loaded = _run(out, f"save:{saved_on}", f"load:{loaded_on}")
    assert saved["ended"] == [0] * saved_on
    assert [find.step_of(path) for path in find.complete(out)] == [2, 3]
    assert len(list((out / "checkpoints/step-00000003/model").iterdir())) == saved_on
    assert not list((out / "checkpoints").glob(".step*"))
    assert loaded["ended"] == [0] * loaded_on
    found = [line for line in lines if "wrong" in line]
    assert [(line["wrong"], line["state"]) for line in found] == [([], {"step": 3, "rank": 0})] * loaded_on
    assert sum(line["names"] for line in found) == 10 * loaded_on + 2
    refused = [line["error"] for line in lines if "error" in line]
    differs = "1 tensors differ, the first is even: F32 [8, 6] there, F32 [8, 7] here"
    assert sum(differs in error for error in refused) == loaded_on
    assert sum("even is a sum over ranks that was not taken yet" in error for error in refused) == loaded_on


def test_saved_on_4_ranks_loads_on_2_and_on_1(tmp_path: Path) -> None:
    _check(tmp_path, 4, 2)
    _loads_alone(tmp_path)


@pytest.mark.slow
def test_saved_on_2_ranks_loads_on_4_and_on_1(tmp_path: Path) -> None:
    _check(tmp_path, 2, 4)
    _loads_alone(tmp_path)


def test_a_ranks_trouble_is_everybodys_and_nobody_hangs(tmp_path: Path) -> None:
    *lines, ended = _run(tmp_path, "trouble:2")
    assert ended["ended"] == [0, -signal.SIGKILL]
    for rank in (0, 1):
        errors = [line["error"] for line in lines if line["rank"] == rank and "error" in line]
        assert len(errors) == 5 - rank
        assert errors[0] is None
        assert errors[2] is None
        for step, error in ((2, errors[1]), (4, errors[3])):
            assert f"step-0000000{step} could not be saved: No space left on device" in error
            assert f"--resume goes on from step-0000000{step - 1}" in error
        if rank == 0:
            assert "step-00000005 could not be saved: Another rank is gone: " in errors[4]
            assert "--resume; --resume goes on from step-00000003" in errors[4]
    assert [line["steps"] for line in lines if "steps" in line] == [[1, 3]]
