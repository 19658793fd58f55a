"""The trainer learns, measures what it says, and leaves a model that the rest of the package opens."""

import json
import warnings
from pathlib import Path

import pytest
import torch

import karakoram
from karakoram.checkpoint import open_checkpoint
from karakoram.errors import TrainingError
from karakoram.train.data.batches import Batch
from karakoram.train.trainer import Trainer, train
from tests.train import tiny

IDS = torch.randint(0, tiny.SHAPE["vocab_size"], (2, 20), generator=torch.Generator().manual_seed(9))


def test_a_tiny_model_learns_to_copy(tmp_path: Path) -> None:
    """From ln 96 = 4.6 (nothing known) to below 0.5; it is 0.01 after 105 of the steps, and 2.3 after 75."""
    trainer = tiny.trainer(tmp_path, steps=110)
    losses = [trainer.train_step(trainer.batches[step])["loss"] for step in range(110)]
    assert losses[0] > 4.3
    assert sum(losses[-5:]) / 5 < 0.5


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Trainer, Path]:
    """Eight steps, the last four on the int4 grid, and a checkpoint after each."""
    out = tmp_path_factory.mktemp("run")
    trainer = tiny.trainer(out, steps=8, int4_from=0.5, checkpoint_minutes=0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer.run(quiet=True)
    return trainer, out


def test_the_finished_model_opens_with_the_same_logits(finished: tuple[Trainer, Path]) -> None:
    trainer, out = finished
    model = karakoram.load_model(out / "model", dense=True)  # the kernels round elsewhere
    with torch.no_grad():
        assert torch.equal(model(IDS), trainer.model(IDS)), "what was trained is what is stored, bit for bit"


def test_experts_are_stored_int4_and_nothing_else(finished: tuple[Trainer, Path]) -> None:
    checkpoint = open_checkpoint(finished[1] / "model")
    checkpoint.check()
    formats = {name: checkpoint.format_of(name) for name in checkpoint.tensors if name.endswith(".weight")}
    packed = {name.removesuffix("_packed") for name in checkpoint.tensors if name.endswith("_packed")}
    assert len(packed) == 4 * 3
    assert all(".experts." in name for name in packed)
    assert all(checkpoint.format_of(name) == "int4" for name in packed)
    assert {form for name, form in formats.items() if name not in packed} == {"bf16"}
    raw = json.loads((finished[1] / "model/config.json").read_text())
    assert raw["quantization_config"]["quant_method"] == "compressed-tensors"
    assert (finished[1] / "model/note.txt").read_bytes() == b"beside the weights"


def test_checkpoints_on_the_way_open_too(finished: tuple[Trainer, Path]) -> None:
    trainer, out = finished
    for step in (7, 8):
        raw = json.loads((out / f"step-{step}/config.json").read_text())
        assert "quantization_config" not in raw
        assert (out / f"step-{step}/note.txt").is_file()
    model = karakoram.load_model(out / "step-8", dense=True)
    with torch.no_grad():
        assert torch.equal(model(IDS), trainer.model(IDS))


def test_without_int4_the_finished_model_is_bfloat16(tmp_path: Path) -> None:
    model = train(
        tiny.train_config(tiny.model_config(quantization_config=None), steps=2, int4_from=1.0),
        tiny.CopyTask(), tmp_path, dtype=torch.float32, compiled=False, quiet=True,
    )  # fmt: skip
    assert "quantization_config" not in json.loads((model / "config.json").read_text())
    assert karakoram.load_model(model)(IDS).isfinite().all()


def test_int4_is_declared_even_where_the_configuration_did_not(tmp_path: Path) -> None:
    config = tiny.train_config(tiny.model_config(quantization_config=None), steps=2, int4_from=0.5)
    model = train(config, tiny.CopyTask(), tmp_path, compiled=False, quiet=True)
    assert json.loads((model / "config.json").read_text())["quantization_config"]
    assert karakoram.load_model(model)(IDS).isfinite().all()


def test_metrics_say_what_happened(finished: tuple[Trainer, Path]) -> None:
    lines = [json.loads(line) for line in (finished[1] / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert [line["rate_share"] for line in lines[:5]] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert lines[-1]["rate_share"] < 1
    assert {line["tokens"] for line in lines} == {32 * 16}
    assert all(line["max_logit"] > 0 and line["max_vio"] >= 0 and line["tokens_per_s"] > 0 for line in lines)
    assert all(later["elapsed_s"] > earlier["elapsed_s"] for earlier, later in zip(lines, lines[1:]))


def test_a_tied_head_is_trained(tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path, model=tiny.model_config(tie_word_embeddings=True))
    before = trainer.masters.weights["model.embed_tokens.weight"].clone()
    losses = [trainer.train_step(trainer.batches[0])["loss"] for _ in range(8)]
    assert "lm_head.weight" not in trainer.masters.weights
    assert not torch.equal(trainer.masters.weights["model.embed_tokens.weight"], before)
    assert losses[-1] < losses[0]


def test_logits_above_the_threshold_are_clipped_in_the_run(tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path, qk_clip_threshold=0.05)
    assert trainer.train_step(trainer.batches[0])["clipped_heads"] > 0


def test_the_gradient_is_clipped_to_its_norm(tmp_path: Path) -> None:
    """A thousandth of the norm: AdamW's first moment, a tenth of the clipped gradient, says how much came through."""
    trainer = tiny.trainer(tmp_path, clip_norm=1e-3)
    norm = trainer.train_step(trainer.batches[0])["gradient_norm"]
    assert norm > 1e-2
    gradients = trainer.masters.gradients()
    moment = trainer.adamw.state()["model.embed_tokens.weight/exp_avg"]
    clipped = gradients["model.embed_tokens.weight"].float() * (1e-3 / (norm + 1e-6))
    assert torch.allclose(moment, clipped * 0.1, rtol=1e-4)


class Poisoned(tiny.CopyTask):
    """The third batch holds a weight that is no number."""

    def __getitem__(self, number: int) -> Batch:
        batch = super().__getitem__(number)
        if number == 2:
            batch.weights[0, -1] = float("nan")
        return batch


def test_a_gradient_that_is_no_number_stops_the_run_before_it_is_applied(tmp_path: Path) -> None:
    config = tiny.train_config(checkpoint_minutes=0.0)
    with pytest.raises(TrainingError, match="gradient became nan at step 2") as caught:
        train(config, Poisoned(), tmp_path, compiled=False, quiet=True)
    assert "lower learning rate" in caught.value.fix
    model = karakoram.load_model(tmp_path / "step-2", dense=True)
    assert model(IDS).isfinite().all(), "the checkpoint before is whole"


class Unweighted(tiny.CopyTask):
    """Nothing to learn from."""

    def __getitem__(self, number: int) -> Batch:
        batch = super().__getitem__(number)
        return batch._replace(weights=torch.zeros_like(batch.weights))


def test_a_batch_without_weights_only_decays(tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path)
    line = trainer.train_step(Unweighted()[0])
    assert line["loss"] == 0
    assert line["gradient_norm"] == 0
    assert all(weight.isfinite().all() for weight in trainer.masters.weights.values())
