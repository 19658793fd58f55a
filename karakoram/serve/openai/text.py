"""`/v1/completions`: text goes on, without a conversation. What evaluation harnesses use: `echo` with `logprobs`.

A prompt is text, or token ids as they are; a list of either is answered at once, choices numbered prompt by prompt.
Text never becomes control tokens. `max_tokens: 0` with `echo` scores a prompt: the engine writes one token, which is
thrown away.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from karakoram.chat import ChatFormat, Tokenizer
from karakoram.engine.request import Finish, News, Request, TokenLogprob
from karakoram.errors import ContextOverflow
from karakoram.serve.openai import schemas
from karakoram.serve.openai.answers import Completion
from karakoram.serve.openai.chat import DONE, Wishes, dumps, usage_of, wishes_of
from karakoram.serve.openai.conversation import sampling_of, stops_of
from karakoram.serve.refusal import Refusal
from karakoram.serve.service import Service
from karakoram.serve.surface import KEEP_ALIVE, Call, Described, Events, Surface
from karakoram.session.chat import ChatRequest, Usage
from karakoram.session.direct import check_prompt
from karakoram.session.parts import Delta
from karakoram.session.stop_strings import StopFilter, StopWatch


@dataclass(frozen=True)
class _Asked:
    """A completion's fields from `parse` to `open` and `events`."""

    body: schemas.CompletionRequest
    stops: tuple[str, ...]
    wishes: Wishes


class Completions(Surface):
    """OpenAI's older API."""

    described = Described("/v1/completions", "Go on with a text", "openai", Completion.model_json_schema())
    id_prefix = "cmpl-"
    Body = schemas.CompletionRequest

    def parse(self, body: Any, headers: Mapping[str, str], service: Service) -> Call:
        model = service.check_model(body.model)
        if body.best_of is not None and body.best_of != (body.n or 1):
            raise Refusal(400, "best_of is not n. Choices are not ranked: leave best_of out.", "best_of")
        if body.max_tokens == 0 and not body.echo:
            raise Refusal(400, "max_tokens is 0. Ask for at least 1 new token, or for echo.", "max_tokens")
        choices = len(prompts_of(body)) * (body.n or 1)
        if choices > schemas.MOST_CHOICES:
            what = f"{choices} choices are asked for, n for each prompt."
            raise Refusal(400, f"{what} At most {schemas.MOST_CHOICES} are answered at once.", "prompt")
        chat = ChatRequest(messages=(), n=choices, sampling=sampling_of(body, service, thinking=True))
        return Call(chat, model, bool(body.stream), _Asked(body, stops_of(body), wishes_of(body)))

    def open(self, call: Call, service: Service) -> Sequence[Any]:
        body, fmt = call.extra.body, service.fmt
        answers: list[TextAnswer] = []
        for prompt in prompts_of(body):
            ids = fmt.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
            check_prompt(ids, service.source)
            for _ in range(body.n or 1):
                request = _request(call, ids, len(answers), service)
                answers.append(TextAnswer(fmt, request, len(answers), prompt, call.extra))
        return answers

    def events(self, call: Call, service: Service) -> TextEvents:
        return TextEvents(call)

    def whole(self, call: Call, answers: Sequence[Any], service: Service) -> dict[str, Any]:
        return {
            "id": call.id,
            "object": "text_completion",
            "created": call.created,
            "model": call.model,
            "choices": [_choice(answer, answer.text, call.extra.wishes) for answer in answers],
            "usage": _usage(answers),
        }


