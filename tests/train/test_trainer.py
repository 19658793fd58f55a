"""The trainer learns, measures what it says, and leaves a model that the rest of the package opens."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import karakoram
from karakoram.checkpoint import open_checkpoint
from karakoram.errors import TrainingError
from karakoram.train.config import BatchConfig
from karakoram.train.data.batches import Batch
from karakoram.train.record.metrics import Metrics
from karakoram.train.trainer import Trainer, train
from tests.train import tiny

IDS = torch.randint(0, tiny.SHAPE["vocab_size"], (2, 20), generator=torch.Generator().manual_seed(9))


def test_a_tiny_model_learns_to_copy(tmp_path: Path) -> None:
    """From ln 96 = 4.6 (nothing known) to below 0.5; it is 0.01 after 105 of the steps, and 2.3 after 75."""
    trainer = tiny.trainer(tmp_path, steps=110)
    losses = [trainer.train_step(trainer.batches.batch(step))["loss"] for step in range(110)]
    assert losses[0] > 4.3
    assert sum(losses[-5:]) / 5 < 0.5


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Trainer, Path]:
    """Eight steps, the last four on the int4 grid, and a checkpoint after each."""
    out = tmp_path_factory.mktemp("run")
    trainer = tiny.trainer(out, steps=8, int4_from=0.5, checkpoints__minutes=0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process is enough
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
        raw = json.loads((out / f"checkpoints/step-{step:08d}/hf/config.json").read_text())
        assert "quantization_config" not in raw
        assert (out / f"checkpoints/step-{step:08d}/hf/note.txt").is_file()
    model = karakoram.load_model(out / "checkpoints/step-00000008/hf", dense=True)
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
    assert [line["tokens"] for line in lines] == [32 * 16 * step for step in range(1, 9)]
    assert all(line["max_logit"] > 0 and line["max_vio"] >= 0 and line["tokens_per_s"] > 0 for line in lines)
    assert all(later["elapsed_s"] > earlier["elapsed_s"] for earlier, later in zip(lines, lines[1:]))


def test_a_tied_head_is_trained(tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path, model=tiny.model_config(tie_word_embeddings=True))
    before = trainer.masters.weights["model.embed_tokens.weight"].clone()
    losses = [trainer.train_step(trainer.batches.batch(0))["loss"] for _ in range(8)]
    assert "lm_head.weight" not in trainer.masters.weights
    assert not torch.equal(trainer.masters.weights["model.embed_tokens.weight"], before)
    assert losses[-1] < losses[0]


def test_logits_above_the_threshold_are_clipped_in_the_run(tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path, optimizer__qk_clip_threshold=0.05)
    assert trainer.train_step(trainer.batches.batch(0))["clipped_heads"] > 0


def test_the_gradient_is_clipped_to_its_norm(tmp_path: Path) -> None:
    """A thousandth of the norm: AdamW's first moment, a tenth of the clipped gradient, says how much came through."""
    trainer = tiny.trainer(tmp_path, optimizer__clip_norm=1e-3)
    batch = trainer.batches.batch(0)
    trainer.backward(batch)
    gradient = trainer.masters.gradients()["model.embed_tokens.weight"].float().clone()
    norm = trainer.train_step(batch)["gradient_norm"]
    assert norm > 1e-2
    moment = trainer.adamw.state()["model.embed_tokens.weight/exp_avg"]
    assert torch.allclose(moment, gradient * (1e-3 / (norm + 1e-6)) * 0.1, rtol=1e-4)


