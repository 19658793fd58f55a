"""Messages in, message parts out, through an engine: what servers talk to.

`ChatSession.open` renders a conversation into one engine request per choice and returns an `Answer` for each; whoever
submits the request feeds the answer with the engine's news and gets deltas in OpenAI's shape back.

What the model wrote is kept (`emitted.py`) and stands in the next turn's prompt as the tokens it was; reasoning that a
client did not send back comes with it. What may be written (calls that satisfy their schemas, JSON, a budget of
reasoning) is compiled by `engine.constrain`.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from karakoram.chat.dialects import CALL_BEGIN, SECTION_BEGIN
from karakoram.chat.format import ChatFormat
from karakoram.chat.messages import Message, read_messages, read_tools
from karakoram.chat.template import Written
from karakoram.chat.tool_ids import canonical_ids
from karakoram.engine.constrain.output import Compiler
from karakoram.engine.constrain.shape import OutputShape, Schema, ToolShape
from karakoram.engine.constrain.validate import validate_call
from karakoram.engine.request import Request, TokenSource
from karakoram.errors import ChatError, ContextOverflow, InputError
from karakoram.session.answer import Answer
from karakoram.session.direct import check_prompt
from karakoram.session.emitted import Emitted, EmittedStore, key_of, prefixes, visible
from karakoram.session.parts import SpokenParser, unspoken
from karakoram.session.request import ChatRequest, TextLogprob, Usage
from karakoram.session.stop_strings import StopWatch

__all__ = ["Answer", "ChatRequest", "ChatSession", "TextLogprob", "Usage"]

MOST_STOPS, MOST_STOP_CHARS = 16, 512
MOST_CHOICES = 128


@dataclass(frozen=True)
class _Opened:
    """A conversation made ready: what its answers have in common."""

    prompt: list[int]
    records: list[Message]  # with canonical ids
    prefix: bytes  # digest of the conversation, under which its answer is kept
    in_reasoning: bool
    first_index: int
    schemas: Mapping[str, Schema]  # of strict tools, by name


class ChatSession:
    """Joins an engine and a chat format. Thread-safe; keeps what was emitted, for the next turn."""

    def __init__(self, source: TokenSource, fmt: ChatFormat, store: EmittedStore | None = None) -> None:
        self.source, self.fmt = source, fmt
        self.store = EmittedStore() if store is None else store
        self.invalid_calls = 0
        # Who declared no tools must get no call; with tools, the constraint sees to it.
        special = fmt.tokenizer.special_ids
        self._calls = tuple(special[marker] for marker in (SECTION_BEGIN, CALL_BEGIN) if marker in special)
        self._unspoken = unspoken(fmt)
        self._compiler = Compiler(fmt.tokenizer, source.vocab_size, fmt.stop_ids, fmt.facts.think)
        self._lock = threading.Lock()

    def open(self, chat: ChatRequest, request_id: str) -> list[Answer]:
        """The answers (n of them) to be fed. ChatError, InputError, ContextOverflow (both numbers), SchemaError (which
        keyword) for what cannot be done. Rendering and compiling happen here: call it off an event loop."""
        self._check(chat)
        opened = self._open(chat)
        limit = self._limit(len(opened.prompt), chat.max_new_tokens)
        shape = self._shape(chat, opened)
        answers: list[Answer] = []
        for index in range(chat.n):
            name = request_id if chat.n == 1 else f"{request_id}-{index}"
            request = self._request(chat, opened, shape, limit, index, name)
            answers.append(
                Answer(
                    self.fmt, chat, request, index, opened.in_reasoning, self._parser(chat, opened),
                    lambda answer: self._closed(answer, chat, opened),
                )
            )  # fmt: skip
        return answers

    def encode(self, chat: ChatRequest) -> list[int]:
        """The prompt's token ids."""
        return self._open(chat).prompt

    def _parser(self, chat: ChatRequest, opened: _Opened) -> SpokenParser:
        parser = self.fmt.parser(list(chat.tools) or None, opened.in_reasoning, opened.first_index)
        return SpokenParser(parser, self._unspoken)

    def _closed(self, answer: Answer, chat: ChatRequest, opened: _Opened) -> None:
        """An answer has ended: keep what it wrote, check its calls once more."""
        message = answer.message
        for call in message["tool_calls"]:
            schema = opened.schemas.get(call["function"]["name"])
            if schema is not None and validate_call(schema, call["function"]["arguments"]) is not None:
                with self._lock:
                    self.invalid_calls += 1
        written = answer.written
        if written is None or (chat.messages[-1].get("partial") and chat.messages[-1].get("role") == "assistant"):
            return
        whole = [*opened.records, *read_messages([message])[-1:]]
        record = canonical_ids(whole)[0][-1]
        emitted = Emitted(written, message.get("reasoning_content") or "", visible(record))
        self.store.put(key_of(opened.prefix, record), emitted)

    def _open(self, chat: ChatRequest) -> _Opened:
        messages, partial = list(chat.messages), None
        if messages and isinstance(messages[-1], Mapping) and messages[-1].get("partial"):
            partial = messages.pop()
            if partial.get("role") != "assistant" or partial.get("tool_calls"):
                raise ChatError(
                    f"Message {len(messages)} is partial but no plain assistant message.",
                    "Only a last assistant message without tool calls can be continued.",
                )
            if not messages:
                raise ChatError("There is nothing before the partial message.", "Give a user message first.")
        records, ids = canonical_ids(read_messages(messages))
        digests = prefixes(chat.client, records)
        restored, written = self._restore(messages, records, digests)
        thinking = chat.thinking and not (partial is not None and _text(partial.get("content")))
        tools = None if not chat.tools else [_without_strict(tool) for tool in chat.tools]
        prompt = self.fmt.encode_segments(
            self.fmt.prompt(restored, tools, thinking, chat.preserve_thinking, True, "canonical", written)
        )
        in_reasoning = thinking and self.fmt.facts.starts_in_reasoning
        if partial is not None:
            prompt += self._begun(partial, in_reasoning)
        check_prompt(prompt, self.source)
        schemas = {tool.name: tool.parameters for tool in _tool_shapes(chat) if tool.strict}
        return _Opened(prompt, records, digests[-1], in_reasoning, ids.next_index, schemas)

    def _begun(self, partial: Mapping[str, Any], in_reasoning: bool) -> list[int]:
        """The tokens of the answer's given beginning."""
        begun = partial.get("reasoning_content") if in_reasoning else None
        return self.fmt.tokenizer.encode(_text(partial.get("content")) or begun or "")

    def _restore(
        self, messages: list[Mapping[str, Any]], records: list[Message], digests: list[bytes]
    ) -> tuple[list[Mapping[str, Any]], dict[int, Written]]:
        """Messages with the reasoning that was not sent back, and the tokens of those that came back as they were."""
        restored, written = messages, dict[int, Written]()
        for index, record in enumerate(records):
            if record.role != "assistant":
                continue
            emitted = self.store.get(key_of(digests[index], record))
            if emitted is None:
                continue
            sent = record.reasoning or record.other_reasoning
            if sent and sent != emitted.reasoning:
                continue
            if visible(record) == emitted.visible:
                written[index] = emitted.written
            elif not sent and emitted.reasoning:
                restored = list(restored)
                restored[index] = {**restored[index], "reasoning_content": emitted.reasoning}
        return restored, written

    def _limit(self, prompt_tokens: int, wanted: int | None) -> int:
        context = self.source.context
        least = 1 if wanted is None else wanted
        if least < 1:
            raise InputError(f"max_tokens is {wanted}.", "Ask for at least 1 new token.")
        if prompt_tokens + least > context:
            raise ContextOverflow(
                f"The prompt has {prompt_tokens} tokens; with {least} new that is {prompt_tokens + least}, but the "
                f"context ends at {context}.",
                "Shorten the conversation, or ask for fewer new tokens.", prompt_tokens + least, context,
            )  # fmt: skip
        return context - prompt_tokens if wanted is None else wanted

    def _shape(self, chat: ChatRequest, opened: _Opened) -> OutputShape | None:
        """What restricts the answers; None: nothing does."""
        plain = chat.response_schema is None and chat.response_regex is None and chat.reasoning_tokens is None
        if plain and not chat.tools:
            return None
        return OutputShape(
            _tool_shapes(chat), chat.tool_choice, chat.named_tool, chat.parallel_tool_calls, opened.first_index,
            chat.response_schema, chat.response_regex, opened.in_reasoning, chat.reasoning_tokens,
        )  # fmt: skip

    def _request(
        self, chat: ChatRequest, opened: _Opened, shape: OutputShape | None, limit: int, index: int, name: str
    ) -> Request:
        constraint = None if shape is None else self._compiler.compile(shape)
        if constraint is not None and limit < constraint.shortest:
            raise InputError(
                f"max_tokens is {limit}, but the shortest answer that satisfies the tools or the schema takes "
                f"{constraint.shortest} tokens.",
                f"Allow at least {constraint.shortest}.",
            )
        ends = frozenset() if chat.ignore_end else self.fmt.stop_ids
        stop_when = None
        if chat.stop:
            stop_when = StopWatch(self._parser(chat, opened), chat.stop)
        sampling = chat.sampling
        if sampling.seed is not None and index:
            sampling = replace(sampling, seed=(sampling.seed + index * 0x9E3779B97F4A7C15) % 2**63)
        return Request(
            name, opened.prompt, limit, sampling, ends | frozenset(chat.stop_token_ids), stop_when, chat.logprobs,
            None, constraint, chat.client, self._calls if constraint is None else (),
        )  # fmt: skip

    def _check(self, chat: ChatRequest) -> None:
        if not 1 <= chat.n <= MOST_CHOICES:
            raise InputError(f"n is {chat.n}.", f"n must be between 1 and {MOST_CHOICES}.")
        if len(chat.stop) > MOST_STOPS or any(not 0 < len(stop) <= MOST_STOP_CHARS for stop in chat.stop):
            raise InputError(
                f"stop has {len(chat.stop)} strings, the longest of {max(map(len, chat.stop))} characters.",
                f"Give at most {MOST_STOPS}, each of 1 to {MOST_STOP_CHARS} characters.",
            )
        names = [tool.name for tool in _tool_shapes(chat)]
        if chat.tool_choice in ("required", "named") and not names:
            raise InputError(f"tool_choice is {chat.tool_choice!r} but there are no tools.", "Declare some.")
        if chat.tool_choice == "named" and chat.named_tool not in names:
            raise InputError(
                f"tool_choice names {chat.named_tool!r}, which is not among the tools.",
                f"Choose of {', '.join(names)}.",
            )
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise InputError(f"The tool {twice!r} is declared twice.", "Give each tool its own name.")


def _tool_shapes(chat: ChatRequest) -> tuple[ToolShape, ...]:
    """Function tools with their schemas; without any, arguments are any object."""
    return tuple(
        ToolShape(
            tool["function"]["name"],
            tool["function"].get("parameters") or {"type": "object"},
            tool["function"].get("strict") is not False,
        )
        for tool in read_tools(list(chat.tools))
        if tool["type"] == "function"
    )


def _without_strict(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    """A declaration as models know it: `strict` is between client and server."""
    function = tool.get("function")
    if not isinstance(function, Mapping) or "strict" not in function:
        return tool
    return {**tool, "function": {key: value for key, value in function.items() if key != "strict"}}


def _text(content: object) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, Sequence):
        return "".join(str(part.get("text") or "") for part in content if isinstance(part, Mapping))
    return ""
