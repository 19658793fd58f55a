"""Two tokenizers: K2's own, where ../shared is present, and a small one of nano's kind that is always there."""

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from karakoram.chat import Tokenizer

GOLDEN = Path(__file__).resolve().parent.parent / "golden"

# K2's special tokens in K2's order, as nano has them; None stays reserved.
SPECIAL_NAMES = [
    *("[BOS]", "[EOS]", "<|im_end|>", "<|im_user|>", "<|im_assistant|>", None, "<|start_header_id|>"),
    *("<|end_header_id|>", None, "[EOT]", "<|im_system|>", "<|tool_calls_section_begin|>"),
    *("<|tool_calls_section_end|>", "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>", None),
    *("<|im_middle|>", "<|media_begin|>", "<|media_content|>", "<|media_end|>", "<|media_pad|>", "<think>", "</think>"),
    *(None, "[UNK]", "[PAD]"),
]
MERGES = [
    b"th",
    b"he",
    b"the",
    b"in",
    b"fu",
    b"nc",
    b"<|",
    b"|>",
    b"im",
    b"to",
    b"ol",
    b"\n\n",
    "é".encode(),
    b"\xe4\xbd",
]


def write_tokenizer(path: Path, without: tuple[str, ...] = (), **config: Any) -> Path:
    """A tokenizer directory: 256 bytes, some merges, K2's special tokens except `without` at ids of its own."""
    tokens = [bytes([byte]) for byte in range(256)] + MERGES
    lines = [f"{base64.b64encode(token).decode()} {rank}" for rank, token in enumerate(tokens)]
    (path / "tiktoken.model").write_text("\n".join(lines) + "\n")
    named = {
        str(len(tokens) + offset): {"content": name, "special": True}
        for offset, name in enumerate(SPECIAL_NAMES)
        if name is not None and name not in without
    }
    (path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": named, **config}))
    return path


@pytest.fixture(scope="session")
def small_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of the small tokenizer, which declares the dialect kimi-k2.5."""
    return write_tokenizer(tmp_path_factory.mktemp("small"), karakoram={"dialect": "kimi-k2.5"})


@pytest.fixture(scope="session")
def small(small_dir: Path) -> Tokenizer:
    """The small tokenizer."""
    return Tokenizer.from_dir(small_dir)


@pytest.fixture(scope="session")
def without_think(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """The small tokenizer without think and media tokens, as K2-0905's has none."""
    missing = ("<think>", "</think>", "<|media_begin|>", "<|media_content|>", "<|media_end|>", "<|media_pad|>")
    return Tokenizer.from_dir(write_tokenizer(tmp_path_factory.mktemp("k2"), without=missing))


@pytest.fixture(scope="session")
def kimi(shared_dir: Path) -> Tokenizer:
    """The official tokenizer of the K2 family."""
    return Tokenizer.from_dir(shared_dir / "data" / "kimi_tokenizer")


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., Path]:
    """`write_tokenizer`, for tests that change the files."""
    return write_tokenizer


@pytest.fixture(scope="session")
def golden() -> Callable[[str], list[dict[str, Any]]]:
    """The lines of one golden file."""
    return lambda name: [json.loads(line) for line in (GOLDEN / f"{name}_public.jsonl").read_text().splitlines()]
