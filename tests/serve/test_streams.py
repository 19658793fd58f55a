"""Streams when something goes wrong with the connection: readers that leave, stall, or come back."""

import itertools
import json
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import httpx2 as httpx
import pytest

from karakoram.engine.request import Request
from karakoram.serve.service import Limits
from tests.serve.conftest import MODEL, WAIT_S, Gate, Running, Words, running, until

pytestmark = pytest.mark.timeout(120)


def request_bytes(**fields: Any) -> bytes:
    """A streaming request as it goes over the wire."""
    body = {"model": MODEL, "messages": [{"role": "user", "content": "ENDLESS"}], "stream": True, **fields}
    raw = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(raw)}\r\n\r\n"
    return head.encode() + raw


def connected(server: Running) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), WAIT_S)


def read_until(connection: socket.socket, mark: bytes) -> bytes:
    got = b""
    while mark not in got:
        piece = connection.recv(65536)
        assert piece, got
        got += piece
    return got


class Slow:
    """A model that goes on for ever, a token whenever it is asked for one; never in a hurry."""

    def __init__(self, words: Words) -> None:
        self.token = words.ids(" on")[0]
        self.steps = threading.Semaphore(0)
        self.free = False

    def script(self, _: Request) -> Iterator[int]:
        while True:
            if not self.free:
                self.steps.acquire(timeout=0.01)
            yield self.token


@pytest.mark.parametrize("stream", [True, False])
def test_readers_that_leave_200_times(serve: Callable[..., Running], words: Words, stream: bool) -> None:
    slow = Slow(words)
    server = serve(slow.script)
    times = 200 if stream else 20
    for number in range(times):
        with connected(server) as connection:
            connection.sendall(request_bytes(stream=stream))
            if stream:
                read_until(connection, b"reasoning")
            else:
                assert until(lambda seen=number: len(server.engine.requests) > seen)
        if number % 50 == 49:
            assert server.idle()
    assert server.idle()
    assert len(server.engine.requests) == times
    floor: Any = server.server._app.state.floor
    assert until(lambda: not floor.desk._runs and not floor.desk._exchanges and not floor.pulse._lines)
    assert server.service.metrics.finished["abort"] == times


def test_a_reader_that_leaves_while_others_read(serve: Callable[..., Running], words: Words) -> None:
    slow = Slow(words)
    server = serve(slow.script)
    with connected(server) as staying:
        staying.sendall(request_bytes(max_tokens=200))
        read_until(staying, b"reasoning")
        with connected(server) as leaving:
            leaving.sendall(request_bytes())
            read_until(leaving, b"reasoning")
        assert until(lambda: server.engine.live == 1)
        slow.free = True
        whole = read_until(staying, b"data: [DONE]")
    assert b'"finish_reason":"length"' in whole


def test_a_reader_that_leaves_before_the_body_is_complete(serve: Callable[..., Running], words: Words) -> None:
    server = serve(words.script)
    with connected(server) as connection:
        connection.sendall(request_bytes()[:-10])
    server.still_answers()
    assert server.idle()


def steady(words: Words) -> Callable[[Request], Iterator[int]]:
    """A model that goes on for ever, faster than one reads but not faster than the server writes."""

    def script(_: Request) -> Iterator[int]:
        pause = threading.Event()
        for number in itertools.count():
            if number % 20 == 0:
                pause.wait(0.001)
            yield words.ids(" on")[0]

    return script


def stalled_on(server: Running) -> socket.socket:
    """A connection that asks for much (log-probabilities of every token) and has room for little."""
    connection = socket.socket()
    connection.settimeout(WAIT_S)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    host, port = server.url.removeprefix("http://").split(":")
    connection.connect((host, int(port)))
    connection.sendall(request_bytes(logprobs=True))
    assert until(lambda: bool(server.engine.requests))
    return connection


def test_a_reader_that_stops_reading(serve: Callable[..., Running], words: Words) -> None:
    server = serve(steady(words), limits=Limits(pending_tokens=1000), context=10**9, send_buffer=8192)
    with stalled_on(server) as connection:
        # What sockets and transports hold is soon full, then the queue: the request is cancelled, the rest goes on.
        assert server.idle()
        assert server.chat(max_tokens=5).status_code == 200
        assert b"slow_reader" in read_until(connection, b"data: [DONE]")


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="Linux's TCP_USER_TIMEOUT closes them")
def test_a_reader_that_never_reads_again_is_let_go(serve: Callable[..., Running], words: Words) -> None:
    limits = Limits(pending_tokens=1000, stalled_s=0.5)
    server = serve(steady(words), limits=limits, context=10**9, send_buffer=8192)
    floor: Any = server.server._app.state.floor
    with stalled_on(server):
        assert server.idle()
        assert until(lambda: not floor.pulse._lines)


