"""Health, keys, models, tokens, metrics, version."""

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from karakoram.engine.request import Request
from karakoram.serve.metrics import Timing
from tests.serve.conftest import MODEL, Gate, Running, Words, until

pytestmark = pytest.mark.timeout(60)

ASKING = {"messages": [{"role": "user", "content": "Hi"}]}


def test_health_while_loading(serve: Callable[..., Running], words: Words) -> None:
    server: Any = serve(words.script, loaded=False, keys=("k",))
    health = server.http.get("/health")
    assert health.status_code == 503 and health.json() == {"status": "loading"}
    key = {"authorization": "Bearer k"}
    for path, body in [("/v1/chat/completions", ASKING), ("/tokenize", {"prompt": "a"}), ("/v1/messages", ASKING)]:
        refused = server.http.post(path, json=body, headers=key)
        assert refused.status_code == 503 and refused.headers["retry-after"]
    assert server.http.get("/v1/models", headers=key).status_code == 503
    assert server.http.get("/metrics", headers=key).status_code == 200
    server.ready()
    assert server.http.get("/health").json() == {"status": "ready"}
    assert server.http.post("/v1/chat/completions", json=ASKING, headers=key).status_code == 200


PATHS = ["/v1/models", "/v1/models/nano", "/metrics", "/version", "/tokenizer_info", "/openapi.json", "/nothing"]


def test_a_bug_is_a_500_with_an_id(shared: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> bytes:
        raise RuntimeError("a bug")

    monkeypatch.setattr(shared.service.metrics, "page", broken)
    answer = shared.http.get("/metrics")
    assert answer.status_code == 500 and "bug" in answer.json()["error"]["message"]
    assert answer.headers["x-request-id"] == answer.headers["request-id"] != ""
    assert "," not in answer.headers["request-id"]  # sent once
    shared.still_answers()


@pytest.mark.parametrize("headers", [{}, {"authorization": "Bearer no"}, {"x-api-key": "no"}, {"x-api-key": "\xff"}])
def test_everything_but_health_needs_the_key(
    locked: Running, headers: dict[str, str], capfd: pytest.CaptureFixture[str]
) -> None:
    encoded = {name: value.encode("latin-1") for name, value in headers.items()}
    assert locked.http.get("/health").status_code == 200
    for path in PATHS:
        answer = locked.http.get(path, headers=encoded)
        assert answer.status_code == 401, path
        assert answer.headers["www-authenticate"] == "Bearer"
        assert answer.json()["error"]["type"] == "authentication_error"
    for path in ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/tokenize", "/detokenize"):
        assert locked.http.post(path, json=ASKING, headers=encoded).status_code == 401
    for path in ("/v1/messages", "/v1/messages/count_tokens"):
        answer = locked.http.post(path, json=ASKING, headers=encoded)
        assert answer.status_code == 401
        assert answer.json()["type"] == "error" and answer.json()["error"]["type"] == "authentication_error"
    assert "sesame" not in "".join(capfd.readouterr())


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": "Bearer sesame"},
        {"authorization": "bearer  sesame"},
        {"x-api-key": "sesame"},
        {"x-api-key": "other"},
        {"x-api-key": "schlüssel"},
        {"authorization": "Bearer wrong", "x-api-key": "sesame"},
        {"authorization": "Basic c2VzYW1l", "x-api-key": "sesame"},
    ],
)
def test_every_key_opens(locked: Running, headers: dict[str, str]) -> None:
    encoded = {name: value.encode() for name, value in headers.items()}
    for path in PATHS[:-1]:
        assert locked.http.get(path, headers=encoded).status_code == 200
    assert locked.http.post("/v1/chat/completions", json=ASKING, headers=encoded).status_code == 200
    client = locked.engine.requests[-1].client
    assert client and "sesame" not in client and "other" not in client


@pytest.fixture
def locked(serve: Callable[..., Running], words: Words) -> Running:
    return serve(words.script, keys=("sesame", "other", "schlüssel"))


def test_clients_are_told_apart_by_their_keys(shared: Running) -> None:
    clients: list[str] = []
    for key in ("a", "b", "a"):
        shared.http.post("/v1/chat/completions", json=ASKING, headers={"authorization": f"Bearer {key}"})
        clients.append(shared.engine.requests[-1].client)
    assert clients[0] == clients[2] != clients[1]


def test_models(shared: Running) -> None:
    listed = shared.http.get("/v1/models").json()
    assert listed["object"] == "list" and [model["id"] for model in listed["data"]] == [MODEL, "alias/of-nano"]
    assert listed["data"][0]["max_model_len"] == 4096
    assert shared.http.get("/v1/models/alias/of-nano").json()["root"] == MODEL
    assert shared.http.get("/version").json() == {"version": "1.2.3"}


def test_tokens_there_and_back(shared: Running, words: Words) -> None:
    text = "Hello, 你好 <|im_end|>"
    answer = shared.http.post("/tokenize", json={"model": MODEL, "prompt": text, "return_token_strs": True}).json()
    assert answer["tokens"] == words.fmt.tokenizer.encode(text)
    assert answer["count"] == len(answer["tokens"]) == len(answer["token_strs"])
    assert answer["max_model_len"] == 4096
    back = shared.http.post("/detokenize", json={"model": MODEL, "tokens": answer["tokens"]}).json()
    assert back == {"prompt": text}


