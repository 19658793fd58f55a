"""What goes into an engine and what comes out: requests, sampling, and one step's news of a request.

Everything here is token ids; words are the session's business. An engine calls a request's listener from its own
thread, at most once a step, with the news of all requests that share the listener: a listener must be quick and must
not raise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from karakoram.errors import ContextOverflow, InputError, KarakoramError

Finish = Literal["stop", "length", "cancelled", "error"]
MAX_ALTERNATIVES = 20
MAX_LOGIT_BIAS = 1024


class QueueFull(KarakoramError):
    """The engine holds as many waiting requests as it may: try again after `retry_after_s` seconds."""

    retry_after_s = 1


class EngineStopped(KarakoramError):
    """The engine has been closed, or its thread has died."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is drawn. temperature 0 is greedy; top_k 0, top_p 1, min_p 0 and penalties 1, 0, 0 do nothing.

    The penalties are OpenAI's (presence, frequency: over generated tokens) and CTRL's (repetition: over prompt and
    generated tokens, arXiv 1909.05858 §4.1). A seed makes the draw depend on (seed, position) alone.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict[int, float])
    seed: int | None = None

    def check(self, vocab_size: int) -> None:
        """Raise InputError for what cannot be sampled, naming the field."""

        def refuse(name: str, value: object, fix: str) -> None:
            raise InputError(f"{name} is {value}.", f"{name} must be {fix}.")

        for name, low, high in (
            ("temperature", 0.0, 100.0), ("top_p", 1e-9, 1.0), ("min_p", 0.0, 1.0), ("repetition_penalty", 1e-3, 100.0),
            ("presence_penalty", -100.0, 100.0), ("frequency_penalty", -100.0, 100.0),
        ):  # fmt: skip
            value = getattr(self, name)
            if not (math.isfinite(value) and low <= value <= high):
                refuse(name, value, f"between {low:g} and {high:g}")
        if not 0 <= self.top_k < 2**31:
            refuse("top_k", self.top_k, "0 (off) or a positive number")
        if self.seed is not None and not -(2**63) <= self.seed < 2**64:
            refuse("seed", self.seed, "a number of 64 bits")
        if len(self.logit_bias) > MAX_LOGIT_BIAS:
            refuse("logit_bias", f"{len(self.logit_bias)} tokens", f"at most {MAX_LOGIT_BIAS} tokens")
        for token, bias in self.logit_bias.items():
            if not 0 <= token < vocab_size:
                refuse("logit_bias", f"for token {token}", f"for tokens 0 to {vocab_size - 1}")
            if not (math.isfinite(bias) and -100 <= bias <= 100):
                refuse("logit_bias", bias, "between -100 and 100")


class Constraint(Protocol):
    """What may be written next; one object follows one output. `fill` may run in another thread than `accept`, never
    at the same time."""

    def fill(self, row: Any, left: int) -> bool:
        """Set the bits of the tokens that may come next in `row` (uint32 NumPy array of ⌈vocabulary / 32⌉ words, bit t
        of word t // 32 is token t; written whole), given that `left` more tokens may be emitted, this one included.
        False: any token may come, and `row` is not written. At least one bit is always set."""
        ...

    def accept(self, token: int) -> None:
        """This token has been emitted."""
        ...


@dataclass(slots=True)
class Request:
    """One sequence to be continued. `id` is unique among the live requests of an engine.

    stop_ids          a token of these is emitted and is the last
    stop_when         called with each emitted token in the engine's thread; True makes it the last
    logprobs          None: none; n: log-probability of each token, and of the n best ones
    prompt_logprobs   the same for the prompt's tokens from the second on
    client            who asks: waiting clients take turns
    banned            ids that are never drawn
    """

    id: str
    prompt: Sequence[int]
    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stop_ids: frozenset[int] = frozenset()
    stop_when: Callable[[int], bool] | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    constraint: Constraint | None = None
    client: str = ""
    banned: tuple[int, ...] = ()

    def check(self, context: int, vocab_size: int) -> None:
        """Raise InputError (ContextOverflow for too many tokens) for what an engine of this size cannot do."""
        prompt, new = len(self.prompt), self.max_new_tokens
        if not prompt:
            raise InputError("The prompt has no tokens.", "Give some text.")
        if new < 1:
            raise InputError(f"max_new_tokens is {new}.", "Ask for at least 1 new token.")
        if prompt + new > context:
            raise ContextOverflow(
                f"The prompt has {prompt} tokens; with {new} new that is {prompt + new}, but the context ends at "
                f"{context}.",
                "Shorten the prompt, or ask for fewer new tokens.", prompt + new, context,
            )  # fmt: skip
        low, high = min(self.prompt), max(self.prompt)
        if low < 0 or high >= vocab_size:
            raise InputError(
                f"Token id {low if low < 0 else high} is outside the vocabulary of {vocab_size}.",
                "Use this model's tokenizer.",
            )
        for name, count in (("logprobs", self.logprobs), ("prompt_logprobs", self.prompt_logprobs)):
            if count is not None and not 0 <= count <= MAX_ALTERNATIVES:
                raise InputError(f"{name} is {count}.", f"{name} must be between 0 and {MAX_ALTERNATIVES}.")
        self.sampling.check(vocab_size)


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token's natural-log probability under the model, before temperature, penalties and masks; and the best ones."""

    token: int
    logprob: float
    best: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class News:
    """What one step brought one request. The first news has `cached_tokens` (of the prompt, taken from earlier
    requests), `queued_s` (until it was let in) and `prompt_logprobs`; `error` says what happened where `finish` is
    "error"."""

    id: str
    tokens: tuple[int, ...] = ()
    finish: Finish | None = None
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    cached_tokens: int = 0
    error: str = ""
    queued_s: float = 0.0
    approximate_tokens: int | None = None  # in the last news: touched by shadows of experts, where those may be used


Listener = Callable[[Sequence[News]], None]


class TokenSource(Protocol):
    """Whatever turns requests into tokens: `Engine`, and `ScriptedEngine` for tests."""

    @property
    def context(self) -> int:
        """Prompt and new tokens together may be so many."""
        ...

    @property
    def vocab_size(self) -> int:
        """Token ids are below this."""
        ...

    def submit(self, request: Request, listener: Listener) -> None:
        """Queue a request. InputError for what is wrong with it, QueueFull, EngineStopped. Never blocks long."""
        ...

    def cancel(self, request_id: str) -> None:
        """End a request within a step; its last news says "cancelled". Unknown and finished ids are passed over."""
        ...
