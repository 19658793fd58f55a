"""LoRA: nothing changes at first, only A and B learn, and what is exported is an ordinary checkpoint."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from karakoram.config import ModelConfig
from karakoram.errors import CheckpointError, InputError
from karakoram.model.load import load_model
from karakoram.model.transformer import Transformer
from karakoram.train.checkpoints.export import save_model
from karakoram.train.initialize import initialize
from karakoram.train.masters import Masters
from karakoram.train.optim.adamw import AdamW
from karakoram.train.post import lora

SHAPE: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16, "v_head_dim": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1,
    "first_k_dense_replace": 1, "max_position_embeddings": 128,
}  # fmt: skip


def config() -> ModelConfig:
    return ModelConfig.from_dict({**ModelConfig.preset("nano").to_dict(), **SHAPE, "quantization_config": None})


def small(dtype: torch.dtype = torch.float32) -> Transformer:
    torch.set_num_threads(1)
    return initialize(Transformer(config(), dtype=dtype), 0)


def ids(rows: int = 4, length: int = 12, seed: int = 0) -> Tensor:
    return torch.randint(0, SHAPE["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(seed))


def stir(adapters: lora.Adapters, size: float = 0.1) -> None:
    """B away from zero, as after training."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapters.parameters().items():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_at_first_the_model_is_the_very_same(dtype: torch.dtype) -> None:
    model = small(dtype)
    before = model(ids())
    adapters = lora.adapt(model, rank=4)
    assert len(adapters.modules) == 2 * 5 + 3  # two layers of five projections, one layer with shared experts
    assert torch.equal(model(ids()), before)


def test_only_adapters_have_gradients_masters_and_state() -> None:
    model = small()
    adapters = lora.adapt(model, rank=4)
    stir(adapters)
    model(ids()).square().mean().backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == set(adapters.parameters())
    assert set(Masters(model).weights) == with_gradient
    trained = sum(p.numel() for p in adapters.parameters().values())
    assert trained < 0.2 * sum(p.numel() for p in model.parameters())
    assert not any(".experts." in name or ".gate." in name for name in with_gradient)


@pytest.mark.parametrize(
    # fp32: sums in another order. bf16: W and the addition rounded once here, twice there; logits of about 1
    ("dtype", "tolerance"),
    [(torch.float32, 1e-5), (torch.bfloat16, 6e-2)],
)
def test_merged_is_adapted_and_plain_again(dtype: torch.dtype, tolerance: float) -> None:
    model = small(dtype)
    names = [name for name, _ in model.named_parameters()]
    adapters = lora.adapt(model, rank=4)
    stir(adapters)
    adapted = model(ids())
    exported = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapters.merge()
    assert [name for name, _ in model.named_parameters()] == names
    assert all(p.requires_grad for p in model.parameters()), "what asked for gradients asks again"
    assert set(exported) == set(model.state_dict())
    assert all(torch.equal(tensor, exported[name]) for name, tensor in model.state_dict().items())
    assert (model(ids()) - adapted).abs().max() <= tolerance
    with pytest.raises(InputError, match="merged or removed"):
        adapters.save(Path("never-written"))


def test_removed_is_the_model_of_before() -> None:
    model = small()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    adapters = lora.adapt(model)
    stir(adapters)
    adapters.remove()
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_decoding_over_a_cache_sees_the_adapter_of_kv_b() -> None:
    model = small()
    adapters = lora.adapt(model, rank=4, targets=["*.kv_b_proj"])
    stir(adapters)
    with torch.no_grad():
        cache = model.new_cache(1, 16)
        absorbed = torch.cat([model(ids(1)[:, t : t + 1], cache) for t in range(12)], 1)
        # absorbed and expanded attention are the same sums in another order
        assert torch.allclose(absorbed, model(ids(1)), atol=1e-4)


