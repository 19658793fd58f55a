"""Recipes over one's own data refuse what cannot be, and say what they leave out, before anything is trained."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from karakoram.config import ModelConfig
from karakoram.env import Memory
from karakoram.errors import InputError, TrainingError
from karakoram.recipes import pretrain, sft
from karakoram.train import recipe as running
from karakoram.train.config import BatchConfig, GuardConfig, OptimizerConfig, ScheduleConfig, TrainConfig
from karakoram.train.data.batches import Batch
from karakoram.train.recipe import Manner, Material, Recipe, run_recipe
from tests.train import tiny

MANNER = Manner(compiled=False, threads=1, dtype=torch.float32)
QUIET = replace(MANNER, quiet=True)


def small(data: str, steps: int = 1, held_out: str = "", **batch: Any) -> Recipe:
    """Rows of 64 tokens into the smallest model with nano's vocabulary."""
    keys = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")
    preset = ModelConfig.preset("nano").to_dict()
    model = tiny.model_config(**{key: preset[key] for key in keys})
    made = pretrain.recipe(data=data, held_out=held_out, sequence_tokens=64, steps=steps)
    size = BatchConfig(**{"tokens_per_step": 256, **batch})
    return made.with_plan(replace(made.plan, model=model, batch=size, held_out_steps=1))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two texts, a Markdown file, and more JSON lines than there are of either."""
    path = tmp_path / "mixed"
    path.mkdir()
    for name in ("a.txt", "b.txt", "c.md", "d.md"):
        (path / name).write_text("Some words and some more. " * 40)
    for name in ("e.jsonl", "f.jsonl", "g.jsonl"):
        (path / name).write_text(json.dumps({"text": "left out"}) + "\n")
    return path


def test_a_mixed_folder_is_read_by_what_it_holds_most_of_and_says_so(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_recipe(small(f"{folder}/"), tmp_path / "run", MANNER)
    told = " ".join(capsys.readouterr().err.split())
    assert "only the text files in it are read; left out: 3 .jsonl" in told
    assert "The warmup (schedule.warmup_steps=50) is longer than the run of 1 steps" in told


def test_skipped_lines_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "data.jsonl"
    lines = [json.dumps({"text": f"line {n} and what follows it"}) for n in range(100)]
    data.write_text("\n".join(["{broken", *lines]) + "\n")
    run_recipe(small(str(data)), tmp_path / "run", MANNER)
    assert "1 of 101 records were skipped; the first:" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        ({"tokens_per_step": 63}, "batch.tokens_per_step is 63, and a row has 64 tokens"),
        ({"micro_tokens": 63}, "batch.micro_tokens is 63, and a row has 64 tokens"),
        ({"ramp_from_tokens": 63, "ramp_tokens": 999}, "batch.ramp_from_tokens is 63, and a row has 64 tokens"),
    ],
)
def test_a_batch_has_room_for_a_row(batch: dict[str, Any], words: str, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=words):
        run_recipe(small(str(folder), **batch), tmp_path / "run", QUIET)


def test_rows_fit_the_context(folder: Path, tmp_path: Path) -> None:
    made = small(str(folder))
    short = made.with_plan(replace(made.plan, model=replace(made.plan.model, max_position_embeddings=32)))
    with pytest.raises(InputError, match="Rows of 64 tokens are longer than the model's context of 32"):
        run_recipe(short, tmp_path / "run", QUIET)


def test_conversations_of_which_nothing_is_learned_are_refused(tmp_path: Path) -> None:
    """They would train to a loss of 0, and weight decay would move the model."""
    data = tmp_path / "chats.jsonl"
    said = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello", "weight": 0}]
    data.write_text(json.dumps({"messages": said}) + "\n")
    made = sft.recipe(data=str(data), sequence_tokens=64, steps=1)
    with pytest.raises(TrainingError, match="every token in it has weight 0"):
        run_recipe(made, tmp_path / "run", QUIET)
    with pytest.raises(InputError, match="lora is -3"):
        sft.recipe(data=str(data), lora=-3)


def test_held_out_rows_are_measured_once(tmp_path: Path) -> None:
    """The last batch is shorter; there are not eight batches of the same few rows."""
    data = tmp_path / "text.txt"
    data.write_text(" ".join(map(str, range(1000, 1100))))
    made = small(str(data), held_out=str(data), tokens_per_step=192)
    material = made.material("", made.plan, running.Workplace(tmp_path, tmp_path, None, 1, quiet=True))
    rows = torch.cat([batch.token_ids for batch in material.held_out])
    assert 1 < len(rows) < 32 and len(rows) % 3 and len({tuple(row) for row in rows.tolist()}) == len(rows)


def test_a_model_that_this_machine_cannot_hold_is_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running, "memory", lambda: Memory(1_000_000, 1_000_000))
    with pytest.raises(TrainingError, match="this machine has 0 GB of memory"):
        run_recipe(small(str(folder)), tmp_path / "run", QUIET)
    assert not (tmp_path / "run" / "run.json").exists()


def _material(batches: Any) -> Any:
    return lambda stage, config, place: Material(batches)


def test_ctrl_c_before_training_says_how_to_go_on(tmp_path: Path) -> None:
    def interrupted(*_: Any) -> Material:
        raise KeyboardInterrupt

    with pytest.raises(TrainingError, match="Stopped before this run began") as caught:
        run_recipe(Recipe(tiny.train_config(), interrupted), tmp_path, QUIET)
    assert "The same command goes on" in caught.value.fix


def test_a_run_that_saved_nothing_begins_anew_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Vanishing(tiny.CopyTask):
        def __getitem__(self, number: int) -> Batch:
            raise OSError("the disk is gone")

    config = tiny.train_config(steps=2)
    with pytest.raises(OSError, match="the disk is gone"):
        run_recipe(Recipe(config, _material(Vanishing())), tmp_path, QUIET)
    run_recipe(Recipe(config, _material(tiny.CopyTask())), tmp_path, replace(MANNER, resume=True))
    assert "Nothing was saved of this run before it stopped: it begins anew." in capsys.readouterr().err


def test_an_unknown_set_of_coefficients_is_refused_before_the_data_are_read(tmp_path: Path) -> None:
    config = tiny.train_config(optimizer__coefficients="mine")
    with pytest.raises(TrainingError, match="no set of coefficients 'mine'"):
        run_recipe(Recipe(config, _material(None)), tmp_path, QUIET)


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ({"optimizer": OptimizerConfig(momentum=2.0)}, "optimizer.momentum is 2.0"),
        ({"optimizer": OptimizerConfig(adamw_learning_rate=-1.0)}, "optimizer.adamw_learning_rate is -1.0"),
        ({"schedule": ScheduleConfig(decay_from=1.5)}, "schedule.decay_from is 1.5"),
        ({"schedule": ScheduleConfig(floor=-2.0)}, "schedule.floor is -2.0"),
        ({"batch": BatchConfig(micro_tokens=0)}, "batch.micro_tokens is 0"),
        ({"batch": BatchConfig(ramp_from_tokens=64)}, "the ramp is of 0 tokens"),
        ({"guard": GuardConfig(loss_factor=0.5)}, "guard.loss_factor is 0.5"),
        ({"int4_from": -0.1}, "int4_from is -0.1"),
    ],
)
def test_impossible_values_are_refused(part: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        TrainConfig(model=tiny.model_config(), steps=1, **part)


def test_the_recipe_in_the_documentation_runs(project_root: Path, folder: Path, tmp_path: Path) -> None:
    page = (project_root / "docs/training.md").read_text()
    (block,) = [b.partition("```")[0] for b in page.split("```python\n") if b.startswith('"""mine')]
    found: dict[str, Any] = {}
    exec(compile(block, "my_recipe.py", "exec"), found)
    made = found["recipe"](data=str(folder), steps=1)
    shape = replace(small("x").plan.model, max_position_embeddings=256)
    run_recipe(made.with_plan(replace(made.plan, model=shape)), tmp_path / "run", QUIET)
    assert (tmp_path / "run/model/config.json").is_file()
