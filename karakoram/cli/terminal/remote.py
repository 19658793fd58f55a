"""Talk to any server that speaks OpenAI's chat completions, as `Session` talks to a model in this process.

Nothing is kept between turns but the messages, which the caller holds. Whatever a server sends is bounded and checked
before it is shown: a line of at most MOST_LINE_BYTES, deltas of the shapes that are known.
"""

from __future__ import annotations

import json
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx2

from karakoram.errors import InputError, KarakoramError
from karakoram.session import Delta, Turn, check_sampling

MOST_LINE_BYTES = 16_000_000
MOST_ERROR_CHARS = 500
CONNECT_S = 10.0
SILENCE_S = 600.0  # servers send something every few seconds while they think, or are slow machines
MOST_CALLS = 128  # in one answer

_ADDRESS = "Give one like http://127.0.0.1:8000."
_OTHER_SERVER = "Is this a server with OpenAI's API?"


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
            raise InputError(f"{url!r} is no address of a server.", _ADDRESS)
        if api_key and not (api_key.isascii() and api_key.isprintable()):
            raise InputError("The API key has characters that no key has.", "Check --api-key and K2_API_KEY.")
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
        with self._answer("GET", path) as answer:
            text = _text_of(answer)
            self._check(answer.status_code, text)
        try:
            found = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise KarakoramError(f"{self.url}{path} did not answer with JSON.", _OTHER_SERVER) from error
        return found if isinstance(found, dict) else {}

    def _events(self, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The events of a stream; KarakoramError where it breaks off before its end."""
        ended = False  # by a reason to finish: not every server says [DONE]
        with self._answer("POST", path, body) as answer:
            if answer.status_code != 200:
                self._check(answer.status_code, _text_of(answer))
            try:
                for line in _lines(answer):
                    if not line.startswith("data:"):
                        continue
                    if line[5:].strip() == "[DONE]":
                        return
                    event = self._event(line[5:])
                    ended = ended or any(choice.get("finish_reason") for choice in _objects(event.get("choices")))
                    yield event
            except httpx2.HTTPError as error:
                raise self._broken_off(str(error) or type(error).__name__) from error
        if not ended:
            raise self._broken_off("the stream has no end")

    @contextmanager
    def _answer(self, method: str, path: str, body: dict[str, Any] | None = None) -> Iterator[httpx2.Response]:
        """An answer whose headers have come, for as long as the block lasts."""
        try:
            answer = self._client.send(self._client.build_request(method, self.url + path, json=body), stream=True)
        except (httpx2.InvalidURL, UnicodeError) as error:
            raise InputError(f"{self.url!r} is no address of a server: {error}.", _ADDRESS) from error
        except httpx2.HTTPError as error:
            reason = str(error) or type(error).__name__
            raise KarakoramError(
                f"{self.url} cannot be reached: {reason}.", "Is the server running? `k2 serve` starts one."
            ) from error
        try:
            yield answer
        finally:
            answer.close()

    def _event(self, text: str) -> dict[str, Any]:
        try:
            event = json.loads(text)
        except (ValueError, RecursionError) as error:
            what = f"{self.url} sent an event that is no JSON: {text[:80]!r}."
            raise KarakoramError(what, _OTHER_SERVER) from error
        if isinstance(event, dict) and event.get("error"):
            raise self._broken_off(_message_of(event) or "no reason given")
        return event if isinstance(event, dict) else {}

    def _check(self, status: int, text: str) -> None:
        if status == 200:
            return
        try:
            message = _message_of(json.loads(text))
        except (ValueError, RecursionError):
            message = ""
        said = (message or text.strip() or "no reason given")[:MOST_ERROR_CHARS]
        fix = "Give the server's key: --api-key or K2_API_KEY." if status == 401 else "" if message else _OTHER_SERVER
        raise KarakoramError(f"{self.url} refused with {status}: {said}", fix)

    def _broken_off(self, reason: str) -> KarakoramError:
        said = reason[:MOST_ERROR_CHARS].rstrip(".")
        return KarakoramError(
            f"{self.url} broke off in the middle of the answer: {said}.", "Ask again once the server is there."
        )


def _text_of(answer: httpx2.Response) -> str:
    """A whole body, as far as it is no longer than an event may be."""
    whole = b""
    try:
        for piece in answer.iter_bytes():
            whole += piece
            if len(whole) > MOST_LINE_BYTES:
                break
    except httpx2.HTTPError as error:
        reason = str(error) or type(error).__name__
        raise KarakoramError(f"{answer.url} broke off: {reason}.", "Ask again once the server is there.") from error
    return whole[:MOST_LINE_BYTES].decode("utf-8", "replace")


def _lines(answer: httpx2.Response) -> Iterator[str]:
    """The lines of a body; KarakoramError where one is longer than MOST_LINE_BYTES."""
    held = b""
    for piece in answer.iter_bytes():
        *lines, held = (held + piece).split(b"\n")
        for line in lines:
            yield line.decode("utf-8", "replace").removesuffix("\r")
        if len(held) > MOST_LINE_BYTES:
            raise KarakoramError(f"{answer.url} sent an event of more than {MOST_LINE_BYTES} bytes.", _OTHER_SERVER)
    if held:
        yield held.decode("utf-8", "replace")


def _message_of(body: object) -> str:
    """What an error body says: OpenAI's and Anthropic's shape, and plain texts; "" for others."""
    error = body.get("error") if isinstance(body, dict) else None
    message = error.get("message") if isinstance(error, dict) else error
    return message if isinstance(message, str) else ""


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
        for choice in _objects(event.get("choices")):
            self.reason = choice.get("finish_reason") or self.reason
            (delta,) = _objects([choice.get("delta")]) or [{}]
            thought = delta.get("reasoning_content") or delta.get("reasoning")
            for key, text in (("reasoning_content", thought), ("content", delta.get("content"))):
                if isinstance(text, str) and text:
                    self.texts[key] += text
                    yield {key: text}
            for piece in _objects(delta.get("tool_calls")):
                if (call := self._call(piece)) is not None:
                    yield call

    def _call(self, piece: dict[str, Any]) -> Delta | None:
        index = piece.get("index") or 0
        if not isinstance(index, int) or not 0 <= index < MOST_CALLS:
            return None
        (function,) = _objects([piece.get("function")]) or [{}]
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


def _objects(value: object) -> list[dict[str, Any]]:
    """The objects of a list; what else a server may send there is passed over."""
    return [one for one in value if isinstance(one, dict)] if isinstance(value, list) else []
