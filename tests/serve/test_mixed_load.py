"""All kinds of requests at once, for long: every one is answered as it should be, and memory stays flat."""

import gc
import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

from karakoram.serve.service import Limits
from tests.serve.conftest import MODEL, WAIT_S, WEATHER, Running, Words, until

READERS = 8
MOST_GROWTH_BYTES = 12_000_000


def resident_bytes() -> int:
    gc.collect()
    fields = Path("/proc/self/statm").read_text().split()
    return int(fields[1]) * 4096


def ask(text: str, **fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": [{"role": "user", "content": text}], **fields}


def whole(client: httpx.Client, _: random.Random) -> None:
    answer = client.post("/v1/chat/completions", json=ask("Hi"))
    assert answer.json()["choices"][0]["message"]["content"] == "Hello, world! ✓ 你好"


def streamed(client: httpx.Client, draw: random.Random) -> None:
    body = ask(draw.choice(["Hi", "CALL", "PARALLEL"]), stream=True, n=draw.randint(1, 3), tools=[WEATHER])
    assert client.post("/v1/chat/completions", json=body).text.endswith("data: [DONE]\n\n")


def abandoned(client: httpx.Client, draw: random.Random) -> None:
    path, body = draw.choice(
        [
            ("/v1/chat/completions", ask("ENDLESS", stream=True)),
            ("/v1/messages", ask("ENDLESS", stream=True, max_tokens=3000)),
            ("/v1/responses", {"model": MODEL, "input": "ENDLESS", "stream": True}),
        ]
    )
    with client.stream("POST", path, json=body) as answer:
        next(answer.iter_raw())


def wrong(client: httpx.Client, draw: random.Random) -> None:
    body = draw.choice([ask("Hi", temperature="x"), {"messages": []}, ask("Hi", n=0), ask("word " * 5000)])
    assert client.post("/v1/chat/completions", json=body).status_code in (400, 413)


def broken(client: httpx.Client, _: random.Random) -> None:
    assert client.post("/v1/chat/completions", json=ask("BREAK")).status_code == 503


def resumed(client: httpx.Client, _: random.Random) -> None:
    answer = client.post("/v1/chat/completions", json=ask("Hi", stream=True), headers={"x-resumable": "true"})
    if answer.status_code == 429:
        return
    again = client.get(f"/v1/streams/{answer.headers['x-request-id']}")
    assert again.status_code == 404 or again.text == answer.text


def other_surfaces(client: httpx.Client, _: random.Random) -> None:
    assert client.post("/v1/messages", json=ask("Hi", max_tokens=50)).json()["type"] == "message"
    assert client.post("/v1/responses", json={"model": MODEL, "input": "Hi", "store": False}).status_code == 200
    assert client.get("/metrics").status_code == 200


KINDS: list[Callable[[httpx.Client, random.Random], None]] = [
    whole, streamed, streamed, abandoned, wrong, broken, resumed, other_surfaces,
]  # fmt: skip


def load(server: Running, times: int, seed: int) -> None:
    """So many requests from each of some readers."""
    failures: list[BaseException] = []

    def read(number: int) -> None:
        draw = random.Random(seed * 100 + number)
        with httpx.Client(base_url=server.url, timeout=WAIT_S) as client:
            for _ in range(times):
                try:
                    draw.choice(KINDS)(client, draw)
                except BaseException as error:  # noqa: BLE001  told to the test below
                    failures.append(error)
                    return

    threads = [threading.Thread(target=read, args=(number,)) for number in range(READERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures[0]
    assert server.idle()
    server.engine.requests.clear()


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
def test_mixed_load(serve: Callable[..., Running], words: Words) -> None:
    server = serve(words.script, limits=Limits(resume_s=0.5))
    load(server, 100, seed=0)  # stores and allocators fill up
    before = resident_bytes()
    for seed in range(1, 6):
        load(server, 100, seed)
    floor: Any = server.server._app.state.floor
    assert until(lambda: not (floor.desk._runs or floor.desk._exchanges or floor.pulse._lines))
    assert until(lambda: not floor.shelf._recordings and not floor.shelf._tasks)
    assert resident_bytes() - before < MOST_GROWTH_BYTES
    server.still_answers()
