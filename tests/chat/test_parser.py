"""The output parser: official cases under every chunking, deltas that add up, and what the cases leave open."""

import random
from collections.abc import Callable, Iterable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from karakoram.chat import ChatFormat, Tokenizer
from karakoram.chat.parser import OutputParser
from karakoram.errors import ChatError, TokenizerError

Cases = Callable[[str], list[dict[str, Any]]]
Message = dict[str, Any]

SECTION = "<|tool_calls_section_begin|>"
SECTION_END = "<|tool_calls_section_end|>"
BEGIN = "<|tool_call_begin|>"
ARGUMENT = "<|tool_call_argument_begin|>"
END = "<|tool_call_end|>"


def tool(name: str, *parameters: str, required: Iterable[str] = ()) -> dict[str, Any]:
    """A declaration with string parameters."""
    schema = {"type": "object", "properties": {p: {"type": "string"} for p in parameters}, "required": [*required]}
    return {"type": "function", "function": {"name": name, "parameters": schema}}


def read(parser: OutputParser, pieces: Iterable[str] | Iterable[list[int]]) -> Message:
    """Feed the pieces; the message, after checking that the deltas add up to it."""
    deltas: list[dict[str, Any]] = []
    for piece in pieces:
        deltas += parser.feed_text(piece) if isinstance(piece, str) else parser.feed(piece)
    deltas += parser.flush()
    message = parser.finish()
    texts = {"reasoning_content": "", "content": ""}
    calls: list[dict[str, Any]] = []
    for delta in deltas:
        assert len(delta) == 1
        for key in texts.keys() & delta.keys():
            assert delta[key]
            texts[key] += delta[key]
        for part in delta.get("tool_calls", []):
            if part["index"] == len(calls):
                assert part["id"] and part["type"] == "function" and part["function"]["name"]
                calls.append({"id": part["id"], "type": "function", "function": dict(part["function"])})
            else:
                assert part["index"] == len(calls) - 1 and part.keys() == {"index", "function"}
                calls[-1]["function"]["arguments"] += part["function"]["arguments"]
    assert {key: value or None for key, value in texts.items()} == {key: message[key] for key in texts}
    assert calls == [{key: call[key] for key in ("id", "type", "function")} for call in message["tool_calls"]]
    assert message == parser.finish()
    return message


def check(message: Message, expect: dict[str, Any]) -> None:
    """Compare with a golden `expect`; an id of null there is any id that is unique."""
    assert message["reasoning_content"] == expect["reasoning"]
    assert message["content"] == expect["content"]
    assert message["finish_reason"] == expect["finish"]
    found = [(c["id"], c["function"]["name"], c["function"]["arguments"]) for c in message["tool_calls"]]
    wanted = [(c["id"], c["name"], c["arguments"]) for c in expect["tool_calls"]]
    assert [call[1:] for call in found] == [call[1:] for call in wanted]
    assert [f if w is None else w for (f, *_), (w, *_) in zip(found, wanted, strict=True)] == [
        call[0] for call in found
    ]
    assert len({call[0] for call in found}) == len(found)


def cut(text: str, at: Iterable[int]) -> list[str]:
    """`text` cut at the given offsets, taken modulo its length."""
    edges = [0, *sorted(offset % (len(text) + 1) for offset in at), len(text)]
    return [text[a:b] for a, b in zip(edges, edges[1:], strict=False)]


def test_golden_under_every_chunking(small: Tokenizer, golden: Cases) -> None:
    cases = golden("parser")
    assert len(cases) == 65
    for case in cases:
        fmt, text = ChatFormat(case["dialect"], small), case["text"]
        ids = small.encode(text, allow_special=True)
        random_cuts = [cut(text, [random.randrange(len(text)) for _ in range(5)]) for _ in range(10)]
        for pieces in ([text], list(text), [ids], [[i] for i in ids], [ids[:3], ids[3:9], ids[9:]], *random_cuts):
            check(read(fmt.parser(case["tools"], thinking=case["thinking"]), pieces), case["expect"])


def test_golden_with_official_tokens(kimi: Tokenizer, golden: Cases) -> None:
    for case in golden("parser"):
        fmt, ids = ChatFormat(case["dialect"], kimi), kimi.encode(case["text"], allow_special=True)
        for pieces in ([ids], [[token_id] for token_id in ids]):
            check(read(fmt.parser(case["tools"], thinking=case["thinking"]), pieces), case["expect"])