def test_micro_batches_add_up_to_the_batch(tmp_path: Path) -> None:
    """In float32, where only the order of the sums differs: gradients, loss, and what the watch saw."""
    whole = tiny.trainer(tmp_path, torch.float32)
    pieces = tiny.trainer(tmp_path, torch.float32, batch=BatchConfig(micro_tokens=7 * 16))
    batch = whole.batches.batch(0)
    assert len(pieces._micro_batches(batch)) == 5
    losses = [each.backward(batch) for each in (whole, pieces)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    expected, found = whole.masters.gradients(), pieces.masters.gradients()
    for name, gradient in expected.items():
        assert torch.allclose(found[name], gradient, rtol=1e-4, atol=1e-6 * float(gradient.abs().max()) + 1e-9), name
    for layer, load_E in whole.watch.loads.items():
        assert torch.equal(pieces.watch.loads[layer], load_E)
    for layer, largest_H in whole.watch.max_logits.items():
        assert torch.allclose(pieces.watch.max_logits[layer], largest_H, rtol=1e-5)


def test_layers_that_run_twice_give_the_same_step(tmp_path: Path) -> None:
    """Bit for bit, whatever is watched: nothing is counted a second time."""
    changes = {"balance__rule": "quantile", "balance__sequence_loss": 1e-2}
    plain, again = (tiny.trainer(tmp_path, recompute=twice, **changes) for twice in (False, True))
    for number in range(3):
        lines = [each.train_step(each.batches.batch(number)) for each in (plain, again)]
        kept = [{k: v for k, v in line.items() if k not in ("tokens_per_s", "elapsed_s")} for line in lines]
        assert kept[0] == kept[1]
    assert all(torch.equal(w, again.masters.weights[n]) for n, w in plain.masters.weights.items())


class Poisoned(tiny.CopyTask):
    """Some batches hold a weight that is no number, or a loss ten thousand times as large."""

    def __init__(self, bad: set[int], value: float = float("nan")) -> None:
        super().__init__()
        self.bad, self.value = bad, value

    def __getitem__(self, number: int) -> Batch:
        batch = super().__getitem__(number)
        if number in self.bad:
            batch.weights[0, -1] = self.value
        return batch


def _events(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]


def test_a_batch_that_is_no_number_is_skipped_and_written_down(tmp_path: Path) -> None:
    """The spike drill: no parameter moves at it, and the next batches train as if it had not been there."""
    config = tiny.train_config(steps=6)
    trainer = Trainer(config, Poisoned({2}), tmp_path, {}, compiled=False)
    seen: list[dict[str, Tensor]] = []
    with Metrics(tmp_path, 0.0, quiet=True) as metrics:
        for number in range(4):
            line = trainer.train_step(trainer.batches.batch(number), metrics)
            assert line.get("skipped", False) is (number == 2)
            seen.append({n: w.clone() for n, w in trainer.masters.weights.items()})
    assert all(torch.equal(seen[1][n], seen[2][n]) for n in seen[1]), "a refused batch moves nothing"
    assert all(torch.equal(b.isfinite(), torch.ones_like(b, dtype=torch.bool)) for b in trainer.muon.state().values())
    assert any(not torch.equal(seen[2][n], seen[3][n]) for n in seen[2])
    (event,) = _events(tmp_path)
    assert (event["step"], event["event"], event["batch"], event["reason"]) == (3, "batch skipped", 2, "loss is nan")


def test_a_loss_ten_thousand_times_too_large_moves_nothing(tmp_path: Path) -> None:
    config = tiny.train_config(steps=9, guard__after_steps=4)
    trainer = Trainer(config, tiny.CopyTask(), tmp_path, {}, compiled=False)
    for number in range(5):
        trainer.train_step(trainer.batches.batch(number))
    before = {n: w.clone() for n, w in trainer.masters.weights.items()}
    plain = trainer.loss
    trainer.loss = lambda batch, watch=True: plain(batch, watch) * 1e4
    assert trainer.train_step(trainer.batches.batch(5))["skipped"]
    assert all(torch.equal(before[n], w) for n, w in trainer.masters.weights.items())
    trainer.loss = plain
    assert "skipped" not in trainer.train_step(trainer.batches.batch(6))


def test_many_bad_batches_go_back_to_the_checkpoint_and_past_them(tmp_path: Path) -> None:
    config = tiny.train_config(steps=8, checkpoints__minutes=0.0, guard__skips_before_rollback=2)
    model = train(config, Poisoned({3, 4}), tmp_path, compiled=False, quiet=True)
    assert karakoram.load_model(model, dense=True)(IDS).isfinite().all()
    events = _events(tmp_path)
    assert [event["event"] for event in events] == ["batch skipped", "batch skipped", "rolled back"]
    # the checkpoint after the second skip holds the weights of before both; the run goes on with batch 5
    assert events[-1]["next_batch"] == 5
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps[-1] == 8


def test_a_run_that_only_spikes_ends_with_an_error(tmp_path: Path) -> None:
    config = tiny.train_config(steps=40, checkpoints__minutes=1e6, guard__skips_before_rollback=3)
    with pytest.raises(TrainingError, match="3 batches in a row up to step 4 were refused, and nothing was saved"):
        train(config, Poisoned(set(range(1, 40))), tmp_path, compiled=False, quiet=True)
    config = tiny.train_config(steps=40, checkpoints__minutes=0.0, guard__skips_before_rollback=2, guard__rollbacks=2)
    with pytest.raises(TrainingError, match="2 rollbacks did not help") as caught:
        train(config, Poisoned(set(range(2, 40))), tmp_path / "again", compiled=False, quiet=True)
    assert "lower learning rate" in caught.value.fix


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


def test_a_run_stopped_behind_a_rollback_goes_on_behind_the_bad_batches(tmp_path: Path) -> None:
    """Back at the checkpoint's step, the run is elsewhere in its data: a save there is no repetition."""
    config = tiny.train_config(steps=8, guard__skips_before_rollback=2)
    trainer = Trainer(config, Poisoned({3, 4}), tmp_path, {}, compiled=False)
    with Metrics(tmp_path, 0.0, quiet=True) as metrics:
        for _ in range(5):
            if trainer.step == 3:
                trainer.save(wait=True)
            trainer.train_step(trainer.next_batch(), metrics)
        assert trainer.guard.wants_rollback
        trainer.roll_back(metrics)
    assert (trainer.step, trainer.position) == (3, 5)
    trainer.save(wait=True)
    again = Trainer(config, Poisoned({3, 4}), tmp_path, {}, compiled=False)
    again.resume()
    assert (again.step, again.position, again.guard.rollbacks) == (3, 5, 1)


def test_held_out_batches_are_taken_in_pieces_too(tmp_path: Path) -> None:
    """In float32; only the order of the sum differs."""
    losses = []
    for micro in (None, 7 * 16):
        trainer = tiny.trainer(tmp_path, torch.float32, batch=BatchConfig(micro_tokens=micro))
        trainer.held_out = [trainer.batches.batch(number) for number in (90, 91)]
        losses.append(trainer.held_out_loss())
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_a_first_loss_that_is_no_number_can_be_shown(tmp_path: Path) -> None:
    """The bar has no mean loss yet."""
    Trainer(tiny.train_config(steps=2), Poisoned({0}), tmp_path, {}, compiled=False).run(quiet=False)
    assert [event["event"] for event in _events(tmp_path)] == ["batch skipped"]


def test_resumes_are_events_and_a_torn_line_does_not_spoil_the_next(tmp_path: Path) -> None:
    config = tiny.train_config(steps=3)
    trainer = Trainer(config, tiny.CopyTask(), tmp_path, {}, compiled=False)
    trainer.train_step(trainer.next_batch())
    trainer.save(wait=True)
    (tmp_path / "events.jsonl").write_text('{"step": 2, "event": "batch ski')
    again = Trainer(config, tiny.CopyTask(), tmp_path, {}, compiled=False)
    again.resume()
    again.run(quiet=True)
    torn, told = (tmp_path / "events.jsonl").read_text().splitlines()
    assert torn.endswith("batch ski")
    assert json.loads(told) == {"step": 1, "event": "resumed", "next_batch": 1}
