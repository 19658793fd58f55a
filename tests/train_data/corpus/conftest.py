"""The bundled tokenizer, and files to read."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from karakoram.chat import ChatFormat, load_chat_format

NANO = Path(__file__).resolve().parents[3] / "karakoram" / "assets" / "nano"


@pytest.fixture(scope="session")
def nano_dir() -> Path:
    return NANO


@pytest.fixture(scope="session")
def nano_format() -> ChatFormat:
    return load_chat_format(NANO)


@pytest.fixture
def json_lines(tmp_path: Path) -> Callable[..., Path]:
    """Writes records, or lines as they are, into a file."""

    def write(records: Iterable[Any], name: str = "data.jsonl") -> Path:
        path = tmp_path / name
        lines = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in records]
        path.write_bytes(b"".join(line + b"\n" for line in lines))
        return path

    return write
