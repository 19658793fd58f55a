"""`/v1/completions`: prompts of four kinds, echo, log-probabilities, and what is refused."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import openai
import pytest

from karakoram.engine.request import Request, TokenLogprob
from karakoram.engine.scripted import ScriptedEngine
from tests.serve.conftest import MODEL, WAIT_S, Gate, Running, Words

pytestmark = pytest.mark.timeout(60)

SAID = "I think.</think>Hello, world! ✓ 你好"


def complete(server: Running, **fields: Any) -> Any:
    answer = server.http.post("/v1/completions", json={"max_tokens": 100, **fields})
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_prompts_of_every_kind(shared: Running, words: Words) -> None:
    tokenizer = words.fmt.tokenizer
    one, two = tokenizer.encode("One <|im_end|> two"), tokenizer.encode("Three")
    assert words.fmt.tokenizer.special_ids["<|im_end|>"] not in one  # text never becomes a control token
    for prompt, expected in [
        ("One <|im_end|> two", [one]),
        (one, [one]),
        (["One <|im_end|> two", "Three"], [one, two]),
    ]:
        before = len(shared.engine.requests)
        answer = complete(shared, prompt=prompt)
        assert [list(request.prompt) for request in shared.engine.requests[before:]] == expected
        assert [choice["text"] for choice in answer["choices"]] == [SAID] * len(expected)
        assert answer["usage"]["prompt_tokens"] == sum(map(len, expected))
    answer = complete(shared, prompt=[one, two], n=2)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert answer["usage"]["prompt_tokens"] == len(one) + len(two)  # each prompt once


def test_lengths_and_stops(shared: Running, words: Words) -> None:
    answer = complete(shared, prompt="ENDLESS", max_tokens=4)
    choice = answer["choices"][0]
    assert choice["finish_reason"] == "length" and choice["text"] == words.fmt.tokenizer.decode(
        words.ids(" on")[:1] * 4
    )
    answer = complete(shared, prompt="x", stop=["world"])
    assert answer["choices"][0] == {
        "index": 0,
        "text": "I think.</think>Hello, ",
        "logprobs": None,
        "finish_reason": "stop",
    }
    default = shared.http.post("/v1/completions", json={"prompt": "ENDLESS"}).json()
    assert default["usage"]["completion_tokens"] == 16
    rest = complete(shared, prompt="x", max_tokens=None)
    assert rest["choices"][0]["text"] == SAID
    assert shared.engine.requests[-1].max_new_tokens == 4096 - 1


def test_stream(shared: Running) -> None:
    body = {"prompt": ["a", "b"], "max_tokens": 100, "stream": True, "stream_options": {"include_usage": True}}
    lines = shared.http.post("/v1/completions", json=body).text.strip().split("\n\n")
    assert lines[-1] == "data: [DONE]"
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    texts = {0: "", 1: ""}
    for chunk in chunks[:-1]:
        texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
    assert texts == {0: SAID, 1: SAID} and chunks[-1]["usage"]["prompt_tokens"] == 2


def test_stream_read_by_openais_client(serve: Callable[..., Running], words: Words) -> None:
    """`finish_reason` is null until the end, as api.openai.com sends it (openai/openai-openapi, pull request 100).
    OpenAI's published type has no null there and takes one for streams and whole answers, so that its client in strict
    mode refuses OpenAI's own streams; any other value in mid-stream would tell readers that the text has ended."""
    gates = [Gate(), Gate()]

    def script(request: Request) -> Iterator[int]:
        yield from words.ids("Hello")
        gates[len(server.engine.requests) - 1].pass_()
        yield from words.ids(" you", "<|im_end|>")

    server = serve(script)
    asked: Any = {"model": MODEL, "prompt": "x", "max_tokens": 50, "stream": True}
    client = openai.OpenAI(api_key="none", base_url=f"{server.url}/v1", max_retries=0, timeout=WAIT_S)
    with client.completions.create(**asked, stream_options={"include_usage": True}) as stream:
        chunks = [next(stream)]
        gates[0].open()
        chunks += stream
    *pieces, usage = chunks
    assert "".join(chunk.choices[0].text for chunk in pieces) == "Hello you"
    assert [chunk.choices[0].finish_reason for chunk in pieces] == [None] * (len(pieces) - 1) + ["stop"]
    assert not usage.choices and usage.usage and usage.usage.completion_tokens > 2
    strict = client.with_options(_extra_kwargs={"_strict_response_validation": True})
    with (
        client,
        strict.completions.create(**asked) as stream,
        pytest.raises(openai.APIResponseValidationError) as refused,
    ):
        next(stream)
    cause: Any = refused.value.__cause__
    assert [error["loc"] for error in cause.errors()] == [("choices", 0, "finish_reason")]
    gates[1].open()
    assert server.idle()


