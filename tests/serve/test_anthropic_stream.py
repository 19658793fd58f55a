"""Anthropic's events: their order, and that the official client's accumulator ends where the whole answer is."""

import json
from dataclasses import dataclass, field
from typing import Any

import anthropic
import httpx2
from hypothesis import given
from hypothesis import strategies as st

from karakoram.serve.anthropic import Messages
from karakoram.serve.anthropic.answers import MessageEvents, Signer, blocks_of, usage_of
from karakoram.serve.refusal import Refusal
from karakoram.serve.surface import KEEP_ALIVE, Call
from karakoram.session.chat import ChatRequest, Usage

SURFACE = Messages(Signer(b"secret"))
CALL = {"id": "functions.add:0", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}

EMPTY = {"id": "functions.add:1", "type": "function", "function": {"name": "add", "arguments": "{}"}}


@dataclass
class Said:
    """An answer as surfaces see it."""

    message: dict[str, Any]
    finish_reason: str = "stop"
    stop_string: str | None = None
    usage: Usage = field(default_factory=lambda: Usage(10, 4, 7, 3))


def events_of(raw: bytes) -> list[tuple[str, dict[str, Any]]]:
    """Names and data of SSE events."""
    events: list[tuple[str, dict[str, Any]]] = []
    for block in raw.decode().split("\n\n")[:-1]:
        name, data = block.split("\n")
        events.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
        assert events[-1][0] == events[-1][1]["type"]
    return events


def call_for(shows_thinking: bool = True) -> Call:
    extra = type("Extra", (), {"shows_thinking": shows_thinking})()
    return Call(ChatRequest([]), "nano", True, extra, "msg_1", 0)


def streamed(deltas: list[dict[str, Any]], said: Said, shows_thinking: bool = True) -> bytes:
    """The bytes of a stream that brings one delta at a time."""
    events = SURFACE.events(call_for(shows_thinking), None)  # type: ignore[arg-type]
    raw = events.start([said])  # type: ignore[list-item]
    for delta in deltas:
        raw += events.deltas(said, [delta])  # type: ignore[arg-type]
    return raw + events.finish([said])  # type: ignore[list-item]


def whole(said: Said, shows_thinking: bool = True) -> dict[str, Any]:
    return SURFACE.whole(call_for(shows_thinking), [said], None)  # type: ignore[list-item, arg-type]


def accumulated(raw: bytes) -> dict[str, Any]:
    """What the official client makes of a stream."""
    headers = {"content-type": "text/event-stream"}
    transport = httpx2.MockTransport(lambda request: httpx2.Response(200, headers=headers, content=raw))
    http = httpx2.Client(transport=transport)
    client = anthropic.Anthropic(api_key="k", base_url="http://x", http_client=http, _strict_response_validation=True)
    with client.messages.stream(model="nano", max_tokens=9, messages=[{"role": "user", "content": "Hi"}]) as stream:
        return stream.get_final_message().model_dump(exclude_none=True)


def _without_none(value: Any) -> Any:
    return {key: item for key, item in value.items() if item is not None} if isinstance(value, dict) else value


def test_the_order_of_events() -> None:
    deltas = [
        {"reasoning_content": "hm"}, {"reasoning_content": "m"}, {"content": "A"}, {"content": "b"},
        {"tool_calls": [{"index": 0, **CALL, "function": {"name": "add", "arguments": ""}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": '{"a":'}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": "1}"}}]},
        {"tool_calls": [{"index": 1, **EMPTY}]},
    ]  # fmt: skip
    said = Said({"reasoning_content": "hmm", "content": "Ab", "tool_calls": [CALL, EMPTY]}, "tool_calls")
    events = events_of(streamed(deltas, said))
    assert [name for name, _ in events] == [
        "message_start",
        *["content_block_start", *["content_block_delta"] * 3, "content_block_stop"],  # with the signature
        *["content_block_start", *["content_block_delta"] * 2, "content_block_stop"],
        *["content_block_start", *["content_block_delta"] * 2, "content_block_stop"],
        *["content_block_start", "content_block_delta", "content_block_stop"],
        "message_delta",
        "message_stop",
    ]
    assert events[4][1]["delta"] == {"type": "signature_delta", "signature": SURFACE.signer.sign("hmm")}
    assert [data["index"] for name, data in events if name == "content_block_start"] == [0, 1, 2, 3]
    assert events[0][1]["message"]["usage"]["input_tokens"] == 6
    assert events[-2][1] == {
        "type": "message_delta",
        "delta": {"stop_reason": "tool_use", "stop_sequence": None},
        "usage": usage_of(said.usage),
    }


