"""The session's promises, with a scripted model: deltas in order, our call ids, counts, every way an answer can end."""

from typing import Any

import pytest

from karakoram.errors import InputError, TokenizerError
from karakoram.session import DEFAULT_NEW_TOKENS, Session, Turn
from tests.session.scripted import ScriptedFormat, call_delta, scripted_model

USER = {"role": "user", "content": "hi"}
SAID = [{"reasoning_content": "hm "}, {"reasoning_content": "ok"}, {"content": "Hello"}, {"content": " you"}]


def session_for(script: list[Any], context: int = 1000, held_back: dict[str, str] | None = None) -> Session:
    fmt = ScriptedFormat(lambda messages: script, held_back)
    return Session(scripted_model(context), fmt, generate=fmt.generate)


def test_deltas_pass_and_the_turn_sums_them_up() -> None:
    session = session_for(SAID)
    assert list(session.stream([USER])) == SAID
    turn = session.last
    assert turn is not None
    assert turn.message == {"role": "assistant", "reasoning_content": "hm ok", "content": "Hello you"}
    assert (turn.prompt_tokens, turn.new_tokens, turn.finish_reason) == (10, 5, "stop")
    assert turn.token_ids[:4] == (0, 1, 2, 3)
    assert turn.prefill_s >= 0
    assert turn.decode_s > 0
    assert turn.tok_per_s == pytest.approx(4 / turn.decode_s)


def test_one_token_has_no_decoding_speed() -> None:
    assert Turn({}, "stop", 3, 1, 0.5, 0.0).tok_per_s == 0


def test_options_reach_renderer_and_model() -> None:
    session = session_for(SAID)
    tool = {"type": "function", "function": {"name": "f"}}
    list(session.stream([USER], [tool], thinking=False, max_new_tokens=7, temperature=0.5, top_p=0.9, seed=3))
    asked = session.fmt.asked[0]
    assert asked["tools"] == [tool]
    assert asked["thinking"] is False
    assert asked["tool_ids"] == "canonical"
    assert (asked["temperature"], asked["top_p"], asked["seed"]) == (0.5, 0.9, 3)
    assert asked["stop_ids"] == session.fmt.stop_ids


def test_call_ids_continue_the_conversations_count() -> None:
    history = [USER, {"role": "assistant", "tool_calls": [{"id": "call_abc"}, {"id": "functions.add:2"}]}]
    arguments = {"tool_calls": [{"index": 0, "function": {"arguments": "1}"}}]}
    session = session_for([call_delta("add", '{"a":'), arguments, call_delta("sub", "{}", 1)])
    deltas = list(session.stream(history))
    # index 2 would be next, but a foreign id of the history already looks like functions.add:2
    ids = [call["id"] for delta in deltas for call in delta["tool_calls"] if "id" in call]
    assert ids == ["functions.add:3", "functions.sub:3"]
    assert session.last is not None
    assert session.last.finish_reason == "tool_calls"
    assert [call["id"] for call in session.last.message["tool_calls"]] == ids
    assert session.last.message["tool_calls"][0]["function"]["arguments"] == '{"a":1}'


def test_what_the_parser_held_back_is_streamed_at_the_end() -> None:
    session = session_for(SAID, held_back={"content": "<|to"})
    deltas = list(session.stream([USER]))
    assert deltas[-1] == {"content": "<|to"}
    assert session.last is not None
    assert session.last.message["content"] == "".join(delta.get("content", "") for delta in deltas)


def test_length() -> None:
    session = session_for(SAID)
    assert list(session.stream([USER], max_new_tokens=3)) == SAID[:3]
    assert session.last is not None
    assert (session.last.finish_reason, session.last.new_tokens) == ("length", 3)


def test_an_early_close_leaves_a_usable_session() -> None:
    session = session_for(SAID)
    stream = session.stream([USER])
    assert [next(stream), next(stream), next(stream)] == SAID[:3]
    stream.close()
    assert session.last is not None
    assert session.last.finish_reason == "interrupted"
    assert session.last.message["content"] == "Hello"
    assert list(session.stream([USER])) == SAID
    assert session.last.finish_reason == "stop"


def test_ctrl_c_inside_the_model() -> None:
    session = session_for(SAID)

    def interrupted(*args: Any, **how: Any) -> Any:
        yield 0
        raise KeyboardInterrupt

    broken = Session(session.model, session.fmt, generate=interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(broken.stream([USER]))
    assert broken.last is not None
    assert (broken.last.finish_reason, broken.last.message.get("reasoning_content")) == ("interrupted", "hm ")


def test_no_messages() -> None:
    with pytest.raises(InputError, match="empty"):
        session_for(SAID).stream([])


def test_the_context_ends_with_numbers() -> None:
    session = session_for(SAID, context=24)
    with pytest.raises(InputError, match=r"20 tokens; with 5 new that is 25.*ends at 24"):
        session.stream([USER, USER], max_new_tokens=5)
    with pytest.raises(InputError, match="30 tokens"):
        session.stream([USER] * 3)
    # without a wish: what is left, 4 tokens
    assert list(session.stream([USER, USER])) == SAID
    assert session.last is not None
    assert session.last.finish_reason == "length"


def test_no_wish_is_bounded() -> None:
    fmt = ScriptedFormat(lambda messages: SAID)
    limits: list[int] = []

    def generate(model: Any, token_ids: Any, limit: int, **how: Any) -> Any:
        limits.append(limit)
        yield from ()

    list(Session(scripted_model(262_144), fmt, generate=generate).stream([USER]))
    assert limits == [DEFAULT_NEW_TOKENS]


@pytest.mark.parametrize(
    "wrong", [{"temperature": -1.0}, {"temperature": float("nan")}, {"top_p": 0.0}, {"top_p": 1.5}]
)
def test_impossible_sampling(wrong: dict[str, float]) -> None:
    with pytest.raises(InputError, match="sample"):
        session_for(SAID).stream([USER], **wrong)  # type: ignore[arg-type]


def test_zero_new_tokens() -> None:
    with pytest.raises(InputError, match="max_new_tokens is 0"):
        session_for(SAID).stream([USER], max_new_tokens=0)


def test_a_foreign_tokenizer() -> None:
    session = session_for(SAID)
    session.fmt.first_id = 100
    with pytest.raises(TokenizerError, match=r"100.*ends at 99"):
        session.stream([USER])
