"""Does the server stay whole under mixed load? `k2 serve` in a process of its own, clients of all kinds from this one.

Clients (threads of this process) ask one thing after another, drawn at random: short and long prompts, streams and
whole answers, four choices at once, second turns, tools (each call checked against its schema with jsonschema), JSON,
thinking, all three APIs, wrong requests; and they hang up, in mid-stream and before the answer. The cache is made small
(`--cache-tokens`), so that requests are preempted and prefixes evicted. Every minute the server's resident memory and
its gauges are written down. At the end everything must have come back: no request running or waiting, no block held.

    python benchmarks/serve_soak.py [--minutes 40] [--clients 8] [--model nano]

Progress on stderr, one line of JSON on stdout. The process ends with 1 if anything went wrong.
"""

import argparse
import contextlib
import json
import os
import platform
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import jsonschema

from karakoram.env import processor

PATIENCE_S = 600.0  # what takes longer hangs: on a crowded machine at low priority some answers took over 120
CONTEXT, CACHE_TOKENS, RUNNING = 2048, 3072, 16  # two long conversations fill it
WORDS = "river stone seven cloud market blue quickly letter Oslo train under bread 42 music because window".split()
TOOLS: dict[str, dict[str, Any]] = {
    "weather": {
        "type": "object",
        "properties": {"city": {"type": "string", "minLength": 1}, "unit": {"enum": ["C", "F"]}},
        "required": ["city", "unit"],
    },
    "book": {
        "type": "object",
        "properties": {
            "when": {"type": "string", "pattern": r"^\d{4}-\d{2}-\d{2}$"},
            "seats": {"type": "array", "items": {"type": "integer", "minimum": 1, "maximum": 90}, "maxItems": 4},
            "note": {"anyOf": [{"type": "null"}, {"type": "string", "maxLength": 40}]},
        },
        "required": ["when", "seats"],
        "additionalProperties": False,
    },
}
ANSWER = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 30}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name", "age"],
}
MARKERS = re.compile(r"<\|[a-z_]+\|>")


class Wrong(Exception):
    """An answer that is not what it should be."""


def expect(true: bool, what: object) -> None:
    """Raise `Wrong` with what was seen."""
    if not true:
        raise Wrong(str(what)[:400])


class Client(threading.Thread):
    """Asks one thing after another until a time; counts, and keeps what went wrong."""

    def __init__(self, url: str, number: int, until: float, kinds: "list[Kind]") -> None:
        super().__init__(name=f"client {number}", daemon=True)
        self.draw, self.until, self.kinds = random.Random(number), until, kinds
        self.http = httpx.Client(base_url=url, timeout=PATIENCE_S, headers={"authorization": f"Bearer client-{number}"})
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []

    def run(self) -> None:
        while time.monotonic() < self.until and len(self.wrong) < 20:
            kind = self.draw.choice(self.kinds)
            try:
                kind(self)
            except Exception as error:  # noqa: BLE001  whatever it is, the report is to show it
                self.wrong.append(f"{kind.__name__}: {type(error).__name__}: {error}")
            self.counts[kind.__name__] += 1

    def text(self, words: int) -> str:
        """Random words; the first may be a prefix that others have as well."""
        shared = " ".join(WORDS * 6) + "\n" if words > 100 and self.draw.random() < 0.6 else ""
        return shared + " ".join(self.draw.choices(WORDS, k=words))

    def body(self, words: int | None = None, **fields: Any) -> dict[str, Any]:
        """A conversation of one message, with sampling of some kind."""
        draw = self.draw
        content = self.text(draw.choice([3, 10, 40, 150]) if words is None else words)
        sampling = draw.choice([{}, {"temperature": 0}, {"temperature": 1.0}, {"top_p": 0.9}])
        message = {"role": "user", "content": content}
        return {"messages": [message], "max_tokens": draw.choice([20, 60, 200]), **sampling, **fields}

    def post(self, path: str, body: dict[str, Any], status: int = 200) -> dict[str, Any]:
        """The answer as JSON."""
        answer = self.http.post(path, json=body)
        expect(answer.status_code == status, f"{answer.status_code}: {answer.text}")
        return answer.json()

    def events(self, path: str, body: dict[str, Any]) -> Generator[Any, None, None]:
        """The data of a stream's events as they come; closing the iterator hangs up."""
        with self.http.stream("POST", path, json={**body, "stream": True}) as answer:
            expect(answer.status_code == 200, answer.status_code)
            for line in answer.iter_lines():
                if line.startswith("data: "):
                    yield None if line == "data: [DONE]" else json.loads(line[6:])

    def chat_stream(self, body: dict[str, Any]) -> list[dict[str, Any]]:
        """The choices of a whole stream, put together; it must end as streams end."""
        ended, choices = False, dict[int, dict[str, Any]]()
        for event in self.events("/v1/chat/completions", {**body, "stream_options": {"include_usage": True}}):
            expect(not ended, "an event after the end")
            if event is None:
                ended = True
                continue
            expect("error" not in event, event)
            for choice in event["choices"]:
                _add(choices.setdefault(choice["index"], {"text": "", "calls": {}, "finish": None}), choice)
            self.counts["tokens"] += (event.get("usage") or {}).get("completion_tokens", 0)
        expect(ended, "the stream was cut off")
        for choice in choices.values():
            expect(choice["finish"] in ("stop", "length", "tool_calls"), choice["finish"])
            expect(not MARKERS.search(choice["text"]), choice["text"])
        return list(choices.values())


