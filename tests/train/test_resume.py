"""Stopping, failing and going on: a resumed run is the run that was never stopped, bit for bit."""

import errno
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from karakoram.errors import CheckpointError, TrainingError
from karakoram.train import resume as saved
from karakoram.train.data.batches import Batch
from karakoram.train.trainer import Trainer, train
from tests.train import tiny

STEPS = 10


class Interrupting(tiny.CopyTask):
    """Presses Ctrl-C while batch `at` is fetched, once."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at: int | None = at

    def __getitem__(self, number: int) -> Batch:
        if number == self.at:
            self.at = None
            os.kill(os.getpid(), signal.SIGINT)
        return super().__getitem__(number)


def _run(out: Path, resume: bool = False, data: Any = None, **changes: Any) -> Path:
    torch.set_num_threads(1)
    config = tiny.train_config(**{"steps": STEPS, "int4_from": 0.5, **changes})
    return train(config, data or tiny.CopyTask(), out, resume, compiled=False, quiet=True)


def _state(out: Path, step: int = STEPS) -> dict[str, Tensor]:
    return load_file(out / f"step-{step}.state/state.safetensors")


def _losses(out: Path) -> list[tuple[int, float, float]]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["gradient_norm"]) for line in lines]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupted; experts go to the int4 grid at half of it."""
    out = tmp_path_factory.mktemp("whole")
    _run(out)
    return out


@pytest.fixture
def stopped(tmp_path: Path) -> Path:
    """A run that Ctrl-C stopped after its fourth step."""
    with pytest.raises(TrainingError, match="stopped at step 4"):
        _run(tmp_path / "run", data=Interrupting(3))
    return tmp_path / "run"


# 4, 5 and 6 steps: before int4 begins, at the very step, and after
@pytest.mark.parametrize("at", [3, 4, 5])
def test_interrupted_and_resumed_equals_uninterrupted(whole: Path, tmp_path: Path, at: int) -> None:
    with pytest.raises(TrainingError, match=f"stopped at step {at + 1}; everything is saved") as caught:
        _run(tmp_path, data=Interrupting(at))
    assert "--resume" in caught.value.fix
    model = _run(tmp_path, resume=True)
    expected, found = _state(whole), _state(tmp_path)
    assert set(found) == set(expected)
    differing = [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)]
    assert not differing
    assert _losses(tmp_path) == _losses(whole)
    assert [step for step, *_ in _losses(tmp_path)] == list(range(1, STEPS + 1))
    for file in (whole / "model").iterdir():
        assert (model / file.name).read_bytes() == file.read_bytes(), file.name


def test_the_signal_handler_is_given_back(stopped: Path) -> None:
    assert stopped.is_dir()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_ctrl_c_stops_at_once(tmp_path: Path) -> None:
    class Impatient(tiny.CopyTask):
        def __getitem__(self, number: int) -> Batch:
            if number == 2:
                os.kill(os.getpid(), signal.SIGINT)
                os.kill(os.getpid(), signal.SIGINT)
            return super().__getitem__(number)

    with pytest.raises(KeyboardInterrupt):
        _run(tmp_path, data=Impatient())
    assert saved.newest(tmp_path) is None


