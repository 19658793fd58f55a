"""Both directions with transformers 5: what it writes is read, what is written here it reads the same way."""

import json
from pathlib import Path
from typing import Any

import pytest

from karakoram.config import PRESETS, ModelConfig

pytest.importorskip("transformers")


def _deepseek(**settings: Any) -> Any:
    from transformers import DeepseekV3Config

    return DeepseekV3Config(**settings)


def _saved(config: Any, folder: Path) -> ModelConfig:
    config.save_pretrained(folder)
    return ModelConfig.from_dir(folder)


def test_its_defaults_are_deepseek_v3(tmp_path: Path) -> None:
    config = _saved(_deepseek(), tmp_path)
    assert (config.q_lora_rank, config.n_group, config.topk_group, config.first_k_dense_replace) == (1536, 8, 4, 3)
    assert (config.rope_theta, config.rope_scaling, config.model_type) == (10000.0, None, "deepseek_v3")
    assert "multi-token" in config.notes[0]  # it declares one layer and saves none


def test_its_k25_config_is_read(tmp_path: Path) -> None:
    from transformers import AutoConfig

    outer = AutoConfig.for_model("kimi_k25", text_config={"model_type": "deepseek_v3", "num_hidden_layers": 5})
    config = _saved(outer, tmp_path)
    assert (config.family, config.num_hidden_layers) == ("kimi-k2.5", 5)


@pytest.mark.parametrize("beta_fast", [1.0, 32.0])
def test_its_yarn_is_read(tmp_path: Path, beta_fast: float) -> None:
    scaling = {
        "rope_type": "yarn",
        "rope_theta": 50000.0,
        "factor": 32.0,
        "original_max_position_embeddings": 128,
        "beta_fast": beta_fast,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    }
    config = _saved(_deepseek(rope_parameters=scaling, max_position_embeddings=4096), tmp_path)
    assert config.rope_theta == 50000.0
    assert config.rope_scaling is not None
    assert (config.rope_scaling.beta_fast, config.rope_scaling.original_max_position_embeddings) == (beta_fast, 128)


@pytest.mark.parametrize("name", PRESETS)
def test_it_reads_ours_and_gives_it_back(tmp_path: Path, name: str) -> None:
    """The same numbers after to_dict → DeepseekV3Config → save_pretrained → from_dir."""
    from transformers import DeepseekV3Config

    config = ModelConfig.preset(name)
    (tmp_path / "config.json").write_text(json.dumps({**config.to_dict(), "model_type": "deepseek_v3"}))
    theirs = DeepseekV3Config.from_pretrained(tmp_path)
    assert theirs.n_routed_experts == config.n_routed_experts
    again = _saved(theirs, tmp_path / "again")
    assert {**again.to_dict(), "model_type": config.model_type} == config.to_dict()