def test_tokens_of_a_conversation(shared: Running, words: Words) -> None:
    body = {**ASKING, "add_generation_prompt": False}
    ids = shared.http.post("/tokenize", json=body).json()["tokens"]
    assert ids == words.fmt.encode(ASKING["messages"], add_generation_prompt=False)
    with_frame = shared.http.post("/tokenize", json=ASKING).json()["tokens"]
    assert with_frame[: len(ids)] == ids and len(with_frame) > len(ids)


def test_the_tokenizer(shared: Running, words: Words) -> None:
    info = shared.http.get("/tokenizer_info").json()
    assert info["eos_token"] == "[EOS]" and info["vocab_size"] == words.fmt.tokenizer.n_vocab
    # How lm-eval learns the id.
    ids = shared.http.post("/tokenize", json={"prompt": info["eos_token"]}).json()["tokens"]
    assert ids == [words.fmt.tokenizer.special_ids["[EOS]"]]


@pytest.mark.parametrize("body", [{}, {"prompt": "a", **ASKING}, {"prompt": 5}, {"messages": []}])
def test_wrong_tokenize(shared: Running, body: dict[str, Any]) -> None:
    assert shared.http.post("/tokenize", json=body).status_code == 400


@pytest.mark.parametrize("tokens", [[-1], [10**9], ["a"], None, [4096]])
def test_wrong_detokenize(shared: Running, tokens: Any) -> None:
    assert shared.http.post("/detokenize", json={"tokens": tokens}).status_code == 400


def scraped(server: Running) -> dict[str, float]:
    """All samples, the model's name left out."""
    samples: dict[str, float] = {}
    for line in server.http.get("/metrics").text.splitlines():
        if not line.startswith("#"):
            name, value = line.rsplit(" ", 1)
            samples[re.sub(r',?model_name="nano"|\{\}', "", name).replace("{}", "")] = float(value)
    return samples


def test_metrics_count_what_happened(serve: Callable[..., Running], words: Words) -> None:
    gate = Gate()

    def script(request: Request) -> Iterator[int]:
        if "wait" in words.fmt.tokenizer.decode(request.prompt):
            gate.pass_()
        yield from words.script(request)

    server = serve(script)
    first = scraped(server)
    assert first["vllm:generation_tokens_total"] == 0
    assert first["karakoram:invalid_tool_calls_total"] == 0
    usage = server.chat().json()["usage"]
    server.chat("ENDLESS", max_tokens=5)
    server.chat("BREAK", stream=True)
    seen = scraped(server)
    assert seen['vllm:request_success_total{finished_reason="stop"}'] == 1
    assert seen['vllm:request_success_total{finished_reason="length"}'] == 1
    assert seen['vllm:request_success_total{finished_reason="error"}'] == 1
    broken = len(words.ids("half"))
    assert seen["vllm:generation_tokens_total"] == usage["completion_tokens"] + 5 + broken
    assert seen["vllm:prompt_tokens_total"] == sum(len(request.prompt) for request in server.engine.requests)
    for name in ("time_to_first_token", "e2e_request_latency"):
        assert seen[f"vllm:{name}_seconds_count"] == 3
        assert seen[f'vllm:{name}_seconds_bucket{{le="+Inf"}}'] == 3
    assert seen["vllm:inter_token_latency_seconds_count"] == seen["vllm:generation_tokens_total"] - 3
    gate.open()


def test_gauges_come_from_the_engine(shared: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    stats = {
        "running": 3,
        "waiting": 2,
        "cache_blocks": 100,
        "cache_used_blocks": 25,
        "prefix_hit_tokens": 7,
        "prefix_query_tokens": 9,
        "preemptions": 1,
    }
    assert "vllm:num_requests_running" not in scraped(shared)
    monkeypatch.setattr(shared.engine, "stats", lambda: stats, raising=False)
    seen = scraped(shared)
    assert seen["vllm:num_requests_running"] == 3 and seen["vllm:num_requests_waiting"] == 2
    assert seen["vllm:kv_cache_usage_perc"] == 0.25
    assert seen["vllm:prefix_cache_hits_total"] == 7 and seen["vllm:prefix_cache_queries_total"] == 9
    assert seen["vllm:num_preemptions_total"] == 1


def test_a_histogram() -> None:
    timing = Timing("t", "a test", (1, 2))
    for value in (0.5, 1, 1.5, 9):
        timing.observe(value)
    timing.observe(2, times=2)
    samples = {sample.labels.get("le", sample.name): sample.value for sample in timing.family("m").samples}
    assert samples == {"1.0": 2, "2.0": 5, "+Inf": 6, "t_count": 6, "t_sum": 16}


def test_an_engine_that_has_stopped_is_not_healthy(serve: Callable[..., Running], words: Words) -> None:
    server = serve(words.script)
    server.engine.stopped = True  # type: ignore[attr-defined]
    assert server.http.get("/health").status_code == 503
    assert until(lambda: server.http.get("/health").json() == {"status": "stopped"})
