"""What is learned of a conversation: the assistant's words and nothing else, behind the prompts of inference."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from karakoram.chat import ChatFormat
from karakoram.chat.dialects import DIALECTS
from karakoram.errors import ChatError
from karakoram.train.data import dialogs
from karakoram.train.data.corpus.conversations import (
    WEIGHT_ONE,
    Rendering,
    Sample,
    conversation_samples,
    samples,
    text_sample,
)
from karakoram.train.data.corpus.records import BadRecord
from karakoram.train.data.documents import Document

TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}


def call(name: str, arguments: str, identity: str | None = None) -> dict[str, Any]:
    return {"id": identity, "type": "function", "function": {"name": name, "arguments": arguments}}


CONVERSATION: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Two lookups, please <|im_end|>"},
    {
        "role": "assistant",
        "content": "First. ",
        "reasoning_content": "THINK A",
        "tool_calls": [call("look", "{}", "x")],
    },
    {"role": "tool", "tool_call_id": "x", "content": "RESULT A"},
    {
        "role": "assistant",
        "content": "",
        "reasoning_content": "THINK B",
        "tool_calls": [call("look", '{"n": 1}', "y"), call("look", '{"n": 2}', "z")],
    },
    {"role": "tool", "tool_call_id": "y", "content": "RESULT B"},
    {"role": "tool", "tool_call_id": "z", "content": "RESULT C"},
    {"role": "assistant", "content": "Both done.", "reasoning_content": "THINK C"},
    {"role": "user", "content": "Thanks"},
    {"role": "assistant", "content": "Welcome.", "reasoning_content": "THINK D"},
]


def spans(sample: Sample) -> list[list[int]]:
    """Runs of tokens that are learned; the end marker closes a run, though the next one may stand behind it."""
    found: list[list[int]] = [[]]
    for token, weight in zip(sample.ids, sample.weights):
        if weight:
            found[-1].append(token)
        elif found[-1]:
            found.append([])
    return [span for span in found if span]


def words(fmt: ChatFormat, message: dict[str, Any], thinking: bool, first_call: int) -> str:
    """What the assistant writes for a message, from the dialect's facts and not from its template."""
    facts, text = fmt.facts, ""
    if facts.think_in_prompt:
        thought = message.get("reasoning_content", "")
        opening, closing = facts.think
        if not facts.think_prefill:
            text = opening + thought + closing
        elif thinking:
            text = thought + closing
    text += message["content"]
    if message.get("tool_calls"):
        text += "<|tool_calls_section_begin|>"
        for number, tool_call in enumerate(message["tool_calls"], first_call):
            body = tool_call["function"]
            text += f"<|tool_call_begin|>functions.{body['name']}:{number}<|tool_call_argument_begin|>"
            text += f"{body['arguments']}<|tool_call_end|>"
        text += "<|tool_calls_section_end|>"
    return text + "<|im_end|>"


@pytest.mark.parametrize("thinking", [True, False])
@pytest.mark.parametrize("dialect", DIALECTS)
def test_exactly_the_assistants_words_are_learned(nano_format: ChatFormat, dialect: str, thinking: bool) -> None:
    fmt = ChatFormat(dialect, nano_format.tokenizer)
    found = conversation_samples(fmt, CONVERSATION, [TOOL], thinking)
    learned = [fmt.tokenizer.decode(span) for sample in found for span in spans(sample)]
    wanted = [words(fmt, CONVERSATION[i], thinking, n) for i, n in ((2, 0), (4, 1), (7, 3), (9, 3))]
    assert learned == wanted
    forgets = fmt.facts.think_in_prompt and (thinking or not fmt.facts.think_prefill)
    assert len(found) == (2 if forgets else 1)
    for sample in found:
        assert set(sample.weights) == {0, WEIGHT_ONE}
        assert "look" in fmt.tokenizer.decode(sample.ids[: sample.weights.index(WEIGHT_ONE)])  # the declaration is read


def check_against_inference(
    fmt: ChatFormat, messages: list[dict[str, Any]], tools: Any, thinking: bool, rendering: Rendering
) -> None:
    """Before each learned span stands the very prompt that inference would give, and no message is learned twice."""
    found = conversation_samples(fmt, messages, tools, thinking, rendering)
    if fmt.facts.think_prefill and not thinking:
        messages = [{key: m[key] for key in m if key != "reasoning_content"} for m in messages]
    prompts = [
        fmt.encode(messages[:i], tools, thinking, rendering.preserve_thinking, tool_ids="canonical")
        for i, message in enumerate(messages)
        if message["role"] == "assistant"
    ]
    starts = [
        sample.ids[:at]
        for sample in found
        for at, weight in enumerate(sample.weights)
        if weight and (at == 0 or not sample.weights[at - 1])
    ]
    assert starts == prompts


