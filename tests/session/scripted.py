"""A model and a chat format that follow a script: a token id is the index of the delta that it turns into.

The script is a function from the rendered messages to the list of deltas of the next answer. `WAIT` in a script stands
for a forward pass that ends only by Ctrl-C.
"""

import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

STOP = 9_999
WAIT = "wait"

Script = Callable[[list[dict[str, Any]]], list[Any]]


def call_delta(name: str, arguments: str, position: int = 0, call_id: str = "functions.wrong:7") -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    return {"tool_calls": [{"index": position, "id": call_id, "type": "function", "function": function}]}


class ScriptedParser:
    def __init__(self, script: list[Any], held_back: dict[str, str]) -> None:
        self.script, self.held_back = script, held_back
        self.message: dict[str, Any] = {"reasoning_content": None, "content": None, "tool_calls": []}

    def feed(self, token_ids: list[int]) -> list[dict[str, Any]]:
        deltas = [self.script[i] for i in token_ids if i != STOP]
        for delta in deltas:
            for key in ("reasoning_content", "content"):
                if key in delta:
                    self.message[key] = (self.message[key] or "") + delta[key]
            for call in delta.get("tool_calls", ()):
                if "id" in call:
                    self.message["tool_calls"].append({**call, "function": dict(call["function"])})
                    del self.message["tool_calls"][-1]["index"]
                else:
                    self.message["tool_calls"][call["index"]]["function"]["arguments"] += call["function"]["arguments"]
        return deltas

    def finish(self, reason: str = "stop") -> dict[str, Any]:
        for key, tail in self.held_back.items():
            self.message[key] = (self.message[key] or "") + tail
        message = {key: value for key, value in self.message.items() if value}
        if reason == "stop" and self.message["tool_calls"]:
            reason = "tool_calls"
        return {**message, "finish_reason": reason}


class ScriptedFormat:
    """Encodes 10 tokens a message, and remembers what it was asked."""

    dialect = "kimi-k2.5"
    stop_ids = frozenset({STOP})

    def __init__(self, script: Script, held_back: dict[str, str] | None = None) -> None:
        self.script_of, self.held_back = script, held_back or {}
        self.script: list[Any] = []
        self.asked: list[dict[str, Any]] = []
        self.first_id = 0

    def sampling(self, thinking: bool = True) -> dict[str, float]:
        return {"temperature": 0.6 if thinking else 0.3, "top_p": 0.95}

    def encode(self, messages: list[dict[str, Any]], **how: Any) -> list[int]:
        self.asked.append({"messages": [dict(message) for message in messages], **how})
        self.script = self.script_of(messages)
        return [self.first_id] * 10 * len(messages)

    def parser(self, tools: Any = None, thinking: bool = True) -> ScriptedParser:
        return ScriptedParser(self.script, self.held_back)

    def generate(self, model: Any, token_ids: list[int], max_new_tokens: int, **how: Any) -> Iterator[int]:
        self.asked[-1].update(how)
        for position, step in enumerate(self.script[:max_new_tokens]):
            if step == WAIT:
                while True:  # not signal.pause(): a signal just before it would be slept through
                    time.sleep(0.01)
            else:
                yield position
        if len(self.script) < max_new_tokens:
            yield STOP


def scripted_model(context: int = 1000, vocabulary: int = 100) -> Any:
    config = SimpleNamespace(max_position_embeddings=context, vocab_size=vocabulary)
    return SimpleNamespace(config=config, device="cpu", dtype="torch.bfloat16")
