"""Anthropic's official client, validating strictly, against the real application over a scripted engine."""

from collections.abc import Callable, Iterable
from typing import Any

import anthropic
import pytest
from pydantic import BaseModel

from karakoram.chat import ChatFormat
from karakoram.engine.request import Request
from tests.serve.conftest import MODEL, Running, Words

HI: Any = [{"role": "user", "content": "Hi"}]
ADD: Any = {
    "name": "add",
    "description": "Adds two numbers.",
    "input_schema": {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
        "required": ["a", "b"],
        "additionalProperties": False,
    },
}
THINKING: Any = {"type": "enabled", "budget_tokens": 1024}
Serve = Callable[..., Running]


@pytest.fixture
def client_for(serve: Serve) -> Callable[..., anthropic.Anthropic]:
    """A client of a new server that answers with these tokens, turn by turn."""

    def start(*turns: Iterable[int], **options: Any) -> anthropic.Anthropic:
        left = iter([*turns])
        server = serve(lambda request: next(left), **options)
        client = anthropic.Anthropic(
            api_key="key", base_url=server.url, max_retries=0, timeout=30, _strict_response_validation=True
        )
        client.server = server  # type: ignore[attr-defined]
        return client

    return start


def prompt_of(client: Any, fmt: ChatFormat, turn: int = -1) -> str:
    """What the model was given."""
    return fmt.tokenizer.decode(list(client.server.engine.requests[turn].prompt))


Client = Callable[..., anthropic.Anthropic]


def test_plain(client_for: Client, words: Words) -> None:
    client = client_for(words.ids("Hello", " you", "<|im_end|>"))
    message = client.messages.create(model=MODEL, max_tokens=50, messages=HI, system="Be brief.")
    assert message.content[0].model_dump(exclude_none=True) == {"type": "text", "text": "Hello you"}
    assert (message.role, message.stop_reason, message.stop_sequence) == ("assistant", "end_turn", None)
    assert message.usage.input_tokens > 0 and message.usage.output_tokens == len(words.ids("Hello", " you")) + 1
    assert message.id.startswith("msg_")


def test_stream_is_the_whole_answer(client_for: Client, words: Words) -> None:
    turn = words.answer("Grüße, 世界!\nLine \u2028 two", "Let me think.")
    client = client_for(turn, turn)
    whole = client.messages.create(model=MODEL, max_tokens=90, messages=HI, thinking=THINKING)
    with client.messages.stream(model=MODEL, max_tokens=90, messages=HI, thinking=THINKING) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_message()
    assert final.model_dump(exclude={"id"}) == whole.model_dump(exclude={"id"})
    assert [block.type for block in final.content] == ["thinking", "text"]
    assert kinds[0] == "message_start" and kinds[-1] == "message_stop"
    details = final.usage.output_tokens_details
    assert details is not None and 0 < details.thinking_tokens < final.usage.output_tokens


def test_raw_stream(client_for: Client, words: Words) -> None:
    client = client_for(words.ids("Hello", "<|im_end|>"))
    events = list(client.messages.create(model=MODEL, max_tokens=9, messages=HI, stream=True))
    assert [event.type for event in events] == [
        "message_start", "content_block_start", "content_block_delta", "content_block_stop", "message_delta",
        "message_stop",
    ]  # fmt: skip


def test_the_beta_client(client_for: Client, words: Words) -> None:
    turn = words.answer("Hello", "Hm.")
    client = client_for(turn, turn)
    asked: dict[str, Any] = {"model": MODEL, "max_tokens": 50, "messages": HI, "thinking": {"type": "adaptive"}}
    asked |= {"betas": ["context-management-2025-06-27"], "context_management": {"edits": []}, "tools": [ADD]}
    message = client.beta.messages.create(**asked, output_config={"effort": "medium"})
    with client.beta.messages.stream(**asked) as stream:
        final = stream.get_final_message()
    assert [block.type for block in message.content] == [block.type for block in final.content] == ["thinking", "text"]


