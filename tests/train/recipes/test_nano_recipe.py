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
from karakoram.train.recipe import Manner, Recipe, run_recipe
from karakoram.train.record.directory import recorded_settings
from tests.train import tiny

QUIET = Manner(quiet=True, compiled=False, threads=1)


def plan(steps: int = 3) -> nano.Plan:
    """nano's vocabulary and special tokens in the smallest model; each stage has so many steps."""
    keys = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings")
    preset = karakoram.ModelConfig.preset("nano").to_dict()
    whole = nano.plan_of(3, None, 0, tiny.model_config(**{key: preset[key] for key in keys}))

    def short(config: TrainConfig) -> TrainConfig:
        return replace(config, steps=steps, batch=replace(config.batch, tokens_per_step=512))

    return nano.Plan(short(whole.pretrain), short(whole.sft), short(whole.int4))


def recipe(steps: int = 3) -> Recipe:
    """With a tokenizer learned from few dialogs."""
    return nano.recipe(steps=3, tokenizer_documents=2500).with_plan(plan(steps))


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("nano") / "run"
    assert run_recipe(recipe(), path, QUIET) == path / "model"
    return path


def test_the_lengths_are_within_the_issue_s() -> None:
    """No stage over 40 minutes, the whole at most 100 with tokenizer and tokens."""
    stages = nano.recipe().plan
    minutes = [stages.pretrain.minutes, stages.sft.minutes, stages.int4.minutes]
    assert max(minutes) <= 40
    assert sum(minutes) == pytest.approx(nano.MINUTES)
    assert [stages.pretrain.int4_from, stages.sft.int4_from, stages.int4.int4_from] == [1.0, 1.0, 0.0]
    short = nano.recipe(steps=100).plan
    assert short.pretrain.minutes is None
    assert short.pretrain.steps + short.sft.steps + short.int4.steps == 100


def test_the_finished_model_opens_and_speaks_its_dialect(out: Path) -> None:
    model = karakoram.load_model(out / "model")
    fmt = karakoram.load_chat_format(out / "model")
    assert fmt.dialect == "kimi-k2.5"
    prompt = fmt.encode([{"role": "user", "content": "What is 17 * 23?"}])
    ids = list(karakoram.generate(model, prompt, max_new_tokens=4))
    assert len(ids) == 4
    assert all(0 <= token < model.config.vocab_size for token in ids)


def test_each_stage_leaves_a_model_and_begins_with_the_one_before(out: Path) -> None:
    raw = {stage: json.loads((out / stage / "model/config.json").read_text()) for stage in ("pretrain", "sft", "int4")}
    assert ["quantization_config" in raw[stage] for stage in raw] == [False, False, True]
    for directory in ("pretrain/model", "sft/model", "int4/model", "model"):
        names = {path.name for path in (out / directory).iterdir()}
        assert {"config.json", "generation_config.json", "tiktoken.model", "tokenizer_config.json"} <= names
    assert (out / "model/tiktoken.model").read_bytes() == (out / "pretrain/model/tiktoken.model").read_bytes()
    mixes = [json.loads((out / s / "tokens/state.json").read_text())["recipe"]["mix"] for s in ("pretrain", "sft")]
    assert [mix["rich"] for mix in mixes] == [False, True]
    generation = json.loads((out / "model/generation_config.json").read_text())
    assert generation["karakoram"] == {"trained_on": "generated dialogs"}
    assert generation["do_sample"] is False


def test_a_stage_that_learns_nothing_ends_as_the_one_before_ended(out: Path, tmp_path: Path) -> None:
    still = plan(steps=1).sft
    still = replace(
        still,
        optimizer=replace(still.optimizer, learning_rate=0.0, adamw_learning_rate=0.0),
        balance=replace(still.balance, rule="none"),
    )
    one = replace(recipe().with_plan(still), start_from=out / "pretrain/model")
    shutil.copytree(out / "pretrain/tokenizer", tmp_path / "run/pretrain/tokenizer")
    run_recipe(one, tmp_path / "run", QUIET)
    before, after = (
        karakoram.load_model(path, dtype="float32", dense=True).state_dict()
        for path in (out / "pretrain/model", tmp_path / "run/model")
    )
    assert not [name for name, tensor in before.items() if not torch.equal(tensor, after[name])]