outputs = st.lists(
    st.sampled_from(
        ["<think>", "</think>", SECTION, SECTION_END, BEGIN, ARGUMENT, END, "<|im_end|>", "<|im_user|>", "[EOS]"]
        + ["functions.f:0", "functions.g:1", "3", "call_9", "weird@id", '{"x": "é"}', '{"y": 1', " ", "\n", "text"]
        + ["<|tool", "<", "</thi", "[E", "👩🏽", "{}", "functions_f_2"]
    ),
    max_size=14,
).map("".join)
TOOLS = [tool("f", "x"), tool("g", "y", "z")]


@given(outputs, st.booleans(), st.lists(st.integers(0, 400), max_size=8))
def test_any_text_in_any_chunking(small: Tokenizer, text: str, thinking: bool, at: list[int]) -> None:
    fmt = ChatFormat("kimi-k2.6", small)
    whole = read(fmt.parser(TOOLS, thinking), [text])
    assert read(fmt.parser(TOOLS, thinking), cut(text, at)) == whole
    assert read(fmt.parser(TOOLS, thinking), list(text)) == whole


@given(outputs, st.booleans(), st.integers(1, 9))
def test_any_ids_in_any_chunking(small: Tokenizer, text: str, thinking: bool, size: int) -> None:
    fmt, ids = ChatFormat("kimi-k2.5", small), small.encode(text, allow_special=True)
    whole = read(fmt.parser(TOOLS, thinking), [ids])
    assert read(fmt.parser(TOOLS, thinking), [ids[i : i + size] for i in range(0, len(ids), size)]) == whole
    assert whole == read(fmt.parser(TOOLS, thinking), [text])


ALL_MARKERS = ["<think>", "</think>", SECTION, SECTION_END, BEGIN, ARGUMENT, END, "<|im_end|>", "<|im_user|>", "[EOS]"]


@given(st.lists(st.sampled_from([*ALL_MARKERS, "functions.f:0", "call_9", '{"x": 1', " ", "text"])), st.booleans())
def test_no_marker_leaks_and_every_call_is_whole(small: Tokenizer, pieces: list[str], thinking: bool) -> None:
    message = read(ChatFormat("kimi-k2.5", small).parser(TOOLS, thinking), ["".join(pieces)])
    shown = (message["reasoning_content"] or "") + (message["content"] or "")
    assert not any(marker in shown for marker in ALL_MARKERS)
    for call in message["tool_calls"]:
        assert call["function"]["arguments"].strip() == call["function"]["arguments"] != ""


@given(
    st.sampled_from(["kimi-k2", "kimi-k2-thinking", "kimi-k2.5", "kimi-k2.6", "kimi-vl-thinking"]),
    st.text(st.characters(codec="utf-8", exclude_characters="<[◁"), max_size=20),
    st.text(st.characters(codec="utf-8", exclude_characters="<[◁"), max_size=20),
    st.lists(st.sampled_from(['{"x": "é"}', "{}", "[1]", '{"x": {"y": "<think>"}}']), max_size=3),
)
def test_what_is_rendered_is_read_back(
    small: Tokenizer, dialect: str, reasoning: str, content: str, arguments: list[str]
) -> None:
    fmt = ChatFormat(dialect, small)
    calls = [
        {"id": f"functions.f:{number}", "type": "function", "function": {"name": "f", "arguments": text}}
        for number, text in enumerate(arguments)
    ]
    answer = {"role": "assistant", "content": content, "reasoning_content": reasoning, "tool_calls": calls}
    user = {"role": "user", "content": "Hi"}
    prompt = fmt.encode([user])
    ids = fmt.encode([user, answer], add_generation_prompt=False)[len(prompt) :]
    # A plain answer is history, which is rendered without its reasoning.
    kept = reasoning if calls and fmt.facts.think_in_prompt else ""
    parser = fmt.parser(TOOLS)
    message = read(parser, [[token_id] for token_id in ids])
    assert parser.stopped
    assert message["reasoning_content"] == (kept or None)
    assert message["content"] == (content or None)
    assert message["tool_calls"] == calls


def test_ids_decide_what_is_a_marker(kimi: Tokenizer) -> None:
    fmt = ChatFormat("kimi-k2.5", kimi)
    ids = kimi.encode(f"Write </think> or {BEGIN} as text")
    message = read(fmt.parser(thinking=False), [[token_id] for token_id in ids])
    assert message["content"] == f"Write </think> or {BEGIN} as text"
    arguments = kimi.encode(f'{{"x": "{END} and <|im_end|>"}}')
    special = kimi.special_ids
    ids = [special[BEGIN], *kimi.encode("functions.f:0"), special[ARGUMENT], *arguments, special[END]]
    call = read(fmt.parser(TOOLS, thinking=False), [[i] for i in ids])["tool_calls"][0]
    assert call["function"]["arguments"] == f'{{"x": "{END} and <|im_end|>"}}'