def test_a_run_that_was_killed_repeats_its_last_steps(whole: Path, stopped: Path) -> None:
    """As after a kill at step 6: two lines of metrics and half a line were written after the last checkpoint."""
    with (stopped / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "loss": 9.0}\n{"step": 6, "loss": 9.0}\n{"step": 7, "lo')
    (stopped / "step-6.state").mkdir()  # saved, but its model was not
    _run(stopped, resume=True)
    assert _losses(stopped) == _losses(whole)
    assert not (stopped / "step-6.state").exists()


def test_a_fresh_start_forgets_the_metrics_of_a_run_that_saved_nothing(tmp_path: Path, whole: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 9.0}\n')
    _run(tmp_path)
    assert _losses(tmp_path) == _losses(whole)


def test_a_finished_run_says_so_and_is_left_alone(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "run")
    trainer = tiny.trainer(tmp_path / "run", steps=STEPS, int4_from=0.5)
    assert trainer.finished is None
    trainer.resume()
    assert trainer.finished == tmp_path / "run/model"
    shutil.rmtree(tmp_path / "run/model")  # killed between the last checkpoint and the finished model
    assert trainer.finished is None
    model = trainer.run(quiet=True)
    assert trainer.step == STEPS
    for file in (whole / "model").iterdir():
        assert (model / file.name).read_bytes() == file.read_bytes(), file.name


def test_the_newest_two_checkpoints_are_kept(tmp_path: Path) -> None:
    _run(tmp_path, checkpoint_minutes=0.0)
    kept = {"step-9", "step-9.state", "step-10", "step-10.state", "model", "metrics.jsonl", "run.json", ".lock"}
    assert {path.name for path in tmp_path.iterdir()} == kept


@pytest.mark.parametrize("damage", ["truncated", "not json", "no step", "missing"])
def test_a_damaged_state_is_named(stopped: Path, damage: str) -> None:
    state = stopped / "step-4.state"
    if damage == "truncated":
        content = (state / "state.safetensors").read_bytes()
        (state / "state.safetensors").write_bytes(content[: len(content) // 2])
    elif damage == "missing":
        (state / "state.safetensors").unlink()
    else:
        (state / "state.json").write_text("{" if damage == "not json" else '{"elapsed_s": 1.0, "seed": 0}')
    with pytest.raises(TrainingError, match=r"step-4\.state cannot be read") as caught:
        _run(stopped, resume=True)
    assert "Remove" in caught.value.fix


def test_the_checkpoint_before_a_damaged_one_resumes(whole: Path, tmp_path: Path) -> None:
    """What the error says to do works."""
    with pytest.raises(TrainingError, match="stopped at step 4"):
        _run(tmp_path, data=Interrupting(3), checkpoint_minutes=0.0)
    shutil.rmtree(tmp_path / "step-4")
    shutil.rmtree(tmp_path / "step-4.state")
    _run(tmp_path, resume=True)
    assert _losses(tmp_path) == _losses(whole)


def test_a_state_of_another_model_is_refused(stopped: Path) -> None:
    other = Trainer(tiny.train_config(tiny.model_config(n_routed_experts=8)), tiny.CopyTask(), stopped, {})
    with pytest.raises(TrainingError, match=r"of another model: \d+ tensors differ, the first is masters/.*mlp\.gate"):
        other.resume()
    deeper = Trainer(tiny.train_config(tiny.model_config(num_hidden_layers=3)), tiny.CopyTask(), stopped, {})
    with pytest.raises(TrainingError, match="of another model"):
        deeper.resume()


def test_another_seed_is_refused_even_without_recorded_settings(stopped: Path) -> None:
    (stopped / "run.json").unlink()
    with pytest.raises(TrainingError, match="trained with seed 0, this run has seed 1") as caught:
        _run(stopped, resume=True, seed=1)
    assert "--seed 0" in caught.value.fix


def test_a_state_from_before_int4_was_noted_resumes(whole: Path, stopped: Path) -> None:
    """Runs that began earlier have neither settings nor the note in their counters."""
    (stopped / "run.json").unlink()
    counters = json.loads((stopped / "step-4.state/state.json").read_text())
    del counters["int4_experts"]
    (stopped / "step-4.state/state.json").write_text(json.dumps(counters))
    _run(stopped, resume=True)
    assert _losses(stopped) == _losses(whole)


def test_no_checkpoint_to_resume(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="no checkpoint to resume"):
        _run(tmp_path, resume=True)
    with pytest.raises(TrainingError, match="no checkpoint to resume"):
        tiny.trainer(tmp_path).resume()


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    ("function", "failure"),
    [
        ("save_file", FULL),
        ("save_file", SafetensorError("I/O error: No space left on device (os error 28)")),
        ("_flush", FULL),
        ("write_checkpoint", CheckpointError("the disk of DIR is full: No space left on device.", "Free some space.")),
    ],
    ids=["state", "state in safetensors", "flush", "model"],
)
def test_a_full_disk_is_a_clear_error_and_the_earlier_checkpoint_survives(
    whole: Path, stopped: Path, monkeypatch: pytest.MonkeyPatch, function: str, failure: Exception
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise failure

    before = {path.name for path in stopped.iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(saved, function, fail)
        with pytest.raises(TrainingError, match=r"step-7 could not be saved: .*No space left on device") as caught:
            _run(stopped, resume=True, data=Interrupting(6))
    assert "--resume goes on from step-4" in caught.value.fix
    assert {path.name for path in stopped.iterdir()} == before, "nothing half-written stays"
    _run(stopped, resume=True)
    assert _losses(stopped) == _losses(whole)


def test_a_full_disk_at_the_first_save_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise FULL

    monkeypatch.setattr(saved, "save_file", fail)
    with pytest.raises(TrainingError, match="could not be saved") as caught:
        _run(tmp_path)
    assert "nothing was saved before" in caught.value.fix
    assert not list(tmp_path.glob("*step*"))
