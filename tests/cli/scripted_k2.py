"""`k2` with a scripted model in place of a loaded one, for tests in a terminal: `python scripted_k2.py chat`."""

import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from karakoram.cli import main, opening
from karakoram.session import Session
from tests.session.scripted import WAIT, ScriptedFormat, call_delta, scripted_model


def script(messages: list[dict[str, Any]]) -> list[Any]:
    last = messages[-1]
    if last["role"] == "tool":
        return [{"reasoning_content": "I read it."}, {"content": f"It is {last['content']}."}]
    said = last["content"]
    if said == "wait":
        return [{"content": "counting "}, {"content": "one "}, WAIT, {"content": "never"}]
    if said == "calculate":
        return [call_delta("calculator", '{"expression": '), {"tool_calls": [arguments('"17 * 23"}')]}]
    if said == "weather":
        return [call_delta("weather", '{"city": "Oslo"}')]
    if said == "loop":
        return [call_delta("calculator", '{"expression": "1 + 1"}')]
    if said == "escape":
        return [{"content": "a\x1b]0;title\x07b"}]
    words = [message["content"] for message in messages if message["role"] == "user"]
    return [{"reasoning_content": "They said "}, {"reasoning_content": said}, {"content": f"You said: {words}"}]


def arguments(text: str) -> dict[str, Any]:
    return {"index": 0, "function": {"arguments": text}}


class ScriptedOpened(opening.Opened):
    def session(self) -> Session:
        return Session(self.model, self.fmt, generate=self.fmt.generate)


def open_scripted(model: str, *_: Any) -> opening.Opened:
    if model != "nano":
        opening.locate(model)
    return ScriptedOpened(Path("/nonexistent"), scripted_model(), ScriptedFormat(script))


opening.open_for_chat = open_scripted

if __name__ == "__main__":
    main.run()
