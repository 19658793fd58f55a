"""What is wrong is refused with the right status and the field's path, and other requests are undisturbed."""

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from karakoram.engine.request import Request
from karakoram.serve.service import Limits
from tests.serve.conftest import MODEL, WEATHER, Gate, Running, Words

pytestmark = pytest.mark.timeout(60)

USER = {"role": "user", "content": "x"}
CALL = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}
RESULT = {"role": "tool", "tool_call_id": "a", "content": "1"}


def calling(*calls: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": None, "tool_calls": list(calls)}


def tool(name: str = "f", **parameters: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": {"type": "object", **parameters}}}


def nested(depth: int) -> Any:
    schema: Any = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


@pytest.fixture(autouse=True)
def _undisturbed(shared: Running) -> Iterator[None]:
    """Every case here: the next request is answered, and nothing stays in the engine."""
    yield
    shared.still_answers()
    assert shared.idle()


BODIES: list[tuple[dict[str, Any], str | None]] = [
    ({"messages": None}, "messages"),
    ({"messages": []}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": ["hi"]}, "messages[0]"),
    ({"messages": [USER, {"role": "owner", "content": "x"}]}, "messages[1].role"),
    ({"messages": [{"content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        "messages[0].content[0].type",
    ),
    ({"messages": [USER, {"role": "assistant"}]}, "messages[1]"),
    ({"messages": [USER, RESULT]}, "messages[1].tool_call_id"),
    ({"messages": [USER, {"role": "tool", "content": "1"}]}, "messages[1]"),
    ({"messages": [USER, calling(CALL), RESULT, RESULT]}, "messages[3].tool_call_id"),
    ({"messages": [USER, calling(CALL, CALL)]}, "messages[1].tool_calls"),
    ({"messages": [USER, calling({"id": "a"})]}, "messages[1].tool_calls[0].function"),
    ({"messages": [USER, {"role": "assistant", "content": "a", "partial": True}, USER]}, "messages[1].partial"),
    ({"messages": [{"role": "assistant", "content": "a", "partial": True}]}, None),
    ({"messages": [USER, {**calling(CALL), "partial": True}]}, "messages[1]"),
    ({"temperature": "warm"}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"temperature": -1}, "temperature"),
    ({"top_p": 1.5}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"min_p": 2}, "min_p"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"presence_penalty": 3}, "presence_penalty"),
    ({"logit_bias": {"x": 1}}, "logit_bias.x"),
    ({"logit_bias": {"1": 101}}, "logit_bias.1"),
    ({"logit_bias": {"4096": 1}}, "logit_bias"),
    ({"seed": 1.5}, "seed"),
    ({"seed": 2**70}, "seed"),
    ({"n": 0}, "n"),
    ({"n": 1000}, "n"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_completion_tokens": "9"}, "max_completion_tokens"),
    ({"stop": ""}, "stop"),
    ({"stop": ["a", ""]}, "stop[1]"),
    ({"stop": ["a"] * 17}, "stop"),
    ({"stop": "a" * 513}, "stop"),
    ({"stop_token_ids": [-1]}, "stop_token_ids[0]"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
    ({"top_logprobs": 3}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"tools": {}}, "tools"),
    ({"tools": [{}]}, "tools[0].function"),
    ({"tools": [tool("1f")]}, "tools[0].function.name"),
    ({"tools": [tool("f" * 65)]}, "tools[0].function.name"),
    ({"tools": [tool("a b")]}, "tools[0].function.name"),
    ({"tools": [tool("f"), tool("f")]}, None),
    ({"tools": [WEATHER] * 129}, "tools"),
    ({"tools": [tool(properties={"a": nested(40)})]}, "tools[0]"),
    (
        {"tools": [WEATHER, tool(properties={"a": {"type": "string", "pattern": "("}})]},
        "tools[1].function.parameters.properties.a.pattern",
    ),
    ({"tool_choice": "sometimes"}, "tool_choice"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tools": [tool()], "tool_choice": {"type": "function", "function": {"name": "g"}}}, None),
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"not": {}}}}},
        "response_format.json_schema.schema.not",
    ),
    ({"structured_outputs": {"regex": "("}}, None),
    ({"tools": [WEATHER], "tool_choice": "required", "max_tokens": 2}, "max_tokens"),
    ({"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}}, "structured_outputs"),
    ({"thinking": {"type": "perhaps"}}, "thinking.type"),
    ({"reasoning_effort": "heroic"}, "reasoning_effort"),
    ({"chat_template_kwargs": {"thinking": "no"}}, "chat_template_kwargs.thinking"),
]


@pytest.mark.parametrize(("fields", "param"), BODIES, ids=lambda value: json.dumps(value, default=str)[:60])
def test_a_wrong_field_is_named(shared: Running, fields: dict[str, Any], param: Any) -> None:
    answer = shared.chat(**fields)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
    assert error["message"]
    assert error["param"] == param, error


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"nonsense",
        b"[]",
        b'"text"',
        b"null",
        b'{"messages": [}',
        b'{"messages": NaN}',
        b'{"messages": [{"role": "user", "content": "\xff\xfe"}]}',
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        b"[" * 100_000,
        b'{"a":' * 100_000,
        "{}".encode("utf-16"),
    ],
    ids=repr,
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"])
def test_what_is_no_json_object(shared: Running, path: str, raw: bytes) -> None:
    answer = shared.http.post(path, content=raw, headers={"content-type": "application/json"})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["code"] == "invalid_json"


def test_an_unknown_model(shared: Running) -> None:
    answer = shared.chat(model="gpt-9")
    assert answer.status_code == 404
    error = answer.json()["error"]
    assert error["code"] == "model_not_found" and error["param"] == "model" and "gpt-9" in error["message"]
    assert shared.http.get("/v1/models/gpt-9").status_code == 404


@pytest.mark.parametrize("fields", [{"text": "word " * 5000}, {"max_tokens": 4096}, {"max_tokens": 2**31 - 1}])
def test_a_prompt_over_the_context(shared: Running, fields: dict[str, Any]) -> None:
    answer = shared.chat(**fields)
    assert answer.status_code == 413
    error = answer.json()["error"]
    assert error["code"] == "context_length_exceeded" and "4096" in error["message"]


def test_unknown_paths_and_methods(shared: Running) -> None:
    assert shared.http.get("/v1/nothing").status_code == 404
    answer = shared.http.get("/v1/chat/completions")
    assert answer.status_code == 405 and answer.headers["allow"] == "POST" and answer.json()["error"]["message"]


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_that_is_too_large(serve: Callable[..., Running], words: Words, chunked: bool) -> None:
    server = serve(words.script, limits=Limits(request_bytes=10_000))
    raw = json.dumps({"model": MODEL, "messages": [{"role": "user", "content": "a" * 20_000}]}).encode()
    pieces: Any = (raw[at : at + 1000] for at in range(0, len(raw), 1000)) if chunked else raw
    answer = server.http.post("/v1/chat/completions", content=pieces)
    assert answer.status_code == 413 and answer.json()["error"]["code"] == "request_too_large"
    server.still_answers()


def test_a_full_queue(serve: Callable[..., Running], words: Words) -> None:
    gate = Gate()

    def script(request: Request) -> Iterator[int]:
        gate.pass_()
        yield from words.answer("done")

    server = serve(script, most=2)
    # Two of three choices would fit: all or none are taken.
    answer = server.chat(n=3)
    assert answer.status_code == 429 and int(answer.headers["retry-after"]) >= 1
    assert answer.json()["error"]["type"] == "rate_limit_error"
    gate.open()
    assert server.idle()
    server.still_answers()


def test_a_worker_that_dies(shared: Running) -> None:
    answer = shared.chat("BREAK")
    assert answer.status_code == 503 and "the model is broken" in answer.json()["error"]["message"]
    # Inside a stream the status has been sent: the error comes as an event, and the stream ends properly.
    lines = shared.chat("BREAK", stream=True).text.strip().split("\n\n")
    assert lines[-1] == "data: [DONE]"
    assert "the model is broken" in json.loads(lines[-2].removeprefix("data: "))["error"]["message"]


def test_one_of_many_choices_dies(serve: Callable[..., Running], words: Words) -> None:
    def script(request: Request) -> Iterator[int]:
        if request.id.endswith("-1"):
            raise RuntimeError("broken")
        while True:
            yield words.ids(" on")[0]

    server = serve(script)
    assert server.chat(n=3, max_tokens=2000).status_code == 503
    assert server.idle()  # the other two have been cancelled


def test_a_stopped_engine(serve: Callable[..., Running], words: Words) -> None:
    server = serve(words.script)
    server.still_answers()
    server.engine.close()
    answer = server.chat()
    assert answer.status_code == 503 and answer.json()["error"]["type"] == "service_unavailable_error"


def test_a_bug_in_encoding_ends_one_answer_only(shared: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    from karakoram.serve.openai.chat import ChatEvents

    def broken(*_: Any) -> bytes:
        raise ZeroDivisionError("a bug")

    with monkeypatch.context() as patch:
        patch.setattr(ChatEvents, "deltas", broken)
        text = shared.chat(stream=True).text
    assert "could not be encoded" in text and text.endswith("data: [DONE]\n\n")
