"""Messages and tools that cannot be rendered: each error names index, value and fix. All else is accepted."""

from typing import Any

import pytest

from karakoram.chat import ChatFormat, Tokenizer
from karakoram.chat.dialects import DIALECTS
from karakoram.errors import ChatError

USER = {"role": "user", "content": "Hi"}


def assistant(*calls: Any) -> dict[str, Any]:
    """An assistant message with these tool_calls."""
    return {"role": "assistant", "content": "", "tool_calls": list(calls)}


def call(**function: Any) -> dict[str, Any]:
    """A tool call with this function."""
    return {"id": "functions.f:0", "type": "function", "function": function}


def nested(depth: int) -> Any:
    """Lists in lists."""
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "There are no messages"),
        (None, "Messages must be a list, not null"),
        ("Hi", "Messages must be a list, not str"),
        ({"role": "user"}, "Messages must be a list, not dict"),
        ([USER, "Hi"], "Message 1 must be an object, not str"),
        ([{"content": "Hi"}], "Message 0 has role None"),
        ([{"role": 3}], "Message 0 has role 3"),
        ([{"role": ""}], "Message 0 has role ''"),
        ([USER, {"role": "tool", "tool_call_id": "x", "content": "y"}], "Message 1 has role 'tool' but no assistant"),
        ([{"role": "user", "content": 5}], "Message 0 has content of type int"),
        ([{"role": "user", "content": {"text": "x"}}], "Message 0 has content of type dict"),
        ([{"role": "user", "content": b"x"}], "Message 0 has content of type bytes"),
        ([{"role": "user", "content": ["x"]}], "Message 0 has a content part 0 of type str"),
        ([{"role": "user", "content": [{"type": "text"}]}], r"Message 0 has a content part 0 .* \(type 'text'\)"),
        ([{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "audio"}]}], "content part 1"),
        ([{**USER, "name": 5}], "Message 0 has name of type int"),
        ([{"role": "assistant", "reasoning_content": 5}], "Message 0 has reasoning_content of type int"),
        ([{"role": "assistant", "reasoning": []}], "Message 0 has reasoning of type list"),
        ([{"role": "assistant", "tool_calls": {}}], "Message 0 has tool_calls of type dict"),
        ([assistant("x")], "Message 0 has a tool call 0 of type str"),
        ([assistant({"id": "x"})], "Message 0 has a tool call 0 without a function"),
        ([assistant(call(arguments="{}"))], "Message 0 has a tool call 0 whose function name is None"),
        ([assistant(call(name="f"))], "Message 0 has a tool call 0 without arguments"),
        ([assistant(call(name="f", arguments={"x": object()}))], "whose arguments are not JSON"),
        ([assistant(call(name="f", arguments=nested(5000)))], "whose arguments are not JSON"),
        ([assistant({**call(name="f", arguments=""), "id": 7})], "Message 0 has a tool call 0 whose id is 7"),
        ([{**USER, "tool_calls": [call(name="f", arguments="")]}], "Message 0 has tool_calls but role 'user'"),
    ],
)
def test_messages(small: Tokenizer, messages: Any, message: str) -> None:
    for dialect in ("kimi-k2", "kimi-k2.5"):
        fmt = ChatFormat(dialect, small)
        for use in (fmt.render, fmt.encode):
            with pytest.raises(ChatError, match=message) as caught:
                use(messages)
            assert caught.value.fix


def function(**fields: Any) -> dict[str, Any]:
    """A function tool with these fields."""
    return {"type": "function", "function": fields}


LOOP: dict[str, Any] = {"type": "function"}
LOOP["function"] = LOOP["again"] = LOOP


@pytest.mark.parametrize(
    ("tool", "message"),
    [
        ("f", "Tool 1 must be an object, not str"),
        ({}, "Tool 1 has type None"),
        ({"function": {"name": "f"}}, "Tool 1 has type None"),
        ({"type": "function"}, "Tool 1 has no function"),
        (function(), "Tool 1 has the function name None"),
        (function(name=5), "Tool 1 has the function name 5"),
        (function(name=""), "Tool 1 has the function name ''"),
        (function(name="f", parameters=[]), r"Tool 1 \(f\) has parameters of type list"),
        (function(name="f", parameters="{}"), r"Tool 1 \(f\) has parameters of type str"),
        (function(name="f", parameters={"type": "string"}), r"Tool 1 \(f\) has parameters of schema type 'string'"),
        (function(name="f", description={1, 2}), r"Tool 1 is not JSON"),
        (function(name="f", parameters={"x": nested(5000)}), "Tool 1 is not JSON"),
        (function(name="f", parameters={"x": nested(130)}), "Tool 1 nests deeper"),
        (LOOP, "Tool 1 is not JSON"),
    ],
)
def test_tools(small: Tokenizer, tool: Any, message: str) -> None:
    good = function(name="g", parameters={})
    for dialect in ("kimi-k2", "kimi-k2.5"):
        fmt = ChatFormat(dialect, small)
        for use in (lambda fmt=fmt: fmt.render([USER], [good, tool]), lambda fmt=fmt: fmt.parser([good, tool])):
            with pytest.raises(ChatError, match=message) as caught:
                use()
            assert caught.value.fix


def test_tools_must_be_a_list(small: Tokenizer) -> None:
    with pytest.raises(ChatError, match="Tools must be a list, not dict"):
        ChatFormat("kimi-k2", small).render([USER], function(name="f"))  # type: ignore[arg-type]


def test_videos_only_where_the_dialect_has_them(small: Tokenizer) -> None:
    messages = [USER, {"role": "user", "content": [{"type": "video_url", "video_url": {"url": "v"}}]}]
    for dialect, facts in DIALECTS.items():
        fmt = ChatFormat(dialect, small)
        if facts.video is None:
            with pytest.raises(ChatError, match=f"Message 1 has a video .* dialect {dialect} does not know"):
                fmt.render(messages)
        else:
            assert "<|kimi_k25_video_placeholder|>" in fmt.render(messages)


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "assistant", "content": "first"}],
        [USER, USER, {"role": "system", "content": None}, {"role": "system", "content": ""}],
        [{"role": "user"}],
        [{"role": "function", "content": "old"}],
        [assistant(call(name="f", arguments="not json")), USER, {"role": "tool", "tool_call_id": "z", "content": []}],
        ({"role": "user", "content": ({"type": "text", "text": "tuples"},)},),
    ],
)
def test_accepted(small: Tokenizer, messages: Any) -> None:
    for dialect in DIALECTS:
        text = ChatFormat(dialect, small).render(messages)
        assert text.count("<|im_end|>") >= len(messages)
