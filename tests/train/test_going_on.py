"""Stopping, failing and going on: a resumed run is the run that was never stopped, bit for bit."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from karakoram.errors import TrainingError
from karakoram.model.load import load_model
from karakoram.train.checkpoints import find
from karakoram.train.data.batches import Batch
from karakoram.train.trainer import Trainer, train
from tests.train import tiny

STEPS = 10


class Interrupting(tiny.CopyTask):
    """Presses Ctrl-C, or sends another signal, while batch `at` is fetched, once."""

    def __init__(self, at: int, number: signal.Signals = signal.SIGINT) -> None:
        super().__init__()
        self.at: int | None = at
        self.signal = number

    def __getitem__(self, number: int) -> Batch:
        if number == self.at:
            self.at = None
            os.kill(os.getpid(), self.signal)
        return super().__getitem__(number)


def _run(out: Path, resume: bool = False, data: Any = None, **changes: Any) -> Path:
    torch.set_num_threads(1)
    config = tiny.train_config(**{"steps": STEPS, "int4_from": 0.5, **changes})
    return train(config, data or tiny.CopyTask(), out, resume, compiled=False, quiet=True)


def _tensors(out: Path, step: int = STEPS) -> dict[str, Tensor]:
    folder = find.path_of(out, step) / find.TENSORS_DIR
    return {name: tensor for file in folder.iterdir() for name, tensor in load_file(file).items()}


def _assert_same(out: Path, other: Path, step: int = STEPS) -> None:
    """Masters, momenta, moments and biases, bit for bit."""
    found, expected = _tensors(out, step), _tensors(other, step)
    assert found.keys() == expected.keys()
    assert not [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)]


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
@pytest.mark.parametrize(("at", "how"), [(3, signal.SIGINT), (4, signal.SIGTERM), (5, signal.SIGINT)])
def test_interrupted_and_resumed_equals_uninterrupted(
    whole: Path, tmp_path: Path, at: int, how: signal.Signals
) -> None:
    with pytest.raises(TrainingError, match=f"stopped at step {at + 1}; everything is saved") as caught:
        _run(tmp_path, data=Interrupting(at, how))
    assert "--resume" in caught.value.fix
    model = _run(tmp_path, resume=True)
    _assert_same(tmp_path, whole)
    assert _losses(tmp_path) == _losses(whole)
    assert [step for step, *_ in _losses(tmp_path)] == list(range(1, STEPS + 1))
    for file in (whole / "model").iterdir():
        assert (model / file.name).read_bytes() == file.read_bytes(), file.name


def test_the_signal_handlers_are_given_back(tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    _run(tmp_path, steps=1)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_second_ctrl_c_stops_at_once(tmp_path: Path) -> None:
    class Impatient(tiny.CopyTask):
        def __getitem__(self, number: int) -> Batch:
            if number == 2:
                os.kill(os.getpid(), signal.SIGINT)
                os.kill(os.getpid(), signal.SIGINT)
            return super().__getitem__(number)

    with pytest.raises(KeyboardInterrupt):
        _run(tmp_path, data=Impatient())
    assert find.newest(tmp_path) is None


def test_a_run_that_was_killed_repeats_its_last_steps(whole: Path, stopped: Path) -> None:
    """As after a kill at step 6: two lines of metrics and half a line were written after the last checkpoint."""
    with (stopped / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "loss": 9.0}\n{"step": 6, "loss": 9.0}\n{"step": 7, "lo')
    _run(stopped, resume=True)
    assert _losses(stopped) == _losses(whole)


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
    _run(tmp_path, checkpoints__minutes=0.0)
    assert [find.step_of(path) for path in find.complete(tmp_path)] == [9, 10]
    assert {path.name for path in tmp_path.iterdir()} == {
        "checkpoints", "model", "metrics.jsonl", "events.jsonl", "run.json", ".lock",
    }  # fmt: skip


def test_the_checkpoint_before_a_damaged_one_resumes(whole: Path, tmp_path: Path) -> None:
    """What the error says to do works."""
    with pytest.raises(TrainingError, match="stopped at step 4"):
        _run(tmp_path, data=Interrupting(3), checkpoints__minutes=0.0)
    newest = find.path_of(tmp_path, 4)
    (newest / find.STATE_FILE).write_text("{")
    with pytest.raises(TrainingError, match="is damaged") as caught:
        _run(tmp_path, resume=True)
    assert caught.value.fix == f"Remove {newest} to resume from the checkpoint before it."
    shutil.rmtree(newest)
    _run(tmp_path, resume=True)
    assert _losses(tmp_path) == _losses(whole)


def test_a_state_of_another_model_is_refused(stopped: Path) -> None:
    for change in ({"n_routed_experts": 8}, {"num_hidden_layers": 3}):
        other = Trainer(tiny.train_config(tiny.model_config(**change)), tiny.CopyTask(), stopped, {}, compiled=False)
        with pytest.raises(TrainingError, match="differ"):
            other.resume()


def test_another_seed_is_refused_even_without_recorded_settings(stopped: Path) -> None:
    (stopped / "run.json").unlink()
    with pytest.raises(TrainingError, match="trained with seed 0, this run has seed 1") as caught:
        _run(stopped, resume=True, seed=1)
    assert "--seed 0" in caught.value.fix


def test_no_checkpoint_to_resume(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="no checkpoint to resume"):
        _run(tmp_path, resume=True)
    with pytest.raises(TrainingError, match="no checkpoint to resume"):
        tiny.trainer(tmp_path).resume()


def test_a_full_disk_while_saving_ends_the_run_and_the_earlier_checkpoint_resumes(
    whole: Path, stopped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("karakoram.train.checkpoints.writer.write_state", full)
        with pytest.raises(TrainingError, match="No space left on device") as caught:
            _run(stopped, resume=True, data=Interrupting(6))
    assert "--resume goes on from step-00000004" in caught.value.fix
    assert [find.step_of(path) for path in find.complete(stopped)] == [4]
    _run(stopped, resume=True)
    assert _losses(stopped) == _losses(whole)


def test_weights_of_a_finished_model_begin_another_run(tmp_path: Path) -> None:
    """The model's numbers become the masters, steps and momenta begin anew; another shape is refused."""
    model = _run(tmp_path / "before", int4_from=1.0)
    trainer = tiny.trainer(tmp_path / "after", int4_from=1.0)
    trainer.start_from(model)
    expected = load_model(model, dense=True).state_dict()
    found = trainer.model.state_dict()
    assert found.keys() == expected.keys()
    assert not [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)]
    assert any(bias_E.any() for bias_E in trainer.biases.values())
    assert trainer.step == 0 and not any(b.any() for b in trainer.muon.state().values())
    other = Trainer(tiny.train_config(tiny.model_config(n_routed_experts=8)), tiny.CopyTask(), tmp_path, {})
    with pytest.raises(TrainingError, match=r"holds another model: \d+ tensors differ"):
        other.start_from(model)


