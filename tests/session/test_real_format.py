"""The session with a real chat format and a small real tokenizer; only the model is scripted, by its words."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from karakoram.chat import ChatFormat, load_chat_format
from karakoram.session import Session
from tests.chat.conftest import write_tokenizer
from tests.session.scripted import scripted_model

ADD = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
CALL = (
    "<|tool_calls_section_begin|><|tool_call_begin|>functions.add:0<|tool_call_argument_begin|>"
    '{"a": 1}<|tool_call_end|><|tool_calls_section_end|><|im_end|>'
)


@pytest.fixture(scope="module")
def fmt(tmp_path_factory: pytest.TempPathFactory) -> ChatFormat:
    return load_chat_format(write_tokenizer(Path(tmp_path_factory.mktemp("tokenizer"))), "kimi-k2.5")


def session_saying(fmt: ChatFormat, text: str) -> tuple[Session, list[list[int]]]:
    prompts: list[list[int]] = []

    def generate(model: Any, prompt: list[int], limit: int, **how: Any) -> Iterator[int]:
        prompts.append(prompt)
        yield from fmt.tokenizer.encode(text, allow_special=True)[:limit]

    return Session(scripted_model(vocabulary=fmt.tokenizer.n_vocab), fmt, generate=generate), prompts


def test_thinking_then_an_answer_with_split_characters(fmt: ChatFormat) -> None:
    session, _ = session_saying(fmt, "mm 山</think>né 日本 😀<|im_end|>")
    deltas = list(session.stream([{"role": "user", "content": "hi"}]))
    assert "".join(delta.get("reasoning_content") or "" for delta in deltas) == "mm 山"
    assert "".join(delta.get("content") or "" for delta in deltas) == "né 日本 😀"
    assert session.last is not None
    assert session.last.message["content"] == "né 日本 😀"
    assert session.last.message["reasoning_content"] == "mm 山"
    assert session.last.finish_reason == "stop"


def test_a_second_call_is_numbered_on_and_the_history_is_renumbered(fmt: ChatFormat) -> None:
    call = {"id": "call_abc", "type": "function", "function": {"name": "add", "arguments": "{}"}}
    messages = [
        {"role": "user", "content": "add"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_abc", "content": "3"},
    ]
    session, prompts = session_saying(fmt, "ok</think>" + CALL)
    deltas = list(session.stream(messages, [ADD]))
    prompt = fmt.tokenizer.decode(prompts[0])
    assert "functions.add:0<|tool_call_argument_begin|>" in prompt
    assert "## Return of functions.add:0\n3" in prompt
    assert "call_abc" not in prompt
    assert session.last is not None
    assert session.last.finish_reason == "tool_calls"
    made = session.last.message["tool_calls"]
    assert [one["id"] for one in made] == ["functions.add:1"]
    assert made[0]["function"] == {"name": "add", "arguments": '{"a": 1}'}
    assert [one["id"] for delta in deltas for one in delta.get("tool_calls") or [] if "id" in one] == [
        "functions.add:1"
    ]
    # and the answer can be sent back as it is
    again = [*messages, session.last.message, {"role": "tool", "tool_call_id": "functions.add:1", "content": "1"}]
    assert "## Return of functions.add:1\n1" in fmt.tokenizer.decode(session.encode(again, [ADD]))


def test_stopped_in_the_middle_of_a_call(fmt: ChatFormat) -> None:
    session, _ = session_saying(fmt, "ok</think>Well." + CALL)
    stream = session.stream([{"role": "user", "content": "add"}], [ADD])
    for delta in stream:
        if any("{" in (call["function"].get("arguments") or "") for call in delta.get("tool_calls") or []):
            break
    stream.close()
    assert session.last is not None
    assert session.last.finish_reason == "interrupted"
    assert session.last.message["content"] == "Well."
    assert session.last.message["tool_calls"][0]["incomplete"] is True
