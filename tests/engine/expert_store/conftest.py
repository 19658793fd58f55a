"""What the store's tests share: the bundled model, in memory and packed."""

from pathlib import Path

import pytest

from karakoram.checkpoint.pack import pack_checkpoint
from karakoram.env import bundled_model_dir
from karakoram.model.transformer import Transformer
from tests.engine.expert_store.fed import Run, run


@pytest.fixture(scope="session")
def packed_nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """nano with its experts in one file; to be read, not written."""
    return pack_checkpoint(bundled_model_dir(), tmp_path_factory.mktemp("experts") / "nano")


@pytest.fixture(scope="session")
def in_memory(nano: Transformer) -> Run:
    """What nano says with all of its experts in memory."""
    return run(nano)
