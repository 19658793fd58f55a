"""A run's directory: one trainer at a time, one set of settings, and no run written over another."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from karakoram.errors import TrainingError
from karakoram.train.checkpoints.find import STATE_FILE, path_of
from karakoram.train.config import CheckpointConfig, OptimizerConfig
from karakoram.train.record.directory import open_run, recorded_settings, settings_of
from tests.train import tiny

CONFIG = tiny.train_config()


def _checkpoint(out: Path, step: int = 7) -> None:
    """What `newest` takes for a whole checkpoint."""
    path = path_of(out, step)
    path.mkdir(parents=True)
    (path / STATE_FILE).write_text("{}")


def _started(out: Path) -> None:
    with open_run(out, settings_of(CONFIG, dtype="bfloat16"), resume=False):
        _checkpoint(out)


def test_a_second_trainer_is_refused_while_the_first_one_works(tmp_path: Path) -> None:
    settings = settings_of(CONFIG)
    with open_run(tmp_path, settings, resume=False):
        with (
            pytest.raises(TrainingError, match=f"going on in .* \\(process {os.getpid()}\\)") as caught,
            open_run(tmp_path, settings, resume=False),
        ):
            pytest.fail("two at once")
        assert "--out" in caught.value.fix
    with open_run(tmp_path, settings, resume=False):
        pass  # and the directory is free again


def test_settings_are_written_down_and_the_same_ones_resume(tmp_path: Path) -> None:
    _started(tmp_path)
    recorded = recorded_settings(tmp_path)
    assert (recorded["seed"], recorded["dtype"], recorded["model"]["hidden_size"]) == (0, "bfloat16", 64)
    with open_run(
        tmp_path, settings_of(replace(CONFIG, checkpoints=CheckpointConfig(minutes=1.0)), dtype="bfloat16"), resume=True
    ):
        pass  # how often to save is no part of what is trained


def test_other_settings_are_named(tmp_path: Path) -> None:
    _started(tmp_path)
    model = tiny.model_config(n_routed_experts=8)
    other = replace(CONFIG, seed=3, optimizer=OptimizerConfig(learning_rate=0.5), model=model)
    with (
        pytest.raises(TrainingError, match="other settings") as caught,
        open_run(tmp_path, settings_of(other, dtype="bfloat16"), resume=True),
    ):
        pytest.fail("resumed with other settings")
    for part in (
        "seed was 0, now 3",
        "optimizer.learning_rate was 0.02, now 0.5",
        "model.n_routed_experts was 4, now 8",
    ):
        assert part in caught.value.what
    assert "dtype" not in caught.value.what
    assert recorded_settings(tmp_path)["seed"] == 0, "the first settings stay"


def test_a_run_is_not_mixed_with_another(tmp_path: Path) -> None:
    _started(tmp_path)
    with (
        pytest.raises(TrainingError, match="already holds a run, up to step-00000007") as caught,
        open_run(tmp_path, settings_of(CONFIG), resume=False),
    ):
        pytest.fail("began over a run")
    assert "--resume" in caught.value.fix


def test_before_the_first_checkpoint_a_run_may_begin_again(tmp_path: Path) -> None:
    with open_run(tmp_path, settings_of(CONFIG), resume=False):
        pass
    with open_run(tmp_path, settings_of(replace(CONFIG, seed=5)), resume=False):
        pass
    assert recorded_settings(tmp_path)["seed"] == 5


def test_nothing_to_resume_is_an_error(tmp_path: Path) -> None:
    with (
        pytest.raises(TrainingError, match="no checkpoint to resume") as caught,
        open_run(tmp_path / "new", settings_of(CONFIG), resume=True),
    ):
        pytest.fail("resumed nothing")
    assert "--resume" in caught.value.fix


def test_a_run_without_settings_takes_those_it_is_resumed_with(tmp_path: Path) -> None:
    _checkpoint(tmp_path)
    with open_run(tmp_path, settings_of(CONFIG), resume=True):
        pass
    assert recorded_settings(tmp_path)["seed"] == 0


@pytest.mark.parametrize("content", ["", "{", "[1]", "\x00"])
def test_damaged_settings_are_an_error_that_names_the_file(tmp_path: Path, content: str) -> None:
    _checkpoint(tmp_path)
    (tmp_path / "run.json").write_text(content)
    with (
        pytest.raises(TrainingError, match=r"run\.json cannot be read") as caught,
        open_run(tmp_path, settings_of(CONFIG), resume=True),
    ):
        pytest.fail("resumed on damaged settings")
    assert "Remove" in caught.value.fix


def test_a_file_in_the_way_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(TrainingError, match="is a file"), open_run(tmp_path / "out", settings_of(CONFIG), resume=False):
        pytest.fail("opened a file")
