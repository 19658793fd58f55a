"""`k2 chat --url` against real servers: nano behind uvicorn, scripted ones, and ones that go away in mid-stream."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

from karakoram.chat import ChatFormat, load_chat_format
from karakoram.cli import main
from karakoram.cli.terminal.remote import RemoteSession
from karakoram.engine.engine import Engine
from karakoram.env import bundled_model_dir
from karakoram.errors import InputError, KarakoramError
from karakoram.kernels import ops
from karakoram.model.load import load_model
from karakoram.serve.service import Opened, Service
from karakoram.session.chat import ChatSession
from tests.serve.conftest import WAIT_S, Gate, Running, Words, closed_port, hosted, running

pytestmark = pytest.mark.timeout(120)

KEY = "sesame-street"


@pytest.fixture(scope="module")
def fmt() -> ChatFormat:
    return load_chat_format(bundled_model_dir())


@pytest.fixture(scope="module")
def nano(fmt: ChatFormat) -> Iterator[str]:
    """The address of the bundled model, served to those who have the key."""
    if ops.chosen() is None:
        pytest.skip("the CPU kernels are not there (no compiler): nano takes seconds for an answer")
    with Engine(load_model(), most_running=2) as engine:
        service = Service(["nano"], [KEY])
        service.ready(Opened(engine, ChatSession(engine, fmt), fmt))
        with hosted(service) as (url, _):
            yield url


@pytest.fixture
def scripted(fmt: ChatFormat) -> Iterator[Running]:
    """A server whose model says what a word in the conversation asks for."""
    with running(fmt, Words(fmt).script) as server:
        yield server


@pytest.fixture
def k2_chat(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Any, str, str]]:
    """Runs `k2 chat --url` in this process: exit code, stdout, stderr."""
    monkeypatch.setenv("K2_API_KEY", KEY)

    def run(url: str, *arguments: str) -> tuple[Any, str, str]:
        with pytest.raises(SystemExit) as left:
            main.run(["chat", "--url", url, *arguments])
        out, err = capfd.readouterr()
        assert KEY not in out + err and "Traceback" not in err
        return left.value.code, out, err

    return run


def asked_directly(url: str, text: str, thinking: bool) -> dict[str, Any]:
    """The message that the server gives to who asks without `k2 chat`, greedily."""
    body = {"messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": 400}
    body["chat_template_kwargs"] = {"thinking": thinking}
    headers = {"authorization": f"Bearer {KEY}"}
    answer = httpx.post(f"{url}/v1/chat/completions", json=body, headers=headers, timeout=WAIT_S)
    return answer.json()["choices"][0]["message"]


def test_a_plain_answer(nano: str, k2_chat: Any) -> None:
    said = "Who are you?"
    code, out, err = k2_chat(nano, "nano", said, "--no-thinking", "--temperature", "0", "--max-tokens", "400")
    message = asked_directly(nano, said, thinking=False)
    assert (code, out.strip()) == (0, message["content"].strip())
    assert out.strip() and not message["reasoning_content"] and f"nano · {nano}/v1 · temperature 0" in err
    assert re.search(r"\d+ tokens in, \d+ out", err)


def test_an_answer_with_thinking(nano: str, k2_chat: Any) -> None:
    said = "Who are you?"
    code, out, err = k2_chat(nano, said, "--temperature", "0", "--max-tokens", "400")
    message = asked_directly(nano, said, thinking=True)
    assert (code, out.strip()) == (0, message["content"].strip())
    assert message["reasoning_content"].strip() in err


def test_an_answer_with_a_tool_call(nano: str, k2_chat: Any) -> None:
    code, out, err = k2_chat(nano, "What is 17 * 23?", "--demo-tools", "--temperature", "0")
    assert code == 0 and "391" in out
    assert re.search(r"→ calculator \{.*17 ?\* ?23.*\}", err) and "= 391" in err


def test_calls_that_nobody_answers(scripted: Running, k2_chat: Any, tmp_path: Path) -> None:
    tools = tmp_path / "tools.json"
    tools.write_text(json.dumps([{"type": "function", "function": {"name": "weather", "parameters": {}}}]))
    code, out, _ = k2_chat(scripted.url, "nano", "PARALLEL", "--tools", str(tools))
    calls = json.loads(out)["tool_calls"]
    assert code == 0 and [call["function"]["arguments"] for call in calls] == ['{"city": "Oslo"}', '{"city": "Rome"}']


def test_a_refused_key(nano: str, k2_chat: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("K2_API_KEY", "another")
    code, out, err = k2_chat(nano, "nano", "Hi there")
    assert (code, out) == (2, "")
    assert "refused with 401" in err and "--api-key or K2_API_KEY" in err and "another" not in err


def test_wrong_addresses(scripted: Running, k2_chat: Any) -> None:
    code, _, err = k2_chat(f"http://127.0.0.1:{closed_port()}", "nano", "Hi there")
    assert code == 2 and "cannot be reached" in err and "`k2 serve` starts one" in err
    code, _, err = k2_chat("127.0.0.1:8000", "nano", "Hi there")
    assert code == 2 and "is no address of a server. Give one like http://127.0.0.1:8000." in err
    code, _, err = k2_chat(f"{scripted.url}/nothing", "Hi there")
    assert code == 2 and "refused with 404" in err
    code, _, err = k2_chat(scripted.url, "another-model", "Hi there")
    assert code == 2 and "another-model" in err and "'nano'" in err


@pytest.mark.parametrize(
    ("url", "key"),
    [
        ("http://[::zz", None),
        ("http://127.0.0.1:port", None),
        ("http://" + "a" * 70 + ".example", None),
        ("http://127.0.0.1\0", None),
        ("http://127.0.0.1:9", "schlüssel"),
        ("http://127.0.0.1:9", "a\nb"),
    ],
)
def test_what_is_no_address_or_no_key(url: str, key: str | None) -> None:
    with pytest.raises(InputError, match=r"no address of a server|no key has"):
        RemoteSession(url, None, key)


# ---------------------------------------------------------------------------------------------------- mid-stream


def broken_off(session: RemoteSession, text: str, meanwhile: Callable[[], None]) -> str:
    """The error of a stream whose server meets with something after the first delta."""
    stream = session.stream([{"role": "user", "content": text}], max_new_tokens=1500, temperature=100, top_p=1, seed=1)
    next(stream)
    meanwhile()
    with pytest.raises(KarakoramError) as error:
        list(stream)
    assert session.last is not None and session.last.finish_reason == "interrupted"
    assert session.last.message["role"] == "assistant" and len(session.last.message) > 1
    return str(error.value)


def test_a_server_that_is_ended_in_mid_stream(fmt: ChatFormat) -> None:
    gate, words = Gate(), Words(fmt)

    def script(_: object) -> Iterator[int]:
        yield from words.ids("half of it")
        gate.pass_()

    with running(fmt, script) as server:

        def end() -> None:
            server.server.should_exit = True

        said = broken_off(RemoteSession(server.url, "nano"), "x", end)
        gate.open()
    assert "broke off in the middle of the answer: The server is shutting down." in said and "Ask again" in said


def test_a_model_that_breaks_in_mid_stream(fmt: ChatFormat) -> None:
    gate, words = Gate(), Words(fmt)

    def script(_: object) -> Iterator[int]:
        yield from words.ids("half of it")
        gate.pass_()
        raise RuntimeError("out of memory")

    with running(fmt, script) as server:
        said = broken_off(RemoteSession(server.url, "nano"), "x", gate.open)
    assert "broke off" in said and "out of memory" in said


def raw_server(body: bytes, gate: Gate | None = None) -> tuple[str, threading.Thread]:
    """A server that answers one request with these bytes, waits at the gate, and hangs up."""
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    listening.listen()

    def serve() -> None:
        with listening, listening.accept()[0] as connection, connection.makefile("rb") as request:
            fields = dict(line.lower().split(b": ", 1) for line in iter(request.readline, b"\r\n") if b": " in line)
            request.read(int(fields[b"content-length"]))  # what is left unread would reset the connection
            head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
            connection.sendall(head + body)
            if gate is not None:
                gate.pass_()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    return f"http://127.0.0.1:{listening.getsockname()[1]}", thread


HELLO = b'data: {"choices": [{"index": 0, "delta": {"content": "Hello"}, "finish_reason": null}]}\n\n'


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"transfer-encoding: chunked\r\n\r\n%x\r\n%b\r\n" % (len(HELLO), HELLO), "incomplete chunked read"),
        (b"content-length: 1000\r\n\r\n" + HELLO, "incomplete message body|without sending complete"),
        (b"connection: close\r\n\r\n" + HELLO, "the stream has no end"),
    ],
)
def test_a_connection_that_is_cut(body: bytes, reason: str) -> None:
    gate = Gate()
    url, thread = raw_server(body, gate)
    said = broken_off(RemoteSession(url, "any"), "x", gate.open)
    assert re.search(f"broke off in the middle of the answer: .*({reason})", said)
    thread.join(WAIT_S)


def test_a_stream_that_ends_without_a_done_is_whole() -> None:
    end = b'data: {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}\n\n'
    url, _ = raw_server(b"connection: close\r\n\r\n" + HELLO + end)
    session = RemoteSession(url, "any")
    assert list(session.stream([{"role": "user", "content": "x"}])) == [{"content": "Hello"}]
    assert session.last and session.last.finish_reason == "stop"


@pytest.mark.parametrize(
    "event",
    [
        b'{"choices": 5}', b'{"choices": [1, {"delta": 7}]}', b"[]", b"7", b'{"usage": [], "choices": null}',
        b'{"choices": [{"delta": {"tool_calls": [3, {"index": "x"}, {"index": -1}, {"index": 1e9}]}}]}',
        b'{"choices": [{"delta": {"content": {"a": 1}, "reasoning": 3, "tool_calls": {}}}]}',
    ],
)  # fmt: skip
def test_odd_events_are_passed_over(event: bytes) -> None:
    url, _ = raw_server(b"connection: close\r\n\r\n" + HELLO + b"data: " + event + b"\n\ndata: [DONE]\n\n")
    assert list(RemoteSession(url, "any").stream([{"role": "user", "content": "x"}])) == [{"content": "Hello"}]


@pytest.mark.parametrize("event", [b"{", b"[" * 100_000, b"\xff"])
def test_events_that_are_no_json(event: bytes) -> None:
    url, _ = raw_server(b"connection: close\r\n\r\ndata: " + event + b"\n\n")
    with pytest.raises(KarakoramError, match=r"no JSON.* Is this a server"):
        list(RemoteSession(url, "any").stream([{"role": "user", "content": "x"}]))


@pytest.mark.slow
def test_k2_serve_killed_in_mid_stream() -> None:
    """At temperature 100 nano draws nearly evenly: of 1,500 tokens the first ones are told, then the process dies."""
    command = [sys.executable, "-c", "from karakoram.cli.main import run; run()", "serve", "--port", "0"]
    environment = {name: value for name, value in os.environ.items() if name != "K2_API_KEY"}
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        assert server.stdout and server.stderr
        ready = re.search(r"http://\S+", server.stdout.readline())
        assert ready, server.stderr.read()
        session = RemoteSession(ready[0])
        said = broken_off(session, "Tell me something.", lambda: os.kill(server.pid, signal.SIGKILL))
        assert "broke off in the middle of the answer" in said
        server.wait(WAIT_S)
        with pytest.raises(KarakoramError, match="cannot be reached"):
            list(session.stream([{"role": "user", "content": "Hi"}]))
    finally:
        with contextlib.suppress(ProcessLookupError):
            server.kill()
        server.wait(WAIT_S)
