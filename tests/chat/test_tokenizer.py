"""The tokenizer against the official vectors, at its limits, and against damaged files."""

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from karakoram.chat import Tokenizer
from karakoram.chat.tokenizer import MAX_RUN_CHARS, MAX_WINDOW_CHARS, PATTERN, cut_points
from karakoram.errors import TokenizerError

SPECIAL = ["<|im_end|>", "[EOS]", "<think>", "</think>", "<|tool_call_begin|>"]


def _text(case: dict[str, Any]) -> str:
    if "repeat" in case:
        piece, count = case["repeat"]
        return piece * count
    return case["text"] if "text" in case else "".join(piece * count for piece, count in case["concat"])


def _ids(case: dict[str, Any], key: str) -> list[int]:
    if key in case:
        return case[key]
    return [token_id for token_id, count in case[f"{key}_rle"] for _ in range(count)]


def test_pattern_is_the_official_one() -> None:
    assert len(PATTERN) == 332
    assert hashlib.sha256(PATTERN.encode()).hexdigest().startswith("de578178")


def test_golden_ids(kimi: Tokenizer, golden: Callable[[str], list[dict[str, Any]]]) -> None:
    cases = golden("tokenizer")
    assert len(cases) == 387
    for case in cases:
        text = _text(case)
        assert kimi.encode(text, allow_special=True) == _ids(case, "ids"), text[:80]
        assert kimi.encode(text) == _ids(case, "ids_no_special"), text[:80]
        assert kimi.decode(kimi.encode(text, allow_special=True)) == text
        assert kimi.decode(kimi.encode(text)) == text


def test_official_sizes(kimi: Tokenizer) -> None:
    assert (kimi.n_vocab, kimi.first_special_id, len(kimi.special_ids)) == (163_840, 163_584, 256)
    assert kimi.special_ids["<|im_end|>"] == 163_586
    assert kimi.special_ids["</think>"] == 163_607
    assert kimi.special_ids["<|reserved_token_163608|>"] == 163_608
    assert kimi.decode([0, 163_839]) == "![PAD]"


def test_specials_of_another_vocabulary(small: Tokenizer) -> None:
    assert small.first_special_id == 270
    assert small.special_ids["[BOS]"] == 270
    assert small.special_ids["<|reserved_token_275|>"] == 275
    assert small.n_vocab == 270 + 27
    assert small.encode("<|im_end|>", allow_special=True) == [272]
    assert max(small.encode("".join(small.special_ids))) < small.first_special_id


@given(st.text())
def test_round_trip(small: Tokenizer, text: str) -> None:
    assert small.decode(small.encode(text)) == text
    assert small.decode(small.encode(text, allow_special=True)) == text


@given(st.lists(st.one_of(st.text(max_size=8), st.sampled_from(SPECIAL))))
def test_text_never_becomes_control(small: Tokenizer, pieces: list[str]) -> None:
    ids = small.encode("".join(pieces))
    assert all(token_id < small.first_special_id for token_id in ids)


def test_lone_surrogates_do_not_fail(small: Tokenizer) -> None:
    assert small.decode(small.encode("a\ud83db")) == "a\ufffdb"


def test_cut_off_characters_decode_to_replacement(small: Tokenizer) -> None:
    assert small.decode([0xE4, 0xBD, ord("x")]) == "\ufffdx"


def _official_cuts(text: str) -> list[int]:
    """The official class's loop over characters, as the slow twin of `cut_points`."""
    cuts: list[int] = []
    for start in range(0, len(text), MAX_WINDOW_CHARS):
        window = text[start : start + MAX_WINDOW_CHARS]
        cuts += [start] if start else []
        length, in_space = 0, window[0].isspace()
        for offset, character in enumerate(window):
            if character.isspace() != in_space:
                length, in_space = 1, not in_space
            else:
                length += 1
                if length > MAX_RUN_CHARS:
                    cuts.append(start + offset)
                    length = 1
    return cuts


