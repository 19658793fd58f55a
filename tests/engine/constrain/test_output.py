"""Whole outputs: what each phase allows, what is owed, what is forced, and when there is no mask at all."""

import json
import re
from typing import Any

import numpy as np
import pytest

from karakoram.chat.dialects import (
    ARGUMENT_BEGIN,
    CALL_BEGIN,
    CALL_END,
    EOS,
    IM_END,
    IM_USER,
    SECTION_BEGIN,
    SECTION_END,
)
from karakoram.chat.format import ChatFormat
from karakoram.engine.constrain.output import Compiler, OutputConstraint
from karakoram.engine.constrain.shape import OutputShape, ToolShape
from karakoram.errors import InputError, KarakoramError
from tests.engine.constrain.writing import Setting, allowed, calls_of, check_calls, write

WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "unit": {"enum": ["celsius", "fahrenheit"]}},
    "required": ["city"],
}
TOOLS = (ToolShape("get_weather", WEATHER), ToolShape("get_time", {"type": "object"}), ToolShape("get", {}))
ANSWER = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}


def mask(setting: Setting, constraint: OutputConstraint, left: int = 1000) -> set[int] | None:
    """The tokens that may come; None without a mask."""
    row = np.zeros(-(-setting.vocab_size // 32), np.uint32)
    return set(allowed(row).tolist()) if constraint.fill(row, left) else None


def marks(setting: Setting, *names: str) -> set[int]:
    return {setting.special(name) for name in names}


def everything(setting: Setting) -> set[int]:
    return set(range(setting.fmt.tokenizer.n_vocab))


def take(setting: Setting, constraint: OutputConstraint, *parts: str) -> None:
    """Markers by name, other text by its tokens; each token must be allowed."""
    for part in parts:
        special = setting.fmt.tokenizer.special_ids.get(part)
        for token in [special] if special is not None else setting.fmt.tokenizer.encode(part):
            may = mask(setting, constraint)
            assert may is None or token in may, setting.text([token])
            constraint.accept(token)


STOPS = (EOS, IM_END)

# ------------------------------------------------------------------------------------------------ free text


@pytest.mark.parametrize("in_reasoning", [False, True])
def test_free_text_without_tools_has_no_mask(thinking: Setting, in_reasoning: bool) -> None:
    constraint = thinking.compiler.compile(OutputShape(in_reasoning=in_reasoning))
    assert constraint.shortest == 1 and constraint.complete
    assert write(thinking, constraint, 200, seed=1).masked == 0


def test_none_takes_away_the_begin_of_calls_and_nothing_else(thinking: Setting) -> None:
    for tools in ((), TOOLS):
        shape = OutputShape(tools=tools, tool_choice="none", in_reasoning=True)
        constraint = thinking.compiler.compile(shape)
        free = everything(thinking) - marks(thinking, SECTION_BEGIN, CALL_BEGIN)
        assert mask(thinking, constraint) == free
        take(thinking, constraint, "hm", "</think>")
        assert mask(thinking, constraint) == free
        take(thinking, constraint, "hi", IM_END)
        assert constraint.shortest == 1 and mask(thinking, constraint) == marks(thinking, *STOPS)


def test_auto_leaves_content_free_but_for_bare_calls(setting: Setting) -> None:
    constraint = setting.compiler.compile(OutputShape(tools=TOOLS))
    assert constraint.shortest == 1 and constraint.complete
    assert mask(setting, constraint) == everything(setting) - marks(setting, CALL_BEGIN)
    take(setting, constraint, "I will look.", SECTION_BEGIN)
    assert not constraint.complete
    assert mask(setting, constraint) == marks(setting, CALL_BEGIN)


def test_auto_offers_no_section_that_does_not_fit(setting: Setting) -> None:
    constraint = setting.compiler.compile(OutputShape(tools=TOOLS))
    section = setting.compiler.compile(OutputShape(tools=TOOLS, tool_choice="required")).shortest
    assert setting.special(SECTION_BEGIN) in (mask(setting, constraint, section) or ())
    assert setting.special(SECTION_BEGIN) not in (mask(setting, constraint, section - 1) or ())


# ------------------------------------------------------------------------------------------------ calls


def test_a_section_step_by_step(setting: Setting) -> None:
    shape = OutputShape(tools=TOOLS, tool_choice="required", first_index=7)
    constraint = setting.compiler.compile(shape)
    assert mask(setting, constraint) == marks(setting, SECTION_BEGIN)
    take(setting, constraint, SECTION_BEGIN, CALL_BEGIN, "functions.get_weather:7")
    assert mask(setting, constraint) == marks(setting, ARGUMENT_BEGIN)
    take(setting, constraint, ARGUMENT_BEGIN, '{"city": "Bern", "unit": "celsius"}')
    assert mask(setting, constraint) == marks(setting, CALL_END)
    take(setting, constraint, CALL_END)
    assert mask(setting, constraint) == marks(setting, CALL_BEGIN, SECTION_END)
    take(setting, constraint, CALL_BEGIN, "functions.get:8", ARGUMENT_BEGIN, "{}", CALL_END, SECTION_END)
    assert constraint.complete
    assert mask(setting, constraint) == marks(setting, *STOPS)
    take(setting, constraint, IM_END)
    assert constraint.complete and mask(setting, constraint) == marks(setting, *STOPS)


def test_headers_name_the_tools_and_the_index(setting: Setting) -> None:
    constraint = setting.compiler.compile(OutputShape(tools=TOOLS, tool_choice="required", first_index=10))
    take(setting, constraint, SECTION_BEGIN, CALL_BEGIN, "functions.get")
    texts = {setting.text([token]) for token in mask(setting, constraint) or ()}
    assert texts and all("_weather:10".startswith(t) or "_time:10".startswith(t) or ":10".startswith(t) for t in texts)
    assert {"_", ":"} <= texts


def test_named_calls_only_that_tool(setting: Setting) -> None:
    shape = OutputShape(tools=TOOLS, tool_choice="named", named_tool="get_time")
    for seed in range(10):
        constraint = setting.compiler.compile(shape)
        written = write(setting, constraint, 120, seed)
        assert check_calls(setting, written, shape) >= 1


@pytest.mark.parametrize("parallel", [True, False])
def test_calls_in_parallel_or_one(setting: Setting, parallel: bool) -> None:
    shape = OutputShape(tools=TOOLS, tool_choice="required", parallel=parallel, first_index=98)
    counts = [
        check_calls(setting, write(setting, setting.compiler.compile(shape), 200, seed), shape) for seed in range(25)
    ]
    assert max(counts) > 1 if parallel else counts == [1] * 25


def test_calls_are_bounded(setting: Setting) -> None:
    constraint = setting.compiler.compile(OutputShape(tools=TOOLS, tool_choice="required"))
    take(setting, constraint, SECTION_BEGIN)
    for number in range(128):
        take(setting, constraint, CALL_BEGIN, f"functions.get:{number}", ARGUMENT_BEGIN, "{}", CALL_END)
    assert mask(setting, constraint) == marks(setting, SECTION_END)


def test_no_special_token_inside_arguments(setting: Setting) -> None:
    constraint = setting.compiler.compile(OutputShape(tools=TOOLS, tool_choice="required"))
    take(setting, constraint, SECTION_BEGIN, CALL_BEGIN, "functions.get_weather:0", ARGUMENT_BEGIN)
    special = set(setting.fmt.tokenizer.special_ids.values())
    for piece in ('{"', "city", '": "', "Bern", " <|im_end|> ", '"'):
        assert not (mask(setting, constraint) or set()) & special
        take(setting, constraint, *piece)
    assert not (mask(setting, constraint) or set()) & special
    take(setting, constraint, "}")
    assert mask(setting, constraint) == marks(setting, CALL_END)


def test_a_call_inside_reasoning_ends_it(thinking: Setting) -> None:
    for choice in ("auto", "required"):
        constraint = thinking.compiler.compile(OutputShape(tools=TOOLS, tool_choice=choice, in_reasoning=True))
        take(thinking, constraint, "<think>", "so I call", SECTION_BEGIN)
        assert mask(thinking, constraint) == marks(thinking, CALL_BEGIN)


# ------------------------------------------------------------------------------------------------ reasoning


def test_reasoning_may_not_stop_while_a_call_is_owed(thinking: Setting) -> None:
    shape = OutputShape(tools=TOOLS, tool_choice="required", in_reasoning=True)
    constraint = thinking.compiler.compile(shape)
    assert mask(thinking, constraint) == everything(thinking) - marks(thinking, *STOPS, CALL_BEGIN)
    take(thinking, constraint, "<think>", "a thought", "</think>")
    assert mask(thinking, constraint) == marks(thinking, SECTION_BEGIN)


def test_reasoning_is_closed_when_what_is_owed_needs_the_rest(thinking: Setting) -> None:
    shape = OutputShape(tools=TOOLS, tool_choice="required", in_reasoning=True)
    shortest = thinking.compiler.compile(shape).shortest
    for budget in (shortest, shortest + 1, shortest + 7, 2 * shortest, 150):
        for seed in range(8):
            constraint = thinking.compiler.compile(shape)
            assert check_calls(thinking, write(thinking, constraint, budget, seed), shape) >= 1
    constraint = thinking.compiler.compile(shape)
    assert mask(thinking, constraint, shortest) == marks(thinking, "</think>")
    assert mask(thinking, constraint, shortest + 1) != marks(thinking, "</think>")


@pytest.mark.parametrize("limit", [0, 1, 9])
@pytest.mark.parametrize("opens", [True, False])
def test_reasoning_tokens_are_counted_without_the_markers(thinking: Setting, limit: int, opens: bool) -> None:
    constraint = thinking.compiler.compile(OutputShape(in_reasoning=True, reasoning_tokens=limit))
    if opens and limit:
        take(thinking, constraint, "<think>")
    word = thinking.fmt.tokenizer.encode("a")[0]
    for _ in range(limit):
        assert mask(thinking, constraint) is None
        constraint.accept(word)
    assert mask(thinking, constraint) == marks(thinking, "</think>")
    take(thinking, constraint, "</think>")
    assert mask(thinking, constraint) is None


def test_free_reasoning_is_not_closed_for_the_budget(thinking: Setting) -> None:
    constraint = thinking.compiler.compile(OutputShape(in_reasoning=True))
    assert mask(thinking, constraint, 1) is None


@pytest.fixture(scope="module")
def spelled_markers(nano_tokenizer: Any) -> Setting:
    """Kimi-VL-Thinking's markers, which no tokenizer has as tokens."""
    return Setting.of(ChatFormat("kimi-vl-thinking", nano_tokenizer))


def test_markers_that_are_text_are_spelled(spelled_markers: Setting) -> None:
    setting = spelled_markers
    shape = OutputShape(response=ANSWER, in_reasoning=True, reasoning_tokens=30)
    shortest = setting.compiler.compile(shape).shortest
    for budget in (shortest, shortest + 3, 2 * shortest, 120):
        for seed in range(8):
            written = write(setting, setting.compiler.compile(shape), budget, seed)
            thought, closed, answer = setting.text(written.tokens).partition("◁/think▷")
            assert written.ended and closed and len(setting.fmt.tokenizer.encode(thought)) >= 0
            assert isinstance(json.loads(answer.removesuffix("<|im_end|>").removesuffix("[EOS]"))["n"], int)


def test_a_model_closes_a_marker_of_text_itself(spelled_markers: Setting) -> None:
    constraint = spelled_markers.compiler.compile(OutputShape(response=ANSWER, in_reasoning=True))
    take(spelled_markers, constraint, "so ◁/thin", "k▷")
    take(spelled_markers, constraint, '{"n": 12}')
    assert constraint.complete


# ------------------------------------------------------------------------------------------------ answers


def test_an_answer_satisfies_its_schema(setting: Setting) -> None:
    shape = OutputShape(response=ANSWER)
    shortest = setting.compiler.compile(shape).shortest
    for budget in (shortest, 2 * shortest, 200):
        for seed in range(20):
            written = write(setting, setting.compiler.compile(shape), budget, seed)
            assert written.ended and setting.compiler.compile(shape).shortest == shortest
            value = json.loads(setting.text(written.tokens[:-1]))
            assert isinstance(value["n"], int)


def test_any_json_object(setting: Setting) -> None:
    shape = OutputShape(response={"type": "object"})
    for seed in range(30):
        written = write(setting, setting.compiler.compile(shape), (3, 9, 80)[seed % 3], seed)
        assert written.ended and isinstance(json.loads(setting.text(written.tokens[:-1])), dict)


@pytest.mark.parametrize("schema", [{"type": "array", "items": {"type": "boolean"}}, {"enum": [1, "b", None]}, True])
def test_answers_need_not_be_objects(setting: Setting, schema: Any) -> None:
    for seed in range(10):
        written = write(setting, setting.compiler.compile(OutputShape(response=schema)), 40, seed)
        assert written.ended
        json.loads(setting.text(written.tokens[:-1]))


@pytest.mark.parametrize(
    "pattern",
    [r"(yes|no)", r"[A-Z]{2}-\d{4}", r"\d{1,3}(\.\d{1,3}){3}", r"a*", r"(?:ab|cd)+x?", r"[^\n]{5,900}", r"ü+😀?"],
)
def test_an_answer_matches_a_regular_expression(setting: Setting, pattern: str) -> None:
    shape = OutputShape(response_regex=pattern)
    shortest = setting.compiler.compile(shape).shortest
    for budget in (shortest, shortest + 2, 30, 120):
        for seed in range(6):
            written = write(setting, setting.compiler.compile(shape), max(budget, shortest), seed)
            text = setting.text(written.tokens[:-1])
            assert written.ended and re.fullmatch(pattern, text), text


def test_an_answer_or_calls(setting: Setting) -> None:
    shape = OutputShape(tools=TOOLS, response=ANSWER)
    constraint = setting.compiler.compile(shape)
    assert constraint.shortest == setting.compiler.compile(OutputShape(response=ANSWER)).shortest
    first = mask(setting, constraint) or set()
    assert setting.special(SECTION_BEGIN) in first and not first & marks(setting, *STOPS, CALL_BEGIN)
    take(setting, constraint, "{")
    assert setting.special(SECTION_BEGIN) not in (mask(setting, constraint) or set())
    take(setting, constraint, '"n": 5}')
    assert mask(setting, constraint) == marks(setting, *STOPS)
    called = write(setting, setting.compiler.compile(shape), 100, 3, (SECTION_BEGIN,))
    assert check_calls(setting, called, shape) >= 1


def test_an_answer_after_reasoning_is_not_replaced_by_a_call(thinking: Setting) -> None:
    constraint = thinking.compiler.compile(OutputShape(response=ANSWER, in_reasoning=True))
    free = everything(thinking) - marks(thinking, *STOPS, SECTION_BEGIN, CALL_BEGIN)
    assert mask(thinking, constraint) == free
    take(thinking, constraint, "hm", "</think>")
    assert {thinking.text([token])[0] for token in mask(thinking, constraint) or ()} == {"{"}


# ------------------------------------------------------------------------------------------------ K2, errors


@pytest.mark.shared
def test_k2s_tokens_spell_what_it_was_trained_on(k2: Setting) -> None:
    """The official tokenization of json.dumps, compact and indented, is allowed token by token."""
    value = {"city": "München 日本", "unit": "celsius"}
    for text in (json.dumps(value, ensure_ascii=False), json.dumps(value), json.dumps(value, indent=2)):
        constraint = k2.compiler.compile(OutputShape(tools=TOOLS, tool_choice="required"))
        take(k2, constraint, SECTION_BEGIN, CALL_BEGIN, "functions.get_weather:0", ARGUMENT_BEGIN, text, CALL_END)


@pytest.mark.parametrize(
    ("shape", "says"),
    [
        (OutputShape(tool_choice="required"), "no tools"),
        (OutputShape(tools=TOOLS, tool_choice="named", named_tool="find"), "'find'"),
        (OutputShape(tools=(*TOOLS, TOOLS[0])), "same name"),
        (OutputShape(tools=tuple(ToolShape(f"t{n}", {}) for n in range(129))), "129 tools"),
        (OutputShape(response=ANSWER, response_regex="a"), "both"),
        (OutputShape(response_regex="(a"), "regular expression"),
        (OutputShape(response_regex=r"(a)\1"), "regular expression"),
        (OutputShape(response_regex="(?=a)b"), "regular expression"),
        (OutputShape(response_regex="(?:[a-z]{900}){900}"), "repetitions"),
    ],
)
def test_wrong_shapes_say_what_is_wrong(setting: Setting, shape: OutputShape, says: str) -> None:
    with pytest.raises(InputError, match=f"(?i){says}"):
        setting.compiler.compile(shape)


def test_a_vocabulary_without_stop_tokens_is_refused(setting: Setting) -> None:
    with pytest.raises(InputError, match="stop token"):
        Compiler(setting.fmt.tokenizer, 4096, frozenset(), setting.fmt.facts.think)


@pytest.mark.parametrize(
    "tokens", [(IM_USER,), (SECTION_BEGIN, SECTION_END), (SECTION_BEGIN, CALL_BEGIN, CALL_END), (IM_END,)]
)
def test_a_forbidden_token_breaks_the_constraint_at_the_next_mask(setting: Setting, tokens: tuple[str, ...]) -> None:
    constraint = setting.compiler.compile(OutputShape(tools=TOOLS, tool_choice="required"))
    for name in tokens:
        constraint.accept(setting.special(name))
    constraint.accept(5)
    with pytest.raises(KarakoramError, match="Token"):
        mask(setting, constraint)


def test_a_forbidden_token_in_arguments_breaks_the_constraint(setting: Setting) -> None:
    constraint = setting.compiler.compile(OutputShape(tools=TOOLS, tool_choice="required"))
    take(setting, constraint, SECTION_BEGIN, CALL_BEGIN, "functions.get:0", ARGUMENT_BEGIN)
    constraint.accept(setting.special(IM_USER))
    with pytest.raises(KarakoramError, match="Token"):
        mask(setting, constraint)


def test_the_shortest_output_is_what_it_says(setting: Setting) -> None:
    """With the shortest budget, the greediest reading of the masks ends exactly at its end; nothing is left over."""
    shape = OutputShape(tools=TOOLS[:1], tool_choice="required")
    constraint = setting.compiler.compile(shape)
    written = write(setting, constraint, constraint.shortest, 0)
    assert written.ended and len(written.tokens) == constraint.shortest
    assert calls_of(setting, written.tokens, shape.tools)[0]["function"]["name"] == "get_weather"
    encoded = setting.fmt.tokenizer.encode('{"city": ""}')
    assert constraint.shortest <= 6 + len(setting.fmt.tokenizer.encode("functions.get_weather:0")) + len(encoded)
