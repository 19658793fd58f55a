"""Opening a model: what it becomes, and what is said when it cannot be."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import DeepseekV3ForCausalLM, LlamaConfig, LlamaForCausalLM

from karakoram import env, load_model
from karakoram.errors import CheckpointError, ConfigError, InputError, KarakoramError
from karakoram.model import load
from tests.model import reference


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small checkpoint in several shards, as transformers writes it."""
    directory = tmp_path_factory.mktemp("model")
    reference.build().save_pretrained(directory, max_shard_size="300KB")
    assert len(list(directory.glob("*.safetensors"))) > 3
    return directory


@pytest.fixture
def copy(directory: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(directory, tmp_path / "copy"))


def test_every_tensor_is_in_its_place(directory: Path) -> None:
    model = load_model(directory, dtype="float32")
    theirs = DeepseekV3ForCausalLM.from_pretrained(directory, dtype=torch.float32).state_dict()
    ours = dict(model.state_dict())
    for layer in (1, 2, 3):
        stem = f"model.layers.{layer}.mlp.experts."
        gate, up = ours.pop(stem + "gate_proj"), ours.pop(stem + "up_proj")
        ours[stem + "gate_up_proj"] = torch.cat((gate, up), dim=1)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_a_model_is_loaded_for_inference(directory: Path) -> None:
    model = load_model(str(directory))
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16} == {model.dtype}
    assert model.model.layers[1].mlp.gate.e_score_correction_bias.dtype == torch.float32
    assert model.device.type == "cpu" and model.config.vocab_size == reference.VOCABULARY
    same = load_model(directory, torch.device("cpu"), torch.float32)
    assert same.dtype == torch.float32


def test_bfloat16_is_float32_rounded(directory: Path) -> None:
    wide, narrow = load_model(directory, dtype="float32").state_dict(), load_model(directory).state_dict()
    assert all(torch.equal(tensor, wide[name].to(tensor.dtype)) for name, tensor in narrow.items())


def refused(path: object, kind: type[KarakoramError], *words: str, **options: object) -> None:
    with pytest.raises(kind) as caught:
        load_model(path, **options)  # type: ignore[arg-type]
    text = str(caught.value)
    assert all(word in text for word in words), text
    assert caught.value.fix, "an error must say what to do"
    assert "\n" not in text


def test_a_path_that_does_not_exist(tmp_path: Path) -> None:
    refused(tmp_path / "absent", CheckpointError, str(tmp_path / "absent"))
    refused("./absent/model", CheckpointError, "absent/model")


def test_another_architecture(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    refused(tmp_path, ConfigError, "model_type", "llama", "kimi_k2")


def test_a_config_that_is_absent_or_broken(copy: Path) -> None:
    config = (copy / "config.json").read_text()
    (copy / "config.json").write_text(config[:100])
    refused(copy, ConfigError, "config.json")
    (copy / "config.json").unlink()
    refused(copy, KarakoramError, "config.json")


def test_an_unknown_key_is_named_and_can_be_allowed(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "attention_sinks": 4}))
    refused(copy, ConfigError, "attention_sinks", "--allow-config-key")
    assert load_model(copy, allow_config_keys=("attention_sinks",)).config.vocab_size == reference.VOCABULARY


@pytest.mark.parametrize("keep", [0, 5, 100, -100])
def test_a_truncated_file(copy: Path, keep: int) -> None:
    shard = sorted(copy.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:keep])
    refused(copy, CheckpointError, shard.name)


def test_a_file_that_is_something_else(copy: Path) -> None:
    shard = sorted(copy.glob("*.safetensors"))[0]
    shard.write_bytes(bytes(range(256)) * (shard.stat().st_size // 256))
    refused(copy, CheckpointError, shard.name)


def test_a_missing_shard(copy: Path) -> None:
    shard = sorted(copy.glob("*.safetensors"))[2]
    shard.unlink()
    refused(copy, CheckpointError, shard.name, "Download")


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.2.mlp.experts.7.up_proj.weight",
        "model.layers.1.mlp.gate.e_score_correction_bias",
        "model.norm.weight",
        "lm_head.weight",
    ],
)
def test_a_missing_tensor_is_named(name: str, tmp_path: Path) -> None:
    reference.build().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors[name]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    refused(tmp_path, CheckpointError, "1 missing", name)


@pytest.mark.parametrize("dtype", ["float16", "int8", "", torch.float16, torch.float64])
def test_a_dtype_that_is_not_supported(directory: Path, dtype: object) -> None:
    refused(directory, InputError, f"as {dtype}", "bfloat16, float32", dtype=dtype)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_absent(directory: Path) -> None:
    refused(directory, InputError, "'cuda'", "k2 doctor", device="cuda")
    refused(directory, InputError, "'cuda:7'", device=torch.device("cuda", 7))


@pytest.mark.parametrize("device", ["nonsense", "", "meta"])
def test_a_device_that_is_none(directory: Path, device: str) -> None:
    refused(directory, InputError, f"'{device}'", "cpu", device=device)


def test_a_model_larger_than_memory(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "memory", lambda: env.Memory(total_bytes=1 << 20, available_bytes=1 << 10))
    refused(directory, CheckpointError, str(directory), "GB", "k2 inspect")
