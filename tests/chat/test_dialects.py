"""Which dialect a checkpoint speaks: our key first, then its chat template, else a clear question."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from karakoram.chat import ChatFormat, Tokenizer, load_chat_format
from karakoram.errors import ChatError, TokenizerError

FRAME = "<|im_user|>{{ role }}<|im_middle|>"
HELPFUL = "You are a helpful assistant"
IMAGE = "<|media_start|>image<|media_content|><|media_pad|><|media_end|>"
# One line per template family, with the features that its real template has.
TEMPLATES = {
    "kimi-k2.6": FRAME + "{% if preserve_thinking %}{{ tools_ts_str }}<think></think><|kimi_k25_video_placeholder|>",
    "kimi-k2.5": FRAME + "{{ tools_ts_str }} tool_declare <think></think><|kimi_k25_video_placeholder|>",
    "kimi-k2-thinking": FRAME + "tool_declare <think></think> You are Kimi, an AI assistant" + IMAGE,
    "kimi-k2": FRAME + "tool_declare <|tool_calls_section_begin|>" + HELPFUL + IMAGE,
    "kimi-vl": FRAME + HELPFUL + IMAGE,
    "kimi-vl-thinking": FRAME + HELPFUL + IMAGE + "◁think▷",
    "moonlight": FRAME + HELPFUL,
}
Write = Callable[..., Path]


@pytest.mark.parametrize("dialect", TEMPLATES)
def test_by_template(tmp_path: Path, make_tokenizer: Write, dialect: str) -> None:
    in_file, in_key, in_list, in_processor = (tmp_path / name for name in ("file", "key", "list", "processor"))
    for path in (in_file, in_key, in_list, in_processor):
        path.mkdir()
    text = TEMPLATES[dialect]
    make_tokenizer(in_file, chat_template="something older")
    (in_file / "chat_template.jinja").write_text(text, encoding="utf-8")
    make_tokenizer(in_key, chat_template=text)
    make_tokenizer(in_list, chat_template=[{"name": "rag", "template": "x"}, {"name": "default", "template": text}])
    make_tokenizer(in_processor)
    (in_processor / "chat_template.json").write_text(json.dumps({"chat_template": text}))
    for path in (in_file, in_key, in_list, in_processor):
        assert load_chat_format(path).dialect == dialect


def test_our_key_comes_first(tmp_path: Path, make_tokenizer: Write) -> None:
    make_tokenizer(tmp_path, chat_template=TEMPLATES["moonlight"], karakoram={"dialect": "kimi-k2.5"})
    assert load_chat_format(tmp_path).dialect == "kimi-k2.5"
    make_tokenizer(tmp_path, chat_template=TEMPLATES["moonlight"])
    (tmp_path / "config.json").write_text(json.dumps({"karakoram": {"dialect": "kimi-k2"}}))
    assert load_chat_format(str(tmp_path)).dialect == "kimi-k2"
    assert load_chat_format(tmp_path, dialect="kimi-vl").dialect == "kimi-vl"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "has no chat template"),
        ({"chat_template": "<|im_start|>" + HELPFUL}, "none of the known dialects"),
        ({"chat_template": FRAME}, "none of the known dialects"),
        ({"chat_template": [{"name": "rag", "template": "x"}, 3]}, "has no chat template"),
    ],
)
def test_unknown_is_asked_for(tmp_path: Path, make_tokenizer: Write, config: dict[str, Any], message: str) -> None:
    make_tokenizer(tmp_path, **config)
    with pytest.raises(ChatError, match=message) as caught:
        load_chat_format(tmp_path)
    assert "--dialect" in caught.value.fix and "kimi-k2.5" in caught.value.fix


def test_unknown_names(tmp_path: Path, make_tokenizer: Write, small: Tokenizer) -> None:
    with pytest.raises(ChatError, match="Unknown chat dialect 'kimi-k9'") as caught:
        ChatFormat("kimi-k9", small)
    assert "kimi-k2-thinking" in caught.value.fix
    make_tokenizer(tmp_path, karakoram={"dialect": "kimi-k9"})
    with pytest.raises(ChatError, match="Unknown chat dialect 'kimi-k9'"):
        load_chat_format(tmp_path)


def test_other_tokenizers_are_refused(tmp_path: Path, make_tokenizer: Write) -> None:
    make_tokenizer(tmp_path, without=("<|im_end|>",))
    with pytest.raises(ChatError, match=r"has no <\|im_end\|> token"):
        load_chat_format(tmp_path, "kimi-k2")
    with pytest.raises(TokenizerError, match="is not a directory"):
        load_chat_format(tmp_path / "nowhere")


def test_damaged_side_files(tmp_path: Path, make_tokenizer: Write) -> None:
    make_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ChatError, match=r"config\.json is not valid JSON"):
        load_chat_format(tmp_path)
    (tmp_path / "config.json").unlink()
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(ChatError, match=r"Cannot read .*chat_template\.jinja"):
        load_chat_format(tmp_path)
