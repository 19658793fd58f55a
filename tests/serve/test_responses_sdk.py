"""OpenAI's official client, validating strictly, against `/v1/responses` of the real application."""

from collections.abc import Callable, Iterable
from typing import Any

import openai
import pytest
from openai.types.responses import Response, ResponseFunctionToolCall
from pydantic import BaseModel

from karakoram.chat import ChatFormat
from tests.serve.conftest import MODEL, Running, Words

ADD: Any = {
    "type": "function",
    "name": "add",
    "description": "Adds two numbers.",
    "strict": True,
    "parameters": {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
        "required": ["a", "b"],
        "additionalProperties": False,
    },
}
Client = Callable[..., openai.OpenAI]


@pytest.fixture
def client_for(serve: Callable[..., Running]) -> Client:
    """A client of a new server that answers with these tokens, turn by turn."""

    def start(*turns: Iterable[int], **options: Any) -> openai.OpenAI:
        left = iter([*turns])
        server = serve(lambda request: next(left), **options)
        client = openai.OpenAI(
            api_key="key", base_url=f"{server.url}/v1", max_retries=0, timeout=30, _strict_response_validation=True
        )
        client.server = server  # type: ignore[attr-defined]
        return client

    return start


def prompt_of(client: Any, fmt: ChatFormat) -> str:
    """What the model was given last."""
    return fmt.tokenizer.decode(list(client.server.engine.requests[-1].prompt))


def calls_of(response: Response) -> list[ResponseFunctionToolCall]:
    return [item for item in response.output if item.type == "function_call"]


def comparable(response: Any) -> Any:
    """A response without its ids and times."""
    body = response.model_dump(exclude={"id", "created_at", "completed_at"})
    for item in body["output"]:
        item.pop("id")
        item.pop("parsed_arguments", None)
        for part in item.get("content") or ():
            part.pop("parsed", None)
    return body


def test_plain(client_for: Client, words: Words, fmt: ChatFormat) -> None:
    client = client_for(words.answer("Hello you", "Hm."))
    response = client.responses.create(model=MODEL, input="Hi", instructions="Be brief.", metadata={"a": "b"})
    assert (response.output_text, response.status, response.instructions) == ("Hello you", "completed", "Be brief.")
    assert [item.type for item in response.output] == ["reasoning", "message"]
    assert response.id.startswith("resp_") and response.metadata == {"a": "b"}
    usage = response.usage
    assert usage is not None and 0 < usage.output_tokens_details.reasoning_tokens < usage.output_tokens
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens
    assert "Be brief." in prompt_of(client, fmt)


def test_stream_is_the_whole_answer(client_for: Client, words: Words) -> None:
    turn = words.answer("Grüße, 世界!\nLine \u2028 two", "Let me think.")
    client = client_for(turn, turn)
    whole = client.responses.create(model=MODEL, input="Hi")
    with client.responses.stream(model=MODEL, input="Hi") as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert comparable(final) == comparable(whole)
    assert kinds[:2] == ["response.created", "response.in_progress"] and kinds[-1] == "response.completed"


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("stateful", [False, True])
def test_parallel_tools_and_reasoning(
    client_for: Client, words: Words, fmt: ChatFormat, streams: bool, stateful: bool
) -> None:
    first = words.calls(("add", '{"a": 1, "b": 2}'), ("add", '{"a":3,"b":4}'), reasoning="Two sums.")
    second = words.calls(("add", '{"a": 3, "b": 7}'), reasoning="Now their sum.", first=2)
    client = client_for(first, second, words.answer("Ten.", "Done."))
    history: list[Any] = [{"role": "user", "content": "1 + 2 + 3 + 4"}]
    previous: str | None = None

    def turn(new: list[Any]) -> Response:
        nonlocal previous
        asked: dict[str, Any] = {"model": MODEL, "tools": [ADD], "input": new if stateful else history}
        asked |= {"previous_response_id": previous} if stateful else {"store": False}
        if streams:
            with client.responses.stream(**asked) as stream:
                response: Response = stream.get_final_response()
        else:
            response = client.responses.create(**asked)
        previous = response.id
        history.extend(item.model_dump(exclude_none=True, exclude={"parsed_arguments"}) for item in response.output)
        return response

    response = turn(history)
    assert [item.type for item in response.output] == ["reasoning", "function_call", "function_call"]
    assert [(call.name, call.arguments) for call in calls_of(response)] == [
        ("add", '{"a": 1, "b": 2}'),
        ("add", '{"a":3,"b":4}'),
    ]
    outputs = [
        {"type": "function_call_output", "call_id": call.call_id, "output": output}
        for call, output in zip(calls_of(response), "37")
    ]
    history.extend(outputs)
    response = turn(outputs)
    assert "Two sums." in prompt_of(client, fmt) and "## Return of functions.add:1\n7" in prompt_of(client, fmt)
    call = calls_of(response)[0]
    outputs = [{"type": "function_call_output", "call_id": call.call_id, "output": "10"}]
    history.extend(outputs)
    response = turn(outputs)
    prompt = prompt_of(client, fmt)
    assert "Two sums." in prompt and "Now their sum." in prompt and "## Return of functions.add:2\n10" in prompt
    assert response.output_text == "Ten."