@pytest.mark.parametrize(
    "text",
    [
        "x" * MAX_RUN_CHARS,
        "x" * (MAX_RUN_CHARS + 1),
        " " * 60_000 + "y" * 75_001 + "\x1c" * 30_000,
        ("word " * 80_001),
        "z" * (MAX_WINDOW_CHARS + 26_000),
    ],
)
def test_giant_texts_are_cut_where_the_official_class_cuts(text: str) -> None:
    assert cut_points(text) == _official_cuts(text)


def test_ids_outside_the_vocabulary(small: Tokenizer) -> None:
    for token_id in (small.n_vocab, -1, 10**12):
        with pytest.raises(TokenizerError, match=f"Token id {token_id} is outside the vocabulary"):
            small.decode([1, token_id])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: [*lines[:3], b"!!!! 3", *lines[4:]], r"line 4: bad base64"),
        (lambda lines: [*lines[:3], b"AA==", *lines[4:]], r"line 4: expected 'base64 rank'"),
        (lambda lines: [*lines[:3], b"Aw== x", *lines[4:]], r"line 4: the rank b'x' is no whole number"),
        (lambda lines: [*lines, lines[0]], r"line 271: the token b'\\x00' a second time"),
        (lambda lines: lines[:-2] + lines[-1:], r"without a gap; 268 is missing"),
        (lambda lines: [*lines[:-1], lines[-1].split()[0] + b" 7"], r"without a gap; 7 appears twice"),
        (lambda lines: lines[1:], r"lacks 1 of the 256 single-byte tokens \(first: 0x00\)"),
        (lambda lines: [], r"lacks 256 of the 256 single-byte tokens"),
        (lambda lines: [b"\x80\x04\x95pickle"], r"line 1: expected"),
    ],
)
def test_damaged_model_files(small_dir: Path, tmp_path: Path, change: Callable[..., Any], message: str) -> None:
    shutil.copytree(small_dir, tmp_path, dirs_exist_ok=True)
    model = tmp_path / "tiktoken.model"
    model.write_bytes(b"\n".join(change(model.read_bytes().splitlines())))
    with pytest.raises(TokenizerError, match=message) as caught:
        Tokenizer.from_dir(tmp_path)
    assert str(model) in caught.value.what
    assert caught.value.fix


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "is not valid JSON"),
        ("[" * 100_000, "is not valid JSON"),
        ("[]", "must hold a JSON object"),
        ("{}", "has no added_tokens_decoder"),
        ({"added_tokens_decoder": {"x": {"content": "[BOS]"}}}, "entry 'x' names no token"),
        ({"added_tokens_decoder": {"270": {}}}, "entry '270' names no token"),
        ({"added_tokens_decoder": {"163584": {"content": "[BOS]"}}}, r"'\[BOS\]' has id 163584, but the 270 tokens"),
        ({"added_tokens_decoder": {"3": {"content": "[BOS]"}}}, r"'\[BOS\]' has id 3, but the 270 tokens"),
        ({"added_tokens_decoder": {"270": {"content": "a"}, "271": {"content": "a"}}}, "'a' names two special ids"),
    ],
)
def test_damaged_configurations(small_dir: Path, tmp_path: Path, config: Any, message: str) -> None:
    shutil.copytree(small_dir, tmp_path, dirs_exist_ok=True)
    text = config if isinstance(config, str) else json.dumps(config)
    (tmp_path / "tokenizer_config.json").write_text(text)
    with pytest.raises(TokenizerError, match=message):
        Tokenizer.from_dir(tmp_path)


@pytest.mark.parametrize("name", ["tiktoken.model", "tokenizer_config.json"])
def test_missing_files(small_dir: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(small_dir, tmp_path, dirs_exist_ok=True)
    (tmp_path / name).unlink()
    with pytest.raises(TokenizerError, match=f"Cannot read .*{name}"):
        Tokenizer.from_dir(tmp_path)


def test_missing_directory(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="is not a directory with a tokenizer"):
        Tokenizer.from_dir(tmp_path / "nowhere")


def test_importing_chat_is_light(project_root: Path) -> None:
    code = "import karakoram.chat, karakoram.chat.format, karakoram.chat.parser, sys; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], cwd=project_root, capture_output=True, text=True, check=True)
    assert not {"torch", "tiktoken", "numpy", "regex", "requests"} & set(run.stdout.split())
