"""`k2 bench train` at a tiny shape: processes that answer and end, arithmetic that agrees with itself. No speeds."""

import io
import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from karakoram.errors import InputError, KarakoramError
from karakoram.evals.bench import memory, report
from karakoram.evals.bench.train import child, layer, ours, process, step, theirs
from karakoram.evals.bench.train.order import LAYER_SHAPE, OURS, STEP_SHAPE, THEIRS, Order
from karakoram.model.cost.training import training_flops

TINY = STEP_SHAPE | {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "moe_intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
}  # fmt: skip
STEP = Order("step", OURS, dtype="float32", compiled=False, rows=2, length=16, shape=TINY)
LAYER = replace(STEP, what="layer")
FAKE = {"dtype": "float32", "finite": True, "peak_bytes": 1, "matmul_flops_per_s": 1e9}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory reads 10 GB/s, and processes are only started where a test does it."""
    monkeypatch.setattr(memory, "BUFFER_BYTES", 1 << 20)
    monkeypatch.setattr(report.memory, "measure", lambda _, b: memory.ReadSpeed({"memcpy": 10.0}, b.numel()))
    monkeypatch.setattr(child, "keep_freed_memory", lambda: None)  # of this process, that would be
    monkeypatch.setattr(child, "matmul_flops_per_s", lambda *_: 1e9)


class Fake(process.Process):
    """Answers without a process: ours takes 1 s a step, transformers 3 s, eager bfloat16 a second longer."""

    def __init__(self, order: Order) -> None:
        self.order, self.closed = order, False
        made.append(self)

    def run(self, steps: int) -> dict[str, Any]:
        mine = self.order.who == OURS
        if self.order.implementation == "grouped_mm" and self.order.dtype == "float32":
            raise process.Ended("ValueError: no such thing here")
        seconds = 1.0 if mine else 3.0 + (self.order.dtype == "bfloat16")
        dtype = "bfloat16" if self.order.dtype == "auto" else self.order.dtype
        return FAKE | {"seconds": [seconds] * steps, "backward_seconds": [0.75 * seconds] * steps, "dtype": dtype}

    def close(self) -> None:
        self.closed = True


made: list[Fake] = []


@pytest.fixture
def faked(monkeypatch: pytest.MonkeyPatch) -> list[Fake]:
    made.clear()
    monkeypatch.setattr(process, "Process", Fake)
    return made


def served(order: Order, *steps: int) -> list[dict[str, Any]]:
    answers = io.StringIO()
    threads = torch.get_num_threads()
    child.serve([order.to_json(), *map(str, steps)], answers)
    torch.set_num_threads(threads)
    return [json.loads(line) for line in answers.getvalue().splitlines()]


def test_a_step_of_ours_tells_its_parts() -> None:
    first, second = served(STEP, 2, 1)
    assert (len(first["seconds"]), len(second["seconds"])) == (2, 1)
    assert first["finite"] and first["dtype"] == "float32" and first["matmul_flops_per_s"] > 0
    assert all(0 < part < whole for part, whole in zip(first["backward_seconds"], first["seconds"], strict=True))


def test_the_step_learns() -> None:
    call = ours.step(replace(STEP, shape=TINY), torch.float32)
    losses = [call(number)["loss"] for number in range(3)]
    assert len(set(losses)) == 3 and abs(losses[0] - torch.tensor(64.0).log()) < 0.5


def test_both_sides_compute_the_same_layer() -> None:
    """The same router and inputs; their other weights are drawn alike, in another order: as many tokens an expert."""
    pytest.importorskip("transformers")
    mine = ours.layer(LAYER, torch.float32)(0)["loss"]
    found = {way: theirs.layer(replace(LAYER, who=THEIRS, implementation=way), torch.float32)(0)["loss"]
             for way in layer.WAYS}  # fmt: skip
    assert found["eager"] == pytest.approx(found["grouped_mm"], rel=1e-4)  # sums in another order
    assert mine == pytest.approx(found["eager"], rel=0.5)  # mean squares of the same distribution


def test_transformers_takes_a_step() -> None:
    pytest.importorskip("transformers")
    call = theirs.step(replace(STEP, who=THEIRS, implementation="eager"), torch.float32)
    losses = [call(0)["loss"] for _ in range(3)]
    assert losses[2] < losses[0]


def test_a_process_answers_and_ends() -> None:
    started = process.Process(LAYER)
    try:
        assert len(started.run(2)["seconds"]) == 2
    finally:
        started.close()
    assert started._process.poll() is not None


def test_what_a_process_said_last_is_told() -> None:
    with pytest.raises(KarakoramError, match=r"has ended early.*no attribute 'float7'"):
        process.alone(replace(LAYER, dtype="float7"), 1, 1, 1, report.silent)


def test_the_best_baseline_counts(faked: list[Fake], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "find_spec", lambda _: True)
    found = step.train_bench(2, 3, 1, shape=TINY, rows=2, length=16, compiled=False)
    assert found["problems"] == [] and all(each.closed for each in faked)
    assert (found["ratio"], found["baseline"]) == (3.0, "transformers eager float32")
    assert found["ratio_by_round"] == [3.0] * 3
    assert found["tokens_per_s"] == 32 and found["baseline_tokens_per_s"] == pytest.approx(32 / 3)
    assert found["optimizer_share"] == pytest.approx(0.25) and found["dtype"] == "bfloat16"
    flops = found["flops_per_step"]
    assert flops["model"] == 32 * training_flops(step.config_of(TINY), 16)
    assert found["matmul_share"] == pytest.approx(sum(flops.values()) / 1e9)
    assert found["mfu"] < found["matmul_share"]
    assert [row["what"] for row in found["rows"]] == [
        "karakoram bfloat16", "transformers eager float32", "transformers eager float32, memory kept",
        "transformers grouped_mm bfloat16", "transformers grouped_mm bfloat16, memory kept",
    ]  # fmt: skip
    assert sum("grouped_mm float32" in note and "no such thing here" in note for note in found["notes"]) == 2


def test_without_transformers_the_reason_stands_there(faked: list[Fake], monkeypatch: pytest.MonkeyPatch) -> None:
    for bench, module in ((step.train_bench, step), (layer.layer_bench, layer)):
        monkeypatch.setattr(module, "find_spec", lambda _: None)
        found = bench(1, 1, 1, shape=TINY, rows=2, length=16)
        assert "pip install transformers" in found["baseline_reason"]
        assert not any(each.order.who == THEIRS for each in faked)
    assert found["ratios"] == {"float32": {}, "bfloat16": {}}


def test_a_ratio_for_each_way_and_dtype(faked: list[Fake], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer, "find_spec", lambda _: True)
    found = layer.layer_bench(1, 2, 1, shape=TINY, rows=2, length=16)
    assert {d: {w: f["ratio"] for w, f in of.items()} for d, of in found["ratios"].items()} == {
        "float32": {"eager": 3.0}, "bfloat16": {"eager": 4.0, "grouped_mm": 4.0},
    }  # fmt: skip
    assert [row["what"] for row in found["rows"] if "matmul_share" in row] == [f"{OURS} {d}" for d in layer.DTYPES]


def test_a_loss_that_is_no_number_is_a_problem(faked: list[Fake], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "find_spec", lambda _: None)
    monkeypatch.setitem(FAKE, "finite", False)
    found = step.train_bench(1, 1, 1, shape=TINY, rows=2, length=16)
    assert not found["loss_finite"] and "no finite number" in found["problems"][0]


def test_short_memory_is_told_before_anything_runs(faked: list[Fake], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "PAIR_BYTES", 1 << 60)
    with pytest.raises(InputError, match="Two models in training"):
        step.train_bench(1, 1, 1)
    assert not faked


def test_shapes_of_the_bars() -> None:
    config = ours.config_of(STEP_SHAPE)
    assert (config.hidden_size, config.n_routed_experts, config.num_experts_per_tok) == (256, 32, 4)
    assert ours.config_of(LAYER_SHAPE).n_routed_experts == 64