def test_settings_are_recorded(out: Path) -> None:
    recorded = recorded_settings(out / "sft")
    assert (recorded["recipe"], recorded["data"], recorded["steps"], recorded["stage"]) == ("nano", False, 3, "sft")
    assert recorded["dtype"] in ("bfloat16", "float32")


def test_resuming_a_finished_run_says_so(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (out / "model/config.json").stat().st_mtime_ns
    assert run_recipe(recipe(), out, replace(QUIET, resume=True, quiet=False)) == out / "model"
    told = " ".join(capsys.readouterr().err.split())
    for stage in ("pretrain", "sft", "int4"):
        assert f"Stage {stage} is finished: it ended with step 3." in told
    assert (out / "model/config.json").stat().st_mtime_ns == before


def test_beginning_again_over_a_run_is_refused(out: Path) -> None:
    with pytest.raises(TrainingError, match="already holds a run, in its stage int4"):
        run_recipe(recipe(), out, QUIET)


def test_resuming_with_another_length_is_refused(out: Path) -> None:
    with pytest.raises(TrainingError, match="made with other settings"):  # so many steps need so many tokens
        run_recipe(recipe(steps=5), out, replace(QUIET, resume=True))
    other = replace(plan(), sft=replace(plan().sft, int4_from=0.5))
    with pytest.raises(TrainingError, match=r"int4_from was 1\.0, now 0\.5"):
        run_recipe(recipe().with_plan(other), out, replace(QUIET, resume=True))


def test_resuming_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="no checkpoint to resume"):
        run_recipe(recipe(), tmp_path / "new", replace(QUIET, resume=True))


# `k2 train nano` itself, with this file's plan; somebody presses Ctrl-C during the third step of the second stage.
INTERRUPTED = """
import os, signal, sys
import karakoram.recipes.nano as nano
from karakoram.cli.main import run
from karakoram.train.trainer import Trainer
from tests.train.recipes.test_nano_recipe import plan

train_step = Trainer.train_step

def press_ctrl_c(self, batch, metrics=None):
    if self.step == 2 and self.out.name == "sft" and "--resume" not in sys.argv:
        os.kill(os.getpid(), signal.SIGINT)
    return train_step(self, batch, metrics)

Trainer.train_step = press_ctrl_c
made = plan(4)
nano.plan_of = lambda steps, minutes, seed: made
run(["train", "nano", "--threads", "1", *sys.argv[1:]])
"""


def _k2_train(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TORCH_COMPILE_DISABLE": "1", "PYTHONPATH": str(root), "COLUMNS": "200"}
    return subprocess.run(
        [sys.executable, "-c", INTERRUPTED, *arguments],
        check=False, capture_output=True, text=True, env=environment, cwd=root,
    )  # fmt: skip


def test_ctrl_c_saves_says_how_to_go_on_and_the_run_goes_on(project_root: Path, out: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(out / "pretrain/tokenizer", run_dir / "pretrain/tokenizer")  # learned once is enough
    stopped = _k2_train(project_root, "--out", str(run_dir))
    assert stopped.returncode == 2, stopped.stderr
    assert "k2: error: Training was stopped at step 3; everything is saved in" in stopped.stderr
    assert "Go on with the same command and --resume." in stopped.stderr
    assert "Traceback" not in stopped.stderr
    karakoram.load_model(run_dir / "sft/checkpoints/step-00000003/hf")

    resumed = _k2_train(project_root, "--resume", str(run_dir))
    assert resumed.returncode == 0, resumed.stderr
    for stage in ("pretrain", "sft", "int4"):
        lines = [json.loads(line) for line in (run_dir / stage / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == [1, 2, 3, 4]
    karakoram.load_model(run_dir / "model")
    again = _k2_train(project_root, "--out", str(run_dir))
    assert again.returncode == 2 and "already holds a run" in again.stderr


@pytest.mark.slow
def test_the_full_pipeline_runs_for_three_steps(tmp_path: Path) -> None:
    """Everything at its real size, the compiler included; only the number of steps is small."""
    model_dir = run_recipe(nano.recipe(steps=3), tmp_path / "run", Manner(threads=2, quiet=True))
    model = karakoram.load_model(model_dir)
    assert model.config == karakoram.ModelConfig.preset("nano")
    assert model(torch.zeros(1, 4, dtype=torch.int64)).isfinite().all()
    for stage in ("pretrain", "sft", "int4"):
        assert sum(file.stat().st_size for file in (tmp_path / "run" / stage / "model").iterdir()) <= 16_000_000
