"""`k2 inspect`: published totals, bytes counted from headers, and a problem told after everything else."""

import json
from pathlib import Path
from typing import Any

import pytest

from karakoram.cli import main
from karakoram.config import PRESETS, ModelConfig
from karakoram.model import cost


def k2(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as left:
        main.run(list(arguments))
    out, err = capsys.readouterr()
    assert isinstance(left.value.code, int)
    return left.value.code, out, err


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))


def report(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    code, out, err = k2(capsys, "inspect", *arguments, "--json")
    assert (code, err) == (0, "")
    return json.loads(out)


def small_config(**changes: Any) -> ModelConfig:
    raw = ModelConfig.preset("nano").to_dict()
    raw |= {
        "vocab_size": 64,
        "num_hidden_layers": 2,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "hidden_size": 64,
    }
    raw |= {"intermediate_size": 64, "moe_intermediate_size": 32, "q_lora_rank": 32, "kv_lora_rank": 32}
    return ModelConfig.from_dict(raw | {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3} | changes)


def save(directory: Path, config: ModelConfig, leave_out: str = "") -> Path:
    """A checkpoint of zeros as K2-Thinking stores them: routed experts in int4, the rest bf16, router bias fp32."""
    import torch

    from karakoram.checkpoint import names, write_checkpoint

    tensors: list[tuple[str, torch.Tensor]] = []
    for name, shape, _ in names.expected_tensors(config):
        if leave_out and leave_out in name:
            continue
        if names.is_routed_expert(name) and config.weight_format == "int4":
            rows, columns = shape
            tensors += [
                (name + "_packed", torch.zeros(rows, columns // 8, dtype=torch.int32)),
                (name + "_scale", torch.zeros(rows, columns // 32, dtype=torch.bfloat16)),
                (name + "_shape", torch.tensor(shape, dtype=torch.int32)),
            ]
        else:
            dtype = torch.float32 if name.endswith("e_score_correction_bias") else torch.bfloat16
            tensors.append((name, torch.zeros(shape, dtype=dtype)))
    return write_checkpoint(directory, config.to_dict(), tensors)


# ----------------------------------------------------------------------------------------------------------- presets


def test_k2(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = k2(capsys, "inspect", "k2")
    assert (code, err) == (0, "")
    assert "1,026.4 B in total" in out
    assert "30.5 B without embeddings · 31.7 B with the head · 32.9 B with both" in out
    assert "Moonshot writes 32.6 B" in out
    assert "active = parameters one token multiplies with" in out
    assert "70,272 bytes per token" in out
    assert "fp8 1,029.2 GB" in out


def test_moonlight(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = k2(capsys, "inspect", "moonlight-16b")
    assert code == 0
    assert "15.29 B without embedding and head" in out
    assert "2.24 B without embeddings" in out
    assert "Moonshot" not in out


def test_a_narrow_terminal_loses_nothing(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    _, out, _ = k2(capsys, "inspect", "k2.5")
    assert "1,014.7 B" in out and "570.8 GB" in out
    assert "with both" in " ".join(out.split())
    assert max(map(len, out.splitlines())) <= 70


@pytest.mark.parametrize("name", sorted(set(PRESETS) - {"nano"}))
def test_json_of_presets(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    config = ModelConfig.preset(name)
    found = report(capsys, name)
    assert found["bytes"] == cost.stored_bytes(config) == sum(found["bytes_by_format"].values())
    assert sum(part["parameters"] for part in found["components"]) == found["parameters"]["total"]
    assert found["read_bytes_per_token"] == cost.decode_bytes_per_token(config)
    assert found["checkpoint"] is None and found["problem"] is None
    assert (found["moonshot_active"] is None) == (name in ("moonlight-16b", "kimi-vl-a3b"))


# -------------------------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("quantized", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_a_checkpoint_is_counted_from_its_headers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], quantized: bool, tied: bool
) -> None:
    """Counted bytes agree with predicted ones: two independent ways to the same numbers."""
    changes: dict[str, Any] = {} if quantized else {"quantization_config": None}
    config = small_config(tie_word_embeddings=tied, **changes)
    found = report(capsys, str(save(tmp_path / "m", config)))
    assert found["bytes"] == cost.stored_bytes(config)
    predicted = {part.name: {k: v for k, v in part.bytes_by_format.items() if v} for part in cost.components(config)}
    assert {part["name"]: part["bytes"] for part in found["components"]} == predicted
    assert found["read_bytes_per_token"] == cost.decode_bytes_per_token(config)
    assert found["checkpoint"]["shards"] == 1
    assert found["checkpoint"]["vision_tensors"] == 0


def test_a_missing_tensor_is_told_after_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = save(tmp_path / "m", small_config(), leave_out="model.norm.")
    code, out, err = k2(capsys, "inspect", str(directory))
    assert code == 2
    assert "parameters" in out and "model.norm.weight" in out
    assert err.startswith("k2: error: ") and "model.norm.weight" in err and err.count("\n") == 1
    code, out, err = k2(capsys, "inspect", str(directory), "--json")
    assert code == 2 and "model.norm.weight" in json.loads(out)["problem"]


def test_a_directory_without_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PRESETS["k2.5"]))
    code, out, err = k2(capsys, "inspect", str(tmp_path))
    assert code == 2 and "1,026.4 B" in out and "safetensors" in err
    found = report(capsys, str(tmp_path / "config.json"))
    assert found["family"] == "kimi-k2.5" and found["problem"] is None


def test_vision_tensors_are_set_aside(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    from karakoram.checkpoint import names, write_checkpoint

    config = small_config(quantization_config=None)
    tensors = [
        (f"language_model.{name}", torch.zeros(shape, dtype=torch.bfloat16))
        for name, shape, _ in names.expected_tensors(config)
    ]
    tensors.append(("vision_tower.patch_embed.proj.weight", torch.zeros(8, 3, dtype=torch.bfloat16)))
    raw = {"model_type": "kimi_k25", "text_config": config.to_dict()}
    directory = write_checkpoint(tmp_path / "m", raw, tensors)
    code, out, err = k2(capsys, "inspect", str(directory))
    assert (code, err) == (0, "")
    assert "1 vision tensors, 48 B" in out


def test_unknown_keys_need_the_option(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**ModelConfig.preset("k2").to_dict(), "mystery": 1}))
    code, _, err = k2(capsys, "inspect", str(file))
    assert code == 2 and "--allow-config-key mystery" in err
    found = report(capsys, str(file), "--allow-config-key", "mystery")
    assert any("mystery" in note for note in found["notes"])


# ----------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("no-such-preset", "neither a directory nor a preset"),
        ("./nowhere", "neither a directory nor a preset"),
        ("", "neither a directory nor a preset"),
        ("~nobody-of-that-name/x", "neither a directory nor a preset"),
        ("x" * 5000, "neither a directory nor a preset"),
        ("a\0b", "neither a directory nor a preset"),
        ("nobody/no-such-model", "not in the cache"),
    ],
)
def test_mistakes(
    argument: str, words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    code, out, err = k2(capsys, "inspect", argument)
    assert (code, out) == (2, "")
    assert err.startswith("k2: error: ") and words in err and err.count("\n") == 1


def test_a_file_that_is_no_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    code, _, err = k2(capsys, "inspect", str(tmp_path / "model.gguf"))
    assert code == 2 and "is a file" in err
    (tmp_path / "empty").mkdir()
    code, _, err = k2(capsys, "inspect", str(tmp_path / "empty"))
    assert code == 2 and "config.json" in err
