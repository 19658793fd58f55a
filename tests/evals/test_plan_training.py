"""`k2 plan --train`: what it says, what it refuses, and that docs/scale.md says the same."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from karakoram.cli import main
from karakoram.config import ModelConfig
from karakoram.errors import InputError
from karakoram.evals.plan.training import Asked, Fixed, plan_of_training, read_asked
from karakoram.model import cost
from karakoram.model.cost.training import RECOMPUTE, activation_bytes, muon_flops, training_flops

PAGE = (Path(__file__).resolve().parents[2] / "docs/scale.md").read_text()
K2 = ModelConfig.preset("k2")


def k2(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main.run(list(arguments))
    captured = capsys.readouterr()
    return int(ended.value.code or 0), captured.out, captured.err


def planned(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    code, out, err = k2(capsys, "plan", *arguments, "--train", "--json")
    assert code == 0, err
    return json.loads(out)


def test_the_published_layout_is_the_default(capsys: pytest.CaptureFixture[str]) -> None:
    report = planned(capsys, "k2", "--gpus", "256")
    layout, memory = report["layout"], report["memory"]
    assert (layout["pipeline"], layout["experts"], layout["replicas"], layout["published"]) == (16, 16, 1, True)
    assert layout["sharding"] == "zero1" and layout["recompute"] == "selective"
    # published: about 30 GB of states on a GPU, 6 TB of weights and gradients in all
    assert 27e9 < memory["mean_states_bytes"] < 31e9 < memory["states_bytes"] < 33e9
    assert round(6 * report["parameters"] / 1e12, 1) == 6.2
    assert memory["fits"] and report["would_fit"] == []
    assert report["total_tokens"] / report["tokens_per_s"] / 86_400 == pytest.approx(report["days"])
    step = dict(report["step"])
    assert step.pop("total_s") == pytest.approx(sum(step.values()))


def test_what_is_asked_is_kept(capsys: pytest.CaptureFixture[str]) -> None:
    options = "--gpus 64 --pp 8 --ep 4 --dp 2 --chunks 2 --recompute full --offload both --sequence 2048"
    report = planned(capsys, "k2", *options.split(), "--batch-tokens", "4e6", "--gpu", "h200", "--tokens", "1e12")
    layout = report["layout"]
    assert [layout[name] for name in ("pipeline", "experts", "replicas", "chunks")] == [8, 4, 2, 2]
    assert layout["recompute"] == "full" and layout["offload_activations"] and layout["offload_optimizer"]
    assert report["gpu"]["name"] == "H200" and not layout["published"]
    assert report["batch"]["tokens"] == 244 * 8 * 2048  # the nearest to 4 million
    assert report["fastest"] is not None or layout["recompute"] == "full"


def test_what_does_not_fit_says_by_how_much_and_what_would(capsys: pytest.CaptureFixture[str]) -> None:
    report = planned(capsys, "k2", "--gpus", "64")
    memory = report["memory"]
    assert not memory["fits"]
    assert memory["over_bytes"] == pytest.approx(memory["total_bytes"] - memory["usable_bytes"])
    assert [one["what"] for one in report["would_fit"]] == ["H200 with 141 GB", "B200 with 180 GB", "128 H800"]
    assert all(one["fits"] for one in report["would_fit"])
    out = k2(capsys, "plan", "k2", "--train", "--gpus", "64")[1]
    assert "too large" in out and "would fit" in out and "128 H800" in out
    forced = planned(capsys, "k2", "--gpus", "2048", "--pp", "1", "--ep", "1", "--sharding", "zero1")
    assert forced["would_fit"][0]["what"] == "another layout"


def test_the_layout_found_is_no_slower_than_any_given() -> None:
    best = plan_of_training("moonlight", ModelConfig.preset("moonlight-16b"), Asked(64))
    assert best["fastest"] is None and best["memory"]["fits"]
    for pp, ep in ((1, 8), (2, 16), (4, 16)):
        given = Asked(64, fixed=Fixed(pipeline=pp, experts=ep))
        other = plan_of_training("moonlight", ModelConfig.preset("moonlight-16b"), given)
        assert other["tokens_per_s"] <= best["tokens_per_s"]


def test_a_dense_model_has_no_ranks_of_experts() -> None:
    config = ModelConfig.from_dict({**ModelConfig.preset("nano").to_dict(), "first_k_dense_replace": 99})
    report = plan_of_training("dense", config, Asked(8, batch_tokens=2**20))
    assert report["layout"]["experts"] == 1 and "experts" not in report["communication"]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ([], "on how many cards"),
        (["--gpus", "256", "--gpu", "abacus"], "no GPU 'abacus'"),
        (["--gpus", "256", "--pp", "3"], "do not make 256 GPUs"),
        (["--gpus", "512", "--ep", "256"], "make no layout"),
        (["--gpus", "64", "--pp", "64"], "make no layout"),
        (["--gpus", "1000000"], "are no plan"),
        (["--gpus", "8", "--offload", "heaven"], "'heaven' is not known"),
        (["--gpus", "8", "--batch-tokens", "10"], "grow in that order"),
        (["--gpus", "8", "--tokens", "nan"], "grow in that order"),
        (["--gpus", "8", "--efficiency", "1.5"], "is no share"),
        (["--gpus", "8", "--ram", "8GB"], "do not go with --train"),
    ],
)
def test_refusals(capsys: pytest.CaptureFixture[str], options: list[str], told: str) -> None:
    code, out, err = k2(capsys, "plan", "k2", "--train", *options)
    assert code != 0 and told in err and not out


def test_gpus_without_training_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = k2(capsys, "plan", "k2", "--gpus", "8")
    assert code != 0 and "Add --train" in err


def test_words_are_read() -> None:
    asked = read_asked({"gpus": 8, "pipeline": 2, "offload": "optimizer"})
    assert asked == Asked(8, fixed=Fixed(pipeline=2, offload=(False, True)))
    with pytest.raises(InputError, match="--sharding 'zero9'"):
        read_asked({"gpus": 8, "sharding": "zero9"})


# ------------------------------------------------------------------------------------------------ docs/scale.md


@pytest.mark.parametrize(
    "shown", re.findall(r"```text\n\$ (k2 [^\n]+)\n(.*?)\n```", PAGE, re.S), ids=lambda one: one[0]
)
def test_the_page_shows_what_the_command_prints(capsys: pytest.CaptureFixture[str], shown: tuple[str, str]) -> None:
    command, text = shown
    assert k2(capsys, *command.split()[1:])[1].rstrip() == text


def test_the_table_is_what_the_commands_say(capsys: pytest.CaptureFixture[str]) -> None:
    rows = re.findall(r"^\| `(k2 [^`]+)` \| [^|]+ \| ([^|]+) \| ([^|]+) \| ([^|]+) \| ([^|]+) \|$", PAGE, re.M)
    assert len(rows) == 12
    for command, *numbers in rows:
        report = planned(capsys, *command.replace(" --train", "").split()[2:])
        now = [
            f"{report['memory']['total_bytes'] / 1e9:.1f}", f"{report['step']['total_s']:.2f}", f"{report['mfu']:.1%}",
            f"{report['days']:.1f}",
        ]  # fmt: skip
        assert numbers == now, command
        assert ("too large" in PAGE.split(command + "`")[1].split("\n")[0]) <= (not report["memory"]["fits"])


def test_the_numbers_in_the_text(capsys: pytest.CaptureFixture[str]) -> None:
    parameters = cost.parameters(K2).total
    routed = next(part.parameters for part in cost.components(K2) if part.name == "routed experts")
    assert f"{6 * parameters / 1e12:.2f} TB once; {6 * (routed + 16 * (parameters - routed)) / 1e12:.1f} TB" in PAGE
    small, large = planned(capsys, "k2", "--gpus", "256"), planned(capsys, "k2", "--gpus", "2048")
    memory = small["memory"]
    assert f"{memory['mean_states_bytes'] / 1e9:.1f} GB on the mean GPU, {memory['states_bytes'] / 1e9:.1f} GB" in PAGE
    assert f"{large['tokens_per_s'] / small['tokens_per_s']:.1f} times the speed" in PAGE
    sent, step = small["communication"]["experts"], small["step"]
    assert f"{sent['seconds'] / step['compute_s']:.0%} of the computing".replace("%", " %") in PAGE
    flops = training_flops(K2, 4096) * 2**26
    assert f"{muon_flops(K2) / 1e15:.0f} PFLOP a step, {muon_flops(K2) / flops:.2%}".replace("%", " %") in PAGE
    assert f"{flops / 1e18:.1f} EFLOP" in PAGE
    kept = [f"{activation_bytes(K2, True, kind) / 1e3:.0f} kB" for kind in RECOMPUTE]
    assert f"{kept[0]} a layer of K2, {kept[1]} with K2's list, {kept[2]} of the input alone" in PAGE
