"""The engine: a thread that turns requests into tokens, one pass of the model after another.

    submit ─▶ inbox ─▶ scheduler (who, how many tokens) ─▶ runner (one forward pass) ─▶ sampler ─▶ news ─▶ listeners

Constraints fill their masks in a second thread while the pass runs: a mask depends on the tokens so far alone. A pass
that fails ends the requests that were in it and nothing else. If the thread itself dies, every request ends with an
error and later ones are refused.

`deterministic` makes a seeded request bit-equal whatever runs beside it, however its prompt was cut, whether it was
preempted or resumed from a prefix (see `runner`); it costs speed (docs/serving.md has the numbers). Without it that is
not promised: sums depend on the number of rows in a pass.
"""

from __future__ import annotations

import queue
import secrets
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress

import torch
from torch import Tensor

from karakoram.engine import masks
from karakoram.engine.blocks import BLOCK_TOKENS, BlockPool
from karakoram.engine.expert_store.store import ExpertStore
from karakoram.engine.request import (
    EngineStopped,
    Finish,
    Listener,
    News,
    QueueFull,
    Request,
    TokenLogprob,
)
from karakoram.engine.runner import Piece, PiecesFailed, Runner
from karakoram.engine.sampler import Row, draw, logprobs
from karakoram.engine.scheduler import Scheduler
from karakoram.engine.sequence import Sequence, chain
from karakoram.engine.speculate import Guesser
from karakoram.env import memory
from karakoram.errors import InputError, KarakoramError
from karakoram.model.transformer import Transformer

MOST_RUNNING = 64
MOST_WAITING = 1024
MOST_BATCH_TOKENS = 512
CACHE_SHARE = 0.5  # of the memory that is free when the engine is made; less is taken where it suffices

_Told = tuple[Sequence, News]
Ids = tuple[int, ...]
Logprobs = tuple[TokenLogprob, ...]


