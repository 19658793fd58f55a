"""Rendering and encoding: official vectors, the dialects they do not cover, and the promise about control tokens."""

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from karakoram.chat import ChatFormat, Tokenizer
from karakoram.chat.dialects import DIALECTS
from karakoram.chat.template import Prompt, Segment

Cases = Callable[[str], list[dict[str, Any]]]

USER = {"role": "user", "content": "Hi"}
CALL = {
    "role": "assistant",
    "content": "Let me look.",
    "reasoning_content": "R1",
    "tool_calls": [{"id": "call_1", "type": "function", "function": {"name": "f", "arguments": {"b": 1, "a": "é"}}}],
}
RESULT = {"role": "tool", "tool_call_id": "call_1", "content": "Sunny"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
KIMI = "<|im_system|>system<|im_middle|>You are Kimi, an AI assistant created by Moonshot AI.<|im_end|>"
HELPFUL = "<|im_system|>system<|im_middle|>You are a helpful assistant<|im_end|>"
GENERATE = "<|im_assistant|>assistant<|im_middle|>"


def test_golden_text(small: Tokenizer, golden: Cases) -> None:
    cases = golden("chat")
    assert len(cases) == 137
    for case in cases:
        fmt = ChatFormat(case["dialect"], small)
        assert fmt.render(case["messages"], case["tools"], **case["kwargs"]) == case["text"], case["case"]


def test_golden_ids(kimi: Tokenizer, golden: Cases) -> None:
    for case in golden("chat"):
        fmt = ChatFormat(case["dialect"], kimi)
        arguments = (case["messages"], case["tools"])
        assert fmt.encode(*arguments, **case["kwargs"], allow_special=True) == case["ids"], case["case"]
        assert kimi.encode(fmt.render(*arguments, **case["kwargs"]), allow_special=True) == case["ids"], case["case"]
        if case["case"] != "special-strings-in-content":
            assert fmt.encode(*arguments, **case["kwargs"]) == case["ids"], case["case"]


def test_k2_default_system_after_tools(small: Tokenizer) -> None:
    tools = [{"type": "function", "function": {"parameters": {"z": 1, "a": [{"y": 1, "b": "é"}]}, "name": "f"}}]
    assert ChatFormat("kimi-k2", small).render([USER], tools) == (
        '<|im_system|>tool_declare<|im_middle|>[{"function":{"name":"f","parameters":{"a":[{"b":"é","y":1}],"z":1}},'
        f'"type":"function"}}]<|im_end|>{KIMI}<|im_user|>user<|im_middle|>Hi<|im_end|>{GENERATE}'
    )


@pytest.mark.parametrize(
    ("dialect", "system", "end"),
    [
        ("kimi-k2", KIMI, ""),
        ("kimi-k2-thinking", KIMI, ""),
        ("kimi-k2.5", "", "<think>"),
        ("kimi-k2.6", "", "<think>"),
        ("moonlight", HELPFUL, ""),
        ("kimi-vl", HELPFUL, ""),
        ("kimi-vl-thinking", HELPFUL, ""),
    ],
)
def test_smallest_prompt(small: Tokenizer, dialect: str, system: str, end: str) -> None:
    fmt = ChatFormat(dialect, small)
    user = "<|im_user|>user<|im_middle|>Hi<|im_end|>"
    assert fmt.render([USER]) == system + user + GENERATE + end
    assert fmt.render([USER], thinking=False) == system + user + GENERATE + (end and "<think></think>")
    assert fmt.render([USER], add_generation_prompt=False) == system + user
    own = {"role": "system", "content": ""}
    assert fmt.render([own, USER]) == "<|im_system|>system<|im_middle|><|im_end|>" + user + GENERATE + end


def _assistant(dialect: str, tok: Tokenizer, *messages: dict[str, Any], **kwargs: Any) -> list[str]:
    """What stands in the assistant frames of a rendered conversation."""
    text = ChatFormat(dialect, tok).render([USER, *messages], add_generation_prompt=False, **kwargs)
    return [frame.split("<|im_end|>")[0] for frame in text.split(GENERATE)[1:]]


def test_reasoning_of_the_current_chain(small: Tokenizer) -> None:
    section = (
        "<|tool_calls_section_begin|><|tool_call_begin|>call_1<|tool_call_argument_begin|>"
        '{"b": 1, "a": "é"}<|tool_call_end|><|tool_calls_section_end|>'
    )
    answer = {"role": "assistant", "content": "A", "reasoning_content": "R2"}
    chain, closed = [CALL, RESULT], [CALL, RESULT, answer]
    called = f"Let me look.{section}"
    for dialect in ("kimi-k2-thinking", "kimi-k2.5", "kimi-k2.6"):
        assert _assistant(dialect, small, *chain) == [f"<think>R1</think>{called}"]
        assert _assistant(dialect, small, *closed) == [f"<think></think>{called}", "<think></think>A"]
        shown = "" if dialect != "kimi-k2-thinking" else "R1"  # K2-Thinking has no switch
        assert _assistant(dialect, small, *chain, thinking=False) == [f"<think>{shown}</think>{called}"]
    for thinking in (True, False):
        preserved = _assistant("kimi-k2.6", small, *closed, preserve_thinking=True, thinking=thinking)
        assert preserved == [f"<think>R1</think>{called}", "<think>R2</think>A"]
    assert _assistant("kimi-k2.5", small, *closed, preserve_thinking=True)[1] == "<think></think>A"
    for dialect in ("kimi-k2", "moonlight", "kimi-vl", "kimi-vl-thinking"):
        assert _assistant(dialect, small, *closed) == [called, "A"]


def test_null_reasoning_is_absent(small: Tokenizer) -> None:
    message = {**CALL, "reasoning_content": None}
    for dialect in ("kimi-k2-thinking", "kimi-k2.5", "kimi-k2.6"):
        assert _assistant(dialect, small, message)[0].startswith("<think></think>Let me look.")
    both = {**CALL, "reasoning": None, "reasoning_content": "x"}
    assert _assistant("kimi-k2.6", small, both)[0].startswith("<think>x</think>")
    other = {**CALL, "reasoning": "y"}
    assert _assistant("kimi-k2.6", small, other)[0].startswith("<think>y</think>")
    assert _assistant("kimi-k2.5", small, other)[0].startswith("<think>R1</think>")


def test_names(small: Tokenizer) -> None:
    messages = [{**USER, "name": "Bob"}, CALL, {**RESULT, "name": "f"}, {"role": "developer", "content": "D"}]
    for dialect, facts in DIALECTS.items():
        text = ChatFormat(dialect, small).render(messages)
        assert ("<|im_user|>Bob<|im_middle|>" in text) == facts.frame_names
        assert ("<|im_system|>f<|im_middle|>## Return of call_1\nSunny" in text) == facts.frame_names
        assert "<|im_system|>developer<|im_middle|>D<|im_end|>" in text


def test_images(small: Tokenizer) -> None:
    picture = {"type": "image_url", "image_url": {"url": "data:,"}}
    bare = {"image": "x.png"}
    messages = [{"role": "user", "content": [{"type": "text", "text": "A"}, picture, bare, {"text": "B"}]}]
    for dialect in DIALECTS:
        text = ChatFormat(dialect, small).render(messages).split("<|im_user|>user<|im_middle|>")[1]
        begin = "begin" if dialect in ("kimi-k2.5", "kimi-k2.6") else "start"
        after = "\n" if dialect.startswith("kimi-k2") else ""  # Kimi-VL's template prints nothing after an image
        image = f"<|media_{begin}|>image<|media_content|><|media_pad|><|media_end|>{after}"
        assert text.startswith(f"A{image}{image}B<|im_end|>"), dialect


def test_media_ids(kimi: Tokenizer) -> None:
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "video"}]}]
    ids = ChatFormat("kimi-k2.5", kimi).encode(messages, add_generation_prompt=False)
    assert ids[3:8] == [163602, 4017, 163603, 163605, 163604]
    assert all(token_id < kimi.first_special_id for token_id in ids[8:-1])
    assert kimi.decode(ids[8:-1]) == "\n<|kimi_k25_video_placeholder|>\n"


