"""`k2 chat` in a real pseudo-terminal, with a scripted model: streaming, Ctrl-C, Ctrl-D, commands, history."""

import os
import pty
import select
import signal
import stat
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

SCRIPTED = str(Path(__file__).with_name("scripted_k2.py"))
PATIENCE_S = 60  # only a hang takes as long


class Terminal:
    def __init__(self, *arguments: str, **environment: str) -> None:
        self.seen = ""
        self.pid, self.master = pty.fork()
        if self.pid == 0:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # a test run in the background ignores it, and so would we
            os.environ.update(environment, TERM="xterm", PYTHONUNBUFFERED="1")
            os.execv(sys.executable, [sys.executable, SCRIPTED, *arguments])

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def ctrl_c_at_prompt(self, then: str | None) -> None:
        """Type Ctrl-C at a prompt until `then` shows, or for None until the program ends.

        Once is enough for a person. CPython's readline sleeps through a SIGINT that comes between showing the prompt
        and waiting for a key, and only the next key wakes it.
        """
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            self.type("\x03")
            while select.select([self.master], [], [], 1)[0]:
                try:
                    piece = os.read(self.master, 65536)
                except OSError:
                    piece = b""
                self.seen += piece.decode(errors="replace")
                if then is not None and then in self.seen:
                    return
                if not piece:
                    assert then is None
                    return
        raise AssertionError(f"Ctrl-C did nothing; saw {self.seen!r}")

    def expect(self, text: str) -> str:
        """Read until `text` shows; return everything up to and with it."""
        deadline = time.monotonic() + PATIENCE_S
        while text not in self.seen:
            ready, _, _ = select.select([self.master], [], [], max(0, deadline - time.monotonic()))
            assert ready, f"waited for {text!r}, saw {self.seen!r}"
            self.seen += self._read()
        end = self.seen.index(text) + len(text)
        head, self.seen = self.seen[:end], self.seen[end:]
        return head

    def _read(self) -> str:
        try:
            piece = os.read(self.master, 65536).decode(errors="replace")
        except OSError:  # Linux says EIO when the other side has closed
            piece = ""
        assert piece, f"the program ended; it had shown {self.seen!r}"
        return piece

    def exit_code(self) -> int:
        while True:
            try:
                if not os.read(self.master, 65536):
                    break
            except OSError:
                break
        os.close(self.master)
        _, status = os.waitpid(self.pid, 0)
        self.pid = 0
        return os.waitstatus_to_exitcode(status)

    def kill(self) -> None:
        if self.pid:
            os.kill(self.pid, 9)
            os.waitpid(self.pid, 0)
            os.close(self.master)


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[type[Terminal]]:
    started: list[Terminal] = []

    def start(*arguments: str, **environment: str) -> Terminal:
        started.append(Terminal(*arguments, XDG_STATE_HOME=str(tmp_path), **environment))
        return started[-1]

    yield start  # type: ignore[misc]
    for one in started:
        one.kill()


def test_thinking_is_dimmed_and_the_answer_is_not(terminal: type[Terminal]) -> None:
    chat = terminal("chat")
    chat.expect("Ctrl-D to leave")
    chat.expect("> ")
    chat.type("hi\n")
    chat.expect("\x1b[2mThey said \x1b[0m\x1b[2mhi\x1b[0m")
    assert "\x1b" not in chat.expect("You said: ['hi']")
    chat.expect("10 tokens in, 4 out")
    chat.expect("> ")
    chat.type("\x04")
    assert chat.exit_code() == 0


def test_ctrl_c_stops_the_answer_then_leaves(terminal: type[Terminal]) -> None:
    chat = terminal("chat", NO_COLOR="1")
    chat.expect("> ")
    chat.type("wait\n")
    chat.expect("counting one ")
    chat.type("\x03")
    chat.expect("stopped")
    chat.expect("> ")
    chat.type("again\n")
    chat.expect("You said: ['wait', 'again']")
    chat.expect("> ")
    chat.ctrl_c_at_prompt(then=None)
    assert "Traceback" not in chat.seen
    assert chat.exit_code() in (0, -2)  # -2: our second Ctrl-C met the interpreter on its way out


def test_ctrl_c_ends_a_single_answer_with_130(terminal: type[Terminal]) -> None:
    chat = terminal("chat", "nano", "wait")
    chat.expect("one ")
    chat.type("\x03")
    assert chat.exit_code() == 130


def test_slash_commands(terminal: type[Terminal]) -> None:
    chat = terminal("chat", "--demo-tools", NO_COLOR="1")
    chat.expect("> ")
    chat.type("/system Be brief.\n")
    chat.expect("new system message")
    chat.type("/system\n")
    chat.expect("Be brief.")
    chat.type("/tools\n")
    chat.expect("calculator: ")
    chat.type("/nope\n")
    chat.expect("no command /nope")
    chat.type("/reset\n")
    chat.expect("forgotten")
    chat.type("//help\n")
    chat.expect("You said: ['/help']")
    chat.type("calculate\n")
    chat.expect('→ calculator {"expression": "17 * 23"}')
    chat.expect("= 391")
    chat.expect("It is 391.")
    chat.expect("> ")
    chat.type("/exit\n")
    assert chat.exit_code() == 0


def test_a_person_answers_a_call(terminal: type[Terminal], tmp_path: Path) -> None:
    tools = tmp_path / "tools.json"
    tools.write_text('[{"type": "function", "function": {"name": "weather"}}]')
    chat = terminal("chat", "--tools", str(tools), NO_COLOR="1")
    chat.expect("> ")
    chat.type("weather\n")
    chat.expect("result of weather> ")
    chat.type("cold\n")
    chat.expect("It is cold.")
    chat.expect("> ")
    chat.type("weather\n")
    chat.expect("result of weather> ")
    chat.ctrl_c_at_prompt(then="\n> ")
    chat.type("hello\n")
    chat.expect("You said: ['weather', 'hello']")


def test_escape_sequences_of_a_model_are_defused(terminal: type[Terminal]) -> None:
    chat = terminal("chat", NO_COLOR="1")
    chat.expect("> ")
    chat.type("escape\n")
    chat.expect("a�]0;title�b")


def test_history_lasts_and_is_private(terminal: type[Terminal], tmp_path: Path) -> None:
    pytest.importorskip("readline", reason="this Python has no readline")
    first = terminal("chat", NO_COLOR="1")
    first.expect("> ")
    first.type("remember me\n")
    first.expect("You said: ['remember me']")
    first.expect("> ")
    first.type("\x04")
    assert first.exit_code() == 0
    history = tmp_path / "karakoram" / "chat_history"
    assert "remember me" in history.read_text()
    assert stat.S_IMODE(history.stat().st_mode) == 0o600
    second = terminal("chat", NO_COLOR="1")
    second.expect("> ")
    second.type("\x1b[A\n")  # the up arrow
    second.expect("You said: ['remember me']")
