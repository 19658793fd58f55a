"""Who computes what in the next pass: decoding first, then pieces of prompts, then newcomers, within a token budget.

- **Decoding** sequences give their newest token (and guesses). When no block is left for one, the newest arrival gives
  up its blocks and waits at the head of the queue; what it had computed stays in the prefix tree as long as nobody
  needs the room, so coming back is cheap (preemption by recompute; vLLM, arXiv 2309.06180 §4.5).
- **Prompts** are computed in pieces (Sarathi-Serve, arXiv 2403.02310 §4.2). While others decode, a piece may add
  SLOWER times what the pass takes without it, and STALL_MS in any case: what earlier pieces took says how many tokens
  that is.
- **Newcomers** are taken from the clients in turn, each client's in order. What the prefix tree remembers of a prompt
  is not computed again; and who needs a block that another sequence is computing right now waits until it is there, so
  a hundred children of one prefix cost one prefix.
"""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator

from karakoram.engine.blocks import BLOCK_TOKENS, BlockPool, Node
from karakoram.engine.runner import Piece
from karakoram.engine.sequence import Sequence
from karakoram.engine.speculate import PassCosts

SLOWER = 1.5  # on top of the pass itself: inter-token times stay within 3 × the median with room for noise
STALL_MS = 20.0  # nobody notices; many small pieces would cost small models more than they spare anyone
LEAST_PIECE = 32  # tokens of a prompt that are taken in any case, so that prompts always move on
PIECE_WITH_LOGPROBS = 64  # each of its positions needs a row of logits: 42 MB at K2's vocabulary


class FairQueue:
    """Waiting sequences: clients take turns, each client's own are first in, first out."""

    def __init__(self) -> None:
        self._by_client: OrderedDict[str, deque[Sequence]] = OrderedDict()
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def put(self, sequence: Sequence, first: bool = False) -> None:
        """At the end of its client's line, or at its head; then the client is the next in turn, too."""
        line = self._by_client.setdefault(sequence.request.client, deque())
        (line.appendleft if first else line.append)(sequence)
        if first:
            self._by_client.move_to_end(sequence.request.client, last=False)
        self._count += 1

    def in_turn(self) -> Iterator[Sequence]:
        """All of them in fair order; see `took`."""
        lines = [list(line) for line in self._by_client.values()]
        for place in range(max(map(len, lines), default=0)):
            for line in lines:
                if place < len(line):
                    yield line[place]

    def took(self, sequence: Sequence) -> None:
        """This one has left; its client goes to the end of the turn."""
        client = sequence.request.client
        line = self._by_client[client]
        line.remove(sequence)
        self._count -= 1
        if line:
            self._by_client.move_to_end(client)
        else:
            del self._by_client[client]