def _add(whole: dict[str, Any], choice: dict[str, Any]) -> None:
    delta = choice["delta"]
    whole["text"] += (delta.get("content") or "") + (delta.get("reasoning_content") or "")
    whole["finish"] = choice["finish_reason"] or whole["finish"]
    for piece in delta.get("tool_calls") or ():
        call = whole["calls"].setdefault(piece["index"], {"name": "", "arguments": ""})
        call["name"] += piece["function"].get("name") or ""
        call["arguments"] += piece["function"].get("arguments") or ""


# ---------------------------------------------------------------------------------------------------- what is asked

Kind = Callable[[Client], None]


def whole(client: Client) -> None:
    answer = client.post("/v1/chat/completions", client.body(n=client.draw.choice([1, 1, 4])))
    client.counts["tokens"] += answer["usage"]["completion_tokens"]
    for choice in answer["choices"]:
        expect(choice["finish_reason"] in ("stop", "length"), choice)
        expect(not MARKERS.search(str(choice["message"])), choice)


def streamed(client: Client) -> None:
    count = client.draw.choice([1, 1, 4])
    expect(len(client.chat_stream(client.body(n=count))) == count, "a choice is missing")


def long_prompt(client: Client) -> None:
    expect(len(client.chat_stream(client.body(words=280, max_tokens=30))) == 1, "a choice is missing")


def two_turns(client: Client) -> None:
    body = client.body(words=30)
    first = client.post("/v1/chat/completions", body)["choices"][0]["message"]
    kept = {key: first[key] for key in ("role", "content", "reasoning_content") if first.get(key)}
    if "content" not in kept:
        return
    more = {"role": "user", "content": client.text(5)}
    client.chat_stream({**body, "messages": [*body["messages"], kept, more]})


def called(client: Client) -> None:
    choice = client.draw.choice(["required", {"type": "function", "function": {"name": "book"}}])
    tools = [{"type": "function", "function": {"name": name, "parameters": TOOLS[name]}} for name in TOOLS]
    body = client.body(tools=tools, tool_choice=choice, max_tokens=client.draw.choice([80, 200, 512]), temperature=1)
    if client.draw.random() < 0.5:
        calls = list(client.chat_stream(body)[0]["calls"].values())
    else:
        message = client.post("/v1/chat/completions", body)["choices"][0]["message"]
        calls = [call["function"] for call in message["tool_calls"]]
    expect(bool(calls), "a required call is missing")
    for call in calls:
        jsonschema.validate(json.loads(call["arguments"]), TOOLS[call["name"]])
    client.counts["calls"] += len(calls)


def as_json(client: Client) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": ANSWER}}
    answer = client.post("/v1/chat/completions", client.body(response_format=form, max_tokens=200))
    jsonschema.validate(json.loads(answer["choices"][0]["message"]["content"]), ANSWER)


def anthropic(client: Client) -> None:
    tools = [{"name": name, "input_schema": schema} for name, schema in TOOLS.items()]
    extra = client.draw.choice(
        [{}, {"thinking": {"type": "enabled", "budget_tokens": 1024}}, {"tools": tools, "tool_choice": {"type": "any"}}]
    )
    body = client.body(30, max_tokens=1100) if "thinking" in extra else client.body(max_tokens=200)
    body |= {"model": "nano", **extra}
    body.pop("top_p", None)
    kinds = [event["type"] for event in client.events("/v1/messages", body)]
    expect(kinds[0] == "message_start" and kinds[-1] == "message_stop", kinds[-3:])


def responses(client: Client) -> None:
    body = {"model": "nano", "input": client.text(20), "max_output_tokens": 60}
    expect(client.post("/v1/responses", body)["object"] == "response", "no response")


def text(client: Client) -> None:
    body = {"prompt": client.text(20), "max_tokens": 20, "logprobs": 2, "echo": client.draw.random() < 0.5}
    expect(len(client.post("/v1/completions", body)["choices"]) == 1, "a choice is missing")


def hangs_up(client: Client) -> None:
    path = client.draw.choice(["/v1/chat/completions", "/v1/messages", "/v1/responses"])
    body = client.body(max_tokens=600)
    if path == "/v1/responses":
        body = {"input": client.text(20), "max_output_tokens": 600}
    events = client.events(path, {**body, "model": "nano"})
    for _ in range(client.draw.randint(1, 12)):
        if next(events, None) is None:
            break
    events.close()


def gives_up(client: Client) -> None:
    with contextlib.suppress(httpx.TimeoutException):
        client.http.post("/v1/chat/completions", json=client.body(max_tokens=600), timeout=client.draw.random() / 10)


