"""Requests of the Responses API become conversations: one test for each rule, one case for each refusal; the store."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from karakoram.serve.answering import checked
from karakoram.serve.refusal import Refusal
from karakoram.serve.responses import Responses
from karakoram.serve.responses.answers import item_id, place_of
from karakoram.serve.responses.requests import echo_of, read_input, read_request
from karakoram.serve.responses.store import ResponseStore, Stored
from karakoram.session.chat import ChatRequest

TOOL = {"type": "function", "name": "add", "description": "Adds.", "parameters": {"type": "object"}}
HI = {"role": "user", "content": "Hi"}
CALL = {"type": "function_call", "call_id": "c1", "name": "add", "arguments": '{"a": 1}'}
OUTPUT = {"type": "function_call_output", "call_id": "c1", "output": "1"}
PLAIN_CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}


class FakeService:
    """What surfaces ask a service for."""

    def sampling(self, thinking: bool = True) -> dict[str, float]:
        return {"temperature": 1.0 if thinking else 0.6, "top_p": 0.95}

    def check_model(self, name: str | None) -> str:
        return name or "nano"


def body_of(**fields: Any) -> Any:
    return checked(Responses.Body, {"model": "nano", "input": "Hi", **fields})


def asked(**fields: Any) -> ChatRequest:
    return read_request(body_of(**fields), FakeService())  # type: ignore[arg-type]


def said(*items: dict[str, Any], store: ResponseStore | None = None, **fields: Any) -> list[dict[str, Any]]:
    kept = store or ResponseStore()
    return read_input(body_of(input=list(items), **fields), lambda name: kept.get("", name))


def refused(**fields: Any) -> dict[str, Any]:
    """The error body of a request that is refused."""
    surface = Responses()

    def read() -> None:
        body = body_of(**fields)
        surface.parse(body, {}, FakeService())  # type: ignore[arg-type]
        read_input(body, lambda name: None)

    with pytest.raises(Refusal) as caught:
        read()
    assert caught.value.status == 400
    error = surface.error(caught.value, "req_1")["error"]
    assert isinstance(error, dict)
    return error


# ---------------------------------------------------------------------------------------------------- messages


def test_a_string_is_a_user_message() -> None:
    assert read_input(body_of(input="Hi"), lambda name: None) == [HI]
    assert said({"type": "message", **HI}) == said(HI) == [HI]
    assert said({"role": "user", "content": [{"type": "input_text", "text": "Hi"}]}) == [HI]


def test_developer_is_system_and_parts_are_joined() -> None:
    parts = [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]
    messages = said({"role": "developer", "content": parts}, {"role": "system", "content": "c"}, HI)
    assert messages == [{"role": "system", "content": "a\nb"}, {"role": "system", "content": "c"}, HI]


def test_a_tool_turn() -> None:
    reasoning = {
        "type": "reasoning",
        "id": "rs_1",
        "summary": [],
        "content": [{"type": "reasoning_text", "text": "hm"}],
    }
    parts = [{"type": "output_text", "text": "Let me ", "annotations": []}, {"type": "refusal", "refusal": "see."}]
    answer = {"type": "message", "role": "assistant", "id": "msg_1", "status": "completed", "content": parts}
    second = {**CALL, "call_id": "c2", "id": "fc_2", "status": "completed"}
    outputs = [{**OUTPUT, "call_id": "c2", "output": [{"type": "input_text", "text": "2"}]}, OUTPUT]
    assert said(HI, reasoning, answer, CALL, second, *outputs) == [
        HI,
        {
            "role": "assistant",
            "reasoning_content": "hm",
            "content": "Let me see.",
            "tool_calls": [PLAIN_CALL, {**PLAIN_CALL, "id": "c2"}],
        },
        {"role": "tool", "tool_call_id": "c2", "content": "2"},
        {"role": "tool", "tool_call_id": "c1", "content": "1"},
    ]


def test_reasoning_may_be_a_summary_or_encrypted() -> None:
    summary = {"type": "reasoning", "summary": [{"type": "summary_text", "text": "short"}], "encrypted_content": "x"}
    assert said(HI, summary, CALL, OUTPUT)[1]["reasoning_content"] == "short"
    silent = {"type": "reasoning", "summary": [], "encrypted_content": "x"}
    assert not said(HI, silent, CALL, OUTPUT)[1]["reasoning_content"]


def test_what_cannot_follow_in_one_message_begins_another() -> None:
    one, two = {"role": "assistant", "content": "one"}, {"role": "assistant", "content": "two"}
    thought = {"type": "reasoning", "summary": [{"type": "summary_text", "text": "hm"}]}
    assert said(HI, one, two) == [HI, one, two]
    assert said(HI, one, thought, two) == [HI, one, {**two, "reasoning_content": "hm"}]
    assert [message["role"] for message in said(HI, CALL, one, OUTPUT)] == ["user", "assistant", "assistant", "tool"]


def test_reasoning_that_nothing_follows_is_dropped() -> None:
    assert said(HI, {"type": "reasoning", "summary": [{"type": "summary_text", "text": "hm"}]}, HI) == [HI, HI]


# ---------------------------------------------------------------------------------------------------- store


def kept(*messages: dict[str, Any], message: dict[str, Any], output: tuple[dict[str, Any], ...] = ()) -> ResponseStore:
    store = ResponseStore()
    store.put("", "resp_1", Stored(messages, message, output, 10))
    return store


def test_a_previous_response_comes_first() -> None:
    answer = {"role": "assistant", "content": "Hello"}
    store = kept(HI, message=answer)
    assert said({"role": "user", "content": "More"}, store=store, previous_response_id="resp_1") == [
        HI,
        answer,
        {"role": "user", "content": "More"},
    ]


def test_history_is_not_changed_by_what_follows() -> None:
    answer = {"role": "assistant", "content": "", "tool_calls": [PLAIN_CALL]}
    store = kept(HI, message=answer)
    messages = said(
        {**CALL, "call_id": "c2"}, {**OUTPUT, "call_id": "c2"}, OUTPUT, store=store, previous_response_id="resp_1"
    )
    assert [len(message.get("tool_calls", ())) for message in messages] == [0, 1, 1, 0, 0]
    assert answer["tool_calls"] == [PLAIN_CALL]


def test_references_lead_to_stored_items() -> None:
    name = "resp_" + "a" * 32
    call = {**CALL, "id": item_id(name, "function_call", 1), "status": "completed"}
    thought = {
        "type": "reasoning", "id": item_id(name, "reasoning", 0), "summary": [], "encrypted_content": None,
        "content": [{"type": "reasoning_text", "text": "hm"}], "status": "completed",
    }  # fmt: skip
    store = ResponseStore()
    store.put("", name, Stored((HI,), {}, (thought, call), 10))
    references = [{"type": "item_reference", "id": thought["id"]}, {"id": call["id"]}]
    assert said(HI, *references, OUTPUT, store=store)[1] == {
        "role": "assistant",
        "reasoning_content": "hm",
        "content": "",
        "tool_calls": [PLAIN_CALL],
    }
    with pytest.raises(Refusal, match="no stored item"):
        said(HI, {"id": item_id(name, "message", 7)}, store=store)


@given(st.text())
def test_any_reference_can_be_read(reference: str) -> None:
    where = place_of(reference)
    assert where is None or where[1] >= 0


def test_the_store_is_bounded_and_keeps_clients_apart() -> None:
    now = [0.0]
    store = ResponseStore(most=3, most_bytes=100, most_age_s=60, clock=lambda: now[0])

    def put(name: str, size: int = 10) -> None:
        store.put("me", name, Stored((), {}, (), size))

    for name in ("a", "b", "c"):
        put(name)
    assert store.get("you", "a") is None
    assert store.get("me", "a") is not None  # and is now the youngest
    put("d")
    assert store.get("me", "b") is None and store.get("me", "a") is not None and len(store) == 3
    put("e", 80)
    assert store.size_bytes <= 100 and store.get("me", "e") is not None and len(store) == 3
    put("f", 101)
    assert store.get("me", "f") is None
    put("e", 30)  # replaced, not counted twice
    assert store.size_bytes == 50
    now[0] = 61.0
    assert store.get("me", "e") is None and len(store) == 0 and store.size_bytes == 0


# ---------------------------------------------------------------------------------------------------- the rest


def test_tools() -> None:
    function = {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}
    assert asked(tools=[TOOL]).tools == [{"type": "function", "function": function}]
    assert asked(tools=[{**TOOL, "strict": False}]).tools[0]["function"]["strict"] is False
    assert asked(tools=[{**TOOL, "strict": None}]).tools[0]["function"] == function


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (None, ("auto", None, ["add", "sub"])),
        ("none", ("none", None, ["add", "sub"])),
        ("required", ("required", None, ["add", "sub"])),
        ({"type": "function", "name": "sub"}, ("named", "sub", ["add", "sub"])),
        (
            {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "sub"}]},
            ("required", None, ["sub"]),
        ),
    ],
)
def test_tool_choice(choice: Any, expected: tuple[Any, ...]) -> None:
    chat = asked(tools=[TOOL, {**TOOL, "name": "sub"}], tool_choice=choice)
    assert (chat.tool_choice, chat.named_tool, [tool["function"]["name"] for tool in chat.tools]) == expected


def test_the_schema_of_the_answer() -> None:
    shape = {"type": "json_schema", "name": "x", "schema": {"type": "array"}, "strict": True}
    assert asked(text={"format": shape}).response_schema == {"type": "array"}
    assert asked(text={"format": {"type": "json_object"}}).response_schema == {"type": "object"}
    assert asked(text={"format": {"type": "text"}, "verbosity": "low"}).response_schema is None


@pytest.mark.parametrize(
    ("reasoning", "thinking", "budget"),
    [
        (None, True, None), ({}, True, None), ({"effort": "none"}, False, None), ({"effort": "low"}, True, 2048),
        ({"effort": "xhigh", "summary": "auto"}, True, None),
    ],
)  # fmt: skip
def test_reasoning(reasoning: Any, thinking: bool, budget: int | None) -> None:
    chat = asked(reasoning=reasoning)
    assert (chat.thinking, chat.reasoning_tokens) == (thinking, budget)


def test_sampling_and_limits() -> None:
    chat = asked()
    assert (chat.sampling.temperature, chat.sampling.top_p, chat.max_new_tokens) == (1.0, 0.95, None)
    chat = asked(temperature=0, top_p=0.5, max_output_tokens=7, parallel_tool_calls=False)
    assert (chat.sampling.temperature, chat.sampling.top_p, chat.max_new_tokens) == (0, 0.5, 7)
    assert chat.parallel_tool_calls is False


def test_the_response_repeats_its_request() -> None:
    body = body_of(instructions="Be brief.", metadata={"a": "b"}, store=False, tools=[TOOL], tool_choice="required")
    echo = echo_of(body, read_request(body, FakeService()))  # type: ignore[arg-type]
    assert (echo["instructions"], echo["metadata"], echo["store"]) == ("Be brief.", {"a": "b"}, False)
    assert (echo["tool_choice"], echo["tools"]) == ("required", [{**TOOL, "strict": None}])
    assert (echo["temperature"], echo["text"]) == (1.0, {"format": {"type": "text"}, "verbosity": "medium"})


def test_what_only_hosted_servers_need_is_ignored() -> None:
    fields = {
        "user": "me", "safety_identifier": "x", "prompt_cache_key": "k", "service_tier": "auto", "background": False,
        "truncation": "disabled", "include": ["reasoning.encrypted_content"], "nonsense": {},
    }  # fmt: skip
    assert asked(**fields) == asked()


IMAGE = {"type": "input_image", "image_url": "http://x/y.png"}


@pytest.mark.parametrize(
    ("fields", "path", "words"),
    [
        ({"input": None}, "input", "string or a list"),
        ({"input": []}, "input", "nothing to answer"),
        ({"input": [7]}, "input[0]", "type message"),
        ({"input": [{"type": "web_search_call", "id": "x"}]}, "input[0]", "not served"),
        ({"input": [{"type": "custom_tool_call", "call_id": "x"}]}, "input[0]", "custom tools"),
        ({"input": [{"role": "robot", "content": "x"}]}, "input[0].role", "'developer'"),
        ({"input": [HI, {"role": "user", "content": [IMAGE]}]}, "input[1].content[0]", "images and files"),
        ({"input": [{"role": "user", "content": [{"type": "input_file"}]}]}, "input[0].content[0]", "files"),
        ({"input": [HI, OUTPUT]}, "input[1].call_id", "No function_call"),
        ({"input": [HI, CALL, OUTPUT, OUTPUT]}, "input[3].call_id", "already"),
        ({"input": [HI, CALL, CALL, OUTPUT]}, "input[2].call_id", "Two calls"),
        ({"input": [HI, {**CALL, "arguments": {}}]}, "input[1].arguments", "valid string"),
        ({"input": [{"type": "item_reference", "id": "rs_1"}]}, "input[0].id", "no stored item"),
        ({"previous_response_id": "resp_x"}, "previous_response_id", "no stored response"),
        ({"tools": [{"type": "web_search"}]}, "tools[0]", "web_search are not served"),
        ({"tools": [{"type": "custom", "name": "x"}]}, "tools[0]", "custom are not served"),
        ({"tools": [{"type": "function"}]}, "tools[0].name", "required"),
        ({"tool_choice": "any"}, "tool_choice", "'required'"),
        ({"tool_choice": {"type": "custom", "name": "x"}}, "tool_choice", "allowed functions"),
        (
            {"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "x"}]}},
            "tool_choice.tools[0].name",
            "not among",
        ),
        ({"text": {"format": {"type": "grammar"}}}, "text.format", "json_schema"),
        ({"reasoning": {"effort": "huge"}}, "reasoning.effort", "'minimal'"),
        ({"max_output_tokens": 0}, "max_output_tokens", "greater"),
        ({"truncation": "auto"}, "truncation", "'disabled'"),
        ({"background": True}, "background", "False"),
        ({"conversation": "conv_1"}, "conversation", "None"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt", "None"),
        ({"include": ["message.output_text.logprobs"]}, "include[0]", "chat/completions"),
        ({"include": ["everything"]}, "include[0]", "Input should be"),
        ({"top_logprobs": 2}, "top_logprobs", "chat/completions"),
        ({"metadata": {"a": 1}}, "metadata.a", "valid string"),
        ({"temperature": "1"}, "temperature", "valid number"),
    ],
)
def test_refused_with_its_path(fields: dict[str, Any], path: str, words: str) -> None:
    error = refused(**fields)
    assert error["param"] == path and words in error["message"], error
    assert error["type"] == "invalid_request_error"


def test_floors_below_speak_this_apis_names() -> None:
    error = Responses().error(Refusal(400, "max_tokens is 2, which is little.", "max_tokens"), "req_1")["error"]
    assert error == {
        "message": "max_output_tokens is 2, which is little.",
        "type": "invalid_request_error",
        "param": "max_output_tokens",
        "code": None,
    }
