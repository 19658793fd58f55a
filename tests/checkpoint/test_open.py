"""Opening: names of every family member, formats weight by weight, and what is wrong said in one line."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from karakoram.checkpoint import open_checkpoint
from karakoram.checkpoint.names import canonical_name, expected_tensors, is_linear, is_routed_expert, is_vision
from karakoram.config import ModelConfig
from karakoram.errors import CheckpointError, ConfigError, FormatError, InputError
from karakoram.formats import fp8_block, int4_group
from tests.checkpoint import k25_of_holes, tiny
from tests.peak_memory import PRINT_PEAK_BYTES


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return tiny.save(tmp_path / "model")


def rewrite(directory: Path, change) -> Path:
    """Apply `change` (dict -> dict or None) to the tensors of a single-file checkpoint."""
    tensors = load_file(directory / "model.safetensors")
    save_file(change(tensors) or tensors, directory / "model.safetensors", {"format": "pt"})
    return directory


@pytest.mark.parametrize("changes", [{}, {"q_lora_rank": None}, {"tie_word_embeddings": True}, {"n_shared_experts": 2}])
def test_what_transformers_saves_opens(tmp_path: Path, changes: dict) -> None:
    reference = tiny.model(**changes)
    reference.save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    checkpoint.check()
    assert set(checkpoint.tensors) == {expected.name for expected in expected_tensors(checkpoint.config)}
    assert ("lm_head.weight" in checkpoint.tensors) is not checkpoint.config.tie_word_embeddings
    name = "model.layers.1.self_attn.kv_b_proj.weight"
    assert torch.equal(checkpoint.read(name), reference.state_dict()[name])
    assert checkpoint.read_weight(name, torch.float32).dtype == torch.float32
    fused = reference.model.layers[1].mlp.experts
    gate, up = fused.gate_up_proj[3].chunk(2)
    assert torch.equal(checkpoint.expert(1, 3, "gate_proj", torch.bfloat16), gate)
    assert torch.equal(checkpoint.expert(1, 3, "up_proj", torch.bfloat16), up)
    assert torch.equal(checkpoint.expert(1, 3, "down_proj", torch.bfloat16), fused.down_proj[3])


def test_shards_and_their_index(tmp_path: Path) -> None:
    whole, parts = tiny.save(tmp_path / "whole"), tiny.save(tmp_path / "parts", max_shard_size="40KB")
    one, many = open_checkpoint(whole), open_checkpoint(str(parts))
    many.check()
    assert len(many.files) > 3
    assert all(torch.equal(one.read(name), many.read(name)) for name in one.tensors)


def test_kimi_k25_as_transformers_saves_it(tmp_path: Path) -> None:
    """transformers 5.23 writes `language_model.model.blocks.…` and `model.mm_projector.pre_norm`; both are read."""
    from transformers import Kimi_K25Config, Kimi_K25ForConditionalGeneration

    vision = {"num_attention_heads": 2, "num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 32}
    config = Kimi_K25Config(
        text_config={"model_type": "deepseek_v3", **tiny.SHAPE},
        vision_config={**vision, "pos_emb_height": 4, "pos_emb_width": 4},
        tie_word_embeddings=False,
    )
    Kimi_K25ForConditionalGeneration(config).to(torch.bfloat16).save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    checkpoint.check()
    assert len(checkpoint.vision) > 15
    assert all(is_vision(name) for name in checkpoint.vision)
    assert "vision tensors set aside" in checkpoint.notes[0]


@pytest.mark.parametrize(
    ("stored", "canonical"),
    [
        ("model.layers.3.mlp.gate.weight", "model.layers.3.mlp.gate.weight"),
        ("language_model.model.layers.3.mlp.gate.weight", "model.layers.3.mlp.gate.weight"),
        ("language_model.model.blocks.3.mlp.gate.weight", "model.layers.3.mlp.gate.weight"),
        ("language_model.layers.3.mlp.gate.weight", "model.layers.3.mlp.gate.weight"),
        ("model.language_model.layers.3.mlp.gate.weight", "model.layers.3.mlp.gate.weight"),
        ("language_model.model.embed_tokens.weight", "model.embed_tokens.weight"),
        ("language_model.lm_head.weight", "lm_head.weight"),
        ("model.norm.weight", "model.norm.weight"),
        ("transformer.h.0.attn.weight", "transformer.h.0.attn.weight"),
    ],
)
def test_canonical_names(stored: str, canonical: str) -> None:
    assert canonical_name(stored) == canonical


def test_which_weights_the_formats_mean() -> None:
    """All weights of a model fall into three kinds; K2-Instruct's fp8 ones are exactly the projections."""
    expected = list(expected_tensors(ModelConfig.preset("nano")))
    assert all(is_linear(tensor.name) == tensor.linear for tensor in expected)
    routed = [tensor.name for tensor in expected if is_routed_expert(tensor.name)]
    assert routed
    assert all(".mlp.experts." in name for name in routed)
    assert not any(is_linear(n) for n in ("lm_head.weight", "model.layers.1.mlp.gate.weight", "model.norm.weight"))