@pytest.mark.parametrize("streams", [False, True])
def test_parallel_tools_with_interleaved_thinking(
    client_for: Client, words: Words, fmt: ChatFormat, streams: bool
) -> None:
    first = words.calls(("add", '{"a": 1, "b": 2}'), ("add", '{"a":3,"b":4}'), reasoning="Two sums.")
    second = words.calls(("add", '{"a": 3, "b": 7}'), reasoning="Now their sum.", first=2)
    client = client_for(first, second, words.answer("Ten.", "Done."))
    messages: list[Any] = [{"role": "user", "content": "1 + 2 + 3 + 4"}]
    asked: dict[str, Any] = {"model": MODEL, "max_tokens": 200, "tools": [ADD], "thinking": THINKING}

    def turn() -> anthropic.types.Message:
        if not streams:
            return client.messages.create(messages=messages, **asked)
        with client.messages.stream(messages=messages, **asked) as stream:
            return stream.get_final_message()

    message = turn()
    assert message.stop_reason == "tool_use"
    assert [block.type for block in message.content] == ["thinking", "tool_use", "tool_use"]
    calls = [block for block in message.content if block.type == "tool_use"]
    assert [(call.name, call.input) for call in calls] == [("add", {"a": 1, "b": 2}), ("add", {"a": 3, "b": 4})]
    results = [
        {"type": "tool_result", "tool_use_id": call.id, "content": str(sum(call.input.values()))} for call in calls
    ]  # type: ignore[arg-type]
    messages += [message.to_param(), {"role": "user", "content": results}]

    message = turn()
    prompt = prompt_of(client, fmt)
    assert "Two sums." in prompt and "## Return of functions.add:0\n3" in prompt
    call = message.content[1]
    assert call.type == "tool_use" and call.id not in {call.id for call in calls}
    results = [{"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "10"}]}]
    messages += [message.to_param(), {"role": "user", "content": results}]

    message = turn()
    prompt = prompt_of(client, fmt)
    assert "Two sums." in prompt and "Now their sum." in prompt and "## Return of functions.add:2\n10" in prompt
    assert [block.type for block in message.content] == ["thinking", "text"]
    assert message.stop_reason == "end_turn"


def test_thinking_that_does_not_come_back_is_put_in_again(client_for: Client, words: Words, fmt: ChatFormat) -> None:
    client = client_for(words.calls(("add", '{"a":1,"b":2}'), reasoning="A secret plan."), words.answer("3", ""))
    asked: dict[str, Any] = {"model": MODEL, "max_tokens": 200, "tools": [ADD]}
    thinking: Any = {"type": "adaptive", "display": "omitted"}
    message = client.messages.create(messages=HI, thinking=thinking, **asked)
    assert message.content[0].model_dump()["thinking"] == ""
    call = message.content[1]
    assert call.type == "tool_use"
    results: Any = [{"type": "tool_result", "tool_use_id": call.id, "content": "3"}]
    history: Any = [*HI, message.to_param(), {"role": "user", "content": results}]
    client.messages.create(messages=history, thinking=thinking, **asked)
    assert "A secret plan." in prompt_of(client, fmt)


def test_structured_output(client_for: Client, words: Words) -> None:
    class City(BaseModel):
        name: str
        people: int

    client = client_for(*[words.ids('{"name": "Skardu", "people": 200000}', "<|im_end|>")] * 2)
    parsed = client.messages.parse(model=MODEL, max_tokens=90, messages=HI, output_format=City)
    assert parsed.parsed_output == City(name="Skardu", people=200000)
    with client.messages.stream(model=MODEL, max_tokens=90, messages=HI, output_format=City) as stream:
        assert stream.get_final_message().parsed_output == City(name="Skardu", people=200000)


def test_stop_sequences_and_max_tokens(client_for: Client, words: Words) -> None:
    client = client_for(*[words.ids("one two END three", "<|im_end|>")] * 3)
    message = client.messages.create(model=MODEL, max_tokens=50, messages=HI, stop_sequences=["XX", "END"])
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", "END")
    assert message.content[0].model_dump()["text"] == "one two "
    with client.messages.stream(model=MODEL, max_tokens=50, messages=HI, stop_sequences=["END"]) as stream:
        assert stream.get_final_message().model_dump(exclude={"id"}) == message.model_dump(exclude={"id"})
    message = client.messages.create(model=MODEL, max_tokens=2, messages=HI)
    assert (message.stop_reason, message.usage.output_tokens) == ("max_tokens", 2)


def test_prefill_is_continued(client_for: Client, words: Words, fmt: ChatFormat) -> None:
    client = client_for(words.ids("42", "<|im_end|>"))
    messages: Any = [*HI, {"role": "assistant", "content": "The answer is "}]
    message = client.messages.create(model=MODEL, max_tokens=50, messages=messages)
    assert message.content[0].model_dump()["text"] == "42"
    assert prompt_of(client, fmt).endswith("The answer is ")


def test_count_tokens_is_the_prompts_length(client_for: Client, words: Words) -> None:
    client = client_for(words.ids("Hello", "<|im_end|>"))
    asked: dict[str, Any] = {"model": MODEL, "messages": HI, "tools": [ADD], "system": "Be brief."}
    count = client.messages.count_tokens(**asked)
    usage = client.messages.create(max_tokens=9, **asked).usage
    assert count.input_tokens == usage.input_tokens + (usage.cache_read_input_tokens or 0)


def test_a_changing_billing_header_changes_nothing(client_for: Client, words: Words) -> None:
    client = client_for(*[words.ids("Hello", "<|im_end|>")] * 2)
    for version in ("1", "2"):
        system: Any = [
            {"type": "text", "text": f"x-anthropic-billing-header: cch={version}"},
            {"type": "text", "text": "You are Claude Code.", "cache_control": {"type": "ephemeral"}},
        ]
        client.messages.create(model=MODEL, max_tokens=9, messages=HI, system=system)
    requests: list[Request] = client.server.engine.requests  # type: ignore[attr-defined]
    assert requests[0].prompt == requests[1].prompt


# ---------------------------------------------------------------------------------------------------- errors


def test_wrong_requests(client_for: Client) -> None:
    client = client_for()
    with pytest.raises(anthropic.BadRequestError) as bad:
        client.messages.create(model=MODEL, max_tokens=0, messages=HI)
    assert bad.value.body == {
        "type": "error",
        "error": {
            "type": "invalid_request_error",
            "message": "max_tokens: Input should be greater than or equal to 1.",
        },
        "request_id": bad.value.request_id,
    }
    with pytest.raises(anthropic.NotFoundError) as missing:
        client.messages.create(model="claude-nonesuch", max_tokens=9, messages=HI)
    assert missing.value.body["error"]["type"] == "not_found_error"  # type: ignore[index]
    image: Any = {"type": "image", "source": {"type": "url", "url": "http://x/y.png"}}
    with pytest.raises(anthropic.BadRequestError, match=r"messages.0.content.0: .* images"):
        client.messages.create(model=MODEL, max_tokens=9, messages=[{"role": "user", "content": [image]}])
    tool: Any = {"type": "web_search_20250305", "name": "web_search"}
    with pytest.raises(anthropic.BadRequestError, match=r"tools.0: web_search_20250305"):
        client.messages.create(model=MODEL, max_tokens=9, messages=HI, tools=[tool])
    history: Any = [*HI, {"role": "assistant", "content": "x"}]
    history += [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "nobody"}]}]
    with pytest.raises(anthropic.BadRequestError, match=r"messages.2.content.0.tool_use_id"):
        client.messages.count_tokens(model=MODEL, messages=history)