def prompts_of(body: schemas.CompletionRequest) -> list[str | list[int]]:
    """The prompts, one or many."""
    prompt: Any = body.prompt
    return [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt


def _request(call: Call, prompt: Sequence[int], index: int, service: Service) -> Request:
    body, fmt = call.extra.body, service.fmt
    context = service.source.context
    wanted = context - len(prompt) if body.max_tokens is None else max(body.max_tokens, 1)
    if len(prompt) + max(wanted, 1) > context:
        total = len(prompt) + max(wanted, 1)
        raise ContextOverflow(
            f"The prompt has {len(prompt)} tokens; with {max(wanted, 1)} new that is {total}, but the context ends at "
            f"{context}.",
            "Shorten the prompt, or ask for fewer new tokens.", total, context,
        )  # fmt: skip
    ends = frozenset() if body.ignore_eos else fmt.stop_ids
    stops = call.extra.stops
    sampling = call.chat.sampling
    if sampling.seed is not None and index:
        sampling = replace(sampling, seed=(sampling.seed + index * 0x9E3779B97F4A7C15) % 2**63)
    return Request(
        id=call.id if call.chat.n == 1 else f"{call.id}-{index}",
        prompt=prompt,
        max_new_tokens=wanted,
        sampling=sampling,
        stop_ids=ends | frozenset(body.stop_token_ids or ()),
        stop_when=StopWatch(TextReader(fmt.tokenizer), stops) if stops else None,
        logprobs=body.logprobs,
        prompt_logprobs=body.logprobs if body.echo else None,
        client=call.chat.client,
    )


class TextReader:
    """Tokens to text, no character split; a parser for those who know no markers."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, tokens: Iterable[int]) -> list[Delta]:
        """The text that these tokens complete, as a parser says it."""
        text = self._decoder.decode(b"".join([self._tokenizer.token_bytes(token) for token in tokens]))
        return [{"content": text}] if text else []

    def finish(self) -> str:
        """What an unfinished character becomes."""
        return self._decoder.decode(b"", final=True)


class TextAnswer:
    """One continuation; has what the stream needs of a session's `Answer`. Feed it from one thread."""

    def __init__(self, fmt: ChatFormat, request: Request, index: int, prompt: str | list[int], asked: _Asked) -> None:
        self.index, self.request = index, request
        self.finish_reason: Finish | None = None
        self.error = ""
        self.token_ids: list[int] = []
        self.text = ""
        self._tokenizer, self._asked = fmt.tokenizer, asked
        self._reader = TextReader(fmt.tokenizer)
        self._filter = StopFilter(asked.stops) if asked.stops else None
        self._echoed = (prompt if isinstance(prompt, str) else fmt.tokenizer.decode(prompt)) if asked.body.echo else ""
        self._scores = asked.body.max_tokens == 0
        self._cached_tokens = 0
        self._approximate_tokens: int | None = None
        self._offset = 0
        self._new_logprobs: list[TokenLogprob | int] = []  # a bare id: the first token has no probability

    def feed(self, news: News) -> list[Delta]:
        """Text that this step makes certain, as deltas of content."""
        self._cached_tokens = news.cached_tokens or self._cached_tokens
        if news.approximate_tokens is not None:
            self._approximate_tokens = news.approximate_tokens
        text = ""
        if self._echoed:
            text, self._echoed = self._echoed, ""
            if news.prompt_logprobs or self.request.prompt_logprobs is not None:
                self._new_logprobs += [self.request.prompt[0], *news.prompt_logprobs]
        if not self._scores:
            text += self._read(news)
        if news.finish is not None:
            self.error, self.finish_reason = news.error, news.finish
            if self._scores and news.finish == "stop":
                self.finish_reason = "length"
        self.text += text
        return [{"content": text}] if text else []

    def _read(self, news: News) -> str:
        self.token_ids.extend(news.tokens)
        self._new_logprobs.extend(news.logprobs)
        spoken = [token for token in news.tokens if token not in self.request.stop_ids]
        text = "".join(delta["content"] for delta in self._reader.feed(spoken))
        if news.finish is not None:
            text += self._reader.finish()
        if self._filter is not None:
            text = self._filter.feed(text)
            if news.finish is not None:
                text += self._filter.flush()
        return text

    @property
    def usage(self) -> Usage:
        """Counts so far; nothing here is reasoning."""
        return Usage(len(self.request.prompt), self._cached_tokens, len(self.token_ids), 0, self._approximate_tokens)

    def take_logprobs(self) -> dict[str, Any] | None:
        """OpenAI's `logprobs` of the tokens since the last time; None where none were asked for."""
        if self.request.logprobs is None:
            return None
        items, self._new_logprobs = self._new_logprobs, []
        tokens, values, best, offsets = list[str](), list[float | None](), list[Any](), list[int]()
        for item in items:
            token = item if isinstance(item, int) else item.token
            text = self._tokenizer.decode([token])
            tokens.append(text)
            offsets.append(self._offset)
            self._offset += len(text)
            if isinstance(item, int):
                values.append(None)
                best.append(None)
            else:
                values.append(item.logprob)
                best.append({self._tokenizer.decode([other]): value for other, value in item.best})
        return {"tokens": tokens, "token_logprobs": values, "top_logprobs": best, "text_offset": offsets}


def _choice(answer: TextAnswer, text: str, wishes: Wishes) -> dict[str, Any]:
    choice = {
        "index": answer.index,
        "text": text,
        "logprobs": answer.take_logprobs(),
        "finish_reason": answer.finish_reason,
    }
    if wishes.token_ids:
        choice |= {"prompt_token_ids": list(answer.request.prompt), "token_ids": answer.token_ids}
    return choice


def _usage(answers: Sequence[TextAnswer]) -> dict[str, Any]:
    """Each prompt counts once, however many choices it had."""
    by_prompt = {id(answer.request.prompt): answer.usage for answer in reversed(answers)}
    usage = usage_of(answers)  # type: ignore[arg-type]
    usage["prompt_tokens"] = sum(count.prompt_tokens for count in by_prompt.values())
    usage["prompt_tokens_details"] = {"cached_tokens": sum(count.cached_tokens for count in by_prompt.values())}
    usage["total_tokens"] = usage["prompt_tokens"] + usage["completion_tokens"]
    return usage


class TextEvents(Events):
    """Streamed continuations as `text_completion` chunks."""

    def __init__(self, call: Call) -> None:
        self._wishes: Wishes = call.extra.wishes
        common = {"id": call.id, "object": "text_completion", "created": call.created, "model": call.model}
        self._common = "data: " + dumps(common)[:-1]
        self._end = ',"usage":null}\n\n' if self._wishes.include_usage else "}\n\n"
        self._told = [0] * call.chat.n

    def start(self, answers: Sequence[Any]) -> bytes:
        return b""

    def deltas(self, answer: Any, deltas: Sequence[Delta]) -> bytes:
        choice = {
            "index": answer.index,
            "text": "".join(delta["content"] for delta in deltas),
            "logprobs": answer.take_logprobs(),
            "finish_reason": answer.finish_reason,
        }
        if self._wishes.token_ids:
            told = self._told[answer.index]
            if not told:
                choice["prompt_token_ids"] = list(answer.request.prompt)
            choice["token_ids"] = answer.token_ids[told:]
            self._told[answer.index] = len(answer.token_ids)
        return f'{self._common},"choices":[{dumps(choice)}]{self._end}'.encode()

    def finish(self, answers: Sequence[Any]) -> bytes:
        if not self._wishes.include_usage:
            return DONE
        return f'{self._common},"choices":[],"usage":{dumps(_usage(answers))}}}\n\n'.encode() + DONE

    def fail(self, refusal: Refusal) -> bytes:
        return f"data: {dumps(refusal.openai_body())}\n\n".encode() + DONE

    def ping(self) -> bytes:
        return KEEP_ALIVE
