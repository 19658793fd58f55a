"""`/v1/chat/completions`.

The stream is the hot path: 32 streams of 500 tokens a second are 16,000 chunks. A chunk of text is therefore made of
two ready strings around the escaped text: 0.7 µs, where building a dict and dumping it takes 8. Whatever is rare (tool
calls, log-probabilities, the end) is dumped.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from json.encoder import encode_basestring
from typing import Any

from karakoram.errors import SchemaError
from karakoram.serve.openai import schemas
from karakoram.serve.openai.answers import ChatCompletion
from karakoram.serve.openai.conversation import (
    read_conversation,
    sampling_of,
    schema_of,
    schema_path,
    stops_of,
    thinking_of,
    tool_choice_of,
)
from karakoram.serve.refusal import Refusal
from karakoram.serve.service import Service
from karakoram.serve.surface import KEEP_ALIVE, Call, Described, Events, Surface
from karakoram.session.chat import Answer, ChatRequest, TextLogprob
from karakoram.session.parts import Delta
from karakoram.session.request import approximate

DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True)
class Wishes:
    """What of a request concerns its encoding alone."""

    include_usage: bool = False
    token_ids: bool = False


class ChatCompletions(Surface):
    """OpenAI's chat."""

    described = Described("/v1/chat/completions", "Answer a conversation", "openai", ChatCompletion.model_json_schema())
    id_prefix = "chatcmpl-"
    Body = schemas.ChatCompletionRequest

    def parse(self, body: Any, headers: Mapping[str, str], service: Service) -> Call:
        model = service.check_model(body.model)
        thinking, keeps, budget = thinking_of(body)
        choice, named = tool_choice_of(body)
        schema, regex = schema_of(body)
        if body.top_logprobs and not body.logprobs:
            raise Refusal(400, "top_logprobs needs logprobs to be true.", "top_logprobs")
        chat = ChatRequest(
            messages=read_conversation(body.messages),
            tools=body.tools or (),
            tool_choice=choice,  # type: ignore[arg-type]
            named_tool=named,
            parallel_tool_calls=body.parallel_tool_calls is not False,
            thinking=thinking,
            preserve_thinking=keeps,
            reasoning_tokens=budget,
            response_schema=schema,
            response_regex=regex,
            sampling=sampling_of(body, service, thinking),
            max_new_tokens=body.max_completion_tokens or body.max_tokens,
            stop=stops_of(body),
            stop_token_ids=body.stop_token_ids or (),
            logprobs=(body.top_logprobs or 0) if body.logprobs else None,
            n=body.n or 1,
            ignore_end=bool(body.ignore_eos),
        )
        return Call(chat, model, bool(body.stream), wishes_of(body))

    def open(self, call: Call, service: Service) -> Sequence[Answer]:
        try:
            return super().open(call, service)
        except SchemaError as error:
            path = schema_path(error, call.chat.tools)
            raise Refusal(400, str(error), path, "unsupported_schema") from error

    def events(self, call: Call, service: Service) -> ChatEvents:
        return ChatEvents(call)

    def whole(self, call: Call, answers: Sequence[Answer], service: Service) -> dict[str, Any]:
        body: dict[str, Any] = {
            "id": call.id,
            "object": "chat.completion",
            "created": call.created,
            "model": call.model,
            "choices": [_choice(answer, call.extra.token_ids) for answer in answers],
            "usage": usage_of(answers),
        }
        if call.extra.token_ids:
            body["prompt_token_ids"] = list(answers[0].request.prompt)
        return body


def wishes_of(body: schemas.Drawing) -> Wishes:
    """How the answer is to be encoded."""
    options = body.stream_options
    return Wishes(bool(options and options.include_usage), bool(body.return_token_ids))


def _choice(answer: Answer, token_ids: bool) -> dict[str, Any]:
    said = answer.message
    reasoning = said.get("reasoning_content") or None
    message: dict[str, Any] = {
        "role": "assistant",
        "content": said.get("content"),
        "reasoning_content": reasoning,
        "reasoning": reasoning,
    }
    if said.get("tool_calls"):
        message["tool_calls"] = said["tool_calls"]
    choice: dict[str, Any] = {
        "index": answer.index,
        "message": message,
        "logprobs": logprobs_of(answer),
        "finish_reason": answer.finish_reason,
    }
    if token_ids:
        choice["token_ids"] = answer.token_ids
    return choice


