"""`quantize`: both formats written, read back and judged by hand, by compressed-tensors and by the models they give."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.utils.match import match_named_modules
from safetensors.torch import save_file

from karakoram.checkpoint import open_checkpoint, write_checkpoint
from karakoram.checkpoint.names import is_linear, is_routed_expert
from karakoram.config import int4_quantization_config
from karakoram.formats import fp8_block
from karakoram.model.load import load_model
from karakoram.quantize.convert import convert
from karakoram.quantize.quantize import quantize
from tests.checkpoint import tiny
from tests.quantize.sources import by_hand, packed_names, rewritten, saved, stored
from tests.quantize.test_round_to_nearest import random_grid, rounded_by_hand


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """bf16, random weights: on no grid."""
    return saved(tmp_path_factory.mktemp("source") / "bf16")


# -------------------------------------------------------------------------------------------------- what is kept


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_int4_trained_weights_survive(tmp_path: Path, dtype: torch.dtype) -> None:
    trained: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def train(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if not is_routed_expert(name):
            return tensor.bfloat16().to(dtype) if "bias" not in name else tensor
        trained[name] = random_grid(tensor.shape[0], tensor.shape[1] // 32)
        codes, scales = trained[name]
        return (codes.bfloat16() * scales.repeat_interleave(32, dim=1)).to(dtype)

    source = rewritten(saved(tmp_path / "source", dtype), train)
    report = quantize(source, tmp_path / "int4")
    result = open_checkpoint(tmp_path / "int4")
    before = stored(source)
    assert len(trained) == 12
    for name, (codes, scales) in trained.items():
        assert torch.equal(result.read(name + "_scale"), scales)
        words = (codes.long() + 8).view(codes.shape[0], -1, 8) << (4 * torch.arange(8))
        assert torch.equal(result.read(name + "_packed").long() & 0xFFFFFFFF, words.sum(-1))
        assert torch.equal(result.read_weight(name, dtype), before[name])
    assert report.total.exact_groups == report.total.groups == sum(s.numel() for _, s in trained.values())
    assert report.total.relative_rms == 0 and report.worst == [] and report.narrowed_values == 0
    model, again = (load_model(directory, dense=True) for directory in (source, tmp_path / "int4"))
    assert torch.equal(model(tiny.token_ids()), again(tiny.token_ids()))


def test_what_is_int4_already_is_copied_bit_for_bit(source: Path, tmp_path: Path) -> None:
    quantize(source, tmp_path / "int4")
    first = stored(tmp_path / "int4")
    again = quantize(tmp_path / "int4", tmp_path / "again")
    second = stored(tmp_path / "again")
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert again.groups_already_int4 == again.total.groups == again.total.exact_groups
    assert again.bytes_before == again.bytes_after
    everything = quantize(tmp_path / "int4", tmp_path / "all", "int4-all")
    third = stored(tmp_path / "all")
    assert all(torch.equal(first[name], third[name]) for name in first if ".mlp.experts." in name)
    assert 0 < everything.groups_already_int4 < everything.total.groups
    # back to the published layout: what was not int4 there is bf16 again, and the declaration follows
    quantize(tmp_path / "all", tmp_path / "back", "int4")
    assert packed_names(stored(tmp_path / "back")) == packed_names(first)
    assert open_checkpoint(tmp_path / "back").raw_config["quantization_config"] == int4_quantization_config()
    convert(tmp_path / "all", tmp_path / "converted", "int4")
    assert open_checkpoint(tmp_path / "converted").raw_config["quantization_config"] == int4_quantization_config()
    assert "re:.*mlp\\.gate$" in open_checkpoint(tmp_path / "all").raw_config["quantization_config"]["ignore"]


# ------------------------------------------------------------------------------------------------ the two formats


def test_int4_is_the_published_layout(source: Path, tmp_path: Path) -> None:
    quantize(source, tmp_path / "int4")
    before, after = stored(source), stored(tmp_path / "int4")
    assert packed_names(after) == {name for name in before if is_routed_expert(name)}
    others = [name for name in before if not is_routed_expert(name)]
    assert all(torch.equal(after[name], before[name]) and after[name].dtype == before[name].dtype for name in others)
    assert open_checkpoint(tmp_path / "int4").raw_config["quantization_config"] == int4_quantization_config()
    for name in ("generation_config.json", "tokenizer_config.json", "tiktoken.model"):
        assert (tmp_path / "int4" / name).read_bytes() == (source / name).read_bytes()


@pytest.mark.parametrize("tied", [False, True])
def test_int4_all_leaves_norms_and_router(tmp_path: Path, tied: bool) -> None:
    source = saved(tmp_path / "source", torch.float32, tie_word_embeddings=tied)
    quantize(source, tmp_path / "all", "int4-all")
    before, after = stored(source), stored(tmp_path / "all")
    plain = before.keys() - packed_names(after)
    assert all(torch.equal(after[name], before[name]) and after[name].dtype == before[name].dtype for name in plain)
    assert {name.rsplit(".", 2)[-2] for name in plain} == {
        "norm",
        "input_layernorm",
        "post_attention_layernorm",
        "q_a_layernorm",
        "kv_a_layernorm",
        "gate",
    }
    tables = {"model.embed_tokens.weight"} | (set() if tied else {"lm_head.weight"})
    assert {name for name in packed_names(after) if not is_linear(name)} == tables


def test_rounding_is_absmax_over_7(source: Path, tmp_path: Path) -> None:
    quantize(source, tmp_path / "all", "int4-all")
    before, after = stored(source), stored(tmp_path / "all")
    for name in ("model.layers.1.mlp.experts.3.down_proj.weight", "lm_head.weight"):
        words, scales = after[name + "_packed"], after[name + "_scale"]
        assert after[name + "_shape"].tolist() == list(before[name].shape)
        for row in range(0, before[name].shape[0], 7):
            for group in range(scales.shape[1]):
                codes, scale = rounded_by_hand(before[name][row, 32 * group : 32 * group + 32].tolist())
                nibbles = [(word >> 4 * place & 0xF) - 8 for word in words[row].tolist() for place in range(8)]
                assert nibbles[32 * group : 32 * group + 32] == codes
                assert scales[row, group].item() == scale


@pytest.mark.parametrize("format", ["int4", "int4-all"])
@pytest.mark.parametrize("tied", [False, True])
def test_it_loads_as_the_model_of_the_weights_dequantized_by_hand(tmp_path: Path, format: str, tied: bool) -> None:
    """Dense: equal to the last bit, the same bf16 weights in the same code. As it comes, possibly on int4 kernels: L2
    distance below 0.2, since two correct bf16 implementations are each up to 0.1 from float32 (docs/numerics.md) and a
    wrong table is 1.4 away."""
    source = saved(tmp_path / "source", tie_word_embeddings=tied)
    quantize(source, tmp_path / "q", format)
    open_checkpoint(tmp_path / "q").check()
    config = json.loads((source / "config.json").read_text())
    write_checkpoint(tmp_path / "hand", config, by_hand(stored(tmp_path / "q")).items())
    found, hand, old = (load_model(tmp_path / n, dense=True)(tiny.token_ids()) for n in ("q", "hand", "source"))
    assert torch.equal(found, hand)
    assert not torch.equal(found, old)
    default = load_model(tmp_path / "q")(tiny.token_ids())
    assert (default - hand).norm() / hand.norm() < 0.2


@pytest.mark.parametrize("format", ["int4", "int4-all"])
def test_compressed_tensors_decompresses_to_the_same_numbers(source: Path, tmp_path: Path, format: str) -> None:
    quantize(source, tmp_path / "q", format)
    result = open_checkpoint(tmp_path / "q")
    scheme = QuantizationConfig.model_validate(result.raw_config["quantization_config"]).config_groups["group_0"]
    tensors = stored(tmp_path / "q")
    keys = PackedQuantizationCompressor.compression_param_names(scheme)
    for name in packed_names(tensors):
        module = {key: tensors[name.removesuffix("weight") + key] for key in keys}
        theirs = PackedQuantizationCompressor.decompress(module, scheme)["weight"]
        assert torch.equal(theirs, result.read_weight(name, torch.bfloat16))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("format", ["int4", "int4-all"])
def test_the_declaration_matches_the_modules_that_are_packed(tmp_path: Path, tied: bool, format: str) -> None:
    """Judged by compressed-tensors on transformers' modules; its experts are stacks, no linear modules."""
    changes = {"tie_word_embeddings": tied, "q_lora_rank": 48}  # 48 inputs stay in bf16
    source = saved(tmp_path / "source", **changes)
    report = quantize(source, tmp_path / "q", format)
    section = QuantizationConfig.model_validate(open_checkpoint(tmp_path / "q").raw_config["quantization_config"])
    targets, ignore = section.config_groups["group_0"].targets, section.ignore
    matched = {name + ".weight" for name, _ in match_named_modules(tiny.model(**changes), targets, ignore)}
    packed = {name for name in packed_names(stored(tmp_path / "q")) if not is_routed_expert(name)}
    assert matched == packed
    left = [f"model.layers.{layer}.self_attn.q_b_proj.weight" for layer in (0, 1)]
    assert report.left_in_bf16 == (left if format == "int4-all" else [])
    assert load_model(tmp_path / "q")(tiny.token_ids()).isfinite().all()