def test_every_answer_has_an_id(client_for: Client, words: Words) -> None:
    def broken() -> Iterable[int]:
        yield from words.ids("Hello")
        raise RuntimeError("out of memory")

    client = client_for(*[words.ids("Hello", "<|im_end|>")] * 2, broken(), keys=("key",))
    asked: dict[str, Any] = {"model": MODEL, "max_tokens": 9, "messages": HI}
    message = client.messages.create(**asked)
    assert message._request_id == message.id
    with client.messages.stream(**asked) as stream:
        assert stream.get_final_message().id == stream.request_id == stream.response.headers["x-request-id"]
    counted = client.messages.count_tokens(model=MODEL, messages=HI)
    assert (counted._request_id or "").startswith("req_")
    with client.messages.stream(**asked) as stream, pytest.raises(anthropic.APIStatusError) as failed:
        stream.get_final_message()
    assert failed.value.request_id == stream.request_id == failed.value.body["request_id"]  # type: ignore[index]
    stranger = anthropic.Anthropic(api_key="other", base_url=client.base_url, max_retries=0)
    ids = {message.id, stream.request_id}
    for one, wrong in ((stranger, {}), (client, {"model": "nonesuch"}), (client, {"max_tokens": 0})):
        with pytest.raises(anthropic.APIStatusError) as refused:
            one.messages.create(**asked | wrong)
        error = refused.value
        assert error.request_id is not None and error.request_id.startswith("req_")
        assert error.body["request_id"] == error.request_id  # type: ignore[index]
        ids.add(error.request_id)
    assert len(ids) == 5


