"""A session over an engine: what stands in the prompt, what comes out, and what is remembered between turns.

The engine is scripted: it writes the tokens of a text in which markers stand for themselves. The format is nano's
(kimi-k2.5: reasoning opens in the prompt).
"""

from __future__ import annotations

import queue
from collections.abc import Sequence
from typing import Any

import pytest

from karakoram.chat.format import ChatFormat, load_chat_format
from karakoram.engine.request import News, Request
from karakoram.engine.scripted import ScriptedEngine
from karakoram.env import bundled_model_dir
from karakoram.errors import ChatError, ContextOverflow, InputError, SchemaError
from karakoram.session.chat import Answer, ChatRequest, ChatSession

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "search",
            "parameters": {"type": "object", "properties": {"q": {"type": "string"}}, "required": ["q"]},
        },
    }
]
USER = {"role": "user", "content": "Find it."}


@pytest.fixture(scope="module")
def fmt() -> ChatFormat:
    return load_chat_format(bundled_model_dir())


def _call(index: int, arguments: str, name: str = "search") -> str:
    begin, at, end = "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"
    return f"{begin}functions.{name}:{index}{at}{arguments}{end}"


def _section(*calls: str) -> str:
    return "<|tool_calls_section_begin|>" + "".join(calls) + "<|tool_calls_section_end|>"


class Talk:
    """A session whose engine writes what it is told; keeps the prompts it was given."""

    def __init__(self, fmt: ChatFormat, context: int = 2048) -> None:
        self.fmt, self.said = fmt, list[str]()
        self.engine = ScriptedEngine(self._write, fmt.tokenizer.n_vocab, context)
        self.session = ChatSession(self.engine, fmt)

    def _write(self, request: Request) -> list[int]:
        ids = self.fmt.tokenizer.encode(self.said[0], allow_special=True)
        if len(self.said) > 1:
            del self.said[0]
        return ids

    def answers(self, chat: ChatRequest, said: str) -> tuple[list[Answer], list[list[dict[str, Any]]]]:
        self.said = [said]
        answers = self.session.open(chat, "r")
        news: queue.SimpleQueue[Sequence[News]] = queue.SimpleQueue()
        by_id = {answer.request.id: answer for answer in answers}
        for answer in answers:
            self.engine.submit(answer.request, news.put)
        deltas: dict[str, list[dict[str, Any]]] = {name: [] for name in by_id}
        while any(answer.finish_reason is None for answer in answers):
            for one in news.get(timeout=10):
                deltas[one.id] += by_id[one.id].feed(one)
        return answers, [deltas[answer.request.id] for answer in answers]

    def answer(self, chat: ChatRequest, said: str) -> Answer:
        return self.answers(chat, said)[0][0]

    @property
    def prompt(self) -> list[int]:
        return list(self.engine.requests[-1].prompt)


@pytest.fixture
def talk(fmt: ChatFormat) -> Talk:
    return Talk(fmt)


def test_parts_usage_and_reason(talk: Talk) -> None:
    answer = talk.answer(ChatRequest([USER]), "so be it</think>Here.<|im_end|>")
    assert answer.message["reasoning_content"] == "so be it" and answer.message["content"] == "Here."
    assert answer.finish_reason == "stop" and answer.message["tool_calls"] == []
    usage = answer.usage
    assert usage.prompt_tokens == len(talk.prompt) and usage.completion_tokens == len(answer.token_ids)
    reasoning = talk.fmt.tokenizer.encode("so be it</think>", allow_special=True)
    assert usage.reasoning_tokens == len(reasoning)


def test_the_prompt_is_the_formats(talk: Talk) -> None:
    talk.answer(ChatRequest([USER], tools=TOOLS), "x</think>y<|im_end|>")
    assert talk.prompt == talk.fmt.encode([USER], tools=TOOLS, tool_ids="canonical")
    talk.answer(ChatRequest([USER], thinking=False), "y<|im_end|>")
    assert talk.prompt == talk.fmt.encode([USER], thinking=False)


