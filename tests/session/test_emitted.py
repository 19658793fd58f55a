"""The store of what models wrote: bounds, age, and keys that keep conversations apart."""

import threading
from typing import Any

import pytest

from karakoram.chat.messages import read_messages
from karakoram.chat.template import Written
from karakoram.chat.tool_ids import canonical_ids
from karakoram.session.emitted import Emitted, EmittedStore, key_of, prefixes, visible


def _records(messages: list[dict[str, Any]]) -> list[Any]:
    return canonical_ids(read_messages(messages))[0]


def _call(arguments: str, call_id: str = "functions.search:0", name: str = "search") -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def _key(client: str, messages: list[dict[str, Any]]) -> bytes:
    """The key of the last message."""
    records = _records(messages)
    return key_of(prefixes(client, records[:-1])[-1], records[-1])


def _emitted(tokens: int = 3, reasoning: str = "so") -> Emitted:
    return Emitted(Written(tuple(range(tokens)), True, 1), reasoning, b"v")


ASKED = [{"role": "user", "content": "Find it."}]
ANSWERED = {"role": "assistant", "content": None, "tool_calls": [_call('{"q": "a"}')]}


def test_a_message_is_found_where_it_stood_and_nowhere_else() -> None:
    store = EmittedStore()
    store.put(_key("alice", [*ASKED, ANSWERED]), _emitted())
    assert store.get(_key("alice", [*ASKED, ANSWERED])) == _emitted()
    assert store.get(_key("bob", [*ASKED, ANSWERED])) is None  # another key
    assert store.get(_key("alice", [{"role": "user", "content": "Find that."}, ANSWERED])) is None  # another prefix
    other = {**ANSWERED, "tool_calls": [_call('{"q": "b"}')]}
    assert store.get(_key("alice", [*ASKED, other])) is None  # another call under the same id


@pytest.mark.parametrize(
    "returned",
    [
        {**ANSWERED, "content": ""},
        {**ANSWERED, "content": []},
        {**ANSWERED, "tool_calls": [_call('{"q":"a"}')]},
        {**ANSWERED, "tool_calls": [_call('{"q": "a"}', "toolu_01")]},
        {**ANSWERED, "reasoning_content": "another thought"},
    ],
    ids=["empty content", "no parts", "white space in arguments", "foreign id", "reasoning"],
)
def test_what_clients_change_on_the_way_does_not_matter(returned: dict[str, Any]) -> None:
    assert _key("c", [*ASKED, returned]) == _key("c", [*ASKED, ANSWERED])


def test_content_cut_into_parts_is_the_same_content() -> None:
    whole = [{"role": "user", "content": "Find it."}, {"role": "assistant", "content": "Here it is."}]
    parts = [
        {"role": "user", "content": [{"type": "text", "text": "Find "}, {"type": "text", "text": "it."}]},
        {"role": "assistant", "content": [{"type": "text", "text": "Here it is."}]},
    ]
    assert _key("c", whole) == _key("c", parts)
    assert visible(_records(whole)[1]) == visible(_records(parts)[1])


def test_text_cannot_pass_for_structure() -> None:
    one = [{"role": "user", "content": 'a"], "b'}, {"role": "assistant", "content": "x"}]
    two = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}, {"role": "assistant", "content": "x"}]
    assert _key("c", one) != _key("c", two)
    assert _key("c", [{"role": "user", "content": "\ud800"}, {"role": "assistant", "content": "x"}])


def test_the_oldest_go_when_bytes_run_out() -> None:
    each = _emitted().size_bytes
    store = EmittedStore(most_bytes=3 * each)
    for name in (b"1", b"2", b"3"):
        store.put(name, _emitted())
    assert store.get(b"1") is not None  # used just now: younger than 2
    store.put(b"4", _emitted())
    assert [store.get(name) is not None for name in (b"1", b"2", b"3", b"4")] == [True, False, True, True]
    assert store.size_bytes == 3 * each and len(store) == 3
    store.put(b"5", _emitted(10_000))
    assert store.get(b"5") is None and store.size_bytes == 3 * each  # larger than the whole store: not kept


def test_replacing_keeps_the_count_of_bytes_right() -> None:
    store = EmittedStore()
    store.put(b"1", _emitted(100))
    store.put(b"1", _emitted(5, "thought"))
    assert store.size_bytes == _emitted(5, "thought").size_bytes


def test_what_is_too_old_is_gone() -> None:
    now = [0.0]
    store = EmittedStore(most_age_s=10, clock=lambda: now[0])
    store.put(b"1", _emitted())
    now[0] = 9
    store.put(b"2", _emitted())
    now[0] = 15
    assert store.get(b"1") is None and store.get(b"2") is not None
    now[0] = 24
    assert store.get(b"2") is not None  # each use makes it young again
    now[0] = 35
    assert store.get(b"2") is None and store.size_bytes == 0


def test_many_threads_at_once() -> None:
    store = EmittedStore(most_bytes=50 * _emitted().size_bytes)

    def work(number: int) -> None:
        for i in range(200):
            store.put(f"{number}-{i % 20}".encode(), _emitted())
            store.get(f"{(number + 1) % 4}-{i % 20}".encode())

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert store.size_bytes == len(store) * _emitted().size_bytes <= store.most_bytes