def test_keywords_that_cannot_be_enforced_are_refused_where_a_tool_is_strict(client_for: Client, words: Words) -> None:
    client = client_for(words.ids("Hello", "<|im_end|>"))
    odd = {**ADD, "input_schema": {**ADD["input_schema"], "frobnicate": 1}}
    assert client.messages.create(model=MODEL, max_tokens=60, messages=HI, tools=[odd]).stop_reason == "end_turn"
    with pytest.raises(anthropic.BadRequestError, match="frobnicate"):
        client.messages.create(model=MODEL, max_tokens=60, messages=HI, tools=[{**odd, "strict": True}])


def test_keys(client_for: Client, words: Words) -> None:
    client = client_for(words.ids("Hello", "<|im_end|>"), words.ids("Hello", "<|im_end|>"), keys=("key",))
    client.messages.create(model=MODEL, max_tokens=9, messages=HI)  # x-api-key
    bearer = anthropic.Anthropic(api_key=None, auth_token="key", base_url=client.base_url)
    bearer.messages.create(model=MODEL, max_tokens=9, messages=HI)
    stranger = anthropic.Anthropic(api_key="other", base_url=client.base_url, max_retries=0)
    with pytest.raises(anthropic.AuthenticationError) as refused:
        stranger.messages.create(model=MODEL, max_tokens=9, messages=HI)
    assert refused.value.body["error"]["type"] == "authentication_error"  # type: ignore[index]


def test_a_conversation_that_does_not_fit(client_for: Client) -> None:
    client = client_for(context=64)
    with pytest.raises(anthropic.APIStatusError, match=r"prompt is too long: .* 64") as refused:
        client.messages.create(model=MODEL, max_tokens=60, messages=[{"role": "user", "content": "word " * 90}])
    assert refused.value.status_code == 413
    assert refused.value.body["error"]["type"] == "request_too_large"  # type: ignore[index]


def test_a_full_queue_and_a_loading_model(client_for: Client, words: Words) -> None:
    with pytest.raises(anthropic.RateLimitError) as full:
        client_for(words.ids("Hello"), most=0).messages.create(model=MODEL, max_tokens=9, messages=HI)
    assert full.value.body["error"]["type"] == "rate_limit_error"  # type: ignore[index]
    assert full.value.response.headers["retry-after"]
    with pytest.raises(anthropic.InternalServerError) as loading:
        client_for(loaded=False).messages.create(model=MODEL, max_tokens=9, messages=HI)
    assert loading.value.body["error"]["type"] == "overloaded_error"  # type: ignore[index]


def test_an_engine_that_breaks_in_the_middle(client_for: Client, words: Words) -> None:
    def broken() -> Iterable[int]:
        yield from words.ids("Hello")
        raise RuntimeError("out of memory")

    client = client_for(broken(), broken())
    with pytest.raises(anthropic.APIStatusError, match="out of memory"):
        client.messages.create(model=MODEL, max_tokens=9, messages=HI)
    with (
        pytest.raises(anthropic.APIStatusError, match="out of memory"),
        client.messages.stream(model=MODEL, max_tokens=9, messages=HI) as stream,
    ):
        stream.get_final_message()
