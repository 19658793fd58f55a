"""A small tokenizer learned once per test run, from few dialogs."""

from pathlib import Path

import pytest

from karakoram.chat import ChatFormat, load_chat_format
from karakoram.train.data.bpe import train_tokenizer


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(directory, documents=3_000)
    return directory


@pytest.fixture(scope="session")
def fmt(tokenizer_dir: Path) -> ChatFormat:
    return load_chat_format(tokenizer_dir)
