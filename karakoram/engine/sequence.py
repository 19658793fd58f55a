"""One request on its way through the engine."""

from __future__ import annotations

import time
from collections.abc import Sequence as Ids
from dataclasses import dataclass, field

from karakoram.engine.blocks import BLOCK_TOKENS, BlockPool, Node
from karakoram.engine.request import Finish, Listener, Request, TokenLogprob
from karakoram.engine.speculate import Guesser


@dataclass(eq=False, slots=True)
class Sequence:
    """A request's tokens, how many of them the cache holds (`computed`), and where.

    nodes     held nodes of the prefix tree: the blocks of the first tokens, all full
    private   the blocks after them, this sequence's own
    """

    request: Request
    listener: Listener
    seed: int
    number: int = 0  # of the engine's requests, for traces
    tokens: list[int] = field(default_factory=list)
    prompt_tokens: int = 0
    computed: int = 0
    submitted_at: float = field(default_factory=time.perf_counter)
    queued_s: float = 0.0
    cached_tokens: int = -1  # -1: not admitted yet; told once, in the first news
    nodes: list[Node] = field(default_factory=list)
    private: list[int] = field(default_factory=list)
    new_tokens: int = 0
    counts: dict[int, int] = field(default_factory=dict)  # of new tokens, for presence and frequency
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    finish: Finish | None = None
    hashes: list[int] = field(default_factory=list)  # of the prompt's whole blocks; see `chain`
    pending: list[int] = field(default_factory=list)  # those that this sequence is computing for all
    waits_for: int | None = None  # the one that another is computing
    guesser: Guesser | None = None

    @property
    def left(self) -> int:
        """New tokens that may still come."""
        return self.request.max_new_tokens - self.new_tokens

    @property
    def prefilling(self) -> bool:
        """More than the newest token is missing from the cache."""
        return self.computed < len(self.tokens) - 1

    @property
    def table(self) -> list[int]:
        """Blocks in order."""
        return [node.block for node in self.nodes] + self.private

    def room(self, pool: BlockPool, tokens: int) -> bool:
        """Blocks for the first `tokens` tokens; False if the pool has none left (those taken are kept)."""
        while (len(self.nodes) + len(self.private)) * BLOCK_TOKENS < tokens:
            block = pool.take()
            if block is None:
                return False
            self.private.append(block)
        return True

    def remember(self, pool: BlockPool) -> None:
        """Full blocks become nodes that others can use."""
        while (len(self.nodes) + 1) * BLOCK_TOKENS <= self.computed:
            start = len(self.nodes) * BLOCK_TOKENS
            parent = self.nodes[-1] if self.nodes else pool.root
            tokens = tuple(self.tokens[start : start + BLOCK_TOKENS])
            self.nodes.append(pool.remember(parent, tokens, self.private.pop(0)))

    def leave(self, pool: BlockPool) -> None:
        """Give up all blocks; what was computed stays remembered as long as there is room."""
        self.remember(pool)
        start = len(self.nodes) * BLOCK_TOKENS
        if self.computed > start and self.private:
            parent = self.nodes[-1] if self.nodes else pool.root
            tokens = tuple(self.tokens[start : self.computed])
            self.nodes.append(pool.remember(parent, tokens, self.private.pop(0)))
        for block in self.private:
            pool.give_back(block)
        pool.release(self.nodes)
        self.nodes, self.private, self.computed = [], [], 0


def chain(tokens: Ids[int], limit: int) -> list[int]:
    """A hash for each whole block of `tokens[:limit]`, of it and everything before it."""
    hashes: list[int] = []
    value = 0
    for start in range(0, limit - BLOCK_TOKENS + 1, BLOCK_TOKENS):
        value = hash((value, *tokens[start : start + BLOCK_TOKENS]))
        hashes.append(value)
    return hashes