def wrong(client: Client) -> None:
    body = client.draw.choice([client.body(temperature="x"), {"messages": []}, client.body(n=0)])
    expect("error" in client.post("/v1/chat/completions", body, status=400), "no error")
    client.post("/v1/chat/completions", client.body(words=3000), status=413)


KINDS: list[Kind] = [
    whole, whole, streamed, streamed, long_prompt, two_turns, called, called, as_json, anthropic, responses, text,
    hangs_up, hangs_up, gives_up, wrong,
]  # fmt: skip

# ---------------------------------------------------------------------------------------------------- the server


@contextlib.contextmanager
def server(model: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`k2 serve` on a free port, and its address; ended with SIGINT."""
    door = "from karakoram.cli.main import run; run()"
    command = [sys.executable, "-c", door, "serve", model, "--port", "0", "--name", "nano", "--context", str(CONTEXT)]
    command += ["--cache-tokens", str(CACHE_TOKENS), "--max-concurrency", str(RUNNING)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        ready = re.search(r"http://\S+", process.stdout.readline())
        if ready is None:
            raise SystemExit("The server did not start: try `k2 serve`.")
        yield process, ready[0]
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(30)


def resident_bytes(process: subprocess.Popen[str]) -> int:
    """Of the server's process."""
    return int(Path(f"/proc/{process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def gauges(url: str) -> dict[str, float]:
    """What /metrics says, without labels but for the reasons."""
    found: dict[str, float] = {}
    for line in httpx.get(f"{url}/metrics", timeout=PATIENCE_S).text.splitlines():
        name, _, value = line.rpartition(" ")
        if not line.startswith("#") and "_bucket" not in name:
            reason = re.search(r'finished_reason="(\w+)"', name)
            short = name.partition("{")[0].removeprefix("vllm:")
            found[f"{short}:{reason[1]}" if reason else short] = float(value)
    return found


def settled(url: str) -> dict[str, float]:
    """The gauges once nothing runs any more, or after some patience."""
    until = time.monotonic() + PATIENCE_S
    seen = gauges(url)
    while time.monotonic() < until and any(seen[name] for name in HELD):
        time.sleep(0.1)
        seen = gauges(url)
    return seen


TOLD = ("request_success", "num_preemptions", "prefix_cache", "karakoram", "generation_tokens", "prompt_tokens")
HELD = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")


def soak(model: str, minutes: float, clients: int, kinds: list[Kind]) -> dict[str, Any]:
    """The report."""
    with server(model) as (process, url):
        began = time.monotonic()
        asking = [Client(url, number, began + 60 * minutes, kinds) for number in range(clients)]
        for client in asking:
            client.start()
        samples: list[list[float]] = []
        while any(client.is_alive() for client in asking) and process.poll() is None:
            at = time.monotonic() - began
            if at > 60 * minutes + PATIENCE_S:
                break
            if not samples or at - samples[-1][0] * 60 >= 60:
                samples.append([round(at / 60, 1), round(resident_bytes(process) / 1e6, 1)])
                total = sum((client.counts for client in asking), Counter[str]())
                print(f"{samples[-1][0]} min: {samples[-1][1]} MB, {dict(total)}", file=sys.stderr, flush=True)
            time.sleep(1)
        lasted_s = time.monotonic() - began
        seen = settled(url)
        samples.append([round((time.monotonic() - began) / 60, 1), round(resident_bytes(process) / 1e6, 1)])
        hanging = [client.name for client in asking if client.is_alive()]
    counts = sum((client.counts for client in asking), Counter[str]())
    kinds_asked = {kind.__name__: counts[kind.__name__] for kind in kinds}
    return {
        "minutes": round(lasted_s / 60, 1),
        "clients": clients,
        "requests": sum(kinds_asked.values()),
        "asked": kinds_asked,
        "tool_calls_valid": counts["calls"],
        "wrong": [line for client in asking for line in client.wrong],
        "hanging": hanging,
        "resident_mb_by_minute": samples,
        "left": {name: seen[name] for name in HELD},
        "metrics": {name: value for name, value in seen.items() if name.startswith(TOLD)},
    }  # fmt: skip


def main() -> None:
    """Soak and print one line of JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=40)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--model", default="nano")
    names = sorted({kind.__name__ for kind in KINDS})
    parser.add_argument("--only", choices=names, action="append", help="ask this; repeatable")
    options = parser.parse_args()
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent, capture_output=True, text=True, check=False,
    ).stdout.strip()  # fmt: skip
    kinds = [kind for kind in KINDS if not options.only or kind.__name__ in options.only]
    report = soak(options.model, options.minutes, options.clients, kinds)
    line = {"benchmark": "serve_soak", "commit": commit or None, "machine": platform.machine()}
    print(json.dumps(line | {"cpu": processor().model, "processors": os.cpu_count(), **report}))
    sys.exit(bool(report["wrong"] or report["hanging"] or any(report["left"].values())))


if __name__ == "__main__":
    main()