def test_a_wrapper_keeps_its_names_its_images_and_its_nesting(source: Path, tmp_path: Path) -> None:
    wrapped = tmp_path / "k25"
    wrapped.mkdir()
    inner = {**json.loads((source / "config.json").read_text()), "model_type": "kimi_k2"}
    outer = {"model_type": "kimi_k25", "text_config": inner, "tie_word_embeddings": False}
    (wrapped / "config.json").write_text(json.dumps(outer))
    tensors = {f"language_model.{name}": tensor for name, tensor in stored(source).items()}
    tensors["vision_tower.patch_embed.proj.weight"] = torch.randn(5, 32)
    save_file(tensors, wrapped / "model.safetensors", {"format": "pt"})
    quantize(wrapped, tmp_path / "all", "int4-all")
    after = stored(tmp_path / "all")
    assert torch.equal(after["vision_tower.patch_embed.proj.weight"], tensors["vision_tower.patch_embed.proj.weight"])
    assert "language_model.lm_head.weight_packed" in after
    config = open_checkpoint(tmp_path / "all").raw_config
    ignore = config["text_config"]["quantization_config"]["ignore"]
    assert "quantization_config" not in config
    assert "re:vision_tower.*" in ignore and not any("lm_head" in entry for entry in ignore)
    quantize(source, tmp_path / "plain", "int4-all")
    both = [load_model(tmp_path / name, dense=True)(tiny.token_ids()) for name in ("all", "plain")]
    assert torch.equal(*both)
    quantize(wrapped, tmp_path / "int4")
    ignore = open_checkpoint(tmp_path / "int4").raw_config["text_config"]["quantization_config"]["ignore"]
    assert "re:.*lm_head.*" in ignore and "re:vision_tower.*" in ignore


