"""Tool calls under random weights, over HTTP: every one that was begun arrives whole, and satisfies its schema.

    random schema ─▶ /v1/chat/completions · /v1/messages ─▶ session ─▶ engine ─▶ random weights, temperature 1

For each schema: `tool_choice` required, named, and auto with the section's opening forced; `max_tokens` of the shortest
valid answer (which the server tells in refusing 1), twice that, and 512; whole and streamed. Arguments are checked by
jsonschema; the pieces of a stream must add up to what the whole answer has.

- The opening is forced by a bias of 100 on the marker's token: `logit_bias` in OpenAI's API. Anthropic's has no such
  field, nor a seed: there `Between` puts both into the engine's request, for prompts that say OPEN and for all.
- The engine is deterministic, so that a seed gives the same tokens whatever runs beside it.
- `Between` also counts the calls that the model began, as tokens: none may be lost on the way.
"""

import itertools
import json
import re
import threading
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx2 as httpx
import jsonschema
import pytest
import torch

from karakoram.chat import ChatFormat
from karakoram.chat.dialects import CALL_BEGIN, SECTION_BEGIN
from karakoram.engine.engine import Engine
from karakoram.engine.request import Listener, News, Request
from karakoram.kernels import ops
from karakoram.model.load import load_model
from karakoram.serve.service import Opened, Service
from karakoram.session.chat import ChatSession
from tests.engine.constrain.random_schemas import random_schema
from tests.engine.models import write_packed
from tests.serve.conftest import WAIT_S, hosted

CHOICES = ("required", "named", "auto")
PADDING = 70  # ids of the model beyond the tokenizer's: never to be drawn
CLIENTS = 24


class Between:
    """The engine as the session sees it; see above."""

    def __init__(self, engine: Engine, fmt: ChatFormat) -> None:
        self.engine, self.fmt = engine, fmt
        self.context, self.vocab_size = engine.context, engine.vocab_size
        self.begun: Counter[str] = Counter()
        self._begin, self._section = (fmt.tokenizer.special_ids[name] for name in (CALL_BEGIN, SECTION_BEGIN))
        self._heard: dict[Listener, Listener] = {}  # the engine groups news by listener

    def submit(self, request: Request, listener: Listener) -> None:
        """Seed and open what comes from Anthropic's API, then pass it on."""
        if request.id.startswith("msg_"):
            said = self.fmt.tokenizer.decode(list(request.prompt))
            seed = zlib.crc32(f"{request.max_new_tokens} {said}".encode())
            bias = {self._section: 100.0} if "OPEN" in said else {}
            request.sampling = replace(request.sampling, seed=seed, logit_bias=bias)
        self.engine.submit(request, self._heard.setdefault(listener, self._counting(listener)))

    def cancel(self, request_id: str) -> None:
        """See `TokenSource`."""
        self.engine.cancel(request_id)

    def _counting(self, listener: Listener) -> Listener:
        def heard(news: Sequence[News]) -> None:
            for one in news:
                self.begun[one.id] += one.tokens.count(self._begin)
            listener(news)

        return heard


@dataclass
class Said:
    """One answer: who called what, with which arguments, and all other text."""

    id: str = ""
    calls: list[list[str]] = field(default_factory=list[list[str]])  # id, name, arguments
    text: str = ""
    end: str | None = None


class OpenAI:
    """How the test speaks /v1/chat/completions."""

    path, end = "/v1/chat/completions", "tool_calls"
    call_id = re.compile(r"functions\.tool_1:\d+")

    def __init__(self, section: int) -> None:
        self.section = section

    def body(self, schema: Any, choice: str, seed: int) -> dict[str, Any]:
        named = {"type": "function", "function": {"name": "tool_1"}}
        return {
            "messages": [{"role": "user", "content": "Go on."}],
            "tools": [{"type": "function", "function": {"name": "tool_1", "parameters": schema}}],
            "tool_choice": named if choice == "named" else choice,
            "logit_bias": {str(self.section): 100} if choice == "auto" else {},
            "temperature": 1, "top_p": 1, "seed": seed,
            "thinking": {"type": "enabled" if seed % 2 else "disabled"},
        }  # fmt: skip

    def whole(self, answer: Any) -> Said:
        choice = answer["choices"][0]
        message = choice["message"]
        calls = [
            [call["id"], call["function"]["name"], call["function"]["arguments"]]
            for call in message.get("tool_calls") or ()
        ]
        text = (message["reasoning_content"] or "") + (message["content"] or "")
        return Said(answer["id"], calls, text, choice["finish_reason"])

    def streamed(self, events: list[Any]) -> Said:
        said = Said(events[0]["id"])
        for event in events:
            choice = event["choices"][0]
            said.end = choice["finish_reason"] or said.end
            delta = choice["delta"]
            said.text += (delta.get("reasoning_content") or "") + (delta.get("content") or "")
            for piece in delta.get("tool_calls") or ():
                function = piece["function"]
                if piece["index"] == len(said.calls):
                    said.calls.append([piece["id"], function["name"], ""])
                said.calls[piece["index"]][2] += function.get("arguments") or ""
        return said


