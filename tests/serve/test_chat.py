"""`/v1/chat/completions` through OpenAI's own client, which checks every answer against its types."""

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from pydantic import BaseModel

from tests.serve.conftest import MODEL, WAIT_S, WEATHER, Running, Words

pytestmark = pytest.mark.timeout(60)


@pytest.fixture(scope="module")
def client(shared: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"{shared.url}/v1",
        api_key="none",
        max_retries=0,
        timeout=WAIT_S,
        _strict_response_validation=True,
    ) as made:
        yield made


def ask(text: str) -> Any:
    return [{"role": "user", "content": text}]


def test_plain(client: openai.OpenAI, shared: Running) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=ask("Hi"))
    choice = answer.choices[0]
    assert choice.message.content == "Hello, world! ✓ 你好" and choice.finish_reason == "stop"
    assert choice.message.tool_calls is None
    assert answer.id.startswith("chatcmpl-") and answer.model == MODEL
    assert answer._request_id == answer.id
    usage = answer.usage
    assert usage and usage.prompt_tokens_details and usage.completion_tokens_details
    assert usage.prompt_tokens == len(shared.engine.requests[-1].prompt)
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.prompt_tokens_details.cached_tokens == 0


def test_thinking_has_both_names(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=ask("Hi"))
    message: Any = answer.choices[0].message
    assert message.reasoning_content == message.reasoning == "I think."
    usage = answer.usage
    assert usage and usage.completion_tokens_details
    assert usage.completion_tokens_details.reasoning_tokens == 7


@pytest.mark.parametrize(
    "fields",
    [
        {"extra_body": {"thinking": {"type": "disabled"}}},
        {"extra_body": {"chat_template_kwargs": {"thinking": False}}},
        {"extra_body": {"chat_template_kwargs": {"enable_thinking": False}}},
        {"reasoning_effort": "none"},
    ],
)
def test_thinking_can_be_switched_off(client: openai.OpenAI, fields: Any) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=ask("Hi"), **fields)
    message: Any = answer.choices[0].message
    assert message.content == "Hello, world! ✓ 你好" and message.reasoning_content is None


def test_stream(client: openai.OpenAI) -> None:
    content, reasoning, reasons = "", "", []
    options: Any = {"include_usage": True}
    chunks = list(client.chat.completions.create(model=MODEL, messages=ask("Hi"), stream=True, stream_options=options))
    for chunk in chunks[:-1]:
        assert chunk.usage is None
        delta: Any = chunk.choices[0].delta
        content += delta.content or ""
        reasoning += getattr(delta, "reasoning_content", None) or ""
        assert getattr(delta, "reasoning", None) == getattr(delta, "reasoning_content", None)
        reasons.append(chunk.choices[0].finish_reason)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert content == "Hello, world! ✓ 你好" and reasoning == "I think."
    assert reasons[-1] == "stop" and not any(reasons[:-1])
    assert not chunks[-1].choices and chunks[-1].usage and chunks[-1].usage.completion_tokens > 10
    last: Any = chunks[-2].choices[0]
    assert last.usage["total_tokens"] == chunks[-1].usage.total_tokens  # where Moonshot's tools look


def test_stream_without_usage(client: openai.OpenAI) -> None:
    for chunk in client.chat.completions.create(model=MODEL, messages=ask("Hi"), stream=True):
        assert chunk.choices and chunk.usage is None


@pytest.mark.parametrize("kind", ["CALL", "PARALLEL"])
def test_tools(client: openai.OpenAI, kind: str) -> None:
    tools: Any = [WEATHER]
    answer = client.chat.completions.create(model=MODEL, messages=ask(kind), tools=tools)
    choice = answer.choices[0]
    assert choice.finish_reason == "tool_calls"
    calls: Any = choice.message.tool_calls
    cities = ["Oslo", "Rome"] if kind == "PARALLEL" else ["Oslo"]
    assert [json.loads(call.function.arguments)["city"] for call in calls] == cities
    assert [call.id for call in calls] == [f"functions.weather:{index}" for index in range(len(cities))]
    results = [{"role": "tool", "tool_call_id": call.id, "content": "sunny"} for call in calls]
    history: Any = [*ask(kind), choice.message.model_dump(exclude_none=True), *results]
    history[0]["content"] = "Go on"
    history.append({"role": "user", "content": "and now?"})
    again = client.chat.completions.create(model=MODEL, messages=history, tools=tools)
    assert again.choices[0].message.content


@pytest.mark.parametrize("kind", ["CALL", "PARALLEL"])
def test_tools_in_a_stream(client: openai.OpenAI, kind: str) -> None:
    tools: Any = [WEATHER]
    arguments: dict[int, str] = {}
    names: dict[int, Any] = {}
    reason = None
    for chunk in client.chat.completions.create(model=MODEL, messages=ask(kind), tools=tools, stream=True):
        for call in chunk.choices[0].delta.tool_calls or ():
            function: Any = call.function
            arguments[call.index] = arguments.get(call.index, "") + (function.arguments or "")
            if call.id is not None:
                names[call.index] = (call.id, function.name)
        reason = chunk.choices[0].finish_reason or reason
    assert reason == "tool_calls"
    cities = ["Oslo", "Rome"] if kind == "PARALLEL" else ["Oslo"]
    assert [json.loads(text)["city"] for text in arguments.values()] == cities
    assert names == {index: (f"functions.weather:{index}", "weather") for index in range(len(cities))}