def logprobs_of(answer: Answer) -> dict[str, Any] | None:
    """OpenAI's `logprobs` of the tokens that came since the last time."""
    if answer.request.logprobs is None:
        return None
    return {"content": [_logprob(item) for item in answer.take_logprobs()], "refusal": None}


def _logprob(item: TextLogprob) -> dict[str, Any]:
    best = [
        {"token": text, "logprob": value, "bytes": list(raw)} for text, raw, value, _ in item.best
    ]  # bytes as a list of numbers is OpenAI's way
    return {"token": item.text, "logprob": item.logprob, "bytes": list(item.bytes), "top_logprobs": best}


def usage_of(answers: Sequence[Answer]) -> dict[str, Any]:
    """OpenAI's `usage`: the prompt counts once, however many choices it had."""
    counts = [answer.usage for answer in answers]
    prompt, written = counts[0].prompt_tokens, sum(count.completion_tokens for count in counts)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": written,
        "total_tokens": prompt + written,
        "prompt_tokens_details": {"cached_tokens": counts[0].cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": sum(count.reasoning_tokens for count in counts)},
        **approximate(counts),
    }


class ChatEvents(Events):
    """One streamed answer as `chat.completion.chunk`s."""

    def __init__(self, call: Call) -> None:
        wishes = call.extra
        self._usage, self._token_ids = wishes.include_usage, wishes.token_ids
        common = {"id": call.id, "object": "chat.completion.chunk", "created": call.created, "model": call.model}
        self._common = "data: " + dumps(common)[:-1]
        self._heads = [f'{self._common},"choices":[{{"index":{index},"delta":' for index in range(call.chat.n)]
        self._end = ',"usage":null}\n\n' if self._usage else "}\n\n"
        self._tail = ',"logprobs":null,"finish_reason":null}]' + self._end
        self._told = [0] * call.chat.n  # tokens whose ids have been sent
        self._plain = call.chat.logprobs is None and not self._token_ids

    def start(self, answers: Sequence[Answer]) -> bytes:
        delta = '{"role":"assistant","content":""}'
        first = [head + delta + self._tail for head in self._heads]
        if self._token_ids:
            prompt = dumps({"prompt_token_ids": list(answers[0].request.prompt)})
            first[0] = f"{self._common},{prompt[1:-1]}" + first[0][len(self._common) :]
        return "".join(first).encode()

    def deltas(self, answer: Answer, deltas: Sequence[Delta]) -> bytes:
        head, tail = self._heads[answer.index], self._tail
        chunks: list[str] = []
        for delta in deltas:
            text = delta.get("content")
            if text is not None:
                shown = f'{{"content":{encode_basestring(text)}}}'
            elif (text := delta.get("reasoning_content")) is not None:
                escaped = encode_basestring(text)
                shown = f'{{"reasoning_content":{escaped},"reasoning":{escaped}}}'
            else:
                shown = dumps(delta)
            if self._plain:
                chunks.append(head + shown + tail)
            else:
                chunks.append(head + shown + self._told_tail(answer))
        if answer.finish_reason is not None:
            chunks.append(self._finished(answer, head))
        return "".join(chunks).encode()

    def finish(self, answers: Sequence[Answer]) -> bytes:
        if not self._usage:
            return DONE
        return f'{self._common},"choices":[],"usage":{dumps(usage_of(answers))}}}\n\n'.encode() + DONE

    def fail(self, refusal: Refusal) -> bytes:
        return f"data: {dumps(refusal.openai_body())}\n\n".encode() + DONE

    def ping(self) -> bytes:
        return KEEP_ALIVE

    def _told_tail(self, answer: Answer, finish: str | None = None) -> str:
        """The end of a chunk with the log-probabilities and ids of the tokens since the last one."""
        rest: dict[str, Any] = {"logprobs": logprobs_of(answer), "finish_reason": finish}
        if self._token_ids:
            rest["token_ids"] = answer.token_ids[self._told[answer.index] :]
            self._told[answer.index] = len(answer.token_ids)
        return "," + dumps(rest)[1:] + "]" + self._end

    def _finished(self, answer: Answer, head: str) -> str:
        reason = answer.finish_reason
        tail = self._told_tail(answer, reason)
        # Moonshot's own API has the counts in the last chunk of each choice, and its tools read them there.
        counts = dumps(usage_of([answer]))
        return f"{head}{{}}" + tail.removesuffix("}]" + self._end) + f',"usage":{counts}}}]{self._end}'


def dumps(value: Any) -> str:
    """JSON without spaces, in UTF-8."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