def test_stops_at_either_end_token(small: Tokenizer) -> None:
    fmt = ChatFormat("kimi-k2.5", small)
    for marker in ("[EOS]", "<|im_end|>"):
        parser = fmt.parser(thinking=False)
        assert parser.feed(small.encode("ab")) == [{"content": "ab"}]
        assert not parser.stopped
        assert parser.feed([small.special_ids[marker], *small.encode("cd")]) == []
        assert parser.stopped
        assert parser.feed(small.encode("ef<|im_end|>gh", allow_special=True)) == []
        assert parser.finish()["content"] == "ab"


def test_characters_split_over_tokens_are_held(small: Tokenizer) -> None:
    parser = ChatFormat("kimi-k2", small).parser()
    spread = [parser.feed([byte]) for byte in "é你".encode()]
    assert spread == [[], [{"content": "é"}], [], [], [{"content": "你"}]]
    assert parser.feed([0xE4, 0xBD]) == []
    assert parser.flush() == [{"content": "\ufffd"}]
    assert parser.finish()["content"] == "é你\ufffd"


def test_first_delta_of_a_call_names_it(small: Tokenizer) -> None:
    parser = ChatFormat("kimi-k2", small).parser(TOOLS)
    assert parser.feed_text(f"{SECTION}{BEGIN} functions.f") == []
    assert parser.feed_text(f":7 {ARGUMENT}") == [
        {
            "tool_calls": [
                {"index": 0, "id": "functions.f:7", "type": "function", "function": {"name": "f", "arguments": ""}}
            ]
        }
    ]
    assert parser.feed_text(' {"x": ') == [{"tool_calls": [{"index": 0, "function": {"arguments": '{"x":'}}]}]
    assert parser.feed_text("1} ") == [{"tool_calls": [{"index": 0, "function": {"arguments": " 1}"}}]}]
    assert parser.feed_text(f"\n{END}") == []
    assert parser.finish()["tool_calls"][0]["function"] == {"name": "f", "arguments": '{"x": 1}'}


@pytest.mark.parametrize(
    ("tail", "arguments", "incomplete"),
    [
        (f'{ARGUMENT}{{"x": "Pa', '{"x": "Pa', True),
        (f'{ARGUMENT}{{"x": "Pa<|im_end|>', '{"x": "Pa', True),
        (ARGUMENT, "{}", True),
        (f'{ARGUMENT}{{"x": "Pa"}} ', '{"x": "Pa"}', False),  # only the end marker is missing
        (f'{ARGUMENT}{{"x": "Pa{END}', '{"x": "Pa', False),  # the model closed it itself
        (f'{ARGUMENT}{{"x": "Pa{SECTION_END}', '{"x": "Pa', False),
        (SECTION_END, "{}", False),
    ],
)
def test_cut_off_calls(small: Tokenizer, tail: str, arguments: str, incomplete: bool) -> None:
    parser = ChatFormat("kimi-k2", small).parser(TOOLS)
    parser.feed_text(f"{SECTION}{BEGIN}functions.f:0{tail}")
    message = parser.finish("length")
    (call,) = message["tool_calls"]
    assert call["function"]["arguments"] == arguments
    assert call.get("incomplete", False) == incomplete
    assert message["finish_reason"] == "length"


def call_of(small: Tokenizer, header: str, arguments: str = '{"y": 1}', tools: Any = TOOLS) -> Any:
    """(id, name) of the one call with this header, None if it was skipped."""
    parser = ChatFormat("kimi-k2.5", small).parser(tools, thinking=False)
    parser.feed_text(f"{SECTION}{BEGIN}{header}{ARGUMENT}{arguments}{END}{SECTION_END}")
    calls = parser.finish()["tool_calls"]
    return (calls[0]["id"], calls[0]["function"]["name"]) if calls else None