def test_each_segment_of_thinking_has_a_block_and_a_signature() -> None:
    deltas = [{"reasoning_content": "a"}, {"content": "b"}, {"reasoning_content": "c"}, {"content": "d"}]
    events = events_of(streamed(deltas, Said({"reasoning_content": "ac", "content": "bd"})))
    kinds = [data["content_block"]["type"] for name, data in events if name == "content_block_start"]
    assert kinds == ["thinking", "text", "thinking", "text"]
    signatures = [
        data["delta"]["signature"] for _, data in events if data.get("delta", {}).get("type") == "signature_delta"
    ]
    assert signatures == [SURFACE.signer.sign("a"), SURFACE.signer.sign("c")]


def test_several_deltas_at_once_are_the_same_as_one_by_one() -> None:
    deltas = [{"reasoning_content": "a"}, {"content": "b"}, {"content": "c"}]
    said = Said({"reasoning_content": "a", "content": "bc"})
    events = MessageEvents("msg_1", "nano", SURFACE.signer)
    raw = events.start([said]) + events.deltas(said, deltas) + events.finish([said])  # type: ignore[list-item, arg-type]
    assert raw == streamed(deltas, said)


def test_thinking_can_be_left_out() -> None:
    said = Said({"reasoning_content": "secret", "content": "b"})
    raw = streamed([{"reasoning_content": "secret"}, {"content": "b"}], said, shows_thinking=False)
    assert b"secret" not in raw
    message = accumulated(raw)
    block = {"type": "thinking", "thinking": "", "signature": SURFACE.signer.sign("secret")}
    assert message["content"][0] == whole(said, False)["content"][0] == block


def test_stop_reasons() -> None:
    for finish, stop, expected in [
        ("stop", None, "end_turn"), ("tool_calls", None, "tool_use"), ("length", None, "max_tokens"),
        ("stop", "END", "stop_sequence"),
    ]:  # fmt: skip
        body = whole(Said({"content": "x"}, finish, stop))
        assert (body["stop_reason"], body["stop_sequence"]) == (expected, stop)


def test_nothing_said_is_no_block() -> None:
    said = Said({"content": "", "tool_calls": []})
    assert whole(said)["content"] == accumulated(streamed([], said))["content"] == []


def test_an_error_in_the_middle_ends_the_stream() -> None:
    events = MessageEvents("msg_1", "nano", SURFACE.signer)
    name, data = events_of(events.fail(Refusal(503, "The engine has failed.")))[0]
    assert name == "error"
    assert data["error"] == {"type": "overloaded_error", "message": "The engine has failed."}
    assert data["request_id"] == "msg_1"


def test_no_event_stands_before_the_message() -> None:
    events = MessageEvents("msg_1", "nano", SURFACE.signer)
    assert events.ping() == KEEP_ALIVE  # a comment: the request may wait in the queue for long
    assert events_of(events.start([Said({})]))[0][0] == "message_start"  # type: ignore[list-item]
    assert events_of(events.ping()) == [("ping", {"type": "ping"})]


def test_arguments_that_are_no_object_do_no_harm() -> None:
    for arguments, expected in [("[1]", {}), ("{", {}), ('{"a": 1, "b"', {"a": 1}), ("nonsense", {}), ("", {})]:
        call = {**CALL, "function": {"name": "add", "arguments": arguments}}
        assert blocks_of({"tool_calls": [call]}, SURFACE.signer)[0]["input"] == expected


def test_the_signature_recognises_our_text_only() -> None:
    signer = Signer()
    signature = signer.sign("reasons")
    assert signer.recognises("reasons", signature)
    assert not signer.recognises("other", signature)
    assert not signer.recognises("reasons", None)
    assert not Signer().recognises("reasons", signature)


_TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
_OBJECT = st.dictionaries(_TEXT, st.one_of(st.integers(-9, 9), _TEXT, st.booleans()), max_size=3)


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
    for index, value in enumerate(draw(st.lists(_OBJECT, max_size=3))):
        arguments = json.dumps(value, ensure_ascii=draw(st.booleans()))
        cut = draw(st.integers(0, len(arguments)))
        call = {"id": f"functions.f:{index}", "type": "function", "function": {"name": "f", "arguments": arguments}}
        first = {"index": index, **call, "function": {"name": "f", "arguments": arguments[:cut]}}
        deltas += [
            {"tool_calls": [first]},
            {"tool_calls": [{"index": index, "function": {"arguments": arguments[cut:]}}]},
        ]
        calls.append(call)
    message["tool_calls"] = calls
    return deltas, Said(message, "tool_calls" if calls else "stop")


@given(_answers(), st.booleans())
def test_the_official_client_ends_where_the_whole_answer_is(answer: tuple[list[Any], Said], shows: bool) -> None:
    deltas, said = answer
    body = whole(said, shows)
    assert accumulated(streamed(deltas, said, shows)) == _without_none(body)
