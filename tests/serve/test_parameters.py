"""What a request's fields become in the engine: every parameter arrives, none is invented."""

from collections.abc import Iterator
from typing import Any

import pytest

from karakoram.chat import load_chat_format
from karakoram.engine.request import Request, Sampling
from karakoram.env import bundled_model_dir
from karakoram.serve.openai.conversation import EFFORT_TOKENS
from tests.serve.conftest import WEATHER, Running, Words, running

pytestmark = pytest.mark.timeout(60)


def asked(server: Running, **fields: Any) -> Request:
    """The engine's request for a conversation with these fields."""
    answer = server.chat(**fields)
    assert answer.status_code == 200, answer.text
    return server.engine.requests[-1]


def prompt_of(server: Running, words: Words, **fields: Any) -> str:
    return words.fmt.tokenizer.decode(asked(server, **fields).prompt)


def test_who_says_nothing_gets_the_makers_sampling(shared: Running, words: Words) -> None:
    assert asked(shared).sampling == Sampling(**words.fmt.sampling(thinking=True))
    quiet = asked(shared, thinking={"type": "disabled"}).sampling
    assert quiet == Sampling(**words.fmt.sampling(thinking=False))


@pytest.mark.parametrize(
    ("fields", "name", "value"),
    [
        ({"temperature": 0.25}, "temperature", 0.25),
        ({"temperature": 0}, "temperature", 0),
        ({"top_p": 0.5}, "top_p", 0.5),
        ({"top_p": 0}, "top_p", 1e-9),
        ({"top_k": 40}, "top_k", 40),
        ({"top_k": -1}, "top_k", 0),
        ({"min_p": 0.1}, "min_p", 0.1),
        ({"repetition_penalty": 1.2}, "repetition_penalty", 1.2),
        ({"presence_penalty": -1.5}, "presence_penalty", -1.5),
        ({"frequency_penalty": 2}, "frequency_penalty", 2),
        ({"logit_bias": {"17": -100, "20": 2.5}}, "logit_bias", {17: -100, 20: 2.5}),
        ({"seed": 7}, "seed", 7),
    ],
)
def test_sampling(shared: Running, fields: dict[str, Any], name: str, value: Any) -> None:
    assert getattr(asked(shared, **fields).sampling, name) == value


def test_limits_and_stops(shared: Running, words: Words) -> None:
    assert asked(shared, max_tokens=33).max_new_tokens == 33
    assert asked(shared, max_tokens=33, max_completion_tokens=44).max_new_tokens == 44
    free = asked(shared)
    assert free.max_new_tokens == 4096 - len(free.prompt)
    assert free.stop_ids == words.fmt.stop_ids
    assert asked(shared, stop_token_ids=[5, 6]).stop_ids == words.fmt.stop_ids | {5, 6}
    assert asked(shared, ignore_eos=True, max_tokens=5).stop_ids == frozenset()
    assert asked(shared, stop="never said").stop_when is not None
    assert free.stop_when is None and free.constraint is None and free.logprobs is None
    assert asked(shared, logprobs=True).logprobs == 0
    assert asked(shared, logprobs=True, top_logprobs=5).logprobs == 5


def test_choices_draw_apart(shared: Running) -> None:
    before = len(shared.engine.requests)
    shared.chat(n=3, seed=1)
    seeds = {request.sampling.seed for request in shared.engine.requests[before:]}
    assert len(seeds) == 3 and 1 in seeds


@pytest.mark.parametrize("effort", [name for name, tokens in EFFORT_TOKENS.items() if tokens])
def test_reasoning_effort_is_a_budget(shared: Running, effort: str) -> None:
    assert asked(shared, reasoning_effort=effort).constraint is not None


@pytest.mark.parametrize("effort", ["xhigh", "max"])
def test_the_highest_efforts_have_no_bound(shared: Running, effort: str) -> None:
    assert asked(shared, reasoning_effort=effort).constraint is None


def test_thinking_has_an_order(shared: Running, words: Words) -> None:
    closed = "<think></think>"
    said = {"chat_template_kwargs": {"thinking": False}, "reasoning_effort": "high"}
    assert prompt_of(shared, words, **said).endswith(closed)
    said = {"thinking": {"type": "enabled"}, "chat_template_kwargs": {"thinking": False}}
    assert not prompt_of(shared, words, **said).endswith(closed)
    said = {"thinking": {"type": "disabled"}, "reasoning_effort": "high"}
    assert prompt_of(shared, words, **said).endswith(closed)