def test_training_lowers_the_loss_and_leaves_the_base() -> None:
    model = small()
    base = {name: p.detach().clone() for name, p in model.named_parameters()}
    adapters = lora.adapt(model, rank=8)
    masters = Masters(model)
    adamw = AdamW(masters.weights, 0.0)
    tokens, losses = ids(8, 17), []
    for _ in range(30):
        logits = model(tokens[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        losses.append(float(loss.detach()))
        loss.backward()
        adamw.step(masters.gradients(), 1e-2, 1.0)
        masters.publish()
        masters.forget_gradients()
    assert losses[-1] < 0.9 * losses[0]
    for name, before in base.items():
        module, _, rest = name.rpartition(".")
        now = adapters.modules[module].base_layer.weight if module in adapters.modules else model.get_parameter(name)
        assert torch.equal(now, before), f"{name} {rest} moved"


def test_saved_and_loaded_is_the_same_model(tmp_path: Path) -> None:
    model, other = small(), small()
    adapters = lora.adapt(model, rank=4, alpha=6.0)
    stir(adapters)
    adapters.save(tmp_path / "adapters", "some/base")
    loaded = lora.load(other, tmp_path / "adapters")
    assert torch.equal(other(ids()), model(ids()))
    assert loaded.adapter_state().keys() == adapters.adapter_state().keys()
    adapters.save(tmp_path / "adapters")  # over what it wrote itself
    assert not list(tmp_path.glob(".*"))


def test_the_files_are_as_peft_names_them(tmp_path: Path) -> None:
    adapters = lora.adapt(small(), rank=4, targets=["model.layers.1.*.o_proj", "*.shared_experts.up_proj"])
    adapters.save(tmp_path / "a")
    stored = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert {name: tuple(t.shape) for name, t in stored.items()} == {
        "base_model.model.model.layers.1.self_attn.o_proj.lora_A.weight": (4, 64),
        "base_model.model.model.layers.1.self_attn.o_proj.lora_B.weight": (64, 4),
        "base_model.model.model.layers.1.mlp.shared_experts.up_proj.lora_A.weight": (4, 64),
        "base_model.model.model.layers.1.mlp.shared_experts.up_proj.lora_B.weight": (32, 4),
    }
    written = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert (written["peft_type"], written["r"], written["lora_alpha"], written["bias"]) == ("LORA", 4, 32.0, "none")
    assert written["target_modules"] == ["model.layers.1.mlp.shared_experts.up_proj", "model.layers.1.self_attn.o_proj"]


def test_int4_experts_keep_every_code(tmp_path: Path) -> None:
    model = load_model(None, dense=True)  # nano: int4 published
    adapters = lora.adapt(model, rank=4)
    stir(adapters, 0.02)
    save_model(model, model.config, tmp_path / "model", {}, int4=True)
    before, after = (
        {name: t for file in path.glob("*.safetensors") for name, t in load_file(file).items()}
        for path in (load_nano_dir(), tmp_path / "model")
    )
    assert before.keys() == after.keys()
    changed = {name.rpartition(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == set(adapters.modules)
    assert torch.isfinite(load_model(tmp_path / "model")(ids())).all()


def load_nano_dir() -> Path:
    from karakoram.env import bundled_model_dir

    return Path(bundled_model_dir())


def test_a_packed_model_is_refused() -> None:
    model = load_model(None)
    if any(isinstance(m, torch.nn.Linear) for m in model.modules()):
        pytest.skip("no kernels here: nothing is packed")
    with pytest.raises(InputError):
        lora.adapt(model)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"rank": 0}, "Rank 0 does not fit model.layers.0.self_attn"),
        ({"rank": 33}, "Rank 33 does not fit"),
        ({"alpha": math.nan}, "alpha is nan"),
        ({"targets": ["*.o_prj"]}, r"\*\.o_prj"),
        ({"targets": ["*.mlp.experts"]}, r"\*\.mlp\.experts"),
        ({"targets": ["*.mlp.gate"], "rank": 2}, "Router"),
    ],
)
def test_wrong_arguments_are_named_and_leave_the_model(arguments: dict[str, Any], words: str) -> None:
    model = small()
    with pytest.raises(InputError, match=words):
        lora.adapt(model, **arguments)
    assert all(p.requires_grad for p in model.parameters())


def test_twice_is_once_too_often() -> None:
    model = small()
    lora.adapt(model, rank=2, targets=["*.o_proj"])
    with pytest.raises(InputError, match="has an adapter already"):
        lora.adapt(model, rank=2, targets=["*.o_proj"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"use_rslora": True}, "use_rslora"),
        ({"r": 8}, r"lora_A.weight has shape \[4, 64\]"),
        ({"r": -1}, "r -1"),
        ({"r": True}, "r True"),
        ({"lora_alpha": "many"}, "'many'"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"rank_pattern": {"o_proj": 2}}, "rank_pattern"),
        ({"something_new": 1}, "something_new"),
        ({"peft_type": "IA3"}, "IA3"),
    ],
)
def test_other_mathematics_is_refused(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    adapters = lora.adapt(small(), rank=4, targets=["*.layers.1.*.o_proj"])
    adapters.save(tmp_path / "a")
    file = tmp_path / "a" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(CheckpointError, match=words):
        lora.load(small(), tmp_path / "a")


def _renamed(t: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.replace("layers.1.", "layers.7."): x for name, x in t.items()}


def _halved(t: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x for name, x in t.items() if "lora_A" in name}


def _poisoned(t: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x * math.nan for name, x in t.items()}


def _narrow(t: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x[:, :-1].contiguous() if "lora_A" in name else x for name, x in t.items()}


@pytest.mark.parametrize(
    ("damage", "words"),
    [(_renamed, "layers.7"), (_halved, "only lora_A"), (_poisoned, "finite"), (_narrow, r"shape \[4, 63\]")],
)
def test_adapters_of_another_model_are_refused_by_name(damage: Any, words: str, tmp_path: Path) -> None:
    adapters = lora.adapt(small(), rank=4, targets=["*.layers.1.*.o_proj"])
    adapters.save(tmp_path / "a")
    file, model = tmp_path / "a" / "adapter_model.safetensors", small()
    save_file(damage(load_file(file)), file)
    with pytest.raises(CheckpointError, match=words):
        lora.load(model, tmp_path / "a")
    assert all(p.requires_grad for p in model.parameters()), "the model is as it was"


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_damaged_files_are_errors(name: str, tmp_path: Path) -> None:
    lora.adapt(small(), rank=4, targets=["*.o_proj"]).save(tmp_path / "a")
    (tmp_path / "a" / name).write_bytes(b"\x80\x04 not this")
    with pytest.raises(CheckpointError, match=name):
        lora.load(small(), tmp_path / "a")
    (tmp_path / "a" / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        lora.load(small(), tmp_path / "a")


def test_a_directory_of_something_else_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "precious.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="no adapters"):
        lora.adapt(small(), rank=4).save(tmp_path / "a")
    assert (tmp_path / "a" / "precious.txt").read_text() == "mine"
