"""The models that the engine's tests run: made once a session, written by nobody."""

from pathlib import Path

import pytest
import torch

from karakoram.kernels import ops
from karakoram.model.load import load_model
from karakoram.model.transformer import Transformer
from tests.engine import models


@pytest.fixture(autouse=True)
def _one_thread(_fixed_seeds: None) -> None:
    """Tensors here are tiny: two threads of torch would wait for each other longer than they compute."""
    torch.set_num_threads(1)


def _kernels() -> None:
    if ops.chosen() is None:
        pytest.skip("the CPU kernels are not there (no compiler)")


@pytest.fixture(scope="session")
def tiny() -> Transformer:
    """Dense, float32."""
    return models.tiny()


@pytest.fixture(scope="session")
def tiny_bf16() -> Transformer:
    """Dense, bfloat16."""
    return models.tiny(torch.bfloat16)


@pytest.fixture(scope="session")
def packed_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with int4 experts, on disk."""
    return models.write_packed(tmp_path_factory.mktemp("packed"))


@pytest.fixture(scope="session")
def tiny_packed(packed_checkpoint: Path) -> Transformer:
    """int4 experts on the kernels."""
    _kernels()
    return load_model(packed_checkpoint)


@pytest.fixture(scope="session")
def nano() -> Transformer:
    """The bundled model on the kernels."""
    _kernels()
    return load_model()