@pytest.mark.parametrize("preserve", [True, False])
@pytest.mark.parametrize("thinking", [True, False])
@pytest.mark.parametrize("dialect", DIALECTS)
def test_prompts_are_those_of_inference(nano_format: ChatFormat, dialect: str, thinking: bool, preserve: bool) -> None:
    fmt = ChatFormat(dialect, nano_format.tokenizer)
    check_against_inference(fmt, CONVERSATION, [TOOL], thinking, Rendering(preserve_thinking=preserve))


def test_prompts_of_generated_dialogs(nano_format: ChatFormat) -> None:
    for index in range(60):
        document = dialogs.generate(5, index)
        check_against_inference(nano_format, document.messages, document.tools, document.thinking, Rendering())


TEXTS = st.sampled_from(["", "a", "Well, yes", "<think>", "</think>", "<|im_end|>", "\n", "12 é", " <|im_assistant|>"])


@st.composite
def conversations(draw: st.DrawFn) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = [{"role": "user", "content": draw(TEXTS)}]
    for _ in range(draw(st.integers(1, 5))):
        kind = draw(st.sampled_from(["answer", "call", "user"]))
        if kind == "user":
            messages.append({"role": "user", "content": draw(TEXTS)})
            continue
        message = {"role": "assistant", "content": draw(TEXTS)}
        if draw(st.booleans()):
            message["reasoning_content"] = draw(TEXTS)
        messages.append(message)
        if kind == "call":
            message["tool_calls"] = [call("look", "{}", f"c{len(messages)}")]
            messages.append({"role": "tool", "tool_call_id": f"c{len(messages) - 1}", "content": draw(TEXTS)})
    return messages


@given(messages=conversations(), dialect=st.sampled_from(list(DIALECTS)), thinking=st.booleans(), keep=st.booleans())
def test_prompts_of_any_conversation(
    nano_format: ChatFormat, messages: list[dict[str, Any]], dialect: str, thinking: bool, keep: bool
) -> None:
    fmt = ChatFormat(dialect, nano_format.tokenizer)
    check_against_inference(fmt, messages, None, thinking, Rendering(preserve_thinking=keep))


def test_thoughts_between_calls_are_kept_and_those_of_finished_turns_forgotten(nano_format: ChatFormat) -> None:
    first, second = (nano_format.tokenizer.decode(s.ids) for s in conversation_samples(nano_format, CONVERSATION))
    assert [thought in first for thought in ("THINK A", "THINK B", "THINK C", "THINK D")] == [True, True, True, False]
    assert [thought in second for thought in ("THINK A", "THINK B", "THINK C", "THINK D")] == [
        False,
        False,
        False,
        True,
    ]
    k26 = ChatFormat("kimi-k2.6", nano_format.tokenizer)
    [whole] = conversation_samples(k26, CONVERSATION, rendering=Rendering(preserve_thinking=True))
    assert all(f"THINK {letter}" in nano_format.tokenizer.decode(whole.ids) for letter in "ABCD")


def test_weights_of_messages_and_of_what_is_read(nano_format: ChatFormat) -> None:
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "No", "weight": 0},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yes", "weight": 0.5},
        {"role": "user", "content": "A question that nobody answered"},
    ]
    [sample] = conversation_samples(nano_format, messages, thinking=False, rendering=Rendering(read_weight=0.1))
    text = {w: nano_format.tokenizer.decode([i for i, v in zip(sample.ids, sample.weights) if v == w]) for w in (0, 50)}
    assert text == {0: "No<|im_end|>", 50: "Yes<|im_end|>"}
    assert set(sample.weights) == {0, 10, 50}
    assert "nobody" not in nano_format.tokenizer.decode(sample.ids)
    for weight in (-0.1, 1.5, float("nan"), True, "1"):
        with pytest.raises(ChatError, match="weight"):
            conversation_samples(nano_format, [messages[0], {**messages[1], "weight": weight}])


def test_what_cannot_be_learned_is_refused(nano_format: ChatFormat) -> None:
    image = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}
    for messages, reason in (
        ([{"role": "user", "content": "Hi"}], "no message in it is an assistant's"),
        ([image, {"role": "assistant", "content": "A cat"}], "image"),
        ([{"role": "tool", "content": "1"}, {"role": "assistant", "content": "A"}], "before it"),
        (["Hi"], "must be an object"),
        ([{"role": "user", "content": "Hi"}, {"role": "assistant", "tool_calls": [{}]}], "without a function"),
    ):
        with pytest.raises(BadRecord, match=reason):
            samples(nano_format, Document(messages), Rendering())  # type: ignore[arg-type]


def test_a_text_ends(nano_format: ChatFormat) -> None:
    sample = text_sample(nano_format, "To be <|im_end|>")
    assert nano_format.tokenizer.decode(sample.ids) == "To be <|im_end|>[EOS]"
    assert nano_format.tokenizer.special_ids["<|im_end|>"] not in sample.ids
    assert set(sample.weights) == {WEIGHT_ONE}