class Engine:
    """Serves many requests over one model. Make it, `submit` from any thread, `close` it."""

    def __init__(
        self,
        model: Transformer,
        cache_tokens: int | None = None,
        context: int | None = None,
        most_running: int = MOST_RUNNING,
        most_waiting: int = MOST_WAITING,
        most_batch_tokens: int = MOST_BATCH_TOKENS,
        deterministic: bool = False,
        speculate: bool = True,
        experts: ExpertStore | None = None,
    ) -> None:
        """cache_tokens None: enough for `most_running` contexts, or what half of the free memory holds.

        experts: the store that feeds the model, where there is one; its counters join `stats`.
        """
        c = model.config
        self.context = min(context or c.max_position_embeddings, c.max_position_embeddings)
        self.vocab_size, self.most_waiting, self.speculate = c.vocab_size, most_waiting, speculate
        self.deterministic = deterministic
        blocks = _blocks(model, cache_tokens, self.context, most_running)
        self.experts = experts
        self.runner = Runner(model, blocks, deterministic, None if experts is None else experts.tell_rows)
        self.pool = BlockPool(blocks)
        self.scheduler = Scheduler(self.pool, self.runner.copy, most_running, most_batch_tokens)
        self.tokens_in = self.tokens_out = self._submitted = 0
        self._lock = threading.Condition()
        self._inbox: deque[Sequence] = deque()
        self._cancels: set[str] = set()
        self._live: dict[str, Sequence] = {}
        self._closing = False
        self._died: str | None = None
        self._fillers = ThreadPoolExecutor(1, "karakoram-masks")
        self._thread = threading.Thread(target=self._run, name="karakoram-engine", daemon=True)
        self._thread.start()

    # -------------------------------------------------------------------------------------------- from any thread

    def submit(self, request: Request, listener: Listener) -> None:
        """See `TokenSource.submit`."""
        request.check(self.context, self.vocab_size)
        seed = request.sampling.seed
        sequence = Sequence(request, listener, secrets.randbits(63) if seed is None else seed)
        sequence.tokens, sequence.prompt_tokens = list(request.prompt), len(request.prompt)
        sequence.hashes = chain(sequence.tokens, len(sequence.tokens) - 1)
        if self.speculate and request.constraint is None and not _depends_on_counts(request):
            sequence.guesser = Guesser()
        with self._lock:
            if self._closing:
                raise EngineStopped(self._died or "The engine has been closed.", "Start it again.")
            if len(self._inbox) + len(self.scheduler.waiting) >= self.most_waiting:
                raise QueueFull(f"{self.most_waiting} requests are waiting already.", "Try again in a second.")
            if request.id in self._live:
                raise InputError(f"A request {request.id!r} is running already.", "Give each its own id.")
            self._live[request.id] = sequence
            sequence.number, self._submitted = self._submitted, self._submitted + 1
            self._inbox.append(sequence)
            self._lock.notify()

    def cancel(self, request_id: str) -> None:
        """See `TokenSource.cancel`."""
        with self._lock:
            if request_id in self._live:
                self._cancels.add(request_id)
                self._lock.notify()

    def stream(self, request: Request) -> Iterator[News]:
        """Submit a request and yield its news; closing the iterator cancels it."""
        news: queue.SimpleQueue[News] = queue.SimpleQueue()

        def listen(batch: Iterable[News]) -> None:
            for one in batch:
                news.put(one)

        self.submit(request, listen)
        finished = False
        try:
            while not finished:
                one = news.get()
                finished = one.finish is not None
                yield one
        finally:
            if not finished:
                self.cancel(request.id)

    def generate(self, request: Request) -> list[int]:
        """All new tokens of a request. Raises EngineStopped with what went wrong if it ended in an error."""
        tokens: list[int] = []
        for news in self.stream(request):
            tokens.extend(news.tokens)
            if news.finish == "error":
                raise EngineStopped(news.error, "")
        return tokens

    @property
    def stopped(self) -> bool:
        """Whether it takes no more requests: closed, or its thread has died."""
        return self._closing

    def stats(self) -> dict[str, float]:
        """Numbers of this moment, for metrics."""
        s = self.scheduler
        return {
            "running": len(s.running),
            "waiting": len(s.waiting) + len(self._inbox),
            "cache_blocks": self.pool.blocks,
            "cache_used_blocks": self.pool.held,
            "prefix_hit_tokens": s.prefix_hits,
            "prefix_query_tokens": s.prefix_queries,
            "preemptions": s.preemptions,
            "prompt_tokens": self.tokens_in,
            "generation_tokens": self.tokens_out,
            **({} if self.experts is None else self.experts.stats()),
        }

    def close(self) -> None:
        """Cancel everything and end the thread. May be called twice."""
        with self._lock:
            self._closing = True
            self._lock.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()
        self._fillers.shutdown()
        self.runner.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -------------------------------------------------------------------------------------------- the engine's thread

    def _run(self) -> None:
        try:
            while self._collect():
                self._step()
        except BaseException as error:
            self._died = f"The engine's thread has died: {type(error).__name__}: {error}."
            raise
        finally:
            with self._lock:
                self._closing = True
                left = list(self._live.values())
                self._live.clear()
            finish: Finish = "error" if self._died else "cancelled"
            told = [(one, News(one.request.id, finish=finish, error=self._died or "")) for one in left]
            for listener, batch in _by_listener(told):
                with suppress(Exception):  # if a listener's own error was the death, the others must hear of it
                    listener(batch)

    def _collect(self) -> bool:
        """Take in what has come, end what was cancelled; waits while there is nothing to do. False: it is over."""
        with self._lock:
            while not (self._closing or self._inbox or self._cancels or self.scheduler.running):
                if len(self.scheduler.waiting):
                    break
                self._lock.wait()
            if self._closing:
                return False
            arrived, self._inbox = self._inbox, deque()
            cancelled = [self._live[name] for name in self._cancels if name in self._live]
            self._cancels.clear()
        for sequence in arrived:
            self.scheduler.waiting.put(sequence)
        if cancelled:
            self._deliver([(sequence, self._end(sequence, "cancelled")) for sequence in cancelled])
        return True

    def _step(self) -> None:
        """One pass: plan, run, draw, tell."""
        pieces = self.scheduler.plan()
        if not pieces:
            return
        constrained = masks.constrained(pieces)
        filled: masks.Masks = {}
        filling: Future[masks.Masks] | None = None
        if constrained and masks.is_quick(constrained):
            filled = masks.fill(constrained, self.vocab_size)
        elif constrained:
            filling = self._fillers.submit(masks.fill, constrained, self.vocab_size)
        started = time.perf_counter()
        told: list[_Told] = []
        try:
            pieces, logits_nV = self._pass(pieces, told)
            self._advance(pieces, logits_nV, filled if filling is None else filling.result(), told)
        except Exception as error:  # noqa: BLE001  whatever a pass dies of, the other requests go on
            text = f"The forward pass failed: {type(error).__name__}: {error}"
            lost = [piece.sequence for piece in pieces if piece.sequence.finish is None]
            told.extend((sequence, self._end(sequence, "error", text)) for sequence in lost)
        self.scheduler.saw(pieces, (time.perf_counter() - started) * 1e3)
        self._deliver(told)

    def _pass(self, pieces: list[Piece], told: list[_Told]) -> tuple[list[Piece], Tensor]:
        """Run them; those that need an expert which cannot be read end here, and the others run again without them."""
        while True:
            try:
                return pieces, self.runner.run(pieces) if pieces else torch.empty(0, self.vocab_size)
            except PiecesFailed as failure:
                for piece in failure.pieces:
                    told.append((piece.sequence, self._end(piece.sequence, "error", str(failure.error))))
                pieces = [piece for piece in pieces if piece not in failure.pieces]

    def _advance(self, pieces: list[Piece], logits_nV: Tensor, filled: masks.Masks, told: list[_Told]) -> None:
        """Draw and append tokens; `told` takes what each sequence has to tell."""
        rows, places, at = list[Row](), list[int](), 0
        spans: list[slice | None] = []  # of the rows that belong to each piece
        for piece in pieces:
            first = at
            at += piece.wanted
            drawn = self._rows_of(piece, logits_nV[first:at], filled, told)
            spans.append(None if drawn is None else slice(len(rows), len(rows) + len(drawn)))
            if drawn is not None:
                rows.extend(drawn)
                places.extend(range(at - len(drawn), at))
        chosen: list[int] = []
        raw_nV = logits_nV
        if rows:
            if len(places) < len(logits_nV):
                raw_nV = logits_nV[torch.tensor(places)]
            wants_logprobs = any(row.sequence.request.logprobs is not None for row in rows)
            chosen = draw(raw_nV.clone() if wants_logprobs else raw_nV, rows)
        for piece, span in zip(pieces, spans, strict=True):
            if span is not None:
                told.append((piece.sequence, self._append(piece, chosen[span], raw_nV[span])))
            elif piece.sequence.finish is None:
                piece.sequence.computed += piece.count
                self.scheduler.advanced(piece.sequence)

    def _rows_of(self, piece: Piece, logits_wV: Tensor, filled: masks.Masks, told: list[_Told]) -> list[Row] | None:
        """The positions of a piece that are to be drawn, its last rows; None if none is yet, or the sequence has ended.

        Log-probabilities of the prompt are kept on the way."""
        sequence, end = piece.sequence, piece.sequence.computed + piece.count
        if sequence.request.prompt_logprobs is not None:
            _keep_prompt_logprobs(piece, logits_wV)
        if end < len(sequence.tokens):
            return None
        mask = filled.get(sequence)
        if isinstance(mask, KarakoramError):
            told.append((sequence, self._end(sequence, "error", str(mask))))
            return None
        return [Row(sequence, end + number, mask) for number in range(1 + len(piece.guesses))]

    def _append(self, piece: Piece, chosen: list[int], raw_nV: Tensor) -> News:
        """Take over the drawn tokens, as far as the guesses before them were right."""
        sequence, request = piece.sequence, piece.sequence.request
        taken, finish, error = 0, None, ""
        for token in chosen:
            sequence.tokens.append(token)
            sequence.new_tokens += 1
            sequence.counts[token] = sequence.counts.get(token, 0) + 1
            taken += 1
            try:
                if _stops(request, token):
                    finish = "stop"
                elif sequence.left <= 0:
                    finish = "length"
            except Exception as failure:  # noqa: BLE001  what a request brings along ends it alone
                finish, error = "error", f"The request's own code failed: {type(failure).__name__}: {failure}"
            if finish is not None or taken > len(piece.guesses) or token != piece.guesses[taken - 1]:
                break
        if sequence.guesser is not None and piece.guesses:
            sequence.guesser.learn(len(piece.guesses), taken - 1)
        sequence.computed += piece.count + taken - 1
        self.scheduler.advanced(sequence)
        self.tokens_out += taken
        new = tuple(chosen[:taken])
        told = () if request.logprobs is None else tuple(logprobs(raw_nV[:taken], new, [request.logprobs] * taken))
        if finish is not None:
            return self._end(sequence, finish, error, new, told)
        return self._news(sequence, new, None, told)

    def _end(self, sequence: Sequence, finish: Finish, error: str = "", new: Ids = (), told: Logprobs = ()) -> News:
        """The last news of a sequence, whose place and blocks are free from here on."""
        sequence.finish = finish
        self.scheduler.remove(sequence)
        with self._lock:
            self._live.pop(sequence.request.id, None)
            self._cancels.discard(sequence.request.id)  # it came too late, and must not hit the next of this name
        return self._news(sequence, new, finish, told, error)

    def _news(self, sequence: Sequence, new: Ids, finish: Finish | None, told: Logprobs, error: str = "") -> News:
        first = sequence.new_tokens == len(new)
        if first:
            self.tokens_in += sequence.prompt_tokens
        return News(
            sequence.request.id, new, finish, told, tuple(sequence.prompt_logprobs) if first else (),
            max(sequence.cached_tokens, 0) if first else 0, error, sequence.queued_s if first else 0.0,
            None if finish is None or self.experts is None else self.experts.approximated(sequence.number),
        )  # fmt: skip

    def _deliver(self, told: list[_Told]) -> None:
        """One call to each listener with all that concerns it."""
        for listener, batch in _by_listener(told):
            listener(batch)