HISTORY: list[dict[str, Any]] = [
    {"role": "user", "content": "first"},
    {"role": "assistant", "content": "said", "reasoning_content": "secret thought"},
    {"role": "user", "content": "second"},
]


@pytest.mark.parametrize(
    "fields", [{"thinking": {"type": "enabled", "keep": "all"}}, {"chat_template_kwargs": {"preserve_thinking": True}}]
)
def test_reasoning_of_earlier_turns_can_be_kept(words: Words, fields: dict[str, Any]) -> None:
    keeping = load_chat_format(bundled_model_dir(), dialect="kimi-k2.6")  # nano's own dialect has no such switch
    with running(keeping, words.script) as server:
        assert "secret thought" in prompt_of(server, words, messages=HISTORY, **fields)
        assert "secret thought" not in prompt_of(server, words, messages=HISTORY)


@pytest.mark.parametrize(
    "field",
    [
        {"reasoning_content": "thought"},
        {"reasoning": "thought"},
        {"reasoning_details": [{"type": "reasoning.text", "text": "thou"}, {"type": "reasoning.text", "text": "ght"}]},
    ],
)
def test_reasoning_is_accepted_under_every_name(shared: Running, words: Words, field: dict[str, Any]) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
    messages = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": None, "tool_calls": [call], **field},
        {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
    ]
    prompt = prompt_of(shared, words, messages=messages)
    assert "<think>thought</think>" in prompt
    assert "functions.weather:0" in prompt and "call_1" not in prompt  # the model's own ids


def test_roles_and_parts(shared: Running, words: Words) -> None:
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}], "name": "ann"},
    ]
    prompt = prompt_of(shared, words, messages=messages)
    assert "<|im_system|>" in prompt and "be brief" in prompt and "one two" in prompt


def test_a_partial_message_is_continued(shared: Running, words: Words) -> None:
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "The answer is", "partial": True}]
    assert prompt_of(shared, words, messages=messages).endswith("The answer is")


def test_tools_are_passed_as_they_were_sent(words: Words) -> None:
    tool = {"type": "function", "function": {"description": "before the name", "name": "f", "x-note": "kept"}}
    builtin = {"type": "builtin_function", "function": {"name": "$web_search"}}
    as_json = load_chat_format(bundled_model_dir(), dialect="kimi-k2")  # the one that prints tools as they are
    with running(as_json, words.script) as server:
        prompt = prompt_of(server, words, tools=[tool, builtin])
    assert '{"description":"before the name","name":"f","x-note":"kept"}' in prompt
    assert '{"function":{"name":"$web_search"},"type":"builtin_function"}' in prompt


@pytest.mark.parametrize(
    ("fields", "constrained"),
    [
        ({"tools": [WEATHER]}, True),
        ({"tools": [WEATHER], "tool_choice": "none"}, True),
        ({"tools": [WEATHER], "parallel_tool_calls": False}, True),
        ({"response_format": {"type": "text"}}, False),
        ({"response_format": {"type": "json_object"}}, True),
        ({"structured_outputs": {"regex": "[a-z]+"}}, True),
        ({"structured_outputs": {"choice": ["yes", "no (really)"]}}, True),
        ({"structured_outputs": {"json": {"type": "object"}}}, True),
    ],
)
def test_what_restricts_the_output(shared: Running, fields: dict[str, Any], constrained: bool) -> None:
    text = "JSON" if "response_format" in fields else "Hi"
    shared.chat(text, **fields)
    assert (shared.engine.requests[-1].constraint is not None) == constrained


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_a_call_can_be_required(shared: Running, choice: Any) -> None:
    answer = shared.chat("CALL", tools=[WEATHER], tool_choice=choice)
    assert answer.json()["choices"][0]["finish_reason"] == "tool_calls", answer.text


def test_unknown_fields_and_headers_are_ignored(shared: Running) -> None:
    body = {"model": "nano", "messages": [{"role": "user", "content": "Hi"}], "store": True, "metadata": {"a": "b"}}
    headers = {"x-anthropic-billing-header": "cc_version=1", "x-request-id": "mine", "origin": "http://evil.example"}
    answer = shared.http.post("/v1/chat/completions", json=body, headers=headers)
    assert answer.status_code == 200
    assert answer.headers["x-request-id"] == answer.json()["id"]
    assert not [name for name in answer.headers if name.startswith("access-control")]  # no CORS


@pytest.fixture(autouse=True)
def _idle(shared: Running) -> Iterator[None]:
    yield
    assert shared.idle()