def test_strict_is_between_client_and_server(talk: Talk) -> None:
    tool = {"type": "function", "function": {**TOOLS[0]["function"], "strict": True}}
    talk.answer(ChatRequest([USER], tools=[tool]), "x</think>y<|im_end|>")
    assert talk.prompt == talk.fmt.encode([USER], tools=TOOLS, tool_ids="canonical")


def test_a_tool_turn_goes_on_from_the_very_tokens(talk: Talk) -> None:
    # White space that no template would write: rendered anew, these tokens would differ.
    said = "hm" + _section(_call(0, '{"q" :  "a"}'))
    first = talk.answer(ChatRequest([USER], tools=TOOLS), said + "<|im_end|>")
    assert first.finish_reason == "tool_calls"
    [call] = first.message["tool_calls"]
    assert call["id"] == "functions.search:0"
    begun = talk.prompt + first.token_ids[:-1]
    result = {"role": "tool", "tool_call_id": call["id"], "content": "found"}
    sent_back = {"role": "assistant", "content": None, "tool_calls": [call]}  # a client that drops reasoning
    talk.answer(ChatRequest([USER, sent_back, result], tools=TOOLS), "ok</think>It is there.<|im_end|>")
    assert talk.prompt[: len(begun)] == begun


def test_when_thinking_becomes_history_the_content_keeps_its_tokens(talk: Talk) -> None:
    first = talk.answer(ChatRequest([USER]), "long thought</think>Here  it is.<|im_end|>")
    history = [USER, {"role": "assistant", "content": first.message["content"]}, {"role": "user", "content": "Thanks."}]
    talk.answer(ChatRequest(history), "x</think>y<|im_end|>")
    assert talk.prompt == talk.fmt.encode(history)  # an empty think block, as the template has it
    text = talk.fmt.tokenizer.decode(talk.prompt)
    assert "long thought" not in text and "<think></think>Here  it is.<|im_end|>" in text


def test_what_the_client_changed_is_rendered_anew(talk: Talk) -> None:
    first = talk.answer(ChatRequest([USER], tools=TOOLS), "hm" + _section(_call(0, '{"q" :  "a"}')) + "<|im_end|>")
    [call] = first.message["tool_calls"]
    result = {"role": "tool", "tool_call_id": call["id"], "content": "found"}
    changed = {"role": "assistant", "content": None, "reasoning_content": "another", "tool_calls": [call]}
    talk.answer(ChatRequest([USER, changed, result], tools=TOOLS), "ok</think>y<|im_end|>")
    assert talk.prompt == talk.fmt.encode([USER, changed, result], tools=TOOLS, tool_ids="canonical")
    with_content = {"role": "assistant", "content": "Let me see.", "tool_calls": [call]}
    talk.answer(ChatRequest([USER, with_content, result], tools=TOOLS), "ok</think>y<|im_end|>")
    restored = {**with_content, "reasoning_content": "hm"}  # the thought belongs to the call, the content to the client
    assert talk.prompt == talk.fmt.encode([USER, restored, result], tools=TOOLS, tool_ids="canonical")


@pytest.mark.parametrize("same_key", [True, False])
def test_concurrent_conversations_with_the_same_ids_never_see_each_others_reasoning(talk: Talk, same_key: bool) -> None:
    """Two conversations at once, calls with the same id; each client drops reasoning and gets its own back."""
    clients = ("k", "k" if same_key else "other")
    asked = [{"role": "user", "content": f"Find {name}."} for name in ("apples", "pears")]
    calls = []
    for client, user, thought in zip(clients, asked, ("about apples", "about pears"), strict=True):
        said = thought + _section(_call(0, '{"q": "it"}')) + "<|im_end|>"
        calls.append(talk.answer(ChatRequest([user], tools=TOOLS, client=client), said).message["tool_calls"])
    assert calls[0] == calls[1]  # the very same id, name and arguments
    for client, user, own, foreign in zip(clients, asked, ("apples", "pears"), ("pears", "apples"), strict=True):
        history = [user, {"role": "assistant", "content": None, "tool_calls": calls[0]},
                   {"role": "tool", "tool_call_id": calls[0][0]["id"], "content": "yes"}]  # fmt: skip
        talk.answer(ChatRequest(history, tools=TOOLS, client=client), "ok</think>y<|im_end|>")
        text = talk.fmt.tokenizer.decode(talk.prompt)
        assert f"about {own}" in text and f"about {foreign}" not in text