class Anthropic:
    """How the test speaks /v1/messages."""

    path, end = "/v1/messages", "tool_use"
    call_id = re.compile(r"toolu_[a-zA-Z0-9_-]+")

    def body(self, schema: Any, choice: str, seed: int) -> dict[str, Any]:
        choices = {"required": {"type": "any"}, "named": {"type": "tool", "name": "tool_1"}, "auto": {"type": "auto"}}
        return {
            "model": "random",
            "messages": [{"role": "user", "content": f"{'OPEN' if choice == 'auto' else 'Go on.'} {seed}"}],
            "tools": [{"name": "tool_1", "input_schema": schema, "strict": True}],
            "tool_choice": choices[choice],
            "temperature": 1, "top_p": 1,
            "thinking": {"type": "adaptive"} if seed % 2 else {"type": "disabled"},
        }  # fmt: skip

    def whole(self, answer: Any) -> Said:
        said = Said(answer["id"], end=answer["stop_reason"])
        for block in answer["content"]:
            if block["type"] == "tool_use":
                said.calls.append([block["id"], block["name"], json.dumps(block["input"])])
            else:
                said.text += block[block["type"]]
        return said

    def streamed(self, events: list[Any]) -> Said:
        said = Said(events[0]["message"]["id"])
        for event in events:
            delta = event.get("delta", {})
            said.end = delta.get("stop_reason", said.end)
            said.text += delta.get("thinking", "") + delta.get("text", "")
            if event["type"] == "content_block_start" and event["content_block"]["type"] == "tool_use":
                said.calls.append([event["content_block"]["id"], event["content_block"]["name"], ""])
            elif delta.get("type") == "input_json_delta":
                said.calls[-1][2] += delta["partial_json"]
        return said


@dataclass
class Tally:
    """What has been asked and what has come. `wrong` is to stay empty."""

    requests: int = 0
    calls: int = 0
    unenforceable: int = 0
    schemas: int = 0
    wrong: list[str] = field(default_factory=list[str])


