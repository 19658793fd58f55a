"""`k2 generate`, `convert`, `eval` and `train` on a tiny checkpoint of random weights: the whole way in one process."""

import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from karakoram.cli import main
from karakoram.cli.generate import text_of


class Bytes:
    """A tokenizer whose ids are bytes."""

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id])


def k2(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as left:
        main.run(list(arguments))
    out, err = capsys.readouterr()
    return left.value.code, out, err  # type: ignore[return-value]


def test_text_of_never_cuts_a_character() -> None:
    ids = [*"né日😀".encode(), 0xFF, ord("x"), 0xE6]
    assert list(text_of(Bytes(), iter(ids), frozenset())) == ["n", "é", "日", "😀", "�", "x", "�"]
    assert list(text_of(Bytes(), iter(b"ab!c"), frozenset({ord("!")}))) == ["a", "b"]


def test_generate_json_is_what_the_library_says(tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import karakoram.model.generate
    from karakoram.chat import Tokenizer
    from karakoram.model.load import load_model

    arguments = ("generate", str(tiny_checkpoint), "--prompt", "The mountain", "--max-tokens", "9", "--device", "cpu")
    code, out, err = k2(capsys, *arguments, "--json")
    assert (code, err) == (0, "")
    record = json.loads(out)
    assert set(record) == {"text", "token_ids", "prompt_tokens", "tok_per_s"}
    tokenizer = Tokenizer.from_dir(tiny_checkpoint)
    prompt = tokenizer.encode("The mountain")
    expected = list(karakoram.model.generate.generate(load_model(tiny_checkpoint), prompt, 9))
    assert record["token_ids"] == expected
    assert record["prompt_tokens"] == len(prompt)
    assert record["text"] == tokenizer.decode(expected)
    assert record["tok_per_s"] > 0
    code, out, err = k2(capsys, *arguments)
    assert (code, out) == (0, record["text"] + "\n")
    assert f"{len(prompt)} tokens in, 9 out" in err


def test_generate_samples_by_seed(tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("generate", str(tiny_checkpoint), "-p", "x", "--max-tokens", "8", "--json", "--temperature", "1.5")
    said = [json.loads(k2(capsys, *arguments, "--seed", seed)[1])["token_ids"] for seed in ("1", "1", "2")]
    assert said[0] == said[1] != said[2]


def test_generate_chat(
    tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("Grüezi\n".encode())))
    arguments = ("generate", str(tiny_checkpoint), "--prompt", "-", "--chat", "--max-tokens", "5", "--json")
    code, out, err = k2(capsys, *arguments)
    assert (code, err) == (0, "")
    record = json.loads(out)
    # <|im_user|>user<|im_middle|>Grüezi<|im_end|><|im_assistant|>assistant<|im_middle|><think> over bytes
    assert record["prompt_tokens"] == 6 + len("userGrüeziassistant".encode())
    assert len(record["token_ids"]) == 5
    assert record["message"]["role"] == "assistant"
    assert record["finish_reason"] in ("length", "stop")


def test_special_tokens_in_a_prompt_are_text_unless_asked(
    tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("generate", str(tiny_checkpoint), "-p", "<|im_user|>", "--max-tokens", "1", "--json")
    assert json.loads(k2(capsys, *arguments)[1])["prompt_tokens"] > 1
    assert json.loads(k2(capsys, *arguments, "--allow-special")[1])["prompt_tokens"] == 1


def test_generate_past_the_context(tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = k2(capsys, "generate", str(tiny_checkpoint), "-p", "x", "--max-tokens", "1024")
    assert code == 2
    assert "The prompt has 1 tokens; with 1024 new that is 1025, but the model's context ends at 1024." in err


def test_chat_with_real_weights(tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = k2(capsys, "chat", str(tiny_checkpoint), "hi", "--max-tokens", "4", "--demo-tools")
    assert code == 0
    assert "kimi-k2.5 · cpu bfloat16 · greedy (generation_config.json)" in err or "cuda" in err
    assert "cut off: --max-tokens" in err


def test_a_tokenizer_with_more_tokens_than_the_model(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(tiny_checkpoint, tmp_path / "copy")
    config = json.loads((copy / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"]["400"] = {"content": "<|more|>"}
    (copy / "tokenizer_config.json").write_text(json.dumps(config))
    for arguments in (("chat", str(copy), "hi"), ("generate", str(copy), "-p", "hi")):
        code, _, err = k2(capsys, *arguments)
        assert code == 2
        assert "401 tokens" in err
        assert "297" in err


def test_wrong_device(tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = k2(capsys, "generate", str(tiny_checkpoint), "-p", "x", "--device", "abacus")
    assert code == 2
    assert "'abacus'" in err


def test_convert_there_and_never_over(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from karakoram.checkpoint import open_checkpoint

    copy = tmp_path / "copy"
    code, out, _ = k2(capsys, "convert", str(tiny_checkpoint), str(copy), "--format", "bf16")
    assert (code, out) == (0, f"wrote {copy} in bf16\n")
    ours, theirs = open_checkpoint(copy), open_checkpoint(tiny_checkpoint)
    assert ours.read("model.embed_tokens.weight").equal(theirs.read("model.embed_tokens.weight"))
    code, _, err = k2(capsys, "convert", str(tiny_checkpoint), str(copy), "--format", "bf16")
    assert code == 2
    assert str(copy) in err
    code, _, err = k2(capsys, "convert", str(tiny_checkpoint), str(tmp_path / "int4"), "--format", "int4")
    assert code == 2
    assert "lie on no int4 grid" in err
    assert not (tmp_path / "int4").exists()


def test_eval_counts_and_writes(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import karakoram.model.generate

    def silent(model: Any, prompts: list[list[int]], most: int, stop_ids: Any) -> list[list[int]]:
        return [[min(stop_ids)] for _ in prompts]

    monkeypatch.setattr(karakoram.model.generate, "generate_batch", silent)
    numbers = tmp_path / "numbers.json"
    wanted = ("--dialogs", "3", "--failures", "1", "--json", str(numbers))
    arguments = ("eval", "nano-tools", str(tiny_checkpoint), *wanted)
    code, out, _ = k2(capsys, *arguments)
    assert code == 0
    assert "final answers exact:" in out
    assert out.count("expected: ") == 1  # of three failures
    record = json.loads(numbers.read_text())
    assert (record["task"], record["answers"]) == ("nano-tools", [0, 3])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["eval", "nano-toolz"], "No such command 'nano-toolz'"),
        (["eval", "gsm8k", "--data", "/no/such"], "gsm8k/train.jsonl"),
        (["eval", "arithmetic", "./no-such"], "No model './no-such'"),
        (["eval", "arithmetic", "--json", "/no/such/file.json"], "/no/such/file.json"),
    ],
)
def test_eval_mistakes(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = k2(capsys, *arguments)
    assert (code, out) == (2, "")
    assert words in err
    assert err.count("\n") == 1


def test_batches_keep_the_order_and_report() -> None:
    import karakoram.model.generate
    from karakoram.cli import eval as eval_module

    seen: list[int] = []
    reported: list[tuple[int, int]] = []

    def echo(model: Any, prompts: list[list[int]], most: int, stop_ids: Any) -> list[list[int]]:
        seen.extend(len(prompt) for prompt in prompts)
        return [[len(prompt)] for prompt in prompts]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(karakoram.model.generate, "generate_batch", echo)
        patch.setattr(eval_module, "BATCH", 2)
        run = eval_module.in_batches(None, lambda done, total: reported.append((done, total)))
        assert run([[0] * 5, [0], [0] * 3], 7, {9}) == [[5], [1], [3]]
    assert seen == [1, 3, 5]
    assert reported == [(2, 3), (3, 3)]
