"""Answers in Anthropic's shape: whole, and as the events of a stream.

    message_start · (content_block_start · content_block_delta* · content_block_stop)* · message_delta · message_stop

One block is open at a time. Reasoning, text and each call are blocks of their own, and whatever interrupts one closes
it: a second segment of reasoning opens a second thinking block. A thinking block ends with a `signature_delta`: an
HMAC-SHA256 of its text, by which the server can tell a block that it wrote. A call's arguments come as pieces of JSON.

Every event is an envelope built once for a block, with the escaped text of one delta in the middle.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from base64 import urlsafe_b64decode, urlsafe_b64encode
from binascii import Error as Base64Error
from collections.abc import Mapping, Sequence
from json.encoder import encode_basestring
from typing import Any

from pydantic_core import from_json

from karakoram.serve.openai.chat import dumps
from karakoram.serve.refusal import Refusal
from karakoram.serve.surface import KEEP_ALIVE
from karakoram.session.chat import Answer, Usage
from karakoram.session.direct import Delta
from karakoram.session.request import approximate

_PING = b'event: ping\ndata: {"type":"ping"}\n\n'
_CALL_ID = re.compile(r"functions\..+:\d+")
_ID_PREFIX = "toolu_"
_FIELD_NAMES = {"stop": "stop_sequences"}
"""What floors below call a field, and Anthropic's name for it."""

# ---------------------------------------------------------------------------------------------------- ids, signatures


def tool_use_id(call_id: str) -> str:
    """A call's id as Anthropic's clients accept it (`^[a-zA-Z0-9_-]+$`): a reversible spelling of ours."""
    return _ID_PREFIX + urlsafe_b64encode(call_id.encode()).decode().rstrip("=")


def call_id_of(tool_id: str) -> str:
    """The way back. An id that we have not made is left as it is: the session gives calls canonical ids anyway."""
    if not tool_id.startswith(_ID_PREFIX):
        return tool_id
    code = tool_id[len(_ID_PREFIX) :]
    try:
        call_id = urlsafe_b64decode(code + "=" * (-len(code) % 4)).decode()
    except (Base64Error, ValueError):
        return tool_id
    return call_id if _CALL_ID.fullmatch(call_id) and tool_use_id(call_id) == tool_id else tool_id


class Signer:
    """Signs reasoning with a secret of this process: after a restart our own blocks are strangers, which does no harm,
    because blocks of strangers are read as well."""

    def __init__(self, secret: bytes | None = None) -> None:
        self._secret = secrets.token_bytes(32) if secret is None else secret

    def begin(self) -> hmac.HMAC:
        """To be updated with the reasoning's UTF-8; its `signature_of` is the signature."""
        return hmac.new(self._secret, digestmod=hashlib.sha256)

    def sign(self, reasoning: str) -> str:
        """The signature of a whole text."""
        begun = self.begin()
        begun.update(reasoning.encode())
        return signature_of(begun)

    def recognises(self, reasoning: str, signature: str | None) -> bool:
        """Whether this server wrote the text. Takes the same time for all wrong signatures."""
        return hmac.compare_digest(self.sign(reasoning).encode(), (signature or "").encode("utf-8", "replace"))


def signature_of(begun: hmac.HMAC) -> str:
    """A finished signature as text."""
    return "k2." + urlsafe_b64encode(begun.digest()).decode().rstrip("=")


# ---------------------------------------------------------------------------------------------------- whole answers


def usage_of(usage: Usage) -> dict[str, Any]:
    """Anthropic counts the cached part of the prompt apart."""
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"thinking_tokens": usage.reasoning_tokens},
        **approximate([usage]),
    }


def stop_of(answer: Answer) -> dict[str, Any]:
    """`stop_reason`, and which string it was where one of the client's ended the answer."""
    if answer.stop_string is not None:
        return {"stop_reason": "stop_sequence", "stop_sequence": answer.stop_string}
    reasons = {"tool_calls": "tool_use", "length": "max_tokens"}
    return {"stop_reason": reasons.get(answer.finish_reason or "", "end_turn"), "stop_sequence": None}


def arguments_of(text: str) -> dict[str, Any]:
    """A call's `input`. Of what was cut off, what can be read, as the official client does it."""
    try:
        value = from_json(text, allow_partial=True)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def blocks_of(message: Mapping[str, Any], signer: Signer, shows_thinking: bool = True) -> list[dict[str, Any]]:
    """The blocks of a finished assistant message in OpenAI's shape."""
    blocks: list[dict[str, Any]] = []
    if reasoning := message.get("reasoning_content"):
        shown = reasoning if shows_thinking else ""
        blocks.append({"type": "thinking", "thinking": shown, "signature": signer.sign(reasoning)})
    if content := message.get("content"):
        blocks.append({"type": "text", "text": content})
    for call in message.get("tool_calls") or ():
        function = call["function"]
        arguments = arguments_of(function["arguments"])
        blocks.append({"type": "tool_use", "id": tool_use_id(call["id"]), "name": function["name"], "input": arguments})
    return blocks


