"""Messages in, message parts out: the one place where words meet tokens.

`Session(model, fmt)` joins a model (token ids in, token ids out) with a chat format (messages to ids, ids to messages).
`stream` renders the conversation, generates, and yields what the parser makes of each token: deltas in OpenAI's shape,
`{"reasoning_content": …}`, `{"content": …}` or `{"tool_calls": [{"index", "id", "type", "function"}]}`.
Afterwards `last` holds the whole message with counts and times, also when the caller stopped early.

Ids of tool calls. The models were trained on `functions.NAME:INDEX`, INDEX counting all calls of the conversation from
0; foreign ids in the history (`call_abc`, `search:0`) make them emit malformed ids (MoonshotAI/K2-Vendor-Verifier,
README). So prompts are always rendered with canonical ids, whatever the caller's are, and the ids of new calls are
issued here, in the same form and unique within the conversation, because a model may well start its own count again.
"""

import math
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from karakoram.errors import ContextOverflow, InputError, TokenizerError
from karakoram.session.parts import CallIds, Delta, FinishReason, Parts

Message = Mapping[str, Any]
Generate = Callable[..., Iterator[int]]

# Unless asked for more: the cache is laid out for prompt + new tokens, and all of K2's 262,144 would take 18 GB.
DEFAULT_NEW_TOKENS = 32_768


@dataclass(frozen=True)
class Turn:
    """One answer. `message` is an assistant message, ready to be appended to the history (without `finish_reason`)."""

    message: dict[str, Any]
    finish_reason: FinishReason
    prompt_tokens: int
    new_tokens: int
    prefill_s: float  # until the first new token
    decode_s: float  # from the first new token to the last
    token_ids: tuple[int, ...] = ()

    @property
    def tok_per_s(self) -> float:
        """Decoding speed: the first token belongs to the prefill. 0 where a single token leaves nothing to measure."""
        return (self.new_tokens - 1) / self.decode_s if self.new_tokens > 1 and self.decode_s > 0 else 0.0


class Session:
    """Talks to one model in one chat format; keeps no messages. One stream at a time.

    `generate` has the signature of `karakoram.generate` and stands in for it in tests.
    """

    def __init__(self, model: Any, fmt: Any, generate: Generate | None = None) -> None:
        self.model = model
        self.fmt = fmt
        self.last: Turn | None = None
        self._generate = generate

    def encode(
        self, messages: Sequence[Message], tools: Sequence[Message] | None = None, thinking: bool = True
    ) -> list[int]:
        """The prompt's token ids, checked against the model's vocabulary and context length."""
        if not messages:
            raise InputError("The list of messages is empty.", "Give at least one message with role user.")
        prompt = self.fmt.encode(
            list(messages),
            tools=list(tools) if tools else None,
            thinking=thinking,
            add_generation_prompt=True,
            tool_ids="canonical",
        )
        check_prompt(prompt, self.model.config)
        return prompt

    def stream(
        self,
        messages: Sequence[Message],
        tools: Sequence[Message] | None = None,
        thinking: bool = True,
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
    ) -> Generator[Delta, None, None]:
        """Deltas of the assistant's answer. Wrong input raises here, before the first delta.

        `max_new_tokens=None` means what is left of the context, at most DEFAULT_NEW_TOKENS. Closing the iterator stops
        the model; `last` then says "interrupted" and holds what came until then. An exception (Ctrl-C included) does
        the same and passes on.
        """
        prompt = self.encode(messages, tools, thinking)
        check_sampling(temperature, top_p)
        limit = check_context(len(prompt), max_new_tokens, self.model.config)
        self.last = None
        tokens = self._generator()(
            self.model,
            prompt,
            limit,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            stop_ids=self.fmt.stop_ids,
        )
        parser = self.fmt.parser(tools=list(tools) if tools else None, thinking=thinking)
        return self._deltas(tokens, Parts(parser, CallIds(messages)), len(prompt), limit)

    def _deltas(
        self, tokens: Iterator[int], answer: Parts, prompt_tokens: int, limit: int
    ) -> Generator[Delta, None, None]:
        started = first = latest = time.perf_counter()
        ids: list[int] = []
        reason: FinishReason = "interrupted"
        try:
            for token in tokens:
                latest = time.perf_counter()
                if not ids:
                    first = latest
                ids.append(token)
                yield from answer.feed(token)
                if token in self.fmt.stop_ids:
                    break
            full = len(ids) >= limit and ids[-1] not in self.fmt.stop_ids
            reason = "length" if full else "stop"
            yield from answer.finish(reason)
        finally:
            # Every way out passes here: the end, an early close, Ctrl-C in the middle of a forward pass.
            if close := getattr(tokens, "close", None):
                close()
            message, reason = answer.message(reason)
            self.last = Turn(message, reason, prompt_tokens, len(ids), first - started, latest - first, tuple(ids))

    def _generator(self) -> Generate:
        if self._generate is None:
            from karakoram.model.generate import generate

            self._generate = generate
        return self._generate


def check_prompt(prompt: Sequence[int], config: Any) -> None:
    """Whether the model has an embedding for each id; a foreign tokenizer is the usual reason where it has not."""
    if not prompt:
        raise InputError("The prompt has no tokens.", "Give some text.")
    if max(prompt) >= config.vocab_size:
        raise TokenizerError(
            f"The tokenizer makes token id {max(prompt)}, but the model's vocabulary ends at {config.vocab_size - 1}.",
            "The tokenizer files belong to another model: take those of this checkpoint.",
        )


def check_vocabulary(tokenizer: Any, config: Any) -> None:
    """Whether the model knows every token of the tokenizer; it may know more (padded embeddings)."""
    if tokenizer.n_vocab > config.vocab_size:
        raise TokenizerError(
            f"The tokenizer has {tokenizer.n_vocab} tokens, the model's vocabulary {config.vocab_size}.",
            "The tokenizer files belong to another model: take those of this checkpoint.",
        )


def check_sampling(temperature: float, top_p: float) -> None:
    """Whether tokens can be drawn this way."""
    if not (0 <= temperature < math.inf and 0 < top_p <= 1):
        raise InputError(
            f"Temperature {temperature:g} with top_p {top_p:g} is no way to sample.",
            "temperature must be at least 0 and finite, top_p above 0 and at most 1.",
        )


def check_context(prompt_tokens: int, max_new_tokens: int | None, config: Any) -> int:
    """How many new tokens may come: those asked for, or for None what is left of the context."""
    context = config.max_position_embeddings
    if max_new_tokens is not None and max_new_tokens < 1:
        raise InputError(f"max_new_tokens is {max_new_tokens}.", "Ask for at least 1 new token.")
    wanted = 1 if max_new_tokens is None else max_new_tokens
    if prompt_tokens + wanted > context:
        raise ContextOverflow(
            f"The prompt has {prompt_tokens} tokens; with {wanted} new that is {prompt_tokens + wanted}, "
            f"but the model's context ends at {context}.",
            "Shorten or reset the conversation, or ask for fewer new tokens.", prompt_tokens + wanted, context,
        )  # fmt: skip
    return min(context - prompt_tokens, DEFAULT_NEW_TOKENS) if max_new_tokens is None else max_new_tokens
