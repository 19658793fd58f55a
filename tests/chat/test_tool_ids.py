"""Canonical ids: one counter for the conversation, results follow their calls, and the map leads back."""

from typing import Any

import pytest

from karakoram.chat import ChatFormat, Tokenizer
from karakoram.chat.tool_ids import ToolIds
from karakoram.errors import ChatError


def calls(*ids: str | None, name: str = "f") -> dict[str, Any]:
    """An assistant message with calls of these ids."""
    made = [{"id": i, "type": "function", "function": {"name": name, "arguments": "{}"}} for i in ids]
    return {"role": "assistant", "content": None, "tool_calls": made}


def result(call_id: str | None, content: str = "") -> dict[str, Any]:
    """A result."""
    return {"role": "tool", "tool_call_id": call_id, "content": content}


def rendered_ids(tok: Tokenizer, messages: list[dict[str, Any]]) -> list[str]:
    """Ids in calls and results of a canonically rendered prompt, in order."""
    text = ChatFormat("kimi-k2", tok).render(messages, tool_ids="canonical", add_generation_prompt=False)
    ids: list[str] = []
    for piece in text.split("<|tool_call_begin|>")[1:]:
        ids.append(piece.split("<|")[0])
        ids += [rest.split("\n")[0] for rest in piece.split("## Return of ")[1:]]
    return ids


def test_counter_runs_over_the_whole_conversation(small: Tokenizer) -> None:
    messages = [calls("call_a", "search:0"), result("search:0"), result("call_a"), calls("x", name="g"), result("x")]
    expected = ["functions.f:0", "functions.f:1", "functions.f:1", "functions.f:0", "functions.g:2", "functions.g:2"]
    assert rendered_ids(small, messages) == expected
    ids = ToolIds.of(messages)
    assert dict(ids.to_original) == {"functions.f:0": "call_a", "functions.f:1": "search:0", "functions.g:2": "x"}
    assert dict(ids.to_canonical) == {original: canonical for canonical, original in ids.to_original.items()}
    assert ids.next_index == 3


def test_repeated_client_ids_belong_to_the_latest_call(small: Tokenizer) -> None:
    messages = [calls("0"), result("0"), calls("0"), result("0")]
    assert rendered_ids(small, messages) == ["functions.f:0", "functions.f:0", "functions.f:1", "functions.f:1"]
    assert dict(ToolIds.of(messages).to_original) == {"functions.f:0": "0", "functions.f:1": "0"}


def test_results_without_a_matching_id_follow_the_order_of_calls(small: Tokenizer) -> None:
    messages = [calls(None, "b"), result("other"), result(None)]
    assert rendered_ids(small, messages) == ["functions.f:0", "functions.f:1", "functions.f:0", "functions.f:1"]
    with pytest.raises(ChatError, match="Message 3 is a result for 'other', which is no open tool call"):
        rendered_ids(small, [*messages, result("other")])


def test_canonical_ids_stay_as_they_are(small: Tokenizer) -> None:
    messages = [calls("functions.f:0"), result("functions.f:0", "A"), calls("functions.f:1")]
    fmt = ChatFormat("kimi-k2.5", small)
    assert fmt.render(messages, tool_ids="canonical") == fmt.render(messages)


def test_verbatim_needs_ids(small: Tokenizer) -> None:
    fmt = ChatFormat("kimi-k2.5", small)
    with pytest.raises(ChatError, match=r"Message 0 has a tool call 1 \(f\) without an id"):
        fmt.render([calls("a", None)])
    with pytest.raises(ChatError, match="Message 1 is a tool result without tool_call_id"):
        fmt.render([calls("a"), result(None)])
    with pytest.raises(ChatError, match="Unknown tool_ids 'other'"):
        fmt.render([calls("a")], tool_ids="other")  # type: ignore[arg-type]