def test_headers(small: Tokenizer) -> None:
    long = [tool("get", "a"), tool("get_weather", "city", required=["city"]), tool("now")]
    assert call_of(small, "functions.मौसम:12") == ("functions.मौसम:12", "मौसम")
    assert call_of(small, "functions.a.b-c/d:0") == ("functions.a.b-c/d:0", "a.b-c/d")
    assert call_of(small, "$web_search:0", tools=None) == ("$web_search:0", "$web_search")
    assert call_of(small, " functions . g : 4 ") == ("functions.g:4", "g")
    assert call_of(small, "functions_get_weather_3", tools=long) == ("functions.get_weather:3", "get_weather")
    assert call_of(small, "functionsget_weather3", tools=long) == ("functions.get_weather:3", "get_weather")
    assert call_of(small, "get_weather", tools=long) == ("functions.get_weather:0", "get_weather")
    assert call_of(small, "5") == ("functions.g:5", "g")
    assert call_of(small, "5", '{"x": 1, "y": 2, "z": 3}') == ("functions.g:5", "g")
    assert call_of(small, "5", '{"y": [1, {"x": 2}], "z": "cut') == ("functions.g:5", "g")
    assert call_of(small, "5", "{}", long) is None  # get and now both fit
    assert call_of(small, "5", "{}", [tool("f", "x", required="x"), tool("now")]) == ("functions.now:5", "now")
    assert call_of(small, "5", "not json") is None
    assert call_of(small, "5", tools=None) is None
    assert call_of(small, "call_9") == ("functions.g:0", "g")
    assert call_of(small, "weird@id") is None
    assert call_of(small, "functions.unknown", tools=TOOLS) is None
    assert call_of(small, "functionsunknown7") is None
    assert call_of(small, "") is None
    assert call_of(small, "9" * 5000) == ("functions.g:0", "g")


def test_new_ids_are_unique_and_continue_the_conversation(small: Tokenizer) -> None:
    one = [tool("f", "x")]
    foreign = f"{BEGIN}call_9{ARGUMENT}{{}}{END}"
    text = f"{SECTION}{BEGIN}functions.f:1{ARGUMENT}{{}}{END}{foreign}{foreign}{SECTION_END}"
    fmt = ChatFormat("kimi-k2.5", small)
    for first_index, expected in ((0, [1, 2, 3]), (4, [1, 5, 6])):
        parser = fmt.parser(one, thinking=False, first_index=first_index)
        parser.feed_text(text)
        assert [call["id"] for call in parser.finish()["tool_calls"]] == [f"functions.f:{n}" for n in expected]


def test_kimi_vl_thinking_markers(small: Tokenizer) -> None:
    fmt = ChatFormat("kimi-vl-thinking", small)
    text = "◁think▷Why◁/think▷Because ◁thin"
    for pieces in ([text], list(text), [[i] for i in small.encode(text)]):
        message = read(fmt.parser(), pieces)
        assert (message["reasoning_content"], message["content"]) == ("Why", "Because ◁thin")
    assert read(fmt.parser(), ["Just an answer"])["content"] == "Just an answer"


def test_markers_that_the_tokenizer_lacks_are_matched_as_text(without_think: Tokenizer) -> None:
    fmt = ChatFormat("kimi-k2-thinking", without_think)
    ids = without_think.encode(f"<think>R</think>A{SECTION}{BEGIN}functions.f:0{ARGUMENT}{{}}{END}", allow_special=True)
    message = read(fmt.parser(), [[token_id] for token_id in ids])
    assert (message["reasoning_content"], message["content"]) == ("R", "A")
    assert message["tool_calls"][0]["id"] == "functions.f:0"
    # A tool marker that exists as a token is still a marker only as that token.
    spelled = without_think.encode(f"<think>R</think>{BEGIN}")
    assert read(fmt.parser(), [spelled])["content"] == BEGIN


def test_thinking_dialects_start_in_reasoning(small: Tokenizer) -> None:
    for dialect in ("kimi-k2-thinking", "kimi-k2.5", "kimi-k2.6"):
        assert ChatFormat(dialect, small).parser().feed_text("x") == [{"reasoning_content": "x"}]
        assert ChatFormat(dialect, small).parser(thinking=False).feed_text("x") == [{"content": "x"}]
    for dialect in ("kimi-k2", "moonlight", "kimi-vl"):
        assert ChatFormat(dialect, small).parser().feed_text("x") == [{"content": "x"}]


def test_misuse(small: Tokenizer) -> None:
    parser = ChatFormat("kimi-k2", small).parser()
    with pytest.raises(TokenizerError, match="outside the vocabulary"):
        parser.feed([97, small.n_vocab])
    parser.feed([98])
    with pytest.raises(ChatError, match="both token ids and text"):
        parser.feed_text("x")
    assert parser.finish()["content"] == "b"
    with pytest.raises(ChatError, match="finished"):
        parser.feed([97])


def test_long_outputs_take_linear_time(small: Tokenizer) -> None:
    spaces = " " * 200_000
    text = f'{SECTION}{BEGIN}functions.f:0{ARGUMENT}{spaces}{{"x":{spaces}1}}{spaces}{END}'
    parser = ChatFormat("kimi-k2", small).parser(TOOLS)
    for start in range(0, len(text), 50):
        parser.feed_text(text[start : start + 50])
    assert len(parser.finish()["tool_calls"][0]["function"]["arguments"]) == len(spaces) + 7