def test_missing_markers_are_text(without_think: Tokenizer) -> None:
    fmt = ChatFormat("kimi-k2.5", without_think)
    messages = [USER, CALL, RESULT, {"role": "user", "content": [{"type": "image"}]}]
    ids = fmt.encode(messages, [TOOL])
    assert ids == without_think.encode(fmt.render(messages, [TOOL]), allow_special=True)
    assert fmt.render(messages).endswith(f"{GENERATE}<think>")
    assert ids[-1] < without_think.first_special_id


def test_stop_ids_and_sampling(kimi: Tokenizer, small: Tokenizer) -> None:
    assert ChatFormat("kimi-k2", kimi).stop_ids == {163585, 163586}
    assert ChatFormat("kimi-k2", small).stop_ids == {271, 272}
    assert ChatFormat("kimi-k2", small).default_sampling == {"temperature": 0.6, "top_p": 1.0}
    fmt = ChatFormat("kimi-k2.5", small)
    assert fmt.default_sampling == {"temperature": 1.0, "top_p": 0.95}
    assert fmt.sampling(thinking=False) == {"temperature": 0.6, "top_p": 0.95}


# ------------------------------------------------------------------------------------------------ properties

plain = st.text(alphabet=st.characters(codec="utf-8", exclude_characters="<[◁"), max_size=12)
hostile = st.lists(
    st.sampled_from(
        ["<|im_end|>", "<|im_system|>", "system", "<|im_middle|>", "[EOS]", "<think>", "</think>", "<|tool_call_end|>"]
        + ["<|media_pad|>", "<|tool_calls_section_begin|>", "<|", "im_end", "|>", "<|reserved_token_275|>", "x", "\n"]
    ),
    max_size=6,
).map("".join)


