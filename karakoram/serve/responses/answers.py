"""Answers in the shape of OpenAI's Responses API: whole, and as the events of a stream.

    created · in_progress · (output_item.added · … · output_item.done)* · completed, incomplete or failed
      reasoning       content_part.added · reasoning_text.delta* · reasoning_text.done · content_part.done
      message         content_part.added · output_text.delta* · output_text.done · content_part.done
      function_call   function_call_arguments.delta* · function_call_arguments.done

One item is open at a time. All events are numbered from 0. Item ids are made of the response's id and the item's place,
so that a reference to an item leads to the stored answer without an index.

A delta event is an envelope built once for an item, with the escaped text of one delta and a number put in.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from json.encoder import encode_basestring
from typing import Any

from karakoram.serve.openai.chat import dumps
from karakoram.serve.refusal import Refusal
from karakoram.serve.surface import KEEP_ALIVE, Call
from karakoram.session.chat import Answer, Usage
from karakoram.session.direct import Delta
from karakoram.session.request import approximate

Item = dict[str, Any]
Keep = Callable[[Answer, list[Item]], None]

ID_PREFIX = "resp_"
_ITEM_PREFIXES = {"reasoning": "rs", "message": "msg", "function_call": "fc"}

# ---------------------------------------------------------------------------------------------------- whole answers


def item_id(response_id: str, kind: str, place: int) -> str:
    """The id of the item at `place` of a response's output."""
    return f"{_ITEM_PREFIXES[kind]}_{response_id.removeprefix(ID_PREFIX)}_{place}"


def place_of(reference: str) -> tuple[str, int] | None:
    """The response and the place that an item's id names; None for ids that we have not made."""
    kind, _, rest = reference.partition("_")
    number, _, place = rest.rpartition("_")
    if kind not in _ITEM_PREFIXES.values() or not (place.isascii() and place.isdigit() and len(place) < 9):
        return None
    return ID_PREFIX + number, int(place)


def _text_part(text: str) -> Item:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _reasoning_part(text: str) -> Item:
    return {"type": "reasoning_text", "text": text}


def _reasoning_item(name: str, content: list[Item], status: str) -> Item:
    item = {"type": "reasoning", "id": name, "summary": [], "content": content, "encrypted_content": None}
    return {**item, "status": status}


def _message_item(name: str, content: list[Item], status: str) -> Item:
    return {"type": "message", "id": name, "role": "assistant", "status": status, "content": content}


def _call_item(name: str, call_id: str, function: str, arguments: str, status: str) -> Item:
    item = {"type": "function_call", "id": name, "call_id": call_id, "name": function, "arguments": arguments}
    return {**item, "status": status}


def items_of(response_id: str, answer: Answer) -> list[Item]:
    """The output of a finished answer. What `max_output_tokens` has cut is "incomplete"; a call is never cut."""
    message, items = answer.message, list[Item]()

    def name(kind: str) -> str:
        return item_id(response_id, kind, len(items))

    if reasoning := message.get("reasoning_content"):
        items.append(_reasoning_item(name("reasoning"), [_reasoning_part(reasoning)], "completed"))
    if content := message.get("content"):
        items.append(_message_item(name("message"), [_text_part(content)], "completed"))
    if items and answer.finish_reason not in ("stop", "tool_calls") and not message.get("tool_calls"):
        items[-1]["status"] = "incomplete"
    for call in message.get("tool_calls") or ():
        function = call["function"]
        where = name("function_call")
        items.append(_call_item(where, call["id"], function["name"], function["arguments"], "completed"))
    return items


def usage_of(usage: Usage) -> dict[str, Any]:
    """Tokens as this API counts them."""
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        **approximate([usage]),
    }


def response_of(call: Call, echo: Mapping[str, Any], status: str = "in_progress", **fields: Any) -> dict[str, Any]:
    """The response object; `echo` is what it repeats of the request."""
    return {
        "id": call.id,
        "object": "response",
        "created_at": call.created,
        "completed_at": None,
        "status": status,
        "background": False,
        "error": None,
        "incomplete_details": None,
        "model": call.model,
        "output": [],
        "usage": None,
        **echo,
        **fields,
    }


def finished(call: Call, echo: Mapping[str, Any], answer: Answer, output: list[Item]) -> dict[str, Any]:
    """The response object of a finished answer."""
    usage = usage_of(answer.usage)
    if answer.finish_reason in ("stop", "tool_calls"):
        return response_of(call, echo, "completed", completed_at=int(time.time()), output=output, usage=usage)
    reason = {"reason": "max_output_tokens"}
    return response_of(call, echo, "incomplete", output=output, usage=usage, incomplete_details=reason)


# ---------------------------------------------------------------------------------------------------- events


