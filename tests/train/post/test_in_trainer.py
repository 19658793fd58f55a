"""LoRA and distillation as the trainer runs them: model and objective are handed in, a checkpoint comes out."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from karakoram.config import ModelConfig
from karakoram.model.load import load_model
from karakoram.model.transformer import Transformer
from karakoram.train.config import OptimizerConfig, ScheduleConfig, TrainConfig
from karakoram.train.initialize import initialize
from karakoram.train.post import lora
from karakoram.train.post.distill import PositionBatches, online_objective, stored_objective
from karakoram.train.post.teacher import TeacherLogits, write_teacher_logits
from karakoram.train.trainer import Trainer

SHAPE: dict[str, Any] = {
    "vocab_size": 48, "hidden_size": 32, "intermediate_size": 64, "moe_intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16, "v_head_dim": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1,
    "first_k_dense_replace": 1, "max_position_embeddings": 64, "quantization_config": None,
}  # fmt: skip


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in path.glob("*.safetensors") for name, t in load_file(file).items()}


def parts() -> tuple[ModelConfig, np.ndarray, np.ndarray, TrainConfig]:
    torch.set_num_threads(1)
    config = ModelConfig.from_dict({**ModelConfig.preset("nano").to_dict(), **SHAPE})
    ids = np.random.default_rng(0).integers(0, 48, 256).astype(np.uint16)
    run = TrainConfig(
        config, steps=3, optimizer=OptimizerConfig(learning_rate=1e-2), schedule=ScheduleConfig(warmup_steps=0)
    )
    return config, ids, np.arange(0, 257, 32), run


def test_lora_trains_and_exports_an_ordinary_checkpoint(tmp_path: Path) -> None:
    config, ids, offsets, run = parts()
    teacher = initialize(Transformer(config), 1)
    model = initialize(Transformer(config), 0)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    adapters = lora.adapt(model, rank=4)
    batches = PositionBatches(ids, offsets, 128, 0)
    trainer = Trainer(
        lora.settings(run), batches, tmp_path, {}, torch.bfloat16, compiled=False, model=model,
        objective=online_objective(teacher),
    )  # fmt: skip
    # the online objective takes ordinary batches, whose targets are ids
    first = batches.batch(0)
    batch = first._replace(targets=torch.from_numpy(ids[first.targets.numpy() + 1].astype(np.int64)))
    losses = [trainer.train_step(batch)["loss"] for _ in range(8)]
    assert losses[-1] < losses[0]
    exported = tensors_of(trainer.finish())
    assert exported.keys() == tensors_of_plain(model, adapters).keys()
    moved = {name for name, t in before.items() if not torch.equal(model.state_dict()[name], t)}
    assert moved == {f"{name}.weight" for name in adapters.modules}
    with torch.no_grad():
        adapted = model(batch.token_ids)
        adapters.merge()
        merged = model(batch.token_ids)
        assert torch.equal(load_model(tmp_path / "model", dense=True)(batch.token_ids), merged)
    # bfloat16: W and the addition are rounded together once, or each by itself; logits of about 1. In float32 all agree
    # within 4e-7; in bfloat16 a token near a tie of its router goes to another expert, one of 128 here (0.10 off)
    differences_N = (adapted - merged).float().abs().amax(-1).flatten()
    assert differences_N.quantile(0.95) < 6e-2


def tensors_of_plain(model: Transformer, adapters: lora.Adapters) -> dict[str, None]:
    """The names that the checkpoint of a plain model has: stacks taken apart."""
    names: dict[str, None] = {}
    for name in model.state_dict():
        stack, _, projection = name.rpartition(".experts.")
        if stack:
            names |= {f"{stack}.experts.{e}.{projection}.weight": None for e in range(4)}
        else:
            names[name] = None
    assert not any("lora" in name or "base_layer" in name for name in names) and adapters.modules
    return names


def test_a_stored_teacher_is_an_objective(tmp_path: Path) -> None:
    config, ids, offsets, run = parts()
    path = write_teacher_logits(initialize(Transformer(config), 1), ids, offsets, tmp_path / "teacher", k=8)
    objective = stored_objective(TeacherLogits(path, (ids, offsets)), ids)
    batches = PositionBatches(ids, offsets, 128, 0)
    trainer = Trainer(run, batches, tmp_path / "run", {}, torch.bfloat16, compiled=False, objective=objective)
    losses = [trainer.train_step(batches.batch(0))["loss"] for _ in range(8)]
    assert losses[-1] < losses[0]