def test_what_is_set_aside(saved: Path) -> None:
    def add(tensors: dict) -> None:
        prefix = "model.layers.0.self_attn.rotary_emb.inv_freq"
        tensors[prefix] = torch.zeros(56, dtype=torch.bfloat16)
        tensors["vision_tower.patch_embed.proj.bias"] = torch.zeros(4)
        tensors["multi_modal_projector.linear_1.weight"] = torch.zeros(4, 4)
        tensors["model.layers.2.eh_proj.weight"] = torch.zeros(4, 4)

    checkpoint = open_checkpoint(rewrite(saved, add))
    checkpoint.check()
    assert set(checkpoint.vision) == {"vision_tower.patch_embed.proj.bias", "multi_modal_projector.linear_1.weight"}
    assert set(checkpoint.mtp) == {"model.layers.2.eh_proj.weight"}
    assert len(checkpoint.ignored) == 1
    assert len(checkpoint.notes) == 3


def test_prefixes_of_kimi_vl(saved: Path) -> None:
    rewrite(saved, lambda tensors: {f"language_model.{name}": tensor for name, tensor in tensors.items()})
    open_checkpoint(saved).check()


def test_formats_may_be_mixed(saved: Path) -> None:
    plain = open_checkpoint(saved)
    expert, attention = "model.layers.1.mlp.experts.2.up_proj.weight", "model.layers.0.self_attn.kv_b_proj.weight"
    q = torch.randint(-8, 8, (32, 64), dtype=torch.int8)
    scale = torch.rand(32, 2).to(torch.bfloat16)
    codes, inverse = torch.randn(64, 32).to(torch.float8_e4m3fn), torch.tensor([[0.37]])
    router = plain.read("model.layers.1.mlp.gate.weight").float()

    def change(tensors: dict) -> None:
        del tensors[expert]
        tensors[expert + "_packed"], tensors[expert + "_scale"] = int4_group.pack(q), scale
        tensors[expert + "_shape"] = torch.tensor([32, 64], dtype=torch.int32)
        tensors[attention], tensors[attention + "_scale_inv"] = codes, inverse
        tensors["model.layers.1.mlp.gate.weight"] = router

    checkpoint = open_checkpoint(rewrite(saved, change))
    checkpoint.check()
    assert checkpoint.format_of(expert) == "int4"
    assert checkpoint.format_of(attention) == "fp8"
    assert checkpoint.format_of("model.layers.1.mlp.gate.weight") == "fp32"
    assert checkpoint.format_of("lm_head.weight") == "bf16"
    int4 = (q.unflatten(-1, (2, 32)).to(torch.bfloat16) * scale.unsqueeze(-1)).flatten(-2)
    assert torch.equal(checkpoint.expert(1, 2, "up_proj", torch.bfloat16), int4)
    assert torch.equal(checkpoint.read_weight(attention, torch.float32), codes.float() * 0.37)
    assert checkpoint.read(expert + "_packed").dtype == torch.int32
    assert fp8_block.scale_shape(64, 32) == checkpoint.tensors[attention + "_scale_inv"].shape


def test_a_stated_shape_that_lies(saved: Path) -> None:
    name = "model.layers.1.mlp.experts.0.up_proj.weight"

    def change(tensors: dict) -> None:
        del tensors[name]
        tensors[name + "_packed"] = torch.zeros(32, 8, dtype=torch.int32)
        tensors[name + "_scale"] = torch.zeros(32, 2, dtype=torch.bfloat16)
        tensors[name + "_shape"] = torch.tensor([64, 32], dtype=torch.int32)

    with pytest.raises(FormatError, match=r"experts\.0\.up_proj\.weight .*\[64, 32\]"):
        open_checkpoint(rewrite(saved, change)).read_weight(name, torch.bfloat16)


def test_check_lists_the_first_and_counts_all(saved: Path) -> None:
    def change(tensors: dict) -> None:
        for expert in range(4):
            del tensors[f"model.layers.1.mlp.experts.{expert}.up_proj.weight"]
            del tensors[f"model.layers.1.mlp.experts.{expert}.down_proj.weight"]
        tensors["model.norm.weight"] = torch.zeros(63)
        tensors["model.layers.0.mlp.extra.weight"] = torch.zeros(1)
        tensors["model.embed_tokens.weight"] = torch.zeros(160, 64, dtype=torch.int32)
        name = "model.layers.0.mlp.up_proj.weight"
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)

    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(rewrite(saved, change)).check()
    text = caught.value.what
    assert "(12)" in text
    assert "9 missing: " in text
    assert "and 4 more" in text
    assert "model.layers.0.mlp.up_proj.weight_scale_inv" in text
    assert "1 wrong-shaped: model.norm.weight [63], expected [64]" in text
    assert "1 of the wrong dtype: model.embed_tokens.weight I32" in text
    assert "1 unexpected: model.layers.0.mlp.extra.weight" in text