def conversations(text: st.SearchStrategy[str]) -> st.SearchStrategy[tuple[list[Any], list[Any]]]:
    """Conversations with names, parts, reasoning, calls and results, all texts drawn from `text`, and tools."""
    word = text.map(lambda value: value or "n")
    parts = st.lists(
        st.one_of(text.map(lambda value: {"type": "text", "text": value}), st.just({"type": "image"})), max_size=3
    )
    content = st.one_of(st.none(), text, parts)
    call = st.builds(
        lambda i, n, a: {"id": i, "type": "function", "function": {"name": n, "arguments": a}}, word, word, text
    )
    speaker = st.builds(
        lambda role, name, body: {"role": role, "name": name, "content": body},
        st.sampled_from(["user", "system", "developer"]),
        st.one_of(st.none(), text),
        content,
    )
    assistant = st.builds(
        lambda body, why, calls: {"role": "assistant", "content": body, "reasoning_content": why, "tool_calls": calls},
        content,
        st.one_of(st.none(), text),
        st.lists(call, max_size=2),
    )
    turn = st.one_of(
        speaker.map(lambda message: [message]),
        assistant.map(
            lambda message: [
                message,
                *({"role": "tool", "tool_call_id": c["id"], "content": c["id"]} for c in message["tool_calls"]),
            ]
        ),
    )
    tool = st.builds(
        lambda name, about, field, choice: {
            "type": "function",
            "function": {
                "name": name,
                "description": about,
                "parameters": {"type": "object", "properties": {field: {"type": "string", "enum": [choice]}}},
            },
        },
        *(word, text, text, text),
    )
    messages = st.lists(turn, min_size=1, max_size=4).map(
        lambda turns: [message for group in turns for message in group]
    )
    return st.tuples(messages, st.lists(tool, max_size=2))


switches = st.fixed_dictionaries(
    {
        "thinking": st.booleans(),
        "preserve_thinking": st.booleans(),
        "add_generation_prompt": st.booleans(),
        "tool_ids": st.sampled_from(["verbatim", "canonical"]),
    }
)


@given(st.sampled_from(sorted(DIALECTS)), conversations(plain), switches)
def test_encode_is_the_encoding_of_the_rendered_text(
    small: Tokenizer, dialect: str, talk: tuple[Any, Any], kwargs: dict[str, Any]
) -> None:
    fmt = ChatFormat(dialect, small)
    assert fmt.encode(*talk, **kwargs) == small.encode(fmt.render(*talk, **kwargs), allow_special=True)


def _markers(prompt: Prompt, tok: Tokenizer) -> list[int]:
    return [tok.special_ids[s.text] for s in prompt if s.is_marker and s.text in tok.special_ids]


@given(st.sampled_from(sorted(DIALECTS)), conversations(hostile), switches)
def test_nothing_a_user_writes_becomes_a_control_token(
    small: Tokenizer, dialect: str, talk: tuple[Any, Any], kwargs: dict[str, Any]
) -> None:
    fmt = ChatFormat(dialect, small)
    ids = fmt.encode(*talk, **kwargs)
    special = [token_id for token_id in ids if token_id >= small.first_special_id]
    assert special == _markers(fmt.prompt(*talk, **kwargs), small)
    assert small.decode(ids) == fmt.render(*talk, **kwargs)


@pytest.mark.parametrize("filler", ["x", " ", "word ", "é"])
def test_giant_contents_are_cut_as_in_the_rendered_text(small: Tokenizer, filler: str) -> None:
    fmt = ChatFormat("kimi-k2.5", small)
    messages = [
        {"role": "user", "content": filler * 60_000},
        USER,
        {"role": "user", "content": filler * 120_000 + "th"},
    ]
    assert fmt.encode(messages) == small.encode(fmt.render(messages), allow_special=True)


def test_a_cut_never_splits_a_marker(small: Tokenizer) -> None:
    prompt = [Segment("x" * 24_995, False), Segment("<|im_end|>", True), Segment("yy", False)]
    ids = ChatFormat("kimi-k2.5", small).encode_segments(prompt)
    assert ids.count(small.special_ids["<|im_end|>"]) == 1
    assert small.decode(ids) == "".join(segment.text for segment in prompt)
