"""A token source that plays from a script: what sessions, servers and agents are tested with."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from karakoram.engine.request import EngineStopped, Listener, News, QueueFull, Request, TokenLogprob
from karakoram.errors import InputError

Script = Callable[[Request], Iterable[int]]


@dataclass(slots=True)
class _Running:
    request: Request
    listener: Listener
    cancelled: threading.Event


class ScriptedEngine:
    """Answers every request with the tokens that `script(request)` yields, one a step, from a thread for each.

    A script may block (a slow model) or raise (a broken one: the request ends with "error"). A request's constraint
    follows along but does not choose. `most` bounds the requests that live at once; more raise QueueFull.
    """

    def __init__(self, script: Script, vocab_size: int, context: int = 2048, most: int = 1024) -> None:
        self.script, self.vocab_size, self.context, self.most = script, vocab_size, context, most
        self.requests: list[Request] = []
        self._running: dict[str, _Running] = {}
        self._lock = threading.Lock()
        self._closed = False

    def submit(self, request: Request, listener: Listener) -> None:
        """See `TokenSource`."""
        request.check(self.context, self.vocab_size)
        with self._lock:
            if self._closed:
                raise EngineStopped("The engine has been closed.", "Start the server again.")
            if len(self._running) >= self.most:
                raise QueueFull(f"{self.most} requests are waiting already.", "Try again in a second.")
            if request.id in self._running:
                raise InputError(f"A request {request.id!r} is running already.", "Give each its own id.")
            self.requests.append(request)
            self._running[request.id] = running = _Running(request, listener, threading.Event())
        threading.Thread(target=self._play, args=(running,), daemon=True).start()

    def cancel(self, request_id: str) -> None:
        """See `TokenSource`."""
        with self._lock:
            running = self._running.get(request_id)
        if running is not None:
            running.cancelled.set()

    @property
    def live(self) -> int:
        """Requests that have not ended."""
        return len(self._running)

    def close(self) -> None:
        """Cancel what runs; refuse what comes."""
        with self._lock:
            self._closed = True
            for running in self._running.values():
                running.cancelled.set()

    def _play(self, running: _Running) -> None:
        request, count = running.request, 0
        try:
            for token in self.script(request):
                if running.cancelled.is_set():
                    self._end(running, News(request.id, finish="cancelled"))
                    return
                count += 1
                if request.constraint is not None:
                    request.constraint.accept(token)
                stopped = token in request.stop_ids or (request.stop_when is not None and request.stop_when(token))
                finish = "stop" if stopped else "length" if count == request.max_new_tokens else None
                logprobs = () if request.logprobs is None else (TokenLogprob(token, -0.5, ((token, -0.5),)),)
                news = News(request.id, (token,), finish, logprobs)
                if finish is not None:
                    self._end(running, news)
                    return
                running.listener((news,))
            self._end(running, News(request.id, finish="cancelled" if running.cancelled.is_set() else "stop"))
        except Exception as error:  # noqa: BLE001  a script may fail in any way: that is what it is for
            self._end(running, News(request.id, finish="error", error=str(error)))

    def _end(self, running: _Running, news: News) -> None:
        with self._lock:
            self._running.pop(running.request.id, None)
        running.listener((news,))
