"""Recipes over one's own data: from nothing, from conversations, by adapters, from a teacher; at the smallest size."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import karakoram
from karakoram.checkpoint import open_checkpoint
from karakoram.config import ModelConfig
from karakoram.env import bundled_model_dir
from karakoram.errors import InputError, TrainingError
from karakoram.recipes import distill, pretrain, sft
from karakoram.train.config import BatchConfig
from karakoram.train.data import dialogs
from karakoram.train.recipe import Manner, Recipe, run_recipe
from tests.train import tiny

QUIET = Manner(quiet=True, compiled=False, threads=1)


def small(recipe: Recipe, **changes: Any) -> Recipe:
    """With small batches, and the smallest model with nano's vocabulary where the shape is free."""
    plan = replace(recipe.plan, batch=BatchConfig(tokens_per_step=512), held_out_steps=2, **changes)
    return recipe.with_plan(plan)


def shape(**changes: Any) -> ModelConfig:
    keys = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings")
    preset = ModelConfig.preset("nano").to_dict()
    return tiny.model_config(**{key: preset[key] for key in keys}, **changes)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    for number in range(6):
        (folder / f"{number}.txt").write_text(f"The number {number} comes before {number + 1}. " * 60)
    return folder


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    made = [dialogs.generate(5, number) for number in range(40)]
    path.write_text(
        "".join(json.dumps({"messages": d.messages, "tools": d.tools, "thinking": d.thinking}) + "\n" for d in made)
    )
    return path


@pytest.fixture(scope="module")
def base(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained from nothing, the last steps on the int4 grid."""
    recipe = pretrain.recipe(data=str(texts), held_out=str(texts), sequence_tokens=128, steps=4)
    return run_recipe(small(recipe, model=shape(), int4_from=0.5), tmp_path_factory.mktemp("base"), QUIET)


def _lines(model: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (model.parent / "metrics.jsonl").read_text().splitlines()]


def test_pretraining_on_texts_leaves_a_model(base: Path) -> None:
    lines = _lines(base)
    assert [line["tokens"] for line in lines] == [512, 1024, 1536, 2048]
    assert [("held_out_loss" in line) for line in lines] == [False, True, False, True]
    assert lines[1]["held_out_loss"] < 9
    assert open_checkpoint(base).config.weight_format == "int4"
    assert (base / "tiktoken.model").read_bytes() == (bundled_model_dir() / "tiktoken.model").read_bytes()


def test_conversations_move_an_int4_model_on_its_grid(base: Path, chats: Path, tmp_path: Path) -> None:
    recipe = sft.recipe(data=str(chats), model=base, sequence_tokens=256, steps=2)
    assert recipe.plan.int4_from == 0.0
    model = run_recipe(small(recipe), tmp_path, QUIET)
    assert open_checkpoint(model).config.weight_format == "int4"
    before, after = (karakoram.load_model(path, dense=True).state_dict() for path in (base, model))
    assert [name for name, tensor in before.items() if not torch.equal(tensor, after[name])]


def test_adapters_leave_experts_and_routers_as_they_were(base: Path, chats: Path, tmp_path: Path) -> None:
    recipe = sft.recipe(data=str(chats), model=base, lora=4, sequence_tokens=256, steps=3)
    rates = replace(recipe.plan.optimizer, learning_rate=1e-2)
    model = run_recipe(small(recipe, optimizer=rates), tmp_path, QUIET)
    assert open_checkpoint(model).config.weight_format == "int4", "what was not trained stays as it was stored"
    before, after = (karakoram.load_model(path, dense=True).state_dict() for path in (base, model))
    moved = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert moved and all("self_attn" in name or "shared_experts" in name for name in moved)


def test_a_student_learns_from_a_teacher(base: Path, texts: Path, tmp_path: Path) -> None:
    recipe = distill.recipe(teacher=base, data=str(texts), sequence_tokens=128, steps=2)
    assert recipe.plan.model.vocab_size == shape().vocab_size
    model = run_recipe(small(recipe, model=shape(num_hidden_layers=1, first_k_dense_replace=0)), tmp_path, QUIET)
    assert open_checkpoint(model).config.num_hidden_layers == 1


def test_a_run_on_changed_data_is_not_resumed(texts: Path, tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.mkdir()
    for file in texts.iterdir():
        (own / file.name).write_text(file.read_text())
    recipe = small(pretrain.recipe(data=str(own), sequence_tokens=128, steps=2), model=shape())
    run_recipe(recipe, tmp_path / "run", QUIET)
    (own / "0.txt").write_text("Something else altogether. " * 60)
    with pytest.raises(TrainingError, match="changed"):
        run_recipe(recipe, tmp_path / "run", replace(QUIET, resume=True))


def test_what_is_missing_is_said() -> None:
    with pytest.raises(InputError, match="pretrain needs data"):
        pretrain.recipe()
    with pytest.raises(InputError, match="sft needs data"):
        sft.recipe()
    with pytest.raises(InputError, match="needs a teacher and data"):
        distill.recipe(data="x")


@pytest.mark.parametrize(
    ("data", "words"),
    [("nowhere.txt", "There is no data nowhere.txt"), ("a:0", "names no data"), ("", "names no data")],
)
def test_data_that_is_not_there(data: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    from karakoram.train.data.corpus.material import named, source_of

    with pytest.raises(InputError, match=words):
        source_of(named(data)[0][0])