def test_stored_answers_belong_to_a_key(client_for: Client, words: Words) -> None:
    answers = [words.answer("Hello", "")] * 4
    client = client_for(*answers, keys=("key", "other"))
    first = client.responses.create(model=MODEL, input="Hi")
    assert client.responses.create(model=MODEL, input="More", previous_response_id=first.id).output_text == "Hello"
    stranger = openai.OpenAI(api_key="other", base_url=client.base_url, max_retries=0)
    with pytest.raises(openai.BadRequestError) as refused:
        stranger.responses.create(model=MODEL, input="More", previous_response_id=first.id)
    assert refused.value.code == "previous_response_not_found" and refused.value.param == "previous_response_id"
    forgotten = client.responses.create(model=MODEL, input="Hi", store=False)
    with pytest.raises(openai.BadRequestError, match="no stored response"):
        client.responses.create(model=MODEL, input="More", previous_response_id=forgotten.id)


def test_items_can_be_referred_to(client_for: Client, words: Words, fmt: ChatFormat) -> None:
    client = client_for(words.calls(("add", '{"a": 1, "b": 2}'), reasoning="A plan."), words.answer("3", ""))
    first = client.responses.create(model=MODEL, input="Hi", tools=[ADD])
    items: list[Any] = [{"type": "item_reference", "id": item.id} for item in first.output]
    output = {"type": "function_call_output", "call_id": calls_of(first)[0].call_id, "output": "3"}
    client.responses.create(model=MODEL, input=[{"role": "user", "content": "Hi"}, *items, output], tools=[ADD])
    assert "A plan." in prompt_of(client, fmt) and "## Return of functions.add:0\n3" in prompt_of(client, fmt)


def test_structured_output(client_for: Client, words: Words) -> None:
    class City(BaseModel):
        name: str
        people: int

    client = client_for(*[words.answer('{"name": "Skardu", "people": 200000}', "Hm.")] * 3)
    city = City(name="Skardu", people=200000)
    parsed = client.responses.parse(model=MODEL, input="Hi", text_format=City)
    assert parsed.output_parsed == city
    assert parsed.text is not None and parsed.text.format is not None and parsed.text.format.type == "json_schema"
    with client.responses.stream(model=MODEL, input="Hi", text_format=City) as stream:
        assert stream.get_final_response().output_parsed == city
    response = client.responses.create(model=MODEL, input="Hi", text={"format": {"type": "json_object"}})
    assert City.model_validate_json(response.output_text) == city


def test_an_answer_that_is_cut(client_for: Client, words: Words) -> None:
    client = client_for(*[words.answer("one two three", "")] * 2)
    response = client.responses.create(model=MODEL, input="Hi", max_output_tokens=3)
    assert response.status == "incomplete" and response.incomplete_details is not None
    assert response.incomplete_details.reason == "max_output_tokens"
    events = list(client.responses.create(model=MODEL, input="Hi", max_output_tokens=3, stream=True))
    assert events[-1].type == "response.incomplete"
    assert comparable(events[-1].response) == comparable(response)


# ---------------------------------------------------------------------------------------------------- errors


def test_wrong_requests(client_for: Client) -> None:
    client = client_for(context=64)
    with pytest.raises(openai.BadRequestError) as bad:
        client.responses.create(model=MODEL, input="Hi", max_output_tokens=0)
    assert (bad.value.param, bad.value.type) == ("max_output_tokens", "invalid_request_error")
    with pytest.raises(openai.NotFoundError) as missing:
        client.responses.create(model="gpt-nonesuch", input="Hi")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.APIStatusError) as long:
        client.responses.create(model=MODEL, input="word " * 90)
    assert (long.value.status_code, long.value.code) == (413, "context_length_exceeded")
    with pytest.raises(openai.BadRequestError, match="web_search are not served"):
        client.responses.create(model=MODEL, input="Hi", tools=[{"type": "web_search"}])
    with pytest.raises(openai.BadRequestError, match="not among the tools"):
        client.responses.create(model=MODEL, input="Hi", tools=[ADD], tool_choice={"type": "function", "name": "sub"})


def test_keywords_that_cannot_be_enforced_are_refused_unless_a_tool_says_no(client_for: Client, words: Words) -> None:
    client = client_for(words.answer("Hello", ""))
    odd: Any = {**ADD, "parameters": {**ADD["parameters"], "frobnicate": 1}}
    asked: dict[str, Any] = {"model": MODEL, "input": "Hi"}
    assert client.responses.create(**asked, tools=[{**odd, "strict": False}]).output_text == "Hello"
    for strict in (True, None):
        with pytest.raises(openai.BadRequestError, match="frobnicate") as refused:
            client.responses.create(**asked, tools=[{**odd, "strict": strict}])
        assert refused.value.code == "unsupported_schema"


def test_keys(client_for: Client) -> None:
    client = client_for(keys=("another",))
    with pytest.raises(openai.AuthenticationError) as refused:
        client.responses.create(model=MODEL, input="Hi")
    assert refused.value.type == "authentication_error"


def test_a_full_queue_and_a_loading_model(client_for: Client) -> None:
    with pytest.raises(openai.RateLimitError):
        client_for(most=0).responses.create(model=MODEL, input="Hi")
    with pytest.raises(openai.InternalServerError):
        client_for(loaded=False).responses.create(model=MODEL, input="Hi")


def test_an_engine_that_breaks_in_the_middle(client_for: Client, words: Words) -> None:
    def broken() -> Iterable[int]:
        yield from words.ids("Hello")
        raise RuntimeError("out of memory")

    client = client_for(broken(), broken())
    with pytest.raises(openai.InternalServerError, match="out of memory"):
        client.responses.create(model=MODEL, input="Hi")
    events = list(client.responses.create(model=MODEL, input="Hi", stream=True))
    assert events[-1].type == "response.failed"
    error = events[-1].response.error
    assert error is not None and error.code == "server_error" and "out of memory" in error.message
