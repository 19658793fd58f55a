"""Stop strings end the content, wherever the text is cut, and never show."""

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from karakoram.session.stop_strings import StopFilter, StopWatch


class _Letters:
    """A parser for which a token is a letter; from "(" to ")" it is reasoning."""

    def __init__(self) -> None:
        self.reasoning = False

    def feed(self, token_ids: list[int]) -> list[dict[str, Any]]:
        deltas = []
        for letter in map(chr, token_ids):
            if letter in "()":
                self.reasoning = letter == "("
            else:
                deltas.append({"reasoning_content" if self.reasoning else "content": letter})
        return deltas


def _watched(text: str, stops: list[str]) -> str:
    """As much of the text as comes before the watch says stop, the last letter included."""
    watch = StopWatch(_Letters(), stops)
    for at, letter in enumerate(text):
        if watch(ord(letter)):
            return text[: at + 1]
    return text


def _filtered(pieces: list[str], stops: list[str]) -> tuple[str, str | None]:
    stop = StopFilter(stops)
    shown = "".join(map(stop.feed, pieces))
    return shown + stop.flush(), stop.found


def test_the_watch_stops_at_the_last_letter_of_a_stop_string() -> None:
    assert _watched("one. two. three", [". t"]) == "one. t"
    assert _watched("one two", ["xyz"]) == "one two"


def test_reasoning_ends_nothing() -> None:
    assert _watched("(stop)go on stop here", ["stop"]) == "(stop)go on stop"


def test_of_two_the_shorter_decides() -> None:
    assert _filtered(["abcd"], ["ab", "abc"]) == ("", "ab")


@given(st.text("abc", max_size=30), st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3), st.data())
def test_any_cut_shows_what_stands_before_the_first_stop(text: str, stops: list[str], data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=5)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    places = [text.find(stop) for stop in stops if stop in text]
    shown, found = _filtered(pieces, stops)
    if places:
        assert shown == text[: min(places)] and found is not None and text.startswith(found, min(places))
    else:
        assert (shown, found) == (text, None)
