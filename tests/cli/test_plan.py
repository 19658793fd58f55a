"""`k2 plan`: the names in its JSON, lines for people, and what it refuses before anything is measured."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from karakoram import env
from karakoram.cli import main
from karakoram.engine.expert_store.trace import TraceWriter
from karakoram.kernels import ops
from tests.evals.described import Counted, at_once

pytestmark = pytest.mark.skipif(ops.chosen() is None, reason="the CPU kernels are not there")

TIMES = {"disk_s", "experts_s", "others_s", "layers_s", "card_s", "read_s"}
SCHEMA: dict[str, set[str]] = {
    "budget": {"ram_bytes", "vram_bytes", "least_ram_bytes", "cache_tokens"},
    "placement": {"on_card", "in_ram", "on_disk", "all_in_memory_ram_bytes"},
    "hit_rate": {"card", "ram", "source"},
    "decode": {"context", "tokens_per_s", *TIMES},
    "prefill": {"tokens", "tokens_per_s", *TIMES},
    "first_token_s": {"16", "512"},
    "machine": {
        "memory_gb_per_s", "memory_one_thread_gb_per_s", "threads", "matmul_tflops", "expert_gb_per_s",
        "expert_tflops", "disk_gb_per_s", "disk_gb_per_s_by_burst", "disk_gb_per_s_by_depth", "layer_us", "card",
    },
}  # fmt: skip
PLAIN = {"version", "model", "expert_format", "expert_bytes", "limit", "helps", "assumptions"}


@pytest.fixture(autouse=True)
def measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Counted:
    monkeypatch.setattr(env, "cache_dir", lambda: tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    return at_once(monkeypatch)


def k2(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as left:
        main.run(["plan", *arguments])
    out, err = capsys.readouterr()
    assert isinstance(left.value.code, int)
    return left.value.code, out, err


def plan(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    code, out, err = k2(capsys, *arguments, "--json")
    assert code == 0, err
    return json.loads(out)


def test_the_names_of_the_json(capsys: pytest.CaptureFixture[str]) -> None:
    found = plan(capsys, "moonlight-16b", "--format", "int4", "--ram", "9GB", "--vram", "1GB")
    assert found.keys() == SCHEMA.keys() | PLAIN and found["version"] == 1
    assert {name: set(found[name]) for name in SCHEMA} == SCHEMA
    assert all(one.keys() == {"what", "description", "tokens_per_s"} for one in found["helps"])
    assert found["limit"] in ("disk", "memory", "card") and all(isinstance(text, str) for text in found["assumptions"])
    assert sum(found["placement"][place] for place in ("on_card", "in_ram", "on_disk")) == 26 * 64


def test_measured_once_and_again_when_asked(capsys: pytest.CaptureFixture[str], measured: Counted) -> None:
    arguments = ("nano", "--ram", "8GB")
    code, first, said = k2(capsys, *arguments)
    assert code == 0 and "measuring, once: experts" in said
    code, second, said = k2(capsys, *arguments)
    assert (code, second, said) == (0, first, "") and set(measured.values()) <= {1, 2}
    before = measured["memory_rates"]
    _, _, said = k2(capsys, *arguments, "--measure-again")
    assert "measuring" in said and measured["memory_rates"] == before + 1


def test_a_checkpoint_is_planned_from_its_own_tensors(
    capsys: pytest.CaptureFixture[str], tiny_checkpoint: Path
) -> None:
    found = plan(capsys, str(tiny_checkpoint), "--expert-ram", "40kB", "--ram", "8GB")
    assert found["expert_format"] == "bf16" and found["placement"]["in_ram"] < 4 == sum(
        found["placement"][place] for place in ("on_card", "in_ram", "on_disk")
    )
    everything = plan(capsys, str(tiny_checkpoint), "--ram", "8GB")
    assert everything["placement"]["on_disk"] == 0
    assert everything["decode"]["tokens_per_s"] > found["decode"]["tokens_per_s"]


def test_lines_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = k2(capsys, "k2-thinking", "--ram", "128GB", "--context", "4096")
    assert code == 0
    for name in (
        "machine",
        "budget",
        "placement",
        "decode",
        "prefill",
        "first token",
        "limit",
        "would help",
        "assumed",
    ):
        assert f"\n{name}" in out
    assert "after 4,096 tokens" in out and "→" in out


def test_a_trace_says_how_often_memory_serves(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "same.trace"
    with TraceWriter(path, range(1, 6), experts=16, top_k=4) as writer:
        for _ in range(80):
            for layer in range(1, 6):
                writer.record(layer, np.arange(4)[None])  # the same experts, always
    found = plan(capsys, "nano", "--ram", "8GB", "--expert-ram", "1MB", "--trace", str(path))
    assert found["placement"]["on_disk"] > 0 and found["hit_rate"]["ram"] == 1.0
    assert "same.trace" in found["hit_rate"]["source"] and found["decode"]["disk_s"] == 0
    code, _, err = k2(capsys, "k2-thinking", "--ram", "128GB", "--trace", str(path))
    assert code == 2 and "another" not in err and "8 of 384" in err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("k2-thinking", "--ram", "4GB"), "Give at least --ram"),
        (("k2-thinking", "--ram", "much"), "is no size"),
        (("k2-thinking", "--disk", "absent"), "Name a folder"),
        (("k3",), "No model"),
        (("nano", "--trace", "absent"), "absent"),
    ],
)
def test_refused_in_one_line(
    arguments: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str], measured: Counted
) -> None:
    code, out, err = k2(capsys, *arguments)
    assert (code, out) == (2, "") and said in err
    assert not measured


def test_a_disk_too_full_to_measure(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(env, "disk", lambda path: env.Disk(Path(path), 10, 1000))
    code, _, err = k2(capsys, "k2-thinking", "--ram", "128GB")
    assert code == 2 and "--disk PATH" in err
