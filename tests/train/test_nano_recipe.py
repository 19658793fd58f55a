"""The recipe from the tokenizer to the finished model, at the smallest size; the full size is in the slow ring."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import karakoram
from karakoram.errors import TrainingError
from karakoram.recipes import nano
from karakoram.train.config import TrainConfig
from karakoram.train.record.directory import recorded_settings
from karakoram.train.trainer import Trainer
from tests.train import tiny


def configuration(steps: int = 3) -> TrainConfig:
    """nano's vocabulary and special tokens in the smallest model."""
    keys = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings")
    preset = karakoram.ModelConfig.preset("nano").to_dict()
    model = tiny.model_config(**{key: preset[key] for key in keys})
    return TrainConfig(model=model, steps=steps, tokens_per_step=512, warmup_steps=1, int4_from=0.5)


def _run(out: Path, resume: bool = False, quiet: bool = True, **changes: int) -> Path:
    config = configuration(**changes)
    return nano.run_configuration(
        config, out, resume=resume, quiet=quiet, tokenizer_documents=2500, compiled=False, threads=1
    )


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("nano") / "run"
    assert _run(path) == path / "model"
    return path


def test_the_finished_model_opens_and_speaks_its_dialect(out: Path) -> None:
    model = karakoram.load_model(out / "model")
    fmt = karakoram.load_chat_format(out / "model")
    assert fmt.dialect == "kimi-k2.5"
    prompt = fmt.encode([{"role": "user", "content": "What is 17 * 23?"}])
    ids = list(karakoram.generate(model, prompt, max_new_tokens=4))
    assert len(ids) == 4
    assert all(0 <= token < model.config.vocab_size for token in ids)


def test_files_beside_the_weights(out: Path) -> None:
    for directory in ("model", "step-3"):
        names = {path.name for path in (out / directory).iterdir()}
        assert {"config.json", "generation_config.json", "tiktoken.model", "tokenizer_config.json"} <= names
    generation = json.loads((out / "model/generation_config.json").read_text())
    assert generation["karakoram"] == {"trained_on": "generated dialogs"}
    assert generation["do_sample"] is False
    assert json.loads((out / "model/config.json").read_text())["quantization_config"]


def test_settings_are_recorded(out: Path) -> None:
    recorded = recorded_settings(out)
    assert (recorded["recipe"], recorded["data"], recorded["steps"]) == ("nano", False, 3)
    assert recorded["dtype"] in ("bfloat16", "float32")


def test_resuming_a_finished_run_says_so(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (out / "model/config.json").stat().st_mtime_ns
    assert _run(out, resume=True, quiet=False) == out / "model"
    assert "This run is finished: it ended with step 3" in " ".join(capsys.readouterr().err.split())
    assert (out / "model/config.json").stat().st_mtime_ns == before


def test_beginning_again_over_a_run_is_refused(out: Path) -> None:
    with pytest.raises(TrainingError, match="already holds a run, up to step-3"):
        _run(out)


def test_resuming_with_another_length_is_refused(out: Path) -> None:
    with pytest.raises(TrainingError, match="steps was 3, now 5"):
        _run(out, resume=True, steps=5)


def test_a_resumed_run_keeps_its_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nano, "faster_dtype", lambda: torch.bfloat16)
    assert nano._dtype({"dtype": "float32"}) == torch.float32
    assert nano._dtype({}) == torch.bfloat16


def test_the_second_part_begins_with_the_weights_of_the_first(out: Path, tmp_path: Path) -> None:
    """Its tokenizer, its weights, all phrasings, and the int4 grid from the first step on."""
    second = nano.second_part(configuration(), steps=1, minutes=None)
    assert (second.int4_from, second.decay_from, second.learning_rate) == (0, 0, configuration().learning_rate / 3)
    still = replace(second, learning_rate=0.0, adamw_learning_rate=0.0, balance_rate=0.0)
    model_dir = nano.run_configuration(
        still, tmp_path / "second", quiet=True, compiled=False, threads=1, start_from=out
    )
    assert (model_dir / "tiktoken.model").read_bytes() == (out / "model/tiktoken.model").read_bytes()
    before, after = (karakoram.load_model(path, dtype="float32").state_dict() for path in (out / "model", model_dir))
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert json.loads((tmp_path / "second/tokens/state.json").read_text())["recipe"]["mix"]["rich"] is True


def test_there_is_no_second_part_without_a_first(tmp_path: Path) -> None:
    trainer = Trainer(tiny.train_config(), tiny.CopyTask(), tmp_path / "second", {}, compiled=False)
    with pytest.raises(TrainingError, match="no checkpoint to start from"):
        trainer.start_from(tmp_path / "first")


# `k2 train nano` itself, with this file's configuration; somebody presses Ctrl-C during the third step.
INTERRUPTED = """
import os, signal, sys
import karakoram.recipes.nano as nano
from karakoram.cli.main import run
from karakoram.train.trainer import Trainer
from tests.train.test_nano_recipe import configuration

train_step = Trainer.train_step

def press_ctrl_c(self, batch):
    if self.step == 2:
        os.kill(os.getpid(), signal.SIGINT)
    return train_step(self, batch)

Trainer.train_step = press_ctrl_c
nano.configuration = lambda steps, minutes, seed: configuration(steps)
run(["train", "nano", "--steps", "5", "--threads", "1", *sys.argv[1:]])
"""


def _k2_train(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TORCH_COMPILE_DISABLE": "1", "PYTHONPATH": str(root), "COLUMNS": "200"}
    return subprocess.run(
        [sys.executable, "-c", INTERRUPTED, *arguments],
        check=False, capture_output=True, text=True, env=environment, cwd=root,
    )  # fmt: skip


def test_ctrl_c_saves_says_how_to_go_on_and_the_run_goes_on(project_root: Path, out: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(out / "tokenizer", run_dir / "first/tokenizer")  # learned once is enough
    stopped = _k2_train(project_root, "--out", str(run_dir))
    assert stopped.returncode == 2, stopped.stderr
    assert "k2: error: Training was stopped at step 3; everything is saved in" in stopped.stderr
    assert "Go on with the same command and --resume." in stopped.stderr
    assert "Traceback" not in stopped.stderr
    karakoram.load_model(run_dir / "first/step-3")

    resumed = _k2_train(project_root, "--out", str(run_dir), "--resume")
    assert resumed.returncode == 0, resumed.stderr
    for part, steps in (("first", [1, 2, 3, 4]), ("second", [1])):
        lines = [json.loads(line) for line in (run_dir / part / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == steps
    karakoram.load_model(run_dir / "model")
    again = _k2_train(project_root, "--out", str(run_dir))
    assert again.returncode == 2 and "already holds a run" in again.stderr


@pytest.mark.slow
def test_the_full_pipeline_runs_for_three_steps(tmp_path: Path) -> None:
    """Everything at its real size, the compiler included; only the number of steps is small."""
    model_dir = nano.run(tmp_path / "run", steps=3, threads=2, quiet=True)
    model = karakoram.load_model(model_dir)
    assert model.config == karakoram.ModelConfig.preset("nano")
    assert model(torch.zeros(1, 4, dtype=torch.int64)).isfinite().all()
    assert sum(file.stat().st_size for file in model_dir.iterdir()) <= 16_000_000
