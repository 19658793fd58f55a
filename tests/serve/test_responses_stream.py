"""Events of the Responses API: their order, and that the official client ends where the whole answer is."""

import json
from dataclasses import dataclass, field
from typing import Any

import httpx2
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from karakoram.serve.answering import checked
from karakoram.serve.refusal import Refusal
from karakoram.serve.responses import Responses
from karakoram.serve.surface import KEEP_ALIVE, Call
from karakoram.session.chat import Usage

NAME = "resp_" + "0" * 32
CALL = {"id": "functions.add:0", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
TOOL = {"type": "function", "name": "add", "parameters": {"type": "object"}, "strict": True}


class FakeService:
    """What surfaces ask a service for."""

    def sampling(self, thinking: bool = True) -> dict[str, float]:
        return {"temperature": 1.0, "top_p": 0.95}

    def check_model(self, name: str | None) -> str:
        return name or "nano"


SERVICE: Any = FakeService()


@dataclass
class Said:
    """An answer as surfaces see it."""

    message: dict[str, Any]
    finish_reason: str = "stop"
    usage: Usage = field(default_factory=lambda: Usage(10, 4, 7, 3))


def call_for(surface: Responses, **fields: Any) -> Call:
    call = surface.parse(checked(Responses.Body, {"model": "nano", "input": "Hi", **fields}), {}, SERVICE)
    call.id, call.created = NAME, 1_700_000_000
    return call


def events_of(raw: bytes) -> list[dict[str, Any]]:
    """Data of SSE events; each is named as its type, and they are numbered from 0."""
    events: list[dict[str, Any]] = []
    for block in raw.decode().split("\n\n")[:-1]:
        name, data = block.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == "event: " + events[-1]["type"]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    return events


def streamed(deltas: list[dict[str, Any]], said: Any, **fields: Any) -> bytes:
    """The bytes of a stream that brings one delta at a time."""
    surface = Responses()
    events = surface.events(call_for(surface, **fields), SERVICE)
    raw = events.start([said])
    for delta in deltas:
        raw += events.deltas(said, [delta])
    return raw + events.finish([said])


def whole(said: Any, **fields: Any) -> dict[str, Any]:
    surface = Responses()
    return surface.whole(call_for(surface, **fields), [said], SERVICE)


def client_of(raw: bytes) -> openai.OpenAI:
    """An official client of a server that sends these bytes."""
    headers = {"content-type": "text/event-stream"}
    transport = httpx2.MockTransport(lambda request: httpx2.Response(200, headers=headers, content=raw))
    http = httpx2.Client(transport=transport)
    return openai.OpenAI(api_key="k", base_url="http://x", http_client=http, _strict_response_validation=True)


def accumulated(raw: bytes) -> dict[str, Any]:
    """What the official client makes of a stream."""
    with client_of(raw).responses.stream(model="nano", input="Hi") as stream:
        return json.loads(stream.get_final_response().model_dump_json(exclude_none=True))


def without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_none(item) for key, item in value.items() if item is not None}
    return [without_none(item) for item in value] if isinstance(value, list) else value


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Equal but for the second in which they were completed."""
    return {**one, "completed_at": 0} == {**other, "completed_at": 0}


DELTAS = [
    {"reasoning_content": "h"}, {"reasoning_content": "m"}, {"content": "A"}, {"content": "b"},
    {"tool_calls": [{"index": 0, **CALL, "function": {"name": "add", "arguments": ""}}]},
    {"tool_calls": [{"index": 0, "function": {"arguments": '{"a":'}}]},
    {"tool_calls": [{"index": 0, "function": {"arguments": " 1}"}}]},
]  # fmt: skip
SAID = Said({"reasoning_content": "hm", "content": "Ab", "tool_calls": [CALL]}, "tool_calls")


def test_the_order_of_events() -> None:
    events = events_of(streamed(DELTAS, SAID, tools=[TOOL]))
    assert [event["type"].removeprefix("response.") for event in events] == [
        "created", "in_progress",
        "output_item.added", "content_part.added", "reasoning_text.delta", "reasoning_text.delta",
        "reasoning_text.done", "content_part.done", "output_item.done",
        "output_item.added", "content_part.added", "output_text.delta", "output_text.delta",
        "output_text.done", "content_part.done", "output_item.done",
        "output_item.added", "function_call_arguments.delta", "function_call_arguments.delta",
        "function_call_arguments.done", "output_item.done",
        "completed",
    ]  # fmt: skip
    places = [event["output_index"] for event in events if event["type"] == "response.output_item.added"]
    assert places == [0, 1, 2]
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert events[-1]["response"]["output"] == done
    assert [item["status"] for item in done] == ["completed"] * 3
    assert events[0]["response"]["status"] == "in_progress" and events[0]["response"]["tools"][0]["name"] == "add"


def test_items() -> None:
    reasoning, message, call = whole(SAID)["output"]
    assert reasoning == {
        "type": "reasoning", "id": f"rs_{NAME[5:]}_0", "summary": [], "encrypted_content": None,
        "content": [{"type": "reasoning_text", "text": "hm"}], "status": "completed",
    }  # fmt: skip
    assert message["content"] == [{"type": "output_text", "text": "Ab", "annotations": [], "logprobs": []}]
    assert call == {
        "type": "function_call", "id": f"fc_{NAME[5:]}_2", "call_id": "functions.add:0", "name": "add",
        "arguments": '{"a": 1}', "status": "completed",
    }  # fmt: skip


def test_usage() -> None:
    assert whole(SAID)["usage"] == {
        "input_tokens": 10, "input_tokens_details": {"cached_tokens": 4, "cache_write_tokens": 0},
        "output_tokens": 7, "output_tokens_details": {"reasoning_tokens": 3}, "total_tokens": 17,
    }  # fmt: skip


def test_several_deltas_at_once_are_the_same_as_one_by_one() -> None:
    surface, said = Responses(), SAID
    events: Any = surface.events(call_for(surface), SERVICE)
    raw = events.start([said]) + events.deltas(said, DELTAS) + events.finish([said])
    one, other = events_of(raw), events_of(streamed(DELTAS, said))
    assert one[:-1] == other[:-1] and same(one[-1]["response"], other[-1]["response"])


def test_what_was_cut_is_incomplete() -> None:
    said = Said({"content": "A"}, "length")
    events = events_of(streamed([{"content": "A"}], said))
    response = events[-1]["response"]
    assert events[-1]["type"] == "response.incomplete" and response["status"] == "incomplete"
    assert response["incomplete_details"] == {"reason": "max_output_tokens"}
    assert response["output"][0]["status"] == "incomplete"
    assert same(response, whole(said))


def test_a_call_that_was_cut_is_incomplete_and_a_finished_one_is_not() -> None:
    cut = {"index": 0, **CALL, "function": {"name": "add", "arguments": '{"a'}}
    response = events_of(streamed([{"tool_calls": [cut]}], Said({"content": "", "tool_calls": []}, "length")))[-1][
        "response"
    ]
    assert (response["output"][0]["arguments"], response["output"][0]["status"]) == ('{"a', "incomplete")
    said = Said({"content": "", "tool_calls": [CALL]}, "length")
    response = events_of(streamed([{"tool_calls": [{"index": 0, **CALL}]}], said))[-1]["response"]
    assert response["output"][0]["status"] == "completed"
    assert same(response, whole(said))


def test_an_error_in_the_middle_fails_the_response() -> None:
    surface = Responses()
    events: Any = surface.events(call_for(surface), SERVICE)
    raw = events.start([SAID]) + events.deltas(SAID, DELTAS[:1]) + events.fail(Refusal(503, "The engine has failed."))
    last = events_of(raw)[-1]
    assert last["type"] == "response.failed" and last["response"]["status"] == "failed"
    assert last["response"]["error"] == {"code": "server_error", "message": "The engine has failed."}
    kinds = [event.type for event in client_of(raw).responses.create(model="nano", input="Hi", stream=True)]
    assert kinds[-1] == "response.failed"
    assert events.ping() == KEEP_ALIVE


@pytest.mark.parametrize(("store", "kept"), [(None, 1), (True, 1), (False, 0)])
@pytest.mark.parametrize("streams", [False, True])
def test_answers_are_kept_unless_the_request_says_no(store: bool | None, kept: int, streams: bool) -> None:
    surface = Responses()
    call = call_for(surface, store=store)
    if streams:
        surface.events(call, SERVICE).finish([SAID])  # type: ignore[list-item]
    else:
        surface.whole(call, [SAID], SERVICE)  # type: ignore[list-item]
    assert len(surface.store) == kept


_TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)


@st.composite
def _answers(draw: Any) -> tuple[list[dict[str, Any]], Said]:
    """Deltas in any pieces, and the message they add up to."""
    deltas: list[dict[str, Any]] = []
    message: dict[str, Any] = {"role": "assistant"}
    for key in ("reasoning_content", "content"):
        pieces = draw(st.lists(_TEXT, max_size=4))
        deltas += [{key: piece} for piece in pieces]
        message[key] = "".join(pieces)
    calls: list[dict[str, Any]] = []
    for index, text in enumerate(draw(st.lists(_TEXT, max_size=3))):
        arguments = json.dumps({"a": text}, ensure_ascii=draw(st.booleans()))
        cut = draw(st.integers(0, len(arguments)))
        call = {"id": f"functions.f:{index}", "type": "function", "function": {"name": "f", "arguments": arguments}}
        first = {"index": index, **call, "function": {"name": "f", "arguments": arguments[:cut]}}
        rest = {"index": index, "function": {"arguments": arguments[cut:]}}
        deltas += [{"tool_calls": [first]}, {"tool_calls": [rest]}]
        calls.append(call)
    message["tool_calls"] = calls
    return deltas, Said(message, "tool_calls" if calls else "stop")


@given(_answers())
def test_the_official_client_ends_where_the_whole_answer_is(answer: tuple[list[Any], Said]) -> None:
    deltas, said = answer
    assert same(accumulated(streamed(deltas, said)), without_none(whole(said)))


@given(_answers())
def test_deltas_add_up_to_the_items(answer: tuple[list[Any], Said]) -> None:
    deltas, said = answer
    events = events_of(streamed(deltas, said))
    texts: dict[str, str] = {}
    for event in events:
        if event["type"].endswith(".delta"):
            texts[event["item_id"]] = texts.get(event["item_id"], "") + event["delta"]
    for item in events[-1]["response"]["output"]:
        text = item["arguments"] if item["type"] == "function_call" else item["content"][0]["text"]
        assert texts.get(item["id"], "") == text
