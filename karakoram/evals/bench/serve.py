"""What serving costs: `k2 serve` in a process of its own, load from this one, beside the engine called directly.

    engine            one stream through `Engine.stream`, no words, no HTTP
    engine, deterministic   the same with `deterministic=True`: the price of bit-equal answers
    server            one stream of /v1/chat/completions over SSE
    server, N streams all at once, each with a prompt of its own

One stream is measured several times, engine and server in turn, and the medians are compared; greedy, nothing guessed,
and a bias against the ends of a turn makes all streams equally long. Times are taken where the bytes arrive.
An event may carry several tokens when the reader was slow: inter-token times are those between events.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from karakoram.chat.format import load_chat_format
from karakoram.engine.engine import Engine
from karakoram.engine.request import Request, Sampling
from karakoram.env import bundled_model_dir
from karakoram.errors import KarakoramError
from karakoram.evals.bench.report import Say, bracketed, silent
from karakoram.model.load import load_model

ROUNDS = 5
START_S = 120.0
BARS = {"ttft_ms": 10.0, "of_engine": 0.95, "of_one": 6.0, "p99_of_median": 3.0}


@dataclass
class Stream:
    """One answer as it arrived: when it was asked for, and when each event with new tokens came (seconds)."""

    asked: float
    tokens: int = 0
    times: list[float] = field(default_factory=list)

    @property
    def ttft_ms(self) -> float:
        """Until the first event."""
        return 1e3 * (self.times[0] - self.asked)

    @property
    def tokens_per_s(self) -> float:
        """After the first event."""
        return (self.tokens - 1) / (self.times[-1] - self.times[0])

    @property
    def gaps_ms(self) -> list[float]:
        """Between one event and the next."""
        return [1e3 * (b - a) for a, b in zip(self.times, self.times[1:])]


@dataclass(frozen=True)
class Served:
    """One row. Ratios are against the row they are named for; None where they say nothing."""

    what: str
    streams: int
    tokens_per_s: float
    ttft_ms: float
    ms_median: float
    p99_ms: float
    of_engine: float | None = None
    of_one: float | None = None

    problem = None

    def to_dict(self, read_gb_per_s: float) -> dict[str, Any]:
        """JSON-ready; the read bandwidth plays no part here."""
        del read_gb_per_s
        row = {
            "what": self.what,
            "streams": self.streams,
            "tokens_per_s": self.tokens_per_s,
            "ttft_ms": self.ttft_ms,
            "ms_median": self.ms_median,
            "p99_ms": self.p99_ms,
            "p99_of_median": self.p99_ms / self.ms_median,
        }
        ratios = {"of_engine": self.of_engine, "of_one": self.of_one}
        return row | {name: value for name, value in ratios.items() if value is not None}


def serve_bench(
    model_dir: str | None, streams: int, generate: int, threads: int, isa: str | None = None, say: Say = silent
) -> dict[str, Any]:
    """The report; rows as above. KarakoramError if the server does not start or answers with an error."""
    place = str(bundled_model_dir()) if model_dir is None else model_dir

    def rows(name: str, notes: list[str]) -> list[Served]:
        model, fmt = load_model(place), load_chat_format(place)
        ids, endless = fmt.encode(_messages(0)), dict.fromkeys(fmt.stop_ids, -100.0)
        with server(place, threads, name) as port:
            one, direct = list[Stream](), list[Stream]()
            with Engine(model, speculate=False) as engine:
                for number in range(ROUNDS + 1):  # the first round warms up
                    say(f"one stream, round {number} of {ROUNDS}")
                    direct.append(_direct(engine, ids, number, generate, endless))
                    one += asyncio.run(_load(port, 1, generate, endless, number))
            say("one stream, deterministic")
            with Engine(model, speculate=False, deterministic=True) as engine:
                fixed = [_direct(engine, ids, number, generate, endless) for number in range(ROUNDS + 1)]
            say(f"{streams} streams")
            asyncio.run(_load(port, streams, generate, endless, 100))
            many = asyncio.run(_load(port, streams, generate, endless, 200))
        notes.append(f"{generate} tokens a stream; medians of {ROUNDS} rounds for one stream.")
        return _rows(direct[1:], fixed[1:], one[1:], many)

    return bracketed(isa, threads, rows, say) | {"model": place, "bars": BARS}


def _rows(direct: list[Stream], fixed: list[Stream], one: list[Stream], many: list[Stream]) -> list[Served]:
    engine, exact, server = _one("engine", direct), _one("engine, deterministic", fixed), _one("server", one)
    began, ended = min(s.times[0] for s in many), max(s.times[-1] for s in many)
    gaps = sorted(gap for s in many for gap in s.gaps_ms)
    together = sum(s.tokens for s in many) / (ended - began)
    return [
        engine,
        _against(exact, of_engine=exact.tokens_per_s / engine.tokens_per_s),
        _against(server, of_engine=server.tokens_per_s / engine.tokens_per_s),
        Served(
            "server", len(many), together, statistics.median(s.ttft_ms for s in many), statistics.median(gaps),
            _p99(gaps), of_one=together / server.tokens_per_s,
        ),
    ]  # fmt: skip


def _one(what: str, rounds: list[Stream]) -> Served:
    gaps = sorted(gap for s in rounds for gap in s.gaps_ms)
    rate, ttft = (statistics.median(values) for values in zip(*((s.tokens_per_s, s.ttft_ms) for s in rounds)))
    return Served(what, 1, rate, ttft, statistics.median(gaps), _p99(gaps))


def _against(row: Served, of_engine: float) -> Served:
    return Served(row.what, row.streams, row.tokens_per_s, row.ttft_ms, row.ms_median, row.p99_ms, of_engine)


def _p99(ordered: list[float]) -> float:
    return ordered[min(len(ordered) - 1, math.ceil(0.99 * len(ordered)) - 1)]


def _messages(number: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"What is {number} times {number + 17}, and why?"}]


def _direct(engine: Engine, ids: list[int], number: int, generate: int, endless: dict[int, float]) -> Stream:
    """One stream of the engine; a token in the middle of the prompt differs, so nothing much is remembered."""
    prompt = list(ids)
    prompt[len(prompt) // 3] = 100 + number
    stream = Stream(time.perf_counter())
    sampling = Sampling(temperature=0, logit_bias=endless)
    for news in engine.stream(Request(f"direct-{number}", prompt, generate, sampling)):
        stream.times.append(time.perf_counter())
        stream.tokens += len(news.tokens)
    return stream


@contextlib.contextmanager
def server(model_dir: str, threads: int, isa: str) -> Iterator[int]:
    """`k2 serve` in a process of its own, ready; gives its port and ends it afterwards."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "KARAKORAM_ISA": isa}
    door = "from karakoram.cli.main import run; run()"
    command = [sys.executable, "-c", door, "serve", model_dir, "--port", str(port), "--no-speculate"]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        _wait_until_ready(process, port)
        yield port
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()