class Asker:
    """Asks one server about many schemas, several at once."""

    def __init__(self, url: str, between: Between) -> None:
        self.between, self.tally = between, Tally()
        self.http = httpx.Client(base_url=url, timeout=4 * WAIT_S, limits=httpx.Limits(max_connections=CLIENTS))
        section = between.fmt.tokenizer.special_ids[SECTION_BEGIN]
        self.apis: tuple[OpenAI | Anthropic, ...] = (OpenAI(section), Anthropic())
        self._lock = threading.Lock()

    def ask(self, seeds: range, full: bool) -> Tally:
        """Not `full`: one budget for each choice, in turn, so that three schemas have all nine pairs."""
        jobs = list(itertools.product(seeds, self.apis))
        with ThreadPoolExecutor(CLIENTS) as pool:
            for _ in pool.map(lambda job: self._schema(*job, full), jobs):
                pass
        self.tally.schemas = len(seeds) - self.tally.unenforceable // len(self.apis)
        return self.tally

    def _schema(self, seed: int, api: OpenAI | Anthropic, full: bool) -> None:
        schema = random_schema(seed)
        refusal = self.http.post(api.path, json={**api.body(schema, "required", seed), "max_tokens": 1})
        said = refusal.json()["error"]["message"]
        if "minProperties" in said:  # the one thing of these schemas that now and then cannot be promised
            with self._lock:
                self.tally.unenforceable += 1
            return
        least = re.search(r"takes (\d+) tokens", said)
        assert refusal.status_code == 400 and least, said
        shortest = int(least[1])
        for number, choice in enumerate(CHOICES):
            for place, budget in enumerate((shortest, 2 * shortest, max(512, shortest))):
                if full or (seed + number) % 3 == place:
                    self._both(api, schema, choice, budget, seed)

    def _both(self, api: OpenAI | Anthropic, schema: Any, choice: str, budget: int, seed: int) -> None:
        body = {**api.body(schema, choice, seed), "max_tokens": budget}
        answer = self.http.post(api.path, json=body)
        what = f"{api.path}, schema {seed}, {choice}, {budget} tokens: "
        wrong: list[str] = []
        whole = Said()
        if answer.status_code == 200:
            whole = api.whole(answer.json())
            wrong += [what + one for one in self._problems(api, whole, schema)]
        else:
            wrong.append(what + answer.text)
        text = self.http.post(api.path, json={**body, "stream": True}).text
        lines = [line[6:] for line in text.split("\n") if line.startswith("data: {")]
        stream = api.streamed([json.loads(line) for line in lines])
        wrong += [f"streamed {what}{one}" for one in self._problems(api, stream, schema)]
        if not _alike(whole, stream):
            wrong.append(f"{what}{whole} is not what was streamed: {stream}")
        with self._lock:
            self.tally.requests += 2
            self.tally.calls += len(whole.calls) + len(stream.calls)
            self.tally.wrong += wrong

    def _problems(self, api: OpenAI | Anthropic, said: Said, schema: Any) -> Iterator[str]:
        """What is wrong with an answer."""
        if said.end != api.end or not said.calls:
            yield f"it ended with {said.end}, {len(said.calls)} calls"
        if self.between.begun[said.id] != len(said.calls):
            yield f"of {self.between.begun[said.id]} calls {len(said.calls)} arrived"
        for name in self.between.fmt.tokenizer.special_ids:
            if name in said.text:
                yield f"{name} in the text"
        if len({call[0] for call in said.calls}) < len(said.calls):
            yield "two calls have one id"
        for call_id, name, arguments in said.calls:
            if name != "tool_1" or not api.call_id.fullmatch(call_id):
                yield f"{call_id} {name}"
            try:
                jsonschema.Draft202012Validator(schema).validate(json.loads(arguments))
            except (ValueError, jsonschema.ValidationError) as error:
                yield f"{arguments[:300]}: {str(error)[:200]}"


def _alike(whole: Said, stream: Said) -> bool:
    """Anthropic's whole answer has arguments as an object, the stream as text: they are compared as JSON there."""
    if whole.id.startswith("msg_"):
        calls = [[[*call[:2], json.loads(call[2])] for call in said.calls] for said in (whole, stream)]
    else:
        calls = [whole.calls, stream.calls]
    return calls[0] == calls[1] and (whole.text, whole.end) == (stream.text, stream.end)


@pytest.fixture(scope="module")
def asker(fmt: ChatFormat, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Asker]:
    """A server over the smallest model, with random weights and nano's tokens."""
    if ops.chosen() is None:
        pytest.skip("the CPU kernels are not there (no compiler): without them a deterministic pass is one token long")
    torch.set_num_threads(1)
    shape = {"vocab_size": fmt.tokenizer.n_vocab + PADDING, "max_position_embeddings": 8192}
    model = load_model(write_packed(Path(tmp_path_factory.mktemp("random")), **shape))
    with Engine(model, cache_tokens=65536, most_running=CLIENTS, deterministic=True) as engine:
        between = Between(engine, fmt)
        session = ChatSession(between, fmt)
        service = Service(["random"])
        service.ready(Opened(between, session, fmt, {"temperature": 1.0, "top_p": 1.0}))
        with hosted(service) as (url, _):
            made = Asker(url, between)
            yield made
            made.http.close()
        assert session.invalid_calls == 0
        stats = engine.stats()
    assert (stats["running"], stats["waiting"], stats["cache_used_blocks"]) == (0, 0, 0)


def test_every_call_arrives_and_is_valid(asker: Asker) -> None:
    tally = asker.ask(range(30), full=False)
    print(tally)
    assert tally.wrong == []
    assert tally.schemas >= 28 and tally.requests >= 28 * 2 * 3 * 2 and tally.calls > tally.requests


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_call_arrives_and_is_valid_for_many_schemas(asker: Asker) -> None:
    asker.tally = Tally()
    tally = asker.ask(range(7000, 7210), full=True)
    print(tally)
    assert tally.wrong == []
    assert tally.schemas >= 200 and tally.requests == tally.schemas * 2 * 3 * 3 * 2
