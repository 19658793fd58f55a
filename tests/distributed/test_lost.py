"""A rank that dies takes the others with it, soon, and they say which it was."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

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


@pytest.mark.slow
def test_torchrun_ends_when_a_rank_is_killed(tmp_path: Path) -> None:
    """The same under torchrun, whose store the ranks use: it ends with an error within its bound."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "tests.distributed.work", str(tmp_path)]
    env = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT))
    ended = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=90, check=False)
    assert ended.returncode == 1
    assert "Signal 9 (SIGKILL)" in ended.stderr