KILLED = """
import sys
from pathlib import Path
from tests.train.test_going_on import _run
_run(Path(sys.argv[1]), resume=sys.argv[2] == "resume", steps=60, checkpoints__minutes=0.0)
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_at_ten_moments_ten_times_bit_equal(project_root: Path, tmp_path: Path) -> None:
    """SIGKILL at any moment, saves in the background included; the lines in the end are those of a run left alone."""
    _run(tmp_path / "whole", steps=60)
    environment = {**os.environ, "PYTHONPATH": str(project_root), "OMP_NUM_THREADS": "1"}
    rng = Random(7)
    for attempt in range(10):
        out, wanted = tmp_path / str(attempt), 1 + int(rng.random() * 55)
        begun = [sys.executable, "-c", KILLED, str(out)]
        process = subprocess.Popen([*begun, "begin"], env=environment, cwd=project_root)
        metrics = out / "metrics.jsonl"
        while process.poll() is None and (not metrics.exists() or len(metrics.read_bytes().splitlines()) < wanted):
            pass
        process.kill()
        process.wait()
        assert process.returncode == -signal.SIGKILL
        how = "resume" if find.newest(out) else "begin"
        subprocess.run([*begun, how], env=environment, cwd=project_root, check=True)
        assert _losses(out) == _losses(tmp_path / "whole"), attempt
        _assert_same(out, tmp_path / "whole", 60)
