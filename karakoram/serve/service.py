"""What a server serves: a model behind a session, under some names, to those who hold a key.

A service exists before its model does: the port is bound first, then the model loads in a thread, and until
`ready` is called everything that needs the model is refused with 503. The tests play the same part with a scripted
engine.

Keys are compared in constant time and kept only as digests; a client is known by the digest of the key it sent, which
is what the session's stores and the engine's queue tell clients apart by.
"""

from __future__ import annotations

import hashlib
import hmac
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from karakoram.chat import ChatFormat
from karakoram.engine.request import TokenSource
from karakoram.serve.metrics import Metrics
from karakoram.serve.refusal import Refusal
from karakoram.session.chat import ChatSession


@dataclass(frozen=True)
class Limits:
    """What one request may ask for, and how long the server waits.

    request_bytes   of a body: 32 MB are 8 million tokens or so, more than any context
    keep_alive_s    a stream in which nothing was sent for so long gets a comment (proxies give up after 30 to 60)
    resume_s        a resumable stream runs on for so long without a reader
    replay_bytes    so much of a resumable stream is kept for those who come back
    recordings      so many resumable streams are kept
    pending_tokens  a stream whose reader has fallen behind by so many tokens is cancelled
    stalled_s       a connection that takes no byte for so long is closed by the kernel
    """

    request_bytes: int = 32 << 20
    keep_alive_s: float = 10.0
    resume_s: float = 30.0
    replay_bytes: int = 4 << 20
    recordings: int = 256
    pending_tokens: int = 16_384
    stalled_s: float = 60.0


@dataclass(frozen=True)
class Opened:
    """A model that can answer: the engine, the session over it, and how it talks."""

    source: TokenSource
    session: ChatSession
    fmt: ChatFormat
    defaults: Mapping[str, float] | None = None  # of sampling, from generation_config.json; None: the dialect's


class Service:
    """One model under one or more names (the first is its own), and who may use it."""

    def __init__(
        self, names: Sequence[str], keys: Sequence[str] = (), limits: Limits | None = None, version: str = ""
    ) -> None:
        self.names = tuple(names)
        self.limits = limits or Limits()
        self.version, self.started_at = version, time.time()
        self.metrics = Metrics(self.names[0])
        self._keys = tuple(_digest(key.encode()) for key in keys)
        self._opened: Opened | None = None
        self._closed = False

    def ready(self, opened: Opened) -> None:
        """The model has been loaded: answer from now on. Callable from any thread."""
        self.metrics.watch(opened.source, opened.session)
        self._opened = opened

    def close(self) -> None:
        """Refuse what comes from now on."""
        self._closed = True

    @property
    def locked(self) -> bool:
        """Whether a key is needed."""
        return bool(self._keys)

    @property
    def state(self) -> str:
        """loading, ready or stopped."""
        if self._closed or (self._opened is not None and getattr(self._opened.source, "stopped", False)):
            return "stopped"
        return "loading" if self._opened is None else "ready"

    @property
    def opened(self) -> Opened:
        """The model; `Refusal` 503 while it loads and after the end."""
        if self._closed:
            raise Refusal(503, "The server is shutting down.", code="engine_stopped")
        if self._opened is None:
            raise Refusal(503, "The model is still loading. Try again in a moment.", code="loading", retry_after_s=5)
        return self._opened

    @property
    def session(self) -> ChatSession:
        return self.opened.session

    @property
    def source(self) -> TokenSource:
        return self.opened.source

    @property
    def fmt(self) -> ChatFormat:
        return self.opened.fmt

    def sampling(self, thinking: bool = True) -> dict[str, float]:
        """`temperature` and `top_p` for who does not say: the checkpoint's, else the dialect's recommendation."""
        opened = self.opened
        return dict(opened.defaults) if opened.defaults else opened.fmt.sampling(thinking=thinking)

    def check_model(self, name: str | None) -> str:
        """The name by which the model was asked for (None and "" mean its own); `Refusal` 404 for others."""
        if not name:
            return self.names[0]
        if name not in self.names:
            known = ", ".join(repr(known) for known in self.names)
            raise Refusal(404, f"There is no model {name!r}. This server has {known}.", "model", "model_not_found")
        return name

    def admit(self, header: Callable[[str], str | None]) -> str:
        """Who asks: a digest of the key sent (as Bearer or x-api-key; of two, the one that fits), "" for none.
        `Refusal` 401 where a key is needed and this is not one."""
        scheme, _, bearer = (header("authorization") or "").partition(" ")
        keys = [bearer.strip() if scheme.lower() == "bearer" else "", (header("x-api-key") or "").strip()]
        sent = [_digest(key.encode("utf-8", "surrogateescape")) for key in keys if key]
        if not self._keys:
            return sent[0].hex()[:32] if sent else ""
        # Every key is compared, whichever fits, so that the time tells nothing.
        fits = [sum([hmac.compare_digest(one, known) for known in self._keys]) for one in sent]
        if not any(fits):
            what = "This API key is not known." if sent else "An API key is needed."
            how = "Send it as 'Authorization: Bearer KEY' or 'x-api-key: KEY'."
            raise Refusal(401, f"{what} {how}", code="invalid_api_key")
        return sent[fits.index(max(fits))].hex()[:32]


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