def _wait_until_ready(process: subprocess.Popen[bytes], port: int) -> None:
    until = time.monotonic() + START_S
    while time.monotonic() < until:
        if process.poll() is not None:
            said = (process.stderr.read() if process.stderr else b"").decode(errors="replace").strip()
            raise KarakoramError(f"The server has ended with {process.returncode}: {said[-500:]}", "Try `k2 serve`.")
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1) as connection:
            connection.sendall(b"GET /health HTTP/1.0\r\n\r\n")
            if b" 200 " in connection.recv(64):
                return
        time.sleep(0.05)
    raise KarakoramError(f"The server was not ready after {START_S:.0f} s.", "Try `k2 serve` by itself.")


async def _load(port: int, streams: int, generate: int, endless: dict[int, float], seed: int) -> list[Stream]:
    """So many streams at once, from the moment when all are connected."""
    connections = [await asyncio.open_connection("127.0.0.1", port) for _ in range(streams)]
    return list(
        await asyncio.gather(
            *(_ask(*connection, generate, endless, seed + number) for number, connection in enumerate(connections))
        )
    )


async def _ask(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, generate: int, endless: dict[int, float], number: int
) -> Stream:
    body = {
        "messages": _messages(number), "stream": True, "max_tokens": generate, "temperature": 0,
        "logit_bias": endless, "stream_options": {"include_usage": True},
    }  # fmt: skip
    data = json.dumps(body).encode()
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: k2\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(data)}\r\n\r\n"
    )
    stream = Stream(time.perf_counter())
    writer.write(head.encode() + data)
    status = await reader.readline()
    if b" 200 " not in status:
        raise KarakoramError(f"The server answered {status.decode(errors='replace').strip()}.", "")
    while line := await reader.readline():
        if line.startswith(b"data: [DONE]"):
            break
        if line.startswith(b"data: "):
            if b'"content":"' in line or b'"reasoning_content":"' in line:
                stream.times.append(time.perf_counter())
            elif b'"usage":' in line and (usage := json.loads(line[6:]).get("usage")):
                stream.tokens = usage["completion_tokens"]
    writer.close()
    return stream