def test_whole_answers_pass_openais_strict_client(shared: Running) -> None:
    with openai.OpenAI(
        api_key="none", base_url=f"{shared.url}/v1", max_retries=0, timeout=WAIT_S, _strict_response_validation=True
    ) as client:
        whole = client.completions.create(model=MODEL, prompt="x", max_tokens=100, logprobs=0)
    assert whole.choices[0].text == SAID and whole.choices[0].finish_reason == "stop"
    assert whole.id.startswith("cmpl-") and whole._request_id == whole.id


@pytest.fixture
def scoring(shared: Running, monkeypatch: pytest.MonkeyPatch) -> Running:
    """The shared server, its engine also scoring prompts."""
    submit = ScriptedEngine.submit

    def scored(self: ScriptedEngine, request: Request, listener: Any) -> None:
        first = [True]

        def listen(news: Any) -> None:
            if first and request.prompt_logprobs is not None:
                first.clear()
                logprobs = tuple(TokenLogprob(token, -2.0, ((token, -2.0),)) for token in request.prompt[1:])
                news = [replace(news[0], prompt_logprobs=logprobs), *news[1:]]
            listener(news)

        submit(self, request, listen)

    monkeypatch.setattr(ScriptedEngine, "submit", scored)
    return shared


@pytest.mark.parametrize("max_tokens", [0, 3])
def test_echo_with_logprobs(scoring: Running, words: Words, max_tokens: int) -> None:
    prompt = "The 你 cat"
    answer = complete(scoring, prompt=prompt, echo=True, logprobs=1, max_tokens=max_tokens)
    choice = answer["choices"][0]
    tokenizer = words.fmt.tokenizer
    ids = [*tokenizer.encode(prompt), *words.answer("", "I think.")[:max_tokens]]
    assert choice["text"] == tokenizer.decode(ids) and choice["finish_reason"] == "length"
    logprobs = choice["logprobs"]
    assert logprobs["tokens"] == [tokenizer.decode([token]) for token in ids]
    asked = len(tokenizer.encode(prompt))
    assert logprobs["token_logprobs"] == [None, *[-2.0] * (asked - 1), *[-0.5] * max_tokens]
    assert logprobs["top_logprobs"][0] is None and len(logprobs["top_logprobs"]) == len(ids)
    assert logprobs["text_offset"][0] == 0 and sorted(logprobs["text_offset"]) == logprobs["text_offset"]
    assert answer["usage"]["completion_tokens"] == max_tokens


def test_echo_in_a_stream(scoring: Running) -> None:
    body = {"prompt": "The cat", "echo": True, "logprobs": 0, "max_tokens": 2, "stream": True}
    lines = scoring.http.post("/v1/completions", json=body).text.strip().split("\n\n")
    chunks = [json.loads(line.removeprefix("data: "))["choices"][0] for line in lines[:-1]]
    assert chunks[0]["text"].startswith("The cat")
    assert sum(len(chunk["logprobs"]["tokens"]) for chunk in chunks) == len(scoring.engine.requests[-1].prompt) + 2


def test_token_ids(shared: Running) -> None:
    answer = complete(shared, prompt="a", return_token_ids=True)
    assert answer["choices"][0]["prompt_token_ids"] == list(shared.engine.requests[-1].prompt)
    assert len(answer["choices"][0]["token_ids"]) == answer["usage"]["completion_tokens"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt[0]"),
        ({"prompt": ""}, None),
        ({"prompt": [5, "a"]}, ...),
        ({"prompt": [-5]}, "prompt[0]"),
        ({"prompt": [4096]}, None),
        ({"prompt": "a", "suffix": "b"}, "suffix"),
        ({"prompt": "a", "best_of": 2}, "best_of"),
        ({"prompt": "a", "n": 2, "best_of": 1}, "best_of"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "a", "logprobs": 21}, "logprobs"),
        ({"prompt": ["a"] * 65, "n": 2}, "prompt"),
        ({"prompt": "a", "echo": "yes"}, "echo"),
    ],
)
def test_what_is_refused(shared: Running, fields: dict[str, Any], param: Any) -> None:
    answer = shared.http.post("/v1/completions", json=fields)
    assert answer.status_code == 400, answer.text
    if param is not ...:
        assert answer.json()["error"]["param"] == param, answer.text


def test_a_prompt_over_the_context(shared: Running) -> None:
    answer = shared.http.post("/v1/completions", json={"prompt": "word " * 5000})
    assert answer.status_code == 413 and "4096" in answer.json()["error"]["message"]
    answer = shared.http.post("/v1/completions", json={"prompt": "word", "max_tokens": 4096})
    assert answer.status_code == 413


def test_best_of_may_be_n(shared: Running) -> None:
    assert len(complete(shared, prompt="a", n=2, best_of=2)["choices"]) == 2


@pytest.fixture(autouse=True)
def _idle(shared: Running) -> Iterator[None]:
    yield
    assert shared.idle()
