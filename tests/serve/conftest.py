"""A real server on a free port, over a scripted engine that speaks nano's chat format."""

import itertools
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx2 as httpx
import pytest

from karakoram.chat import ChatFormat, load_chat_format
from karakoram.engine.request import Request
from karakoram.engine.scripted import ScriptedEngine
from karakoram.env import bundled_model_dir
from karakoram.serve.app import create_app
from karakoram.serve.listen import Server, bind, url_of
from karakoram.serve.service import Limits, Opened, Service
from karakoram.session.chat import ChatSession

WAIT_S = 30.0  # for what must happen at once; only a broken server takes it
MODEL = "nano"
Piece = str | int


@pytest.fixture(scope="session")
def fmt() -> ChatFormat:
    """nano's chat format: thinking, tools, 4,096 tokens."""
    return load_chat_format(bundled_model_dir())


class Words:
    """Writes scripts: text and markers to token ids."""

    def __init__(self, fmt: ChatFormat) -> None:
        self.fmt = fmt

    def ids(self, *pieces: Piece) -> list[int]:
        """Token ids of texts, and of markers such as `<|im_end|>`."""
        special = self.fmt.tokenizer.special_ids
        ids: list[int] = []
        for piece in pieces:
            if isinstance(piece, int):
                ids.append(piece)
            elif piece in special:
                ids.append(special[piece])
            else:
                ids.extend(self.fmt.tokenizer.encode(piece))
        return ids

    def answer(self, content: str, reasoning: str | None = None) -> list[int]:
        """A whole turn with content; the prompt has opened the reasoning."""
        return self.ids(reasoning or "", "</think>", content, "<|im_end|>")

    def calls(self, *calls: tuple[str, str], reasoning: str = "", first: int = 0) -> list[int]:
        """A whole turn with tool calls, each a name and the JSON of its arguments."""
        pieces: list[Piece] = [reasoning, "</think>", "<|tool_calls_section_begin|>"]
        for index, (name, arguments) in enumerate(calls, first):
            header = f"functions.{name}:{index}"
            pieces += ["<|tool_call_begin|>", header, "<|tool_call_argument_begin|>", arguments, "<|tool_call_end|>"]
        return self.ids(*pieces, "<|tool_calls_section_end|>", "<|im_end|>")

    def script(self, request: Request) -> Iterator[int]:
        """What the shared server's model says: a word in the conversation decides."""
        said = self.fmt.tokenizer.decode(request.prompt)
        if "ENDLESS" in said:
            yield from itertools.repeat(self.ids(" on")[0])
        turn = self.answer("Hello, world! ✓ 你好", "I think.")
        if "PARALLEL" in said:
            turn = self.calls(("weather", '{"city": "Oslo"}'), ("weather", '{"city": "Rome"}'), reasoning="Two.")
        elif "CALL" in said:
            turn = self.calls(("weather", '{"city": "Oslo"}'), reasoning="One.")
        elif "JSON" in said:
            turn = self.answer('{"name": "Ada", "age": 36}', "Data.")
        elif "BREAK" in said:
            yield from self.ids("half")
            raise RuntimeError("the model is broken")
        closing = self.ids("</think>")[0]
        yield from turn[turn.index(closing) + 1 :] if request.prompt[-1] == closing else turn


@pytest.fixture(scope="session")
def words(fmt: ChatFormat) -> Words:
    return Words(fmt)


WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather in a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


@pytest.fixture(scope="module")
def shared(fmt: ChatFormat, words: Words) -> Iterator["Running"]:
    """One server for the tests of a module."""
    with running(fmt, words.script) as server:
        yield server


class Gate:
    """Holds a script until the test says go; a script that is held for too long ends."""

    def __init__(self) -> None:
        self._open = threading.Event()

    def open(self) -> None:
        self._open.set()

    def pass_(self) -> None:
        assert self._open.wait(WAIT_S), "nobody opened the gate"


class Running:
    """A server, its parts, and a plain client."""

    def __init__(self, url: str, service: Service, engine: ScriptedEngine, server: Server) -> None:
        self.url, self.service, self.engine, self.server = url, service, engine, server
        self.http = httpx.Client(base_url=url, timeout=WAIT_S)

    def chat(self, text: str = "Hi", **fields: Any) -> httpx.Response:
        """POST a conversation of one message."""
        body = {"model": MODEL, "messages": [{"role": "user", "content": text}], **fields}
        return self.http.post("/v1/chat/completions", json=body)

    def idle(self) -> bool:
        """Whether the engine becomes idle: every request has ended."""
        return until(lambda: self.engine.live == 0)

    def still_answers(self) -> None:
        """Other requests are undisturbed: an ordinary one is answered."""
        answer = self.chat("ping")
        assert answer.status_code == 200, answer.text
        assert answer.json()["choices"][0]["message"]["content"]


def until(true: Callable[[], bool]) -> bool:
    """Whether this becomes true. Asks again whenever other threads have had a turn."""
    wake = threading.Event()
    for _ in range(int(WAIT_S / 0.005)):
        if true():
            return True
        wake.wait(0.005)
    return False


Script = Callable[[Request], Iterable[int]]


@contextmanager
def running(
    fmt: ChatFormat,
    script: Script,
    keys: tuple[str, ...] = (),
    limits: Limits | None = None,
    loaded: bool = True,
    context: int = 4096,
    most: int = 1024,
    send_buffer: int | None = None,
) -> Iterator[Running]:
    """A server over a scripted engine, for as long as the block lasts."""
    engine = ScriptedEngine(script, fmt.tokenizer.n_vocab, context, most)
    service = Service((MODEL, "alias/of-nano"), keys, limits, version="1.2.3")
    opened = Opened(engine, ChatSession(engine, fmt), fmt)
    if loaded:
        service.ready(opened)
    with hosted(service, send_buffer) as (url, server):
        server_running = Running(url, service, engine, server)
        server_running.ready = lambda: service.ready(opened)  # type: ignore[attr-defined]
        try:
            yield server_running
        finally:
            server_running.http.close()
    engine.close()


@contextmanager
def hosted(service: Service, send_buffer: int | None = None) -> Iterator[tuple[str, Server]]:
    """A service on a free port, and its address, for as long as the block lasts."""
    bound = bind("127.0.0.1", 0, service.limits.stalled_s)
    if send_buffer is not None:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)  # connections inherit it
    server = Server(create_app(service))
    thread = threading.Thread(target=server.run, args=([bound],), daemon=True)
    thread.start()
    try:
        assert until(lambda: server.started)
        yield url_of(bound), server
    finally:
        server.should_exit = True
        thread.join(WAIT_S)
        assert not thread.is_alive(), "the server did not end"


@pytest.fixture
def serve(fmt: ChatFormat) -> Iterator[Callable[..., Running]]:
    """Starts servers that end with the test: `serve(script, keys=…, limits=…)`."""
    opened: list[Any] = []

    def start(script: Script, **options: Any) -> Running:
        context = running(fmt, script, **options)
        opened.append(context)
        return context.__enter__()

    yield start
    for context in reversed(opened):
        context.__exit__(None, None, None)


def closed_port() -> int:
    """A port on which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