def test_another_key_gets_nothing_back(talk: Talk) -> None:
    said = "secret" + _section(_call(0, '{"q": "it"}')) + "<|im_end|>"
    calls = talk.answer(ChatRequest([USER], tools=TOOLS, client="alice"), said).message["tool_calls"]
    history = [USER, {"role": "assistant", "content": None, "tool_calls": calls},
               {"role": "tool", "tool_call_id": calls[0]["id"], "content": "yes"}]  # fmt: skip
    talk.answer(ChatRequest(history, tools=TOOLS, client="mallory"), "ok</think>y<|im_end|>")
    assert "secret" not in talk.fmt.tokenizer.decode(talk.prompt)


def test_foreign_ids_are_canonical_in_the_prompt(talk: Talk) -> None:
    history = [
        USER,
        {"role": "assistant", "content": None,
         "tool_calls": [{"id": "toolu_1", "type": "function", "function": {"name": "search", "arguments": "{}"}}]},
        {"role": "tool", "tool_call_id": "toolu_1", "content": "yes"},
    ]  # fmt: skip
    said = "x" + _section(_call(1, '{"q": "b"}')) + "<|im_end|>"
    answer = talk.answer(ChatRequest(history, tools=TOOLS), said)
    assert "functions.search:0" in talk.fmt.tokenizer.decode(talk.prompt)
    assert [call["id"] for call in answer.message["tool_calls"]] == ["functions.search:1"]


def test_special_tokens_that_mean_nothing_are_no_text(talk: Talk) -> None:
    said = (
        "Re<|media_begin|>ason[UNK].</think>On<|end_header_id|>e <|reserved_token_4000|>two[PAD]<|im_user|>.<|im_end|>"
    )
    answer = talk.answer(ChatRequest([USER], stop=["two."]), said)
    assert answer.message["reasoning_content"] == "Reason." and answer.message["content"] == "One "
    assert answer.stop_string == "two."
    assert talk.fmt.tokenizer.special_ids["[PAD]"] in answer.token_ids  # they were drawn, and count


def test_stop_strings_end_the_content_and_do_not_show(talk: Talk) -> None:
    chat = ChatRequest([USER], stop=["STOP", "\n\n"])
    [answer], [deltas] = talk.answers(chat, "no STOP here</think>One STOP two<|im_end|>")
    assert answer.message["content"] == "One " and answer.finish_reason == "stop" and answer.stop_string == "STOP"
    assert "".join(delta.get("content", "") for delta in deltas) == "One "
    assert "two" not in talk.fmt.tokenizer.decode(answer.token_ids)  # the engine has stopped there, too


def test_deltas_add_up_to_the_message(talk: Talk) -> None:
    said = "über 漢字</think>Größe 🏔 ok" + _section(_call(0, '{"q": "é"}'), _call(1, '{"q": "b"}')) + "<|im_end|>"
    [answer], [deltas] = talk.answers(ChatRequest([USER], tools=TOOLS), said)
    for key in ("reasoning_content", "content"):
        assert "".join(delta.get(key, "") for delta in deltas) == answer.message[key]
    pieces = [call for delta in deltas for call in delta.get("tool_calls", ())]
    for index, call in enumerate(answer.message["tool_calls"]):
        own = [piece for piece in pieces if piece["index"] == index]
        assert own[0]["id"] == call["id"] and own[0]["function"]["name"] == "search"
        assert "".join(piece["function"]["arguments"] for piece in own) == call["function"]["arguments"]


