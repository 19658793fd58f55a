"""`k2 chat` with a scripted model: what the arguments mean, what goes to which stream, and what the history keeps."""

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from karakoram.cli import chat, opening
from karakoram.cli.terminal.conversation import MAX_ROUNDS, Conversation
from karakoram.cli.terminal.view import AnswerView, printable
from karakoram.errors import ConfigError, InputError
from karakoram.session import Session
from tests.session.scripted import ScriptedFormat, call_delta, scripted_model

SCRIPTED = [sys.executable, str(Path(__file__).with_name("scripted_k2.py"))]


def scripted_k2(*arguments: str, stdin: str = "") -> tuple[int, str, str]:
    done = subprocess.run([*SCRIPTED, *arguments], input=stdin, capture_output=True, text=True, timeout=60, check=False)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ((None, None), ("nano", None)),
        (("nano", None), ("nano", None)),
        (("hello", None), ("nano", "hello")),
        (("What is 2+2?", None), ("nano", "What is 2+2?")),
        (("x\0y" * 3000, None), ("nano", "x\0y" * 3000)),
        (("./gone", None), ("./gone", None)),
        (("moonshotai/Kimi-K2-Thinking", None), ("moonshotai/Kimi-K2-Thinking", None)),
        (("k2-thinking", None), ("k2-thinking", None)),
        (("hello", "there"), ("hello", "there")),
    ],
)
def test_a_lone_argument_is_a_model_only_where_it_can_be(given: Any, meant: Any) -> None:
    assert chat.model_and_prompt(*given) == meant


def test_an_existing_directory_is_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path)
    assert chat.model_and_prompt("mine", None) == ("mine", None)


def test_piped_prompt_answer_to_stdout_the_rest_to_stderr() -> None:
    code, out, err = scripted_k2("chat", stdin="hi\n")
    assert (code, out) == (0, "You said: ['hi']\n")
    assert "They said hi" in err
    assert "greedy" not in err
    assert "temperature 0.6, top_p 0.95 (default of kimi-k2.5)" in err
    assert "10 tokens in, 4 out" in err
    assert "\x1b" not in out + err


def test_a_prompt_as_argument_leaves_stdin_alone() -> None:
    code, out, _ = scripted_k2("chat", "nano", "hello", "--temperature", "0", stdin="not read")
    assert (code, out) == (0, "You said: ['hello']\n")


def test_nothing_piped() -> None:
    code, out, err = scripted_k2("chat", stdin="\n")
    assert (code, out) == (2, "")
    assert err.startswith("k2: error: The prompt is empty.")


def test_piped_bytes_that_are_no_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"ab\xff")))
    with pytest.raises(InputError, match=r"not UTF-8 \(byte 2\)"):
        chat.given_prompt("-")


def test_calls_that_nobody_answers_are_printed_as_json(tmp_path: Path) -> None:
    tools = tmp_path / "tools.json"
    tools.write_text(json.dumps([{"type": "function", "function": {"name": "weather", "parameters": {}}}]))
    code, out, _ = scripted_k2("chat", "nano", "weather", "--tools", str(tools))
    assert code == 0
    call = json.loads(out)["tool_calls"][0]
    assert (call["id"], call["function"]["name"]) == ("functions.weather:0", "weather")


def test_demo_tools_run_and_are_shown() -> None:
    code, out, err = scripted_k2("chat", "nano", "calculate", "--demo-tools")
    assert (code, out) == (0, "It is 391.\n")
    assert '→ calculator {"expression": "17 * 23"}' in err
    assert "= 391" in err


@pytest.mark.parametrize("text", ["{", '{"a": 1}', "[1]", '[{"function": {}}]', "[" * 100_000])
def test_wrong_tools_files(text: str, tmp_path: Path) -> None:
    path = tmp_path / "tools.json"
    path.write_text(text)
    with pytest.raises(InputError, match=r"tools\.json"):
        opening.read_tools(path)


