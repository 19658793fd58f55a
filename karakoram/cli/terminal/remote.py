"""Talk to any server that speaks OpenAI's chat completions, as `Session` talks to a model in this process.

Nothing is kept between turns but the messages, which the caller holds. Whatever a server sends is bounded and checked
before it is shown: a line of at most MOST_LINE_BYTES, deltas of the shapes that are known.
"""

from __future__ import annotations

import json
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx2

from karakoram.errors import InputError, KarakoramError
from karakoram.session import Delta, Turn, check_sampling

MOST_LINE_BYTES = 16_000_000
MOST_ERROR_CHARS = 500
CONNECT_S = 10.0
SILENCE_S = 600.0  # servers send something every few seconds while they think, or are slow machines


@dataclass(frozen=True)
class ServerSampling:
    """What a server is asked for; None leaves it to the server."""

    temperature: float | None
    top_p: float | None

    def __str__(self) -> str:
        asked = {"temperature": self.temperature, "top_p": self.top_p}
        given = [f"{name} {value:g}" for name, value in asked.items() if value is not None]
        return ", ".join(given) or "the server's sampling"


class RemoteSession:
    """One server and one of its models. `api_key` is sent as a bearer token and appears in no message."""

    def __init__(self, url: str, model: str | None = None, api_key: str | None = None) -> None:
        """Raises InputError for what is no address, KarakoramError if the server cannot be asked for its models."""
        address = url.rstrip("/")
        if not address.startswith(("http://", "https://")):
            raise InputError(f"{url!r} is no address of a server.", "Give one like http://127.0.0.1:8000.")
        self.url = address if address.endswith("/v1") else f"{address}/v1"
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._client = httpx2.Client(headers=headers, timeout=httpx2.Timeout(SILENCE_S, connect=CONNECT_S))
        self.model = model or self._first_model()
        self.last: Turn | None = None

    def stream(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        thinking: bool = True,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        seed: int | None = None,
    ) -> Generator[Delta, None, None]:
        """As `Session.stream`; what is None is left to the server."""
        given = {"max_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
        body: dict[str, Any] = {
            "model": self.model,
            "messages": list(messages),
            "stream": True,
            "stream_options": {"include_usage": True},
            "chat_template_kwargs": {"thinking": thinking},
            **{key: value for key, value in given.items() if value is not None},
        }
        if tools:
            body["tools"] = list(tools)
        self.last = None
        return self._deltas(body)

    def _deltas(self, body: dict[str, Any]) -> Generator[Delta, None, None]:
        answer, started = _Answer(), time.perf_counter()
        first = latest = started
        try:
            for event in self._events("/chat/completions", body):
                for delta in answer.read(event):
                    latest = time.perf_counter()
                    first = latest if first == started else first
                    yield delta
        finally:
            usage = answer.usage
            self.last = Turn(
                answer.message(), answer.reason or "interrupted", usage.get("prompt_tokens", 0),
                usage.get("completion_tokens", 0), first - started, latest - first,
            )  # fmt: skip

    def _first_model(self) -> str:
        found = self._json("/models").get("data")
        if not isinstance(found, list) or not found or not isinstance(found[0], dict):
            raise KarakoramError(f"{self.url}/models lists no model.", "Name one: k2 chat --url … MODEL.")
        return str(found[0].get("id"))

    def _json(self, path: str) -> dict[str, Any]:
        try:
            answer = self._client.get(self.url + path)
        except httpx2.HTTPError as error:
            raise self._unreachable(error) from error
        self._check(answer.status_code, answer.text)
        try:
            found = answer.json()
        except ValueError as error:
            raise KarakoramError(f"{self.url}{path} did not answer with JSON.", "Is it such a server?") from error
        return found if isinstance(found, dict) else {}

    def _events(self, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        try:
            with self._client.stream("POST", self.url + path, json=body) as answer:
                if answer.status_code != 200:
                    answer.read()
                    self._check(answer.status_code, answer.text)
                for line in answer.iter_lines():
                    if len(line) > MOST_LINE_BYTES:
                        raise KarakoramError(f"{self.url} sent an event of {len(line)} characters.", "")
                    if line.startswith("data:") and line[5:].strip() != "[DONE]":
                        yield self._event(line[5:])
        except httpx2.HTTPError as error:
            raise self._unreachable(error) from error

    def _event(self, text: str) -> dict[str, Any]:
        try:
            event = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise KarakoramError(f"{self.url} sent an event that is no JSON: {text[:80]!r}.", "") from error
        if isinstance(event, dict) and event.get("error"):
            self._check(500, text)
        return event if isinstance(event, dict) else {}

    def _check(self, status: int, text: str) -> None:
        if status == 200:
            return
        try:
            message = json.loads(text)["error"]["message"]
        except (ValueError, KeyError, TypeError, RecursionError):
            message = text.strip() or "no reason given"
        fix = "Give the server's key: --api-key or K2_API_KEY." if status == 401 else ""
        raise KarakoramError(f"{self.url} refused with {status}: {str(message)[:MOST_ERROR_CHARS]}", fix)

    def _unreachable(self, error: Exception) -> KarakoramError:
        reason = str(error) or type(error).__name__
        return KarakoramError(
            f"{self.url} cannot be reached: {reason}.", "Is the server running? `k2 serve` starts one."
        )


def open_remote(
    url: str, model: str | None, api_key: str | None, temperature: float | None, top_p: float | None
) -> tuple[RemoteSession, ServerSampling, str]:
    """A session with a server, sampling as asked (None: the server's own), and what is said about both."""
    session = RemoteSession(url, model, api_key)
    if temperature is not None or top_p is not None:
        check_sampling(1.0 if temperature is None else temperature, 1.0 if top_p is None else top_p)
    sampling = ServerSampling(temperature, top_p)
    return session, sampling, f"{session.model} · {session.url} · {sampling}"


class _Answer:
    """A message as it comes in."""

    def __init__(self) -> None:
        self.texts = {"reasoning_content": "", "content": ""}
        self.calls: dict[int, dict[str, Any]] = {}
        self.reason: Any = None
        self.usage: dict[str, int] = {}

    def read(self, event: dict[str, Any]) -> Iterator[Delta]:
        """The deltas of one event of the stream, in our shape."""
        usage = event.get("usage")
        if isinstance(usage, dict):
            self.usage = {key: value for key, value in usage.items() if isinstance(value, int)}
        for choice in event.get("choices") or ():
            self.reason = choice.get("finish_reason") or self.reason
            delta = choice.get("delta") or {}
            thought = delta.get("reasoning_content") or delta.get("reasoning")
            for key, text in (("reasoning_content", thought), ("content", delta.get("content"))):
                if isinstance(text, str) and text:
                    self.texts[key] += text
                    yield {key: text}
            for call in delta.get("tool_calls") or ():
                yield self._call(call)

    def _call(self, piece: dict[str, Any]) -> Delta:
        index, function = int(piece.get("index") or 0), piece.get("function") or {}
        name, arguments = function.get("name"), str(function.get("arguments") or "")
        call = self.calls.get(index)
        if call is None:
            whole = {"name": str(name), "arguments": arguments}
            call = self.calls[index] = {"id": piece.get("id"), "type": "function", "function": whole}
            return {"tool_calls": [{"index": index, **call, "function": dict(whole)}]}
        call["function"]["arguments"] += arguments
        return {"tool_calls": [{"index": index, "function": {"arguments": arguments}}]}

    def message(self) -> dict[str, Any]:
        """What has come so far, as an assistant message."""
        message: dict[str, Any] = {"role": "assistant", **{key: text for key, text in self.texts.items() if text}}
        if self.calls:
            message["tool_calls"] = [self.calls[index] for index in sorted(self.calls)]
        return message
