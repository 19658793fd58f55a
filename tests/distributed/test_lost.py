"""A rank that dies takes the others with it, soon, and they say which it was."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch.distributed import HashStore  # pyright: ignore[reportPrivateImportUsage]

from karakoram.distributed import lost
from karakoram.distributed.lost import Pulse
from karakoram.errors import TrainingError
from tests.distributed.launch import ROOT, launch

# Six beats without a sign, one second's courtesy, and a busy machine: far below the communication's timeout of 30 s.
BOUND_S = 20


def test_a_killed_rank_is_named(tmp_path: Path) -> None:
    """SIGKILL leaves no word: its beats stand still."""
    ended = launch("lose", 3, tmp_path, victim=1, how="kill")
    assert [end.code for end in ended] == [0, -9, 0], [end.output for end in ended]
    for survivor in (ended[0], ended[2]):
        assert "Rank 1 was lost" in survivor.told["error"] and "--resume" in survivor.told["error"]
        assert survivor.told["took_s"] < BOUND_S


def test_a_failed_rank_leaves_its_error(tmp_path: Path) -> None:
    """The others know what happened there, and it itself fails with its own error."""
    ended = launch("lose", 2, tmp_path, victim=1, how="raise")
    assert [end.code for end in ended] == [0, 1], [end.output for end in ended]
    assert "Rank 1 failed: ValueError: the data is gone." in ended[0].told["error"]
    assert ended[0].told["took_s"] < BOUND_S
    assert "ValueError: the data is gone" in ended[1].output


def test_ranks_wait_for_the_first_without_a_limit_of_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """While it tokenises; but not for one that failed or fell silent."""
    monkeypatch.setattr(lost, "LEAVE_S", 0.0)
    store = HashStore()
    first, second = (Pulse(store, rank, 2) for rank in range(2))
    first.follow("material a", leads=True)
    second.follow("material a", leads=False)
    monkeypatch.setattr(lost, "LEADER_STILL_S", 0.0)
    with pytest.raises(TrainingError, match="Rank 0 was lost: it gave no sign of life for 0 s"):
        second.follow("material b", leads=False)
    with pytest.raises(ValueError), first.beating():
        raise ValueError("no such data")
    monkeypatch.setattr(lost, "LEADER_STILL_S", 60.0)
    with pytest.raises(TrainingError, match="Rank 0 failed: ValueError: no such data"):
        second.follow("material b", leads=False)


@pytest.mark.slow
def test_torchrun_ends_when_a_rank_is_killed(tmp_path: Path) -> None:
    """The same under torchrun, whose store the ranks use: it ends with an error within its bound."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "tests.distributed.work", str(tmp_path)]
    env = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT))
    ended = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=90, check=False)
    assert ended.returncode == 1
    assert "Signal 9 (SIGKILL)" in ended.stderr
