"""A conversation on a terminal: turns, tool calls and their results, and what is kept when Ctrl-C comes between.

The invariant: between two calls of `answer`, `messages` is a conversation that a model can continue. A turn that
fails or is stopped before it said anything leaves no trace; one that was stopped later keeps its words, and loses
calls that nobody has answered.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from karakoram.cli.opening import Sampling
from karakoram.cli.terminal.remote import ServerSampling
from karakoram.cli.terminal.view import AnswerView
from karakoram.session import Turn

MAX_ROUNDS = 8  # of tool calls for one question: enough for any demonstration, an end for a model that loops

Call = Mapping[str, Any]


@dataclass
class Conversation:
    """`answer_call` gives a tool call's result as text, or None to leave the calls unanswered and end the turn.

    `more` adds to the line that ends an answer.
    """

    session: Any  # Session, or RemoteSession
    view: AnswerView
    sampling: Sampling | ServerSampling
    tools: list[dict[str, Any]]
    answer_call: Callable[[Call], str | None]
    system: str | None = None
    thinking: bool = True
    max_new_tokens: int | None = None
    seed: int | None = None
    more: Callable[[], str] = str
    messages: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])

    def __post_init__(self) -> None:
        self.reset()

    def reset(self, system: str | None = None) -> None:
        """Forget everything said; take a new system message if one is given."""
        self.system = system if system is not None else self.system
        self.messages = [{"role": "system", "content": self.system}] if self.system else []

    def answer(self, text: str) -> list[Call]:
        """Say `text` as the user and show the answer, tool rounds included.

        Returns the calls that were left unanswered. KeyboardInterrupt passes on once the messages are in order.
        """
        start = len(self.messages)
        self.messages.append({"role": "user", "content": text})
        turns: list[Turn] = []
        try:
            for _ in range(MAX_ROUNDS):
                turn = self._turn(turns)
                calls = turn.message.get("tool_calls") or []
                if turn.finish_reason != "tool_calls" or not self._answer_calls(calls):
                    return calls if turn.finish_reason == "tool_calls" else []
            self.view.note(f"stopped after {MAX_ROUNDS} rounds of tool calls")
            return []
        finally:
            self._tidy(start)
            self.view.end_line()
            if turns:
                self.view.note(" · ".join(filter(None, (counts(turns), self.more()))))

    def _turn(self, turns: list[Turn]) -> Turn:
        stream = self.session.stream(
            self.messages,
            self.tools,
            thinking=self.thinking,
            max_new_tokens=self.max_new_tokens,
            temperature=self.sampling.temperature,
            top_p=self.sampling.top_p,
            seed=self.seed,
        )
        try:
            for delta in stream:
                self.view.delta(delta)
            self.view.end_line()
        finally:
            stream.close()
            if turn := self.session.last:
                turns.append(turn)
                self.messages.append(turn.message)
        return turns[-1]

    def _answer_calls(self, calls: list[Call]) -> bool:
        """Append a result for each call; False if there is none to be had."""
        for call in calls:
            result = self.answer_call(call)
            if result is None:
                return False
            self.view.result(result)
            self.messages.append({"role": "tool", "tool_call_id": call["id"], "content": result})
        return True

    def _tidy(self, start: int) -> None:
        """Restore the invariant for the messages from `start` on."""
        while self.messages[-1]["role"] == "tool":
            self.messages.pop()  # no answer followed: the rounds were used up, or Ctrl-C came between the calls
        last = self.messages[-1]
        if last["role"] == "assistant":
            last.pop("tool_calls", None)
            if last.get("content"):
                return
        del self.messages[start:]


def counts(turns: list[Turn]) -> str:
    """Token counts and speed of one answer, over all its rounds."""
    last = turns[-1]
    new, seconds = sum(turn.new_tokens for turn in turns), sum(turn.decode_s for turn in turns)
    timed = sum(max(turn.new_tokens - 1, 0) for turn in turns)
    parts = [f"{last.prompt_tokens} tokens in, {new} out"]
    if timed and seconds > 0:
        parts.append(f"{timed / seconds:.1f} tok/s")
    parts.append(f"first after {turns[0].prefill_s:.2f} s")
    if last.finish_reason == "length":
        parts.append("cut off: --max-tokens or the context reached")
    elif last.finish_reason == "interrupted":
        parts.append("stopped")
    return " · ".join(parts)


def as_json(calls: list[Call]) -> str:
    """Calls as one JSON line, for a program that reads stdout."""
    return json.dumps({"tool_calls": calls}, ensure_ascii=False)