def test_steps_in_quick_succession_are_gathered_and_none_is_left_behind(
    serve: Callable[..., Running], words: Words
) -> None:
    gate = Gate()

    def script(_: Request) -> Iterator[int]:
        for _ in range(20):
            yield from words.ids("</think>", *["a b c "] * 20)
            gate.pass_()
        yield from words.ids("<|im_end|>")

    server = serve(script)
    body = {"messages": [{"role": "user", "content": "Hi"}], "stream": True}
    said, chunks = "", 0
    with server.http.stream("POST", "/v1/chat/completions", json=body) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                chunks += 1
                said += json.loads(line[6:])["choices"][0]["delta"].get("content") or ""
            if len(said) == 120:
                gate.open()  # only now: all that was said has arrived although nothing more came
    assert said == "a b c " * 400
    assert chunks < 20 * len(words.ids("a b c ")) * 20


def test_keep_alives_while_nothing_is_said(serve: Callable[..., Running], words: Words) -> None:
    gate = Gate()

    def script(_: Request) -> Iterator[int]:
        yield words.ids("a")[0]
        gate.pass_()
        yield from words.answer("b")

    server = serve(script, limits=Limits(keep_alive_s=0.02))
    body = {"messages": [{"role": "user", "content": "Hi"}], "stream": True}
    with server.http.stream("POST", "/v1/chat/completions", json=body) as answer:
        lines = answer.iter_lines()
        for _ in range(3):
            assert next(line for line in lines if line.startswith(":")) == ": keep-alive"
        gate.open()
        assert [line for line in lines if line.startswith("data: ")][-1] == "data: [DONE]"


def test_one_more_thing_on_the_same_connection(shared: Running) -> None:
    """A stream ends cleanly: the connection takes the next request."""
    with httpx.Client(base_url=shared.url, timeout=WAIT_S, limits=httpx.Limits(max_connections=1)) as client:
        for _ in range(3):
            body = {"messages": [{"role": "user", "content": "Hi"}], "stream": True}
            answer = client.post("/v1/chat/completions", json=body)
            assert answer.headers["content-type"].startswith("text/event-stream")
            assert answer.text.endswith("data: [DONE]\n\n")


def test_many_streams_get_their_own_words(serve: Callable[..., Running], words: Words) -> None:
    def script(request: Request) -> Iterator[int]:
        said = words.fmt.tokenizer.decode(request.prompt)
        yield from words.answer(said.split("say:")[1].split("<")[0] * 20)

    server = serve(script)
    answers: dict[int, str] = {}

    def ask(number: int) -> None:
        text = ""
        with httpx.Client(base_url=server.url, timeout=WAIT_S) as client:
            body = {"messages": [{"role": "user", "content": f"say:{number} "}], "stream": True}
            with client.stream("POST", "/v1/chat/completions", json=body) as answer:
                for line in answer.iter_lines():
                    if line.startswith("data: {"):
                        text += json.loads(line[6:])["choices"][0]["delta"].get("content") or ""
        answers[number] = text

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    assert answers == {number: f"{number} " * 20 for number in range(32)}


def test_the_end_of_the_server_ends_its_streams(words: Words) -> None:
    slow = Slow(words)
    with running(words.fmt, slow.script) as server:
        connection = connected(server)
        connection.sendall(request_bytes())
        read_until(connection, b"reasoning")
        server.server.should_exit = True
        end = read_until(connection, b"data: [DONE]")
        assert b"shutting down" in end
        connection.close()
    assert server.engine.live == 0


# ---------------------------------------------------------------------------------------------------- coming back


def events_of(text: str) -> dict[int, str]:
    """Number and data of each event."""
    events: dict[int, str] = {}
    for event in text.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in event.splitlines() if line and not line.startswith(":"))
        if "id" in fields:
            events[int(fields["id"])] = fields["data"]
    return events


class Halted:
    """A model that halts in the middle until the gate is opened."""

    def __init__(self, words: Words) -> None:
        self.gate, self._words = Gate(), words

    def script(self, _: Request) -> Iterator[int]:
        yield from self._words.ids("one two", "</think>")
        self.gate.pass_()
        yield from self._words.ids("three four", "<|im_end|>")


def begin(server: Running, **headers: str) -> tuple[str, int]:
    """Begin a resumable stream, read two events and leave; its id and the last event's number."""
    body = {"messages": [{"role": "user", "content": "Hi"}], "stream": True}
    with server.http.stream(
        "POST", "/v1/chat/completions", json=body, headers={"x-resumable": "true", **headers}
    ) as answer:
        assert answer.status_code == 200
        lines = (line for line in answer.iter_lines() if line.startswith("id: "))
        numbers = [int(line[4:]) for line in itertools.islice(lines, 2)]
    assert numbers == [0, 1]
    return answer.headers["x-request-id"], 1


