"""The tokenizers that constraints are tested with: nano's, and K2's own where it is there."""

from pathlib import Path

import pytest

from karakoram.chat.format import ChatFormat
from karakoram.chat.tokenizer import Tokenizer
from tests.engine.constrain.writing import Setting


@pytest.fixture(scope="session")
def nano_tokenizer(project_root: Path) -> Tokenizer:
    return Tokenizer.from_dir(project_root / "karakoram/assets/nano")


@pytest.fixture(scope="session")
def setting(nano_tokenizer: Tokenizer) -> Setting:
    """nano's tokenizer, K2's way to talk."""
    return Setting.of(ChatFormat("kimi-k2", nano_tokenizer))


@pytest.fixture(scope="session")
def thinking(nano_tokenizer: Tokenizer) -> Setting:
    """nano's tokenizer, K2-Thinking's way to talk."""
    return Setting.of(ChatFormat("kimi-k2-thinking", nano_tokenizer))


@pytest.fixture(scope="session")
def k2(shared_dir: Path) -> Setting:
    """K2's own tokenizer of 163,840 ids."""
    return Setting.of(ChatFormat("kimi-k2", Tokenizer.from_dir(shared_dir / "data/kimi_tokenizer")))
