"""Reading what a person types: arrow keys and a history that lasts, by the standard library's readline.

The history file is the user's own words, so only the user may read it (mode 0600).
"""

import os
import sys
from contextlib import suppress
from pathlib import Path

_HISTORY_LINES = 2000


def state_dir() -> Path:
    """Where a user's state belongs: XDG_STATE_HOME, else ~/.local/state (XDG base directory specification)."""
    root = os.environ.get("XDG_STATE_HOME")
    return (Path(root) if root else Path.home() / ".local" / "state") / "karakoram"


class LineInput:
    """Prompts for lines on a terminal. `read` raises EOFError at Ctrl-D and KeyboardInterrupt at Ctrl-C.

    Without readline (Windows, minimal builds of Python) or with an unwritable home, it works without history.
    """

    def __init__(self, history: Path | None = None) -> None:
        self.history = history or state_dir() / "chat_history"
        try:
            import readline
        except ImportError:
            self._readline = None
            return
        self._readline = readline
        readline.set_history_length(_HISTORY_LINES)
        readline.set_auto_history(False)
        with suppress(OSError):  # the first time there is none
            readline.read_history_file(self.history)

    def read(self, prompt: str, remember: bool = True) -> str:
        """One line without its line feed; `remember` puts it into the history. EOFError at the end of input."""
        if not (sys.stdin.isatty() and sys.stdout.isatty()):
            # input() would put the prompt into a stdout that is piped to somebody
            print(prompt, end="", file=sys.stderr, flush=True)
            line = sys.stdin.readline()
            if not line:
                raise EOFError
            return line.rstrip("\n")
        line = input(prompt)
        if remember and line.strip():
            self._remember(line)
        return line

    def _remember(self, line: str) -> None:
        if self._readline is None:
            return
        last = self._readline.get_history_item(self._readline.get_current_history_length())
        if last != line:
            self._readline.add_history(line)
            self._save()

    def _save(self) -> None:
        """Written at each line: a closed terminal loses nothing."""
        assert self._readline is not None
        try:
            self.history.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            os.close(os.open(self.history, os.O_WRONLY | os.O_CREAT, 0o600))
            os.chmod(self.history, 0o600)
            self._readline.write_history_file(self.history)
        except OSError:
            self._readline = None  # no place for it: go on without