# ------------------------------------------------------------------------------------------------- other sources


def test_fp8_is_rounded_from_its_float32_numbers(source: Path, tmp_path: Path) -> None:
    checkpoint, numbers = open_checkpoint(source), {}

    def tensors():
        for name in checkpoint.tensors:
            weight = checkpoint.read(name)
            if is_linear(name):
                scale = torch.full(fp8_block.scale_shape(*weight.shape), 0.0123)
                codes = (weight.float() / 0.0123).to(torch.float8_e4m3fn)
                numbers[name] = codes.float() * 0.0123
                yield name, codes
                yield name + "_scale_inv", scale
            else:
                yield name, weight

    write_checkpoint(tmp_path / "fp8", checkpoint.raw_config, tensors())
    report = quantize(tmp_path / "fp8", tmp_path / "int4")
    result = open_checkpoint(tmp_path / "int4")
    result.check()
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    for row in (0, 31):
        wanted = [rounded_by_hand(numbers[name][row, 32 * g : 32 * g + 32].tolist())[1] for g in range(2)]
        assert result.read(name + "_scale")[row].tolist() == wanted
    attention = "model.layers.0.self_attn.o_proj.weight"
    assert torch.equal(result.read(attention), numbers[attention].bfloat16())
    changed = [n for n in numbers if not is_routed_expert(n)]
    assert report.narrowed_values == sum(int((numbers[n].bfloat16().float() != numbers[n]).sum()) for n in changed)