def test_coming_back_to_a_stream(serve: Callable[..., Running], words: Words) -> None:
    model = Halted(words)
    server = serve(model.script)
    name, last = begin(server)
    assert server.engine.live == 1  # it runs on
    model.gate.open()
    rest = server.http.get(f"/v1/streams/{name}", headers={"last-event-id": str(last)})
    assert rest.status_code == 200 and rest.headers["content-type"].startswith("text/event-stream")
    events = events_of(rest.text)
    assert min(events) == 2 and list(events.values())[-1] == "[DONE]"
    whole = events_of(server.http.get(f"/v1/streams/{name}").text)
    assert list(whole) == list(range(len(whole)))
    assert {number: whole[number] for number in events} == events
    deltas = [json.loads(data)["choices"][0]["delta"] for data in whole.values() if data != "[DONE]"]
    assert "".join(delta.get("reasoning", "") for delta in deltas) == "one two"
    assert "".join(delta.get("content", "") for delta in deltas) == "three four"


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/completions", {"prompt": "Hi", "max_tokens": 50}),
        ("/v1/messages", {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 50}),
        ("/v1/responses", {"input": "Hi"}),
    ],
)
def test_every_surface_can_be_come_back_to(
    serve: Callable[..., Running], words: Words, path: str, fields: dict[str, Any]
) -> None:
    server = serve(words.script)
    body = {"model": MODEL, "stream": True, **fields}
    answer = server.http.post(path, json=body, headers={"x-resumable": "true"})
    assert answer.status_code == 200, answer.text
    events = events_of(answer.text)
    assert list(events) == list(range(len(events))) and len(events) >= 2
    name = answer.headers["x-request-id"]
    rest = server.http.get(f"/v1/streams/{name}", headers={"last-event-id": "0"})
    assert events_of(rest.text) == {number: data for number, data in events.items() if number}


def test_a_second_reader_follows_live(serve: Callable[..., Running], words: Words) -> None:
    model = Halted(words)
    server = serve(model.script)
    name, _ = begin(server)
    with server.http.stream("GET", f"/v1/streams/{name}") as answer:
        lines = answer.iter_lines()
        assert next(line for line in lines if line.startswith("id: ")) == "id: 0"
        model.gate.open()
        assert [line for line in lines if line.startswith("data: ")][-1] == "data: [DONE]"


def test_only_the_same_key_comes_back(serve: Callable[..., Running], words: Words) -> None:
    model = Halted(words)
    server = serve(model.script, keys=("one", "two"))
    name, _ = begin(server, authorization="Bearer one")
    model.gate.open()
    other = server.http.get(f"/v1/streams/{name}", headers={"authorization": "Bearer two"})
    assert other.status_code == 404 and other.json()["error"]["code"] == "stream_not_found"
    assert server.http.get(f"/v1/streams/{name}").status_code == 401
    same = server.http.get(f"/v1/streams/{name}", headers={"x-api-key": "one"})
    assert same.status_code == 200 and "[DONE]" in same.text


@pytest.mark.parametrize("last", ["", "x", "-1", "1.5", "9" * 30, "100000"])
def test_a_wrong_last_event_id(serve: Callable[..., Running], words: Words, last: str) -> None:
    server = serve(words.script)
    body = {"messages": [{"role": "user", "content": "Hi"}], "stream": True}
    answer = server.http.post("/v1/chat/completions", json=body, headers={"x-resumable": "true"})
    name = answer.headers["x-request-id"]
    wrong = server.http.get(f"/v1/streams/{name}", headers={"last-event-id": last})
    assert wrong.status_code == 400 and wrong.json()["error"]["param"] == "Last-Event-ID"
    assert server.http.get("/v1/streams/nothing").status_code == 404


def test_events_that_have_been_dropped(serve: Callable[..., Running], words: Words) -> None:
    server = serve(words.script, limits=Limits(replay_bytes=300))
    body = {"messages": [{"role": "user", "content": "ENDLESS"}], "stream": True, "max_tokens": 400}
    answer = server.http.post("/v1/chat/completions", json=body, headers={"x-resumable": "true"})
    name = answer.headers["x-request-id"]
    floor: Any = server.server._app.state.floor
    recording = floor.shelf._recordings[name]
    assert until(lambda: recording.done)
    again = server.http.get(f"/v1/streams/{name}")
    assert again.status_code == 410 and again.json()["error"]["code"] == "events_dropped"
    recent = server.http.get(f"/v1/streams/{name}", headers={"last-event-id": str(recording.end - 2)})
    assert list(events_of(recent.text).values()) == ["[DONE]"]


def test_a_forsaken_stream_is_cancelled_and_forgotten(serve: Callable[..., Running], words: Words) -> None:
    slow = Slow(words)
    server = serve(slow.script, limits=Limits(resume_s=0.05))
    name, _ = begin(server)
    assert server.idle()
    assert until(lambda: server.http.get(f"/v1/streams/{name}").status_code == 404)


def test_a_shelf_has_an_end(serve: Callable[..., Running], words: Words) -> None:
    model = Halted(words)
    server = serve(model.script, limits=Limits(recordings=2))
    first, _ = begin(server)
    second, _ = begin(server)
    body = {"messages": [{"role": "user", "content": "Hi"}], "stream": True}
    third = server.http.post("/v1/chat/completions", json=body, headers={"x-resumable": "true"})
    assert third.status_code == 429 and third.headers["retry-after"]
    model.gate.open()
    assert server.idle()
    for name in (first, second):  # read to the end
        assert "[DONE]" in server.http.get(f"/v1/streams/{name}").text
    assert begin(server)[0]  # takes the place of a finished one