def test_the_helper_for_streams_puts_them_together(client: openai.OpenAI) -> None:
    tools: Any = [WEATHER]
    with client.chat.completions.stream(model=MODEL, messages=ask("PARALLEL"), tools=tools) as stream:
        for _ in stream:
            pass
        final = stream.get_final_completion()
    calls: Any = final.choices[0].message.tool_calls
    assert [json.loads(call.function.arguments)["city"] for call in calls] == ["Oslo", "Rome"]


class Person(BaseModel):
    name: str
    age: int


def test_structured_output(client: openai.OpenAI, shared: Running) -> None:
    answer = client.chat.completions.parse(model=MODEL, messages=ask("JSON"), response_format=Person)
    assert answer.choices[0].message.parsed == Person(name="Ada", age=36)
    assert shared.engine.requests[-1].constraint is not None


def test_json_object(client: openai.OpenAI) -> None:
    kind: Any = {"type": "json_object"}
    answer = client.chat.completions.create(model=MODEL, messages=ask("JSON"), response_format=kind)
    assert json.loads(answer.choices[0].message.content or "")["age"] == 36


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs(client: openai.OpenAI, words: Words, stream: bool) -> None:
    common: Any = {"model": MODEL, "messages": ask("Hi"), "logprobs": True, "top_logprobs": 2}
    entries: list[Any] = []
    if stream:
        for chunk in client.chat.completions.create(**common, stream=True):
            for choice in chunk.choices:
                entries += choice.logprobs.content or [] if choice.logprobs else []
    else:
        answer = client.chat.completions.create(**common)
        logprobs = answer.choices[0].logprobs
        entries = list(logprobs.content or []) if logprobs else []
    said = words.answer("Hello, world! ✓ 你好", "I think.")
    assert b"".join(bytes(entry.bytes) for entry in entries) == b"".join(map(words.fmt.tokenizer.token_bytes, said))
    assert all(entry.logprob == -0.5 and entry.top_logprobs[0].logprob == -0.5 for entry in entries)


def test_many_choices(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=ask("Hi"), n=3)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert answer.usage and answer.usage.completion_tokens % 3 == 0
    texts = ["", "", ""]
    ended: set[int] = set()
    for chunk in client.chat.completions.create(model=MODEL, messages=ask("Hi"), n=3, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            if choice.finish_reason:
                ended.add(choice.index)
    assert texts == ["Hello, world! ✓ 你好"] * 3 and ended == {0, 1, 2}


@pytest.mark.parametrize("stop", ["world", ["nothing", "wor"]])
def test_stop_strings(client: openai.OpenAI, stop: Any) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=ask("Hi"), stop=stop)
    assert answer.choices[0].message.content == "Hello, " and answer.choices[0].finish_reason == "stop"
    chunks = client.chat.completions.create(model=MODEL, messages=ask("Hi"), stop=stop, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "Hello, "


def test_length(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=ask("ENDLESS"), max_completion_tokens=9)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage and answer.usage.completion_tokens == 9


def test_token_ids(client: openai.OpenAI, words: Words, shared: Running) -> None:
    extra = {"return_token_ids": True}
    answer: Any = client.chat.completions.create(model=MODEL, messages=ask("Hi"), extra_body=extra)
    said = words.answer("Hello, world! ✓ 你好", "I think.")
    assert answer.choices[0].token_ids == said
    assert answer.prompt_token_ids == list(shared.engine.requests[-1].prompt)
    chunks: Any = list(client.chat.completions.create(model=MODEL, messages=ask("Hi"), extra_body=extra, stream=True))
    assert chunks[0].prompt_token_ids == answer.prompt_token_ids
    assert [token for chunk in chunks[1:] for token in chunk.choices[0].token_ids] == said


def test_errors_have_the_clients_own_classes(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt-9", messages=ask("Hi"))
    assert missing.value.code == "model_not_found" and missing.value.param == "model"
    assert (missing.value.request_id or "").startswith("req_")
    with pytest.raises(openai.BadRequestError) as wrong:
        client.chat.completions.create(model=MODEL, messages=[])
    assert wrong.value.param == "messages"
    with pytest.raises(openai.APIStatusError) as large:
        client.chat.completions.create(model=MODEL, messages=ask("word " * 5000))
    assert large.value.status_code == 413 and large.value.code == "context_length_exceeded"
    assert "4096" in str(large.value) and "5" in str(large.value)


def test_an_error_in_the_middle_of_a_stream_is_raised_by_the_client(client: openai.OpenAI) -> None:
    with pytest.raises(openai.APIError, match="the model is broken"):
        for _ in client.chat.completions.create(model=MODEL, messages=ask("BREAK"), stream=True):
            pass


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL, "alias/of-nano"]
    assert client.models.retrieve("alias/of-nano").id == "alias/of-nano"


def test_text_completions(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt="Hi", max_tokens=50)
    assert answer.choices[0].text == "I think.</think>Hello, world! ✓ 你好"
    # Not strictly: the client's type has no null for `finish_reason`, which OpenAI's own chunks have.
    loose = client.copy(_extra_kwargs={"_strict_response_validation": False})
    pieces = loose.completions.create(model=MODEL, prompt="Hi", max_tokens=50, stream=True)
    assert "".join(piece.choices[0].text for piece in pieces) == answer.choices[0].text