def test_half_a_quantized_weight_is_missing_the_other_half(saved: Path) -> None:
    def change(tensors: dict) -> None:
        name = "model.layers.1.mlp.experts.0.gate_proj.weight"
        del tensors[name]
        tensors[name + "_packed"] = torch.zeros(32, 8, dtype=torch.int32)
        tensors[name + "_scale"] = torch.zeros(32, 3, dtype=torch.bfloat16)

    with pytest.raises(CheckpointError, match=r"1 missing: .*weight_shape; 1 wrong-shaped: .*weight_scale \[32, 3\]"):
        open_checkpoint(rewrite(saved, change)).check()


def test_names_that_are_not_there(saved: Path) -> None:
    checkpoint = open_checkpoint(saved)
    with pytest.raises(CheckpointError, match=r"no tensor model\.layers\.1\.mlp\.experts\.9"):
        checkpoint.expert(1, 9, "up_proj", torch.bfloat16)
    with pytest.raises(InputError, match="w1"):
        checkpoint.expert(1, 0, "w1", torch.bfloat16)


def test_paths_that_lead_nowhere(saved: Path, tmp_path: Path) -> None:
    for wrong in (tmp_path / "absent", str(tmp_path / "absent"), "./a/b", "a/b/c", "no-slash", ""):
        with pytest.raises(CheckpointError):
            open_checkpoint(wrong if wrong else tmp_path / "empty")
    with pytest.raises(CheckpointError, match="is a file"):
        open_checkpoint(saved / "model.safetensors")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"no \.safetensors files"):
        open_checkpoint(tmp_path / "empty")
    (tmp_path / "empty" / "pytorch_model-00001-of-00002.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(CheckpointError, match="elsewhere"):
        open_checkpoint(tmp_path / "empty")


@pytest.mark.parametrize("content", ["{", "[]", '{"weight_map": {}}', '{"weight_map": {"a": 1}}', "[" * 100000])
def test_an_index_that_is_none(saved: Path, content: str) -> None:
    (saved / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match="not a checkpoint index"):
        open_checkpoint(saved)


def test_an_index_that_points_nowhere(tmp_path: Path) -> None:
    directory = tiny.save(tmp_path, max_shard_size="40KB")
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    name = "model.layers.1.mlp.gate.weight"  # shares its file with other tensors
    shard = index["weight_map"][name]

    def open_with(claims: dict) -> None:
        path.write_text(json.dumps({"weight_map": {**index["weight_map"], **claims}}))
        open_checkpoint(directory)

    with pytest.raises(CheckpointError, match=r"lacks 1 of the \d+ files .* model-9\.safetensors"):
        open_with({name: "model-9.safetensors"})
    with pytest.raises(CheckpointError, match="Only files beside it"):
        open_with({name: "../model.safetensors"})
    with pytest.raises(CheckpointError, match=r"do not have: model\.layers\.7"):
        open_with({"model.layers.7.mlp.gate.weight": shard})
    other = next(file for file in index["weight_map"].values() if file != shard)
    with pytest.raises(CheckpointError, match=f"but it is in {shard}"):
        open_with({name: other})
    path.unlink()
    with pytest.raises(CheckpointError, match=r"no model\.safetensors\.index\.json"):
        open_checkpoint(directory)


def test_damage_is_told_with_the_file(saved: Path) -> None:
    file = saved / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors has \d+ bytes, but its tensors end at"):
        open_checkpoint(saved)


def test_the_same_tensor_under_two_names(saved: Path) -> None:
    rewrite(saved, lambda tensors: {**tensors, "language_model.model.norm.weight": torch.zeros(64)})
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight is stored twice"):
        open_checkpoint(saved)


def test_another_architecture(saved: Path) -> None:
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps({**config, "model_type": "llama"}))
    with pytest.raises(ConfigError, match="llama"):
        open_checkpoint(saved)
    (saved / "config.json").unlink()
    with pytest.raises(ConfigError):
        open_checkpoint(saved)


def test_k25_in_full(tmp_path: Path, project_root: Path) -> None:
    """208,550 tensors and 595 GB of holes: every name, shape and dtype of K2.5 is the expected one, within 1 GB."""
    import subprocess
    import sys

    total = k25_of_holes.write(tmp_path)
    assert total == 595_148_192_736
    code = (
        "import sys, torch\nfrom karakoram.checkpoint import open_checkpoint\n"
        "c = open_checkpoint(sys.argv[1]); c.check()\n"
        "e = c.expert(60, 383, 'down_proj', torch.bfloat16)\nassert e.shape == (7168, 2048) and not e.any()\n"
        "print(len(c.tensors) + len(c.vision), sum(x.nbytes for x in [*c.tensors.values(), *c.vision.values()]))\n"
        + PRINT_PEAK_BYTES
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True, cwd=project_root
    )
    tensors, nbytes, peak = map(int, run.stdout.split())
    assert tensors == k25_of_holes.TENSORS
    assert nbytes == total
    assert peak <= 10**9  # measured: 0.4 GB, of which 0.23 GB are torch itself
