"""Anthropic's requests become conversations in OpenAI's shape: one test for each rule, one case for each refusal."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from karakoram.errors import ContextOverflow, InputError
from karakoram.serve.answering import checked
from karakoram.serve.anthropic import CountTokens, Messages
from karakoram.serve.anthropic.answers import call_id_of, error_body, tool_use_id
from karakoram.serve.anthropic.requests import read_request
from karakoram.serve.refusal import Refusal, refusal_of
from karakoram.session.chat import ChatRequest

HI = {"role": "user", "content": "Hi"}
TOOL = {"name": "add", "description": "Adds.", "input_schema": {"type": "object", "properties": {"a": {}}}}


class FakeService:
    """What surfaces ask a service for."""

    def sampling(self, thinking: bool = True) -> dict[str, float]:
        return {"temperature": 1.0 if thinking else 0.6, "top_p": 0.95}

    def check_model(self, name: str | None) -> str:
        return name or "nano"


def asked(**fields: Any) -> ChatRequest:
    """The conversation of a request."""
    body = {"model": "nano", "max_tokens": 9, "messages": [HI], **fields}
    return Messages().parse(checked(Messages.Body, body), {}, FakeService()).chat  # type: ignore[arg-type]


def said(*messages: dict[str, Any], **fields: Any) -> list[dict[str, Any]]:
    return list(asked(messages=list(messages), **fields).messages)


def refused(**fields: Any) -> str:
    """The sentence by which a request is refused."""
    with pytest.raises(Refusal) as caught:
        asked(**fields)
    assert caught.value.status == 400
    body = error_body(caught.value, "req_1")
    assert body["type"] == "error" and body["error"]["type"] == "invalid_request_error"
    return body["error"]["message"]


def text(text: str, **more: Any) -> dict[str, Any]:
    return {"type": "text", "text": text, **more}


def use(name: str, tool_id: str, **arguments: Any) -> dict[str, Any]:
    return {"type": "tool_use", "id": tool_id, "name": name, "input": arguments}


def result(tool_id: str, content: Any = "ok", **more: Any) -> dict[str, Any]:
    return {"type": "tool_result", "tool_use_id": tool_id, "content": content, **more}


# ---------------------------------------------------------------------------------------------------- messages


def test_a_string_and_a_text_block_are_the_same() -> None:
    assert said(HI) == said({"role": "user", "content": [text("Hi", cache_control={"type": "ephemeral"})]}) == [HI]


def test_blocks_and_neighbours_are_joined() -> None:
    blocks = {"role": "user", "content": [text("a"), text("b")]}
    assert said(blocks, {"role": "user", "content": "c"}) == [{"role": "user", "content": "a\nb\nc"}]


def test_system_comes_first_without_the_billing_header() -> None:
    system = [text("x-anthropic-billing-header: cc_version=2.1; cch=a1b2c"), text("Be brief."), text("Be kind.")]
    assert said(HI, system=system) == [{"role": "system", "content": "Be brief.\nBe kind."}, HI]
    assert said(HI, system="Be brief.") == [{"role": "system", "content": "Be brief."}, HI]
    assert said(HI, system=system[:1]) == said(HI, system="") == [HI]


def test_a_system_message_may_come_later() -> None:
    assert said(HI, {"role": "system", "content": "New rules."}, HI)[1] == {"role": "system", "content": "New rules."}


def test_a_tool_turn() -> None:
    turn = [
        {"type": "thinking", "thinking": "I should ", "signature": "of another server"},
        {"type": "redacted_thinking", "data": "???"},
        {"type": "thinking", "thinking": "add."},
        text("Let me see."),
        use("add", "toolu_1", a=1),
        use("add", "toolu_2", a="ä"),
    ]
    results = [text("And then?"), result("toolu_2", [text("4"), text("5")]), result("toolu_1", "no", is_error=True)]
    assert said(HI, {"role": "assistant", "content": turn}, {"role": "user", "content": results}) == [
        HI,
        {
            "role": "assistant",
            "content": "Let me see.",
            "reasoning_content": "I should add.",
            "tool_calls": [
                {"id": "toolu_1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}},
                {"id": "toolu_2", "type": "function", "function": {"name": "add", "arguments": '{"a": "ä"}'}},
            ],
        },
        {"role": "tool", "tool_call_id": "toolu_2", "content": "4\n5"},
        {"role": "tool", "tool_call_id": "toolu_1", "content": "Error: no"},
        {"role": "user", "content": "And then?"},
    ]


def test_an_assistant_sent_in_pieces_is_one_message() -> None:
    pieces = [
        {"role": "assistant", "content": [{"type": "thinking", "thinking": "hm", "signature": ""}]},
        {"role": "assistant", "content": [use("add", "toolu_1")]},
    ]
    messages = said(HI, *pieces, {"role": "user", "content": [result("toolu_1", None)]})
    assert [message["role"] for message in messages] == ["user", "assistant", "tool"]
    assert messages[1]["reasoning_content"] == "hm" and messages[2]["content"] == ""


def test_thinking_of_which_only_the_signature_came_is_missing() -> None:
    turn = [{"type": "thinking", "thinking": "", "signature": "k2.x"}, use("add", "toolu_1")]
    messages = said(HI, {"role": "assistant", "content": turn}, {"role": "user", "content": [result("toolu_1")]})
    assert "reasoning_content" not in messages[1]


def test_a_last_assistant_message_is_continued() -> None:
    messages = said(HI, {"role": "assistant", "content": "The answer is ("})
    assert messages[-1] == {"role": "assistant", "content": "The answer is (", "partial": True}
    assert "partial" not in said(HI, {"role": "assistant", "content": "Yes."}, HI)[1]


def test_our_ids_come_back_as_they_were() -> None:
    ours = tool_use_id("functions.add:0")
    turn = {"role": "assistant", "content": [use("add", ours)]}
    messages = said(HI, turn, {"role": "user", "content": [result(ours)]})
    assert messages[1]["tool_calls"][0]["id"] == messages[2]["tool_call_id"] == "functions.add:0"


@given(st.from_regex(r"functions\.[A-Za-z_$][A-Za-z0-9_.\-]{0,63}:[0-9]{1,5}", fullmatch=True))
def test_ids_are_spelled_reversibly(call_id: str) -> None:
    spelled = tool_use_id(call_id)
    assert spelled.replace("_", "").replace("-", "").isalnum() and spelled.isascii()
    assert call_id_of(spelled) == call_id


@given(st.one_of(st.text(), st.from_regex(r"toolu_[A-Za-z0-9_\-]{0,40}", fullmatch=True)))
def test_foreign_ids_stay(tool_id: str) -> None:
    read = call_id_of(tool_id)
    assert read == tool_id or tool_use_id(read) == tool_id


# ---------------------------------------------------------------------------------------------------- the rest


def test_tools_and_choice() -> None:
    chat = asked(tools=[{**TOOL, "cache_control": {"type": "ephemeral"}, "type": "custom"}, {**TOOL, "strict": True}])
    function = {"name": "add", "description": "Adds.", "parameters": TOOL["input_schema"], "strict": False}
    assert chat.tools == [
        {"type": "function", "function": function},
        {"type": "function", "function": {**function, "strict": True}},
    ]
    assert (chat.tool_choice, chat.named_tool, chat.parallel_tool_calls) == ("auto", None, True)


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ({"type": "auto"}, ("auto", None, True)),
        ({"type": "auto", "disable_parallel_tool_use": True}, ("auto", None, False)),
        ({"type": "any"}, ("required", None, True)),
        ({"type": "any", "disable_parallel_tool_use": False}, ("required", None, True)),
        ({"type": "tool", "name": "add"}, ("named", "add", True)),
        ({"type": "tool", "name": "add", "disable_parallel_tool_use": True}, ("named", "add", False)),
        ({"type": "none"}, ("none", None, True)),
    ],
)
def test_tool_choice(choice: dict[str, Any], expected: tuple[Any, ...]) -> None:
    chat = asked(tools=[TOOL], tool_choice=choice)
    assert (chat.tool_choice, chat.named_tool, chat.parallel_tool_calls) == expected


@pytest.mark.parametrize(
    ("fields", "thinking", "budget"),
    [
        ({}, False, None),
        ({"thinking": {"type": "disabled"}}, False, None),
        ({"thinking": {"type": "between_tools"}}, False, None),
        ({"thinking": {"type": "enabled", "budget_tokens": 2048}}, True, 2048),
        ({"thinking": {"type": "enabled"}}, True, None),
        ({"thinking": {"type": "adaptive"}}, True, None),
        ({"thinking": {"type": "adaptive"}, "output_config": {"effort": "low"}}, True, 2048),
        ({"thinking": {"type": "adaptive"}, "output_config": {"effort": "max"}}, True, None),
        ({"thinking": {"type": "enabled", "budget_tokens": 7}, "output_config": {"effort": "low"}}, True, 7),
        ({"output_config": {"effort": "high"}}, False, None),
    ],
)
def test_thinking(fields: dict[str, Any], thinking: bool, budget: int | None) -> None:
    chat = asked(**fields)
    assert (chat.thinking, chat.reasoning_tokens) == (thinking, budget)


def test_sampling_is_the_models_unless_said() -> None:
    assert (asked().sampling.temperature, asked().sampling.top_p, asked().sampling.top_k) == (0.6, 0.95, 0)
    chat = asked(temperature=0, top_p=0.5, top_k=40, stop_sequences=["END"], metadata={"user_id": "me"})
    assert (chat.sampling.temperature, chat.sampling.top_p, chat.sampling.top_k) == (0, 0.5, 40)
    assert (chat.stop, chat.max_new_tokens) == (("END",), 9)


def test_the_schema_of_the_answer() -> None:
    shape = {"type": "json_schema", "schema": {"type": "object"}}
    assert asked(output_config={"format": shape}).response_schema == {"type": "object"}
    assert asked(output_format=shape).response_schema == {"type": "object"}
    assert asked().response_schema is None


def test_unknown_fields_are_ignored() -> None:
    assert asked(service_tier="auto", container=None, nonsense=[1], context_management={"edits": []}) == asked()


def test_counting_needs_no_max_tokens_and_allows_open_calls() -> None:
    body = {
        "model": "nano",
        "messages": [HI, {"role": "assistant", "content": [use("add", "toolu_1")]}],
        "tools": [TOOL],
    }
    chat = read_request(checked(CountTokens.Body, body))
    assert "partial" not in chat.messages[-1] and len(chat.tools) == 1
    assert CountTokens().whole(7) == {"input_tokens": 7}


# ---------------------------------------------------------------------------------------------------- refusals

IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": ""}}
USED = [HI, {"role": "assistant", "content": [use("add", "toolu_1")]}]


@pytest.mark.parametrize(
    ("fields", "path", "words"),
    [
        ({"max_tokens": "9"}, "max_tokens", "valid integer"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": None}, "max_tokens", "valid integer"),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": "Hi"}, "messages", "valid list"),
        ({"messages": [{"role": "tool", "content": ""}]}, "messages.0", "user, assistant or system"),
        ({"messages": [{"role": "user"}]}, "messages.0.content", "required"),
        ({"messages": [{"role": "user", "content": 7}]}, "messages.0.content", "string or a list"),
        ({"messages": [{"role": "user", "content": {}}]}, "messages.0.content", "string or a list"),
        (
            {"messages": [HI, {"role": "user", "content": [text("a"), {"type": "text"}]}]},
            "messages.1.content.1.text",
            "required",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "document"}]}]}, "messages.0.content.0", "documents"),
        ({"messages": [{"role": "user", "content": [IMAGE]}]}, "messages.0.content.0", "images"),
        ({"messages": [{"role": "user", "content": [use("add", "x")]}]}, "messages.0.content.0", "text or tool_result"),
        ({"messages": [HI, {"role": "assistant", "content": [IMAGE]}]}, "messages.1.content.0", "tool_use"),
        ({"messages": [*USED, {"role": "user", "content": [result("x")]}]}, "messages.2.content.0.tool_use_id", "'x'"),
        (
            {"messages": [*USED, {"role": "user", "content": [result("toolu_1"), result("toolu_1")]}]},
            "messages.2.content.1.tool_use_id",
            "already",
        ),
        (
            {"messages": [*USED, {"role": "user", "content": [result("toolu_1", [IMAGE])]}]},
            "messages.2.content.0.content.0.type",
            "'text'",
        ),
        (
            {"messages": [*USED, {"role": "user", "content": [result("toolu_1", [{"type": "tool_reference"}])]}]},
            "messages.2.content.0.content.0.type",
            "'text'",
        ),
        ({"messages": USED}, "messages.1", "no tool_result yet"),
        (
            {"messages": [HI, {"role": "assistant", "content": [use("add", "a"), use("add", "a")]}, HI]},
            "messages.1.content.1.id",
            "two calls",
        ),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools.0", "is one of Anthropic's"),
        ({"tools": [{"name": "add"}]}, "tools.0.input_schema", "required"),
        ({"tools": [{**TOOL, "name": "with space"}]}, "tools.0.name", "pattern"),
        ({"tool_choice": "auto"}, "tool_choice", "auto, any, tool or none"),
        ({"tool_choice": {"type": "tool"}}, "tool_choice.name", "required"),
        ({"thinking": {"type": "maybe"}}, "thinking.type", "adaptive"),
        ({"thinking": {"type": "enabled", "budget_tokens": 0}}, "thinking.budget_tokens", "greater"),
        ({"temperature": True}, "temperature", "valid number"),
        ({"temperature": -1}, "temperature", "greater"),
        ({"stop_sequences": [""]}, "stop_sequences.0", "at least 1"),
        ({"system": {}}, "system", "string or a list"),
        ({"system": [IMAGE]}, "system.0.type", "'text'"),
        ({"mcp_servers": [{"url": "x"}]}, "mcp_servers", "at most 0"),
        ({"output_config": {"format": {"type": "json_schema"}}}, "output_config.format.schema", "required"),
    ],
)  # fmt: skip
def test_refused_with_its_path(fields: dict[str, Any], path: str, words: str) -> None:
    message = refused(**fields)
    assert message.startswith(f"{path}: ") and words in message, message


def test_schemas_that_nest_too_deep_are_refused() -> None:
    schema: dict[str, Any] = {}
    for _ in range(80):
        schema = {"properties": {"a": schema}}
    assert refused(tools=[{**TOOL, "input_schema": schema}]).startswith("tools.0.input_schema: ")


def test_errors_of_floors_below_speak_anthropics_language() -> None:
    overflow = refusal_of(ContextOverflow("The prompt has 9 tokens.", "Shorten it.", 9, 8))
    assert error_body(overflow, "req_1")["error"] == {
        "type": "request_too_large",
        "message": "prompt is too long: The prompt has 9 tokens. Shorten it.",
    }
    stop = refusal_of(InputError("stop is bad.", "Give others."))
    assert error_body(stop, "req_1")["error"]["message"] == "stop_sequences is bad. Give others."
    kinds = {
        400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error",
        413: "request_too_large", 429: "rate_limit_error", 500: "api_error", 503: "overloaded_error",
    }  # fmt: skip
    assert {status: error_body(Refusal(status, "x"), "req_1")["error"]["type"] for status in kinds} == kinds