class Scheduler:
    """Owns the sequences and hands out blocks. Used by the engine's thread alone."""

    def __init__(
        self, pool: BlockPool, copy: Callable[[int, int, int], None], most_running: int, most_tokens: int
    ) -> None:
        self.pool, self._copy = pool, copy
        self.most_running, self.most_tokens = most_running, most_tokens
        self.waiting, self.running = FairQueue(), list[Sequence]()
        self.costs, self._prompt_costs = PassCosts(), PassCosts()
        self.preemptions = self.prefix_hits = self.prefix_queries = 0
        self._in_flight: dict[int, Sequence] = {}

    def plan(self) -> list[Piece]:
        """The pieces of the next pass, none if nothing can run."""
        pieces = self._decoding()
        decoding = sum(piece.tokens for piece in pieces)
        budget = self._prompt_budget(decoding)
        for sequence in [s for s in self.running if s.prefilling]:
            if budget <= 0:
                break
            if piece := self._prompt_piece(sequence, budget):
                pieces.append(piece)
                budget -= piece.count
        # Making room for one may have taken the blocks of another that was planned before. Newcomers come after this:
        # such a one may be among them, with another piece; they make room by leaving themselves alone.
        pieces = [piece for piece in pieces if piece.sequence in self.running]
        if budget > 0 and len(self.waiting):
            pieces.extend(self._newcomers(budget))
        return pieces

    def saw(self, pieces: list[Piece], ms: float) -> None:
        """A pass took so long: what later passes are planned by."""
        prompt = sum(piece.count for piece in pieces if piece.count > 1)
        decoding = sum(piece.tokens for piece in pieces) - prompt
        if not prompt:
            self.costs.saw(decoding, ms)
            return
        alone = self.costs.ms(decoding) if decoding else 0.0
        if alone is not None:
            self._prompt_costs.saw(prompt, max(ms - alone, 0.0))

    def advanced(self, sequence: Sequence) -> None:
        """A sequence has more in the cache: full blocks become everyone's."""
        before = len(sequence.nodes)
        sequence.remember(self.pool)
        for value in sequence.pending[: len(sequence.nodes) - before]:
            self._in_flight.pop(value, None)
        del sequence.pending[: len(sequence.nodes) - before]

    def remove(self, sequence: Sequence) -> None:
        """A sequence has ended, running or waiting."""
        if sequence in self.running:
            self._leave(sequence)
        else:
            self.waiting.took(sequence)

    def _decoding(self) -> list[Piece]:
        ready = [s for s in self.running if not s.prefilling]
        extra = self.costs.extra(max(len(ready), 1))
        pieces: list[Piece] = []
        for sequence in ready:
            if sequence not in self.running:
                continue  # made room for an earlier one
            guesses: list[int] = []
            if sequence.guesser is not None and sequence.left > 1:
                guesses = sequence.guesser.guess(sequence.tokens, sequence.left - 1, extra)
            if guesses and not sequence.room(self.pool, len(sequence.tokens) + len(guesses)):
                guesses = []  # nobody makes room for those
            if not self._make_room(sequence, len(sequence.tokens)):
                continue
            pieces.append(Piece(sequence, 1, guesses, 1 + len(guesses)))
        return pieces

    def _prompt_budget(self, decoding: int) -> int:
        budget = self.most_tokens - decoding
        if not decoding:
            return budget
        allowed, tokens = max(SLOWER * (self.costs.ms(decoding) or 0.0), STALL_MS), LEAST_PIECE
        while tokens < budget and self._prompt_costs.estimate(min(2 * tokens, budget)) <= allowed:
            tokens *= 2
        return min(tokens, budget)

    def _prompt_piece(self, sequence: Sequence, budget: int) -> Piece | None:
        if sequence not in self.running:
            return None
        whole = len(sequence.tokens) - sequence.computed
        with_logprobs = sequence.request.prompt_logprobs is not None
        count = min(whole, budget, PIECE_WITH_LOGPROBS if with_logprobs else whole)
        if not self._make_room(sequence, sequence.computed + count):
            return None
        return Piece(sequence, count, (), count if with_logprobs else int(count == whole))

    def _newcomers(self, budget: int) -> list[Piece]:
        pieces: list[Piece] = []
        for sequence in self.waiting.in_turn():
            if budget <= 0 or len(self.running) >= self.most_running:
                break
            needed = -(-(len(sequence.tokens) + 1) // BLOCK_TOKENS)
            if not self._admit(sequence, needed):
                if sequence.waits_for is None:
                    break  # for want of blocks: who comes later must not take them for ever
                continue
            piece = self._prompt_piece(sequence, budget)
            if piece is not None:
                pieces.append(piece)
                budget -= piece.count
        return pieces

    def _admit(self, sequence: Sequence, needed: int) -> bool:
        """Let a waiting sequence in with what is remembered of it; False if it must go on waiting."""
        if sequence.waits_for in self._in_flight:
            return False
        limit = len(sequence.tokens) - 1  # the last token must run for its logits
        if sequence.request.prompt_logprobs is not None:
            limit = 0
        match = self.pool.match(sequence.tokens, limit)
        hashes = sequence.hashes[len(match.nodes) :] if limit else []
        if hashes and hashes[0] in self._in_flight:
            sequence.waits_for = hashes[0]
            return False
        sequence.waits_for = None
        self.pool.hold(match.nodes)
        if self.running and needed - len(match.nodes) > self.pool.available:
            self.pool.release(match.nodes)
            return False
        self.waiting.took(sequence)
        self.running.append(sequence)
        sequence.nodes, sequence.computed = match.nodes, len(match.nodes) * BLOCK_TOKENS
        if match.partial is not None and match.shared:
            self._copy_part(sequence, match.partial, match.shared)
        for value in hashes:
            self._in_flight.setdefault(value, sequence)
        sequence.pending = hashes
        if sequence.cached_tokens < 0:
            sequence.cached_tokens = sequence.computed
            sequence.queued_s = time.perf_counter() - sequence.submitted_at
            self.prefix_hits += sequence.computed
            self.prefix_queries += len(sequence.tokens)
        return True

    def _copy_part(self, sequence: Sequence, node: Node, shared: int) -> None:
        """Copy on write: the shared rows of a block into one of the sequence's own."""
        self.pool.hold((node,))
        block = self.pool.take()
        if block is not None:
            self._copy(node.block, block, shared)
            sequence.private.append(block)
            sequence.computed += shared
        self.pool.release((node,))

    def _make_room(self, sequence: Sequence, tokens: int) -> bool:
        """Blocks for a sequence's first tokens, taken from the newest arrivals if need be, itself included."""
        while not sequence.room(self.pool, tokens):
            newest = self.running[-1]
            self._leave(newest)
            self.waiting.put(newest, first=True)
            self.preemptions += 1
            if newest is sequence:
                return False
        return True

    def _leave(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        for value in sequence.pending:
            if self._in_flight.get(value) is sequence:
                del self._in_flight[value]
        sequence.pending = []
        sequence.leave(self.pool)
