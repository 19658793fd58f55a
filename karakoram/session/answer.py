"""One choice of one conversation, as it comes: the engine's news in, deltas out, and in the end a whole message."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from karakoram.chat.dialects import CALL_BEGIN, SECTION_BEGIN
from karakoram.chat.format import ChatFormat
from karakoram.chat.template import Written
from karakoram.engine.request import News, Request, TokenLogprob
from karakoram.session.parts import CallIds, Delta, Parts, SpokenParser
from karakoram.session.request import ChatRequest, TextLogprob, Usage
from karakoram.session.stop_strings import StopFilter

FinishReason = Literal["stop", "tool_calls", "length", "cancelled", "error"]


@dataclass(frozen=True)
class Markers:
    """Ids of the markers around reasoning, None where a tokenizer spells them as text."""

    think_open: int | None
    think_close: int | None
    ends_reasoning: frozenset[int]

    @classmethod
    def of(cls, fmt: ChatFormat) -> Markers:
        """Those of a chat format."""
        special = fmt.tokenizer.special_ids
        opening, closing = (special.get(marker) for marker in fmt.facts.think)
        ends = (closing, special.get(SECTION_BEGIN), special.get(CALL_BEGIN))
        return cls(opening, closing, frozenset(token for token in ends if token is not None))


class Answer:
    """One choice of one conversation. Not thread-safe: feed it from one thread."""

    def __init__(
        self,
        fmt: ChatFormat,
        chat: ChatRequest,
        request: Request,
        index: int,
        in_reasoning: bool,
        parser: SpokenParser,
        on_close: Callable[[Answer], None],
    ) -> None:
        self.index, self.request = index, request
        self.finish_reason: FinishReason | None = None
        self.error = ""
        self.token_ids: list[int] = []
        self.logprobs: list[TextLogprob] = []
        self._fmt, self._markers, self._on_close = fmt, Markers.of(fmt), on_close
        self._parts = Parts(parser, CallIds(chat.messages))
        self._filter = StopFilter(chat.stop) if chat.stop else None
        self._began_in_reasoning = self._reasoning = in_reasoning
        self._reasoning_tokens = self._cached_tokens = 0
        self._approximate_tokens: int | None = None
        self._content_at = None if in_reasoning else 0
        self._message: dict[str, Any] | None = None

    @property
    def stop_string(self) -> str | None:
        """The stop string that ended the content, if one did."""
        return None if self._filter is None else self._filter.found

    def feed(self, news: News) -> list[Delta]:
        """Deltas that this step makes certain: {"reasoning_content": …}, {"content": …} or {"tool_calls": [{"index",
        "id", "type", "function"}]}. The last news closes the answer: `finish_reason` and `message` are there then."""
        if news.approximate_tokens is not None:
            self._approximate_tokens = news.approximate_tokens
        if news.cached_tokens:
            self._cached_tokens = news.cached_tokens
        deltas: list[Delta] = []
        for token in news.tokens:
            self._count(token)
            deltas.extend(self._parts.feed(token))
        if news.logprobs:
            self.logprobs.extend(map(self._as_text, news.logprobs))
        if news.finish is not None:
            self.error = news.error
            deltas.extend(self._parts.finish("stop" if news.finish == "stop" else "length"))
            if self._filter is not None:
                deltas = self._filtered(deltas)
                if rest := self._filter.flush():
                    deltas.append({"content": rest})
            self._close(news)
            return deltas
        return deltas if self._filter is None else self._filtered(deltas)

    @property
    def message(self) -> dict[str, Any]:
        """The assistant message: role, content, reasoning_content, tool_calls (None or empty where there is none).
        Complete once `finish_reason` is there."""
        assert self._message is not None, "the answer is not complete"
        return self._message

    @property
    def usage(self) -> Usage:
        """Counts so far."""
        return Usage(
            len(self.request.prompt),
            self._cached_tokens,
            len(self.token_ids),
            min(self._reasoning_tokens, len(self.token_ids)),
            self._approximate_tokens,
        )

    def take_logprobs(self) -> list[TextLogprob]:
        """Log-probabilities of the tokens since the last call; empty where none were asked for."""
        taken, self.logprobs = self.logprobs, []
        return taken

    def _count(self, token: int) -> None:
        markers = self._markers
        self.token_ids.append(token)
        if not self._reasoning:
            if len(self.token_ids) == 1 and token == markers.think_open:
                self._reasoning, self._content_at, self._reasoning_tokens = True, None, 1
            return
        if token in markers.ends_reasoning:
            self._reasoning = False
            self._content_at = len(self.token_ids) - (token != markers.think_close)
            self._reasoning_tokens += token == markers.think_close
        else:
            self._reasoning_tokens += 1

    def _filtered(self, deltas: list[Delta]) -> list[Delta]:
        assert self._filter is not None
        kept: list[Delta] = []
        for delta in deltas:
            if "content" not in delta:
                if self._filter.found is None:
                    kept.append(delta)
            elif text := self._filter.feed(delta["content"]):
                kept.append({"content": text})
        return kept

    def _close(self, news: News) -> None:
        message, _ = self._parts.message("stop" if news.finish == "stop" else "length")
        if self.stop_string is not None:
            content = message.get("content") or ""
            message["content"] = content[: content.find(self.stop_string)]
        complete = [call for call in message.get("tool_calls") or () if not call.pop("incomplete", False)]
        message["tool_calls"] = complete
        self._message = message
        if news.finish in ("cancelled", "error"):
            self.finish_reason = news.finish
        else:
            self.finish_reason = "length" if news.finish == "length" else "tool_calls" if complete else "stop"
        self._on_close(self)

    @property
    def written(self) -> Written | None:
        """The tokens as the next turn's prompt may hold them; None if the answer did not end by itself."""
        ends = self._fmt.stop_ids
        if self.finish_reason not in ("stop", "tool_calls") or not self.token_ids or self.token_ids[-1] not in ends:
            return None
        ids = tuple(self.token_ids[:-1])
        at = len(ids) if self._content_at is None else self._content_at
        return Written(ids, self._began_in_reasoning, min(at, len(ids)))

    def _as_text(self, logprob: TokenLogprob) -> TextLogprob:
        tokenizer = self._fmt.tokenizer
        best = tuple(
            (tokenizer.decode([token]), tokenizer.token_bytes(token), value, token) for token, value in logprob.best
        )
        token = logprob.token
        return TextLogprob(tokenizer.decode([token]), tokenizer.token_bytes(token), logprob.logprob, token, best)