def test_choices_have_their_own_ids_and_seeds(talk: Talk) -> None:
    from karakoram.engine.request import Sampling

    answers, _ = talk.answers(ChatRequest([USER], n=3, sampling=Sampling(seed=7)), "a</think>b<|im_end|>")
    assert [answer.request.id for answer in answers] == ["r-0", "r-1", "r-2"]
    assert len({answer.request.sampling.seed for answer in answers}) == 3
    assert all(answer.request.prompt is answers[0].request.prompt for answer in answers)


def test_a_partial_message_is_continued(talk: Talk) -> None:
    partial = {"role": "assistant", "content": "The answer is", "partial": True}
    answer = talk.answer(ChatRequest([USER, partial]), " 42.<|im_end|>")
    begun = talk.fmt.encode([USER], thinking=False) + talk.fmt.tokenizer.encode("The answer is")
    assert talk.prompt == begun and answer.message["content"] == " 42."
    with pytest.raises(ChatError, match="partial"):
        talk.session.open(ChatRequest([{**USER, "partial": True}]), "r")


def test_what_does_not_fit_says_both_numbers(fmt: ChatFormat) -> None:
    talk = Talk(fmt, context=40)
    with pytest.raises(ContextOverflow, match="context ends at 40") as caught:
        talk.session.open(ChatRequest([USER], max_new_tokens=100), "r")
    assert caught.value.context == 40 and caught.value.wanted == len(talk.session.encode(ChatRequest([USER]))) + 100
    [answer] = talk.session.open(ChatRequest([USER]), "r")
    assert answer.request.max_new_tokens == 40 - len(answer.request.prompt)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"n": 0}, "n is 0"),
        ({"n": 1000}, "n is 1000"),
        ({"stop": ["x" * 1000]}, "1000 characters"),
        ({"stop": [""]}, "stop has"),
        ({"max_new_tokens": 0}, "max_tokens is 0"),
        ({"tool_choice": "required"}, "no tools"),
        ({"tools": TOOLS, "tool_choice": "named", "named_tool": "find"}, "'find'"),
        ({"tools": [*TOOLS, *TOOLS]}, "declared twice"),
        ({"tools": TOOLS, "tool_choice": "required", "max_new_tokens": 3}, "Allow at least"),
    ],
)
def test_wrong_requests_say_what_is_wrong(talk: Talk, wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        talk.session.open(ChatRequest([USER], **wrong), "r")


def test_a_schema_that_cannot_be_enforced_names_the_keyword(talk: Talk) -> None:
    function = {"name": "f", "parameters": {"type": "object", "properties": {"a": {"not": {"type": "string"}}}}}
    with pytest.raises(SchemaError) as caught:
        talk.session.open(ChatRequest([USER], tools=[{"type": "function", "function": function}]), "r")
    assert caught.value.keyword == "not"
    loose = {"type": "function", "function": {**function, "strict": False}}
    [answer] = talk.session.open(ChatRequest([USER], tools=[loose]), "r")
    assert answer.request.constraint is not None


def test_free_text_has_no_constraint_but_no_calls_either(talk: Talk) -> None:
    [answer] = talk.session.open(ChatRequest([USER]), "r")
    special = talk.fmt.tokenizer.special_ids
    assert answer.request.constraint is None
    assert set(answer.request.banned) == {special["<|tool_calls_section_begin|>"], special["<|tool_call_begin|>"]}


def test_invalid_calls_are_counted(talk: Talk) -> None:
    # The scripted engine writes what the constraint would not allow.
    talk.answer(ChatRequest([USER]), "x</think>y<|im_end|>")
    assert talk.session.invalid_calls == 0


def test_an_answer_that_was_cut_off_is_not_kept(talk: Talk) -> None:
    answer = talk.answer(ChatRequest([USER], max_new_tokens=2), "one two three four</think>five<|im_end|>")
    assert answer.finish_reason == "length" and len(talk.session.store) == 0
    talk.answer(ChatRequest([USER]), "one</think>five<|im_end|>")
    assert len(talk.session.store) == 1