def test_float32_becomes_bf16_around_the_experts(tmp_path: Path) -> None:
    source = saved(tmp_path / "source", torch.float32)
    report = quantize(source, tmp_path / "int4")
    before, after = stored(source), stored(tmp_path / "int4")
    for name in before:
        if name.endswith("e_score_correction_bias"):
            assert after[name].dtype == torch.float32
        elif not is_routed_expert(name):
            assert torch.equal(after[name], before[name].bfloat16())
    assert report.narrowed_values > 0
    assert open_checkpoint(tmp_path / "int4").raw_config["dtype"] == "bfloat16"


# ----------------------------------------------------------------------------------------------------- the report


def test_the_report_adds_up(source: Path, tmp_path: Path) -> None:
    """Against the two checkpoints themselves. 1e-5: squares of float32 differences, each right to 1e-7, summed."""
    report = quantize(source, tmp_path / "all", "int4-all").to_dict()
    before, after = stored(source), by_hand(stored(tmp_path / "all"))

    def relative_rms(which) -> float:
        names = [name for name in before if which(name) and name in packed_names(stored(tmp_path / "all"))]
        moved = sum(float((after[n].double() - before[n].double()).square().sum()) for n in names)
        return (moved / sum(float(before[n].double().square().sum()) for n in names)) ** 0.5

    assert report["relative_rms"] == pytest.approx(relative_rms(lambda name: True), rel=1e-5)
    layers = {(row["layer"], row["component"]): row for row in report["layers"]}
    assert list(layers) == [
        (0, "attention"),
        (0, "dense layers"),
        (1, "attention"),
        (1, "routed experts"),
        (1, "shared experts"),
        (None, "embedding"),
        (None, "output head"),
    ]
    for key, mark in (
        ((0, "dense layers"), "layers.0.mlp."),
        ((1, "routed experts"), "layers.1.mlp.experts."),
        ((1, "shared experts"), "layers.1.mlp.shared_experts."),
        ((None, "embedding"), "embed_tokens"),
    ):
        assert layers[key]["relative_rms"] == pytest.approx(
            relative_rms(lambda name, mark=mark: mark in name), rel=1e-5
        )
    worst = report["worst"]
    assert len(worst) == 20
    assert [row["relative_rms"] for row in worst] == sorted((row["relative_rms"] for row in worst), reverse=True)
    assert worst[0]["relative_rms"] == pytest.approx(relative_rms(lambda name: name == worst[0]["name"]), rel=1e-5)
    assert sum(row["groups_rounded"] for row in report["layers"]) == report["groups_rounded"]
    assert report["bytes_before"] == sum(tensor.nbytes for tensor in before.values())
    assert report["bytes_after"] == sum(tensor.nbytes for tensor in stored(tmp_path / "all").values())
    json.dumps(report, allow_nan=False)


def test_progress_counts_the_bytes_of_the_source(source: Path, tmp_path: Path) -> None:
    seen: list[Any] = []
    quantize(
        source,
        tmp_path / "out",
        progress=lambda done, total: seen.append((done, total)),
        before_writing=lambda: seen.append("before"),
    )
    total = sum(entry.nbytes for entry in open_checkpoint(source).tensors.values())
    assert seen[:2] == ["before", (0, total)]
    assert seen[-1] == (total, total)
    assert seen[1:] == sorted(seen[1:])