def message_of(message_id: str, model: str, blocks: list[dict[str, Any]], usage: Usage) -> dict[str, Any]:
    """A message that has not stopped yet."""
    return {
        "id": message_id,
        "type": "message",
        "role": "assistant",
        "model": model,
        "content": blocks,
        "stop_reason": None,
        "stop_sequence": None,
        "usage": usage_of(usage),
    }


def error_body(refusal: Refusal, request_id: str) -> dict[str, Any]:
    """Anthropic's error body. The path of the field opens the message, as `messages.0.content.1`; a conversation that
    does not fit is told in the words by which Claude Code knows that it must shorten it."""
    message, param = refusal.message, refusal.param
    if refusal.code == "context_length_exceeded":
        message = f"prompt is too long: {message}"
    elif param is not None and refusal.code != "unsupported_schema":  # which says where itself
        path = re.sub(r"\[(\d+)\]", r".\1", _FIELD_NAMES.get(param, param))
        if message.startswith(f"{param} is "):  # the sentence names it
            message = path + message[len(param) :]
        else:
            message = f"{path}: {message.removeprefix(f'{param}: ')}"
    error = {"type": refusal.anthropic_kind, "message": message}
    return {"type": "error", "error": error, "request_id": request_id}


# ---------------------------------------------------------------------------------------------------- events


class MessageEvents:
    """One streamed message; see `surface.Events` for the order of calls."""

    def __init__(self, message_id: str, model: str, signer: Signer, shows_thinking: bool = True) -> None:
        self._id, self._model, self._signer, self._shows_thinking = message_id, model, signer, shows_thinking
        self._started = False
        self._count = 0  # of blocks begun
        self._open: str | int | None = None  # "thinking", "text", or the index of a call
        self._before = ""  # a delta's envelope up to its text
        self._signature: hmac.HMAC | None = None

    def start(self, answers: Sequence[Answer]) -> bytes:
        """See `surface.Events`."""
        self._started = True
        message = message_of(self._id, self._model, [], answers[0].usage)
        return _event("message_start", {"message": message}).encode()

    def deltas(self, answer: Answer, deltas: Sequence[Delta]) -> bytes:
        """See `surface.Events`."""
        del answer
        out: list[str] = []
        for delta in deltas:
            if reasoning := delta.get("reasoning_content"):
                self._think(out, reasoning)
            if content := delta.get("content"):
                if self._open != "text":
                    self._begin(out, "text", {"type": "text", "text": ""}, "text_delta", "text")
                out.append(f"{self._before}{encode_basestring(content)}}}}}\n\n")
            for call in delta.get("tool_calls") or ():
                self._call(out, call)
        return "".join(out).encode()

    def finish(self, answers: Sequence[Answer]) -> bytes:
        """See `surface.Events`."""
        out: list[str] = []
        self._end(out)
        answer = answers[0]
        out.append(_event("message_delta", {"delta": stop_of(answer), "usage": usage_of(answer.usage)}))
        out.append(_event("message_stop", {}))
        return "".join(out).encode()

    def fail(self, refusal: Refusal) -> bytes:
        """See `surface.Events`."""
        return _event("error", error_body(refusal, self._id)).encode()

    def ping(self) -> bytes:
        """See `surface.Events`. Nothing may stand before `message_start`, so until then it is a comment."""
        return _PING if self._started else KEEP_ALIVE

    def _think(self, out: list[str], reasoning: str) -> None:
        if self._open != "thinking":
            block = {"type": "thinking", "thinking": "", "signature": ""}
            self._begin(out, "thinking", block, "thinking_delta", "thinking")
            self._signature = self._signer.begin()
        assert self._signature is not None
        self._signature.update(reasoning.encode())
        if self._shows_thinking:
            out.append(f"{self._before}{encode_basestring(reasoning)}}}}}\n\n")

    def _call(self, out: list[str], call: Mapping[str, Any]) -> None:
        function = call.get("function") or {}
        if self._open != call["index"]:
            block = {"type": "tool_use", "id": tool_use_id(call["id"]), "name": function["name"], "input": {}}
            self._begin(out, call["index"], block, "input_json_delta", "partial_json")
        if arguments := function.get("arguments"):
            out.append(f"{self._before}{encode_basestring(arguments)}}}}}\n\n")

    def _begin(self, out: list[str], what: str | int, block: dict[str, Any], delta: str, key: str) -> None:
        """Close what is open, open a block; `key` is where its deltas have their text."""
        self._end(out)
        index = self._count
        self._open, self._count = what, index + 1
        out.append(_event("content_block_start", {"index": index, "content_block": block}))
        self._before = (
            f'event: content_block_delta\ndata: {{"type":"content_block_delta","index":{index},'
            f'"delta":{{"type":"{delta}","{key}":'
        )

    def _end(self, out: list[str]) -> None:
        if self._open is None:
            return
        index = self._count - 1
        if self._open == "thinking":
            assert self._signature is not None
            delta = {"type": "signature_delta", "signature": signature_of(self._signature)}
            out.append(_event("content_block_delta", {"index": index, "delta": delta}))
        out.append(_event("content_block_stop", {"index": index}))
        self._open = None


def _event(kind: str, fields: Mapping[str, Any]) -> str:
    return f"event: {kind}\ndata: {dumps({'type': kind, **fields})}\n\n"