def _by_listener(told: list[_Told]) -> Iterable[tuple[Listener, list[News]]]:
    by_listener: dict[Listener, list[News]] = {}
    for sequence, news in told:
        by_listener.setdefault(sequence.listener, []).append(news)
    return by_listener.items()


def _blocks(model: Transformer, cache_tokens: int | None, context: int, most_running: int) -> int:
    """Blocks of the cache; at least one whole context, so that a single request can always end."""
    c = model.config
    block_bytes = BLOCK_TOKENS * c.num_hidden_layers * (c.kv_lora_rank + c.qk_rope_head_dim) * model.dtype.itemsize
    least = -(-context // BLOCK_TOKENS) + 1
    if cache_tokens is None:
        free = memory().available_bytes or 0
        return max(least, min(least * most_running, int(CACHE_SHARE * free) // block_bytes))
    if cache_tokens < context:
        raise InputError(
            f"A cache of {cache_tokens} tokens does not hold one context of {context}.",
            f"Give at least {context}, or a smaller context.",
        )
    return max(least, -(-cache_tokens // BLOCK_TOKENS))


def _depends_on_counts(request: Request) -> bool:
    """Whether a draw depends on earlier draws beyond the logits: then guesses cannot be drawn at once."""
    s = request.sampling
    return bool(s.repetition_penalty != 1 or s.presence_penalty or s.frequency_penalty)


def _stops(request: Request, token: int) -> bool:
    """Tell a request's constraint of its new token; whether it is to be the last."""
    if request.constraint is not None:
        request.constraint.accept(token)
    return token in request.stop_ids or (request.stop_when is not None and request.stop_when(token))


def _keep_prompt_logprobs(piece: Piece, logits_nV: Tensor) -> None:
    """Log-probabilities of the prompt's tokens that follow this piece's, unless they are kept already."""
    sequence = piece.sequence
    first = sequence.computed + 1  # the token that the piece's first row predicts
    end = min(first + piece.count, sequence.prompt_tokens)
    known = len(sequence.prompt_logprobs) + 1
    if known >= end or known < first:
        return
    tokens = sequence.tokens[known:end]
    rows_nV = logits_nV[known - first : end - first]
    count = sequence.request.prompt_logprobs or 0
    sequence.prompt_logprobs.extend(logprobs(rows_nV, tokens, [count] * len(tokens)))