def test_sampling_comes_from_generation_config_then_dialect(tmp_path: Path) -> None:
    fmt = ScriptedFormat(lambda messages: [])
    assert str(opening.sampling_for(tmp_path, fmt)) == "temperature 0.6, top_p 0.95 (default of kimi-k2.5)"
    assert opening.sampling_for(tmp_path, fmt, thinking=False).temperature == 0.3
    config = tmp_path / "generation_config.json"
    config.write_text('{"eos_token_id": 5}')
    assert opening.sampling_for(tmp_path, fmt).temperature == 0.6
    config.write_text('{"temperature": 0.3, "do_sample": true}')
    assert str(opening.sampling_for(tmp_path, fmt)) == "temperature 0.3, top_p 1 (generation_config.json)"
    config.write_text('{"temperature": 0.3, "do_sample": false}')
    assert str(opening.sampling_for(tmp_path, fmt)) == "greedy (generation_config.json)"
    assert str(opening.sampling_for(tmp_path, fmt, temperature=0.8)) == "temperature 0.8, top_p 1 (as asked)"


@pytest.mark.parametrize("text", ["[]", '{"temperature": "hot"}', '{"top_p": 0}', '{"temperature": -1}'])
def test_wrong_generation_config(text: str, tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"generation_config\.json"):
        opening.sampling_for(tmp_path, ScriptedFormat(lambda messages: []))


def test_foreign_control_characters_do_not_reach_a_terminal() -> None:
    assert printable("a\x1b[31mb\x07\u202ec\r\nd\te") == "a�[31mb��c\nd\te"


def conversation(script: Any, answer_call: Any = lambda call: None, system: str | None = None) -> Conversation:
    fmt = ScriptedFormat(script)
    return Conversation(
        session=Session(scripted_model(), fmt, generate=fmt.generate),
        view=AnswerView(io.StringIO(), io.StringIO()),
        sampling=opening.Sampling(0, 1, "test"),
        tools=[],
        answer_call=answer_call,
        system=system,
    )


def roles(talk: Conversation) -> list[str]:
    return [message["role"] for message in talk.messages]


def test_history_grows_and_resets() -> None:
    talk = conversation(lambda messages: [{"content": "yes"}], system="Be brief.")
    assert talk.answer("a") == []
    assert talk.answer("b") == []
    assert roles(talk) == ["system", "user", "assistant", "user", "assistant"]
    talk.reset()
    assert talk.messages == [{"role": "system", "content": "Be brief."}]
    talk.reset("Be long.")
    assert talk.messages == [{"role": "system", "content": "Be long."}]


def test_unanswered_calls_leave_no_trace() -> None:
    talk = conversation(lambda messages: [call_delta("f", "{}")])
    assert [call["function"]["name"] for call in talk.answer("a")] == ["f"]
    assert talk.messages == []


def test_words_before_an_unanswered_call_stay() -> None:
    talk = conversation(lambda messages: [{"content": "Let me see."}, call_delta("f", "{}")])
    talk.answer("a")
    assert talk.messages[1:] == [{"role": "assistant", "content": "Let me see."}]


def test_endless_calls_end() -> None:
    talk = conversation(lambda messages: [call_delta("f", "{}")], answer_call=lambda call: "1")
    talk.answer("a")
    assert len(talk.session.fmt.asked) == MAX_ROUNDS
    assert talk.messages == []


def interrupted(*words: str) -> Any:
    def answer_call(call: Any) -> str:
        raise KeyboardInterrupt

    return conversation(lambda messages: [*({"content": word} for word in words), call_delta("f", "{}")], answer_call)


def test_ctrl_c_keeps_what_was_said() -> None:
    talk = interrupted("Well. ")
    with pytest.raises(KeyboardInterrupt):
        talk.answer("a")
    assert talk.messages == [{"role": "user", "content": "a"}, {"role": "assistant", "content": "Well. "}]


def test_ctrl_c_before_a_word_leaves_no_trace() -> None:
    talk = interrupted()
    with pytest.raises(KeyboardInterrupt):
        talk.answer("a")
    assert talk.messages == []


def test_an_error_leaves_no_trace() -> None:
    talk = conversation(lambda messages: [{"content": "yes"}])
    talk.session.model.config.max_position_embeddings = 10
    with pytest.raises(InputError, match="context"):
        talk.answer("a")
    assert talk.messages == []