class ResponseEvents:
    """One streamed response; see `surface.Events` for the order of calls. `keep` is called with the finished output."""

    def __init__(self, call: Call, echo: Mapping[str, Any], keep: Keep) -> None:
        self._call, self._echo, self._keep = call, echo, keep
        self._number = 0  # of the next event
        self._items: list[Item] = []  # finished ones
        self._open: str | int | None = None  # "reasoning", "message", or the index of a call
        self._item: Item = {}  # the open one, as it will be
        self._pieces: list[str] = []  # its text
        self._before = ""  # a delta's envelope up to its text

    def start(self, answers: Sequence[Answer]) -> bytes:
        """See `surface.Events`."""
        del answers
        response = response_of(self._call, self._echo)
        begun = self._event("response.created", {"response": response})
        return (begun + self._event("response.in_progress", {"response": response})).encode()

    def deltas(self, answer: Answer, deltas: Sequence[Delta]) -> bytes:
        """See `surface.Events`."""
        del answer
        out: list[str] = []
        for delta in deltas:
            if reasoning := delta.get("reasoning_content"):
                if self._open != "reasoning":
                    self._begin(out, "reasoning", _reasoning_item(self._name("reasoning"), [], "in_progress"))
                self._piece(out, reasoning)
            if content := delta.get("content"):
                if self._open != "message":
                    self._begin(out, "message", _message_item(self._name("message"), [], "in_progress"))
                self._piece(out, content)
            for call in delta.get("tool_calls") or ():
                function = call.get("function") or {}
                if self._open != call["index"]:
                    name = self._name("function_call")
                    item = _call_item(name, call["id"], function["name"], "", "in_progress")
                    self._begin(out, call["index"], item)
                if arguments := function.get("arguments"):
                    self._piece(out, arguments)
        return "".join(out).encode()

    def finish(self, answers: Sequence[Answer]) -> bytes:
        """See `surface.Events`."""
        answer, out = answers[0], list[str]()
        complete = answer.finish_reason in ("stop", "tool_calls")
        if self._open is not None:
            calls = {call["id"] for call in answer.message.get("tool_calls") or ()}
            complete = complete or self._item.get("call_id") in calls
            self._end(out, "completed" if complete else "incomplete")
        response = finished(self._call, self._echo, answer, self._items)
        self._keep(answer, self._items)
        out.append(self._event(f"response.{response['status']}", {"response": response}))
        return "".join(out).encode()

    def fail(self, refusal: Refusal) -> bytes:
        """See `surface.Events`."""
        code = "rate_limit_exceeded" if refusal.status == 429 else "server_error"
        error = {"code": code, "message": refusal.message}
        response = response_of(self._call, self._echo, "failed", output=self._items, error=error)
        return self._event("response.failed", {"response": response}).encode()

    def ping(self) -> bytes:
        """See `surface.Events`."""
        return KEEP_ALIVE

    def _name(self, kind: str) -> str:
        """The id of the next item; the open one, if there is one, will have been closed before it."""
        return item_id(self._call.id, kind, len(self._items) + (self._open is not None))

    def _piece(self, out: list[str], text: str) -> None:
        self._pieces.append(text)
        out.append(f'{self._before}{encode_basestring(text)},"sequence_number":{self._number}}}\n\n')
        self._number += 1

    def _begin(self, out: list[str], what: str | int, item: Item) -> None:
        """Close what is open, open an item."""
        self._end(out, "completed")
        self._open, self._item, self._pieces = what, item, []
        out.append(self._event("response.output_item.added", {"output_index": len(self._items), "item": item}))
        where: dict[str, Any] = {"item_id": item["id"], "output_index": len(self._items)}
        if what == "reasoning":
            kind, part = "response.reasoning_text.delta", _reasoning_part("")
        elif what == "message":
            kind, part = "response.output_text.delta", _text_part("")
        else:
            kind, part = "response.function_call_arguments.delta", None
        if part is not None:
            where["content_index"] = 0
            out.append(self._event("response.content_part.added", {**where, "part": part}))
        if what == "message":
            where["logprobs"] = []
        self._before = f'event: {kind}\ndata: {dumps({"type": kind, **where})[:-1]},"delta":'

    def _end(self, out: list[str], status: str) -> None:
        if self._open is None:
            return
        text, item = "".join(self._pieces), {**self._item, "status": status}
        where: dict[str, Any] = {"item_id": item["id"], "output_index": len(self._items)}
        if self._open == "reasoning" or self._open == "message":
            where["content_index"] = 0
            if self._open == "reasoning":
                part = _reasoning_part(text)
                out.append(self._event("response.reasoning_text.done", {**where, "text": text}))
            else:
                part = _text_part(text)
                out.append(self._event("response.output_text.done", {**where, "text": text, "logprobs": []}))
            out.append(self._event("response.content_part.done", {**where, "part": part}))
            item["content"] = [part]
        else:
            item["arguments"] = text
            done = {**where, "name": item["name"], "arguments": text}
            out.append(self._event("response.function_call_arguments.done", done))
        out.append(self._event("response.output_item.done", {"output_index": len(self._items), "item": item}))
        self._items.append(item)
        self._open = None

    def _event(self, kind: str, fields: Mapping[str, Any]) -> str:
        data = dumps({"type": kind, **fields, "sequence_number": self._number})
        self._number += 1
        return f"event: {kind}\ndata: {data}\n\n"
