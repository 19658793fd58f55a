"""From a plan to logits: sequences' next tokens side by side, one forward pass over the paged cache.

In the deterministic mode every token attends absorbed, each by itself, and the kernels take one path whatever the
number of rows; a model without packed weights runs on torch, whose sums depend on the shape, so there each token gets a
pass of its own.

Legend: T tokens of the batch, n positions whose logits are wanted, V vocabulary.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Ids
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from karakoram.engine.blocks import BLOCK_TOKENS
from karakoram.engine.sequence import Sequence
from karakoram.errors import ExpertUnavailable
from karakoram.kernels import ops
from karakoram.model.attention import ABSORB_UP_TO
from karakoram.model.cache import PagedPass, Span, lazy_zeros
from karakoram.model.transformer import Transformer


@dataclass(slots=True)
class Piece:
    """The next `count` tokens of a sequence, then `guesses`; logits are wanted for the last `wanted` of all these."""

    sequence: Sequence
    count: int
    guesses: Ids[int] = ()
    wanted: int = 0

    @property
    def tokens(self) -> int:
        """Of this piece in the pass."""
        return self.count + len(self.guesses)


class PiecesFailed(Exception):
    """A pass that failed for these pieces' sake; the others can run without them."""

    def __init__(self, pieces: Ids[Piece], error: ExpertUnavailable) -> None:
        super().__init__(str(error))
        self.pieces, self.error = pieces, error


class Runner:
    """The model and the memory of the cache: [layers, blocks, BLOCK_TOKENS, latent + rope key]."""

    def __init__(
        self,
        model: Transformer,
        blocks: int,
        deterministic: bool = False,
        tell_rows: Callable[[np.ndarray], None] | None = None,
    ) -> None:
        """tell_rows hears before each pass whose tokens its rows are: numbers of sequences, int [T]."""
        c = model.config
        self.model, self.deterministic, self._tell_rows = model, deterministic, tell_rows
        width = c.kv_lora_rank + c.qk_rope_head_dim
        self.rows = lazy_zeros((c.num_hidden_layers, blocks, BLOCK_TOKENS, width), model.dtype, model.device)
        packed = hasattr(model.lm_head, "matrix")  # PackedLinear
        self.one_by_one = deterministic and not packed
        if deterministic:
            _demand(+1)
            self._release = weakref.finalize(self, _demand, -1)
        self.absorb_up_to = 1 << 62 if deterministic else ABSORB_UP_TO

    def close(self) -> None:
        """Ask nothing more of the kernels. May be called twice."""
        if self.deterministic:
            self._release()

    def copy(self, source: int, target: int, tokens: int) -> None:
        """The first rows of a block into another one."""
        self.rows[:, target, :tokens] = self.rows[:, source, :tokens]

    @torch.inference_mode()
    def run(self, pieces: Ids[Piece]) -> Tensor:
        """Write the pieces' tokens into the cache; logits float32 [n, V] in the order of the pieces.

        Raises PiecesFailed where some need an expert that cannot be read; what was written is written again next time.
        """
        if self.one_by_one:
            return torch.cat([self._pass([one]) for one in _tokens_alone(pieces)])
        # Single tokens first: the pass wants them so. Logits are put back in the given order.
        order = sorted(range(len(pieces)), key=lambda i: pieces[i].tokens > self.absorb_up_to)
        logits_nV = self._pass([pieces[i] for i in order])
        if order == list(range(len(pieces))):
            return logits_nV
        ends = np.cumsum([pieces[i].wanted for i in order])
        where = {i: np.arange(end - pieces[i].wanted, end) for i, end in zip(order, ends, strict=True)}
        return logits_nV[torch.from_numpy(np.concatenate([where[i] for i in range(len(pieces))]))]

    def _pass(self, pieces: Ids[Piece]) -> Tensor:
        device = self.model.device
        ids = list(chain.from_iterable(_ids(piece) for piece in pieces))
        starts = np.array([piece.sequence.computed for piece in pieces])
        counts = np.array([piece.tokens for piece in pieces])
        ends = counts.cumsum()
        positions_T = np.arange(ends[-1]) + np.repeat(starts - (ends - counts), counts)
        # No longer than needed: torch's sums depend on a table's length, so deterministic ones must not know of blocks
        # that a longer piece has already been given.
        lengths = -(-(starts + counts) // BLOCK_TOKENS)
        tables = [piece.sequence.table[:length] for piece, length in zip(pieces, lengths, strict=True)]
        padded = np.zeros((len(pieces), max(map(len, tables))), np.int32)
        for number, table in enumerate(tables):
            padded[number, : len(table)] = table
        owner_T = np.repeat(np.arange(len(pieces)), counts)
        if self._tell_rows is not None:
            self._tell_rows(np.array([piece.sequence.number for piece in pieces])[owner_T])
        slots_T = padded[owner_T, positions_T // BLOCK_TOKENS].astype(np.int64) * BLOCK_TOKENS
        slots_T += positions_T % BLOCK_TOKENS
        singles = int(counts[counts <= self.absorb_up_to].sum())
        batch = PagedPass(
            self.rows,
            torch.from_numpy(slots_T).to(device),
            torch.from_numpy(positions_T + 1).to(device),
            singles,
            torch.from_numpy(padded[owner_T[:singles]]).to(device),
            [
                Span(int(end - count), int(count), torch.from_numpy(_slots(padded[i], int(start + count))).to(device))
                for i, (start, count, end) in enumerate(zip(starts, counts, ends, strict=True))
                if count > self.absorb_up_to
            ],
        )
        ids_1T = torch.tensor([ids], device=device)
        try:
            hidden_1TD = self.model.hidden(ids_1T, batch, torch.from_numpy(positions_T)[None].to(device))
        except ExpertUnavailable as error:
            touched = np.unique(owner_T[list(error.rows)])
            raise PiecesFailed([pieces[i] for i in touched], error) from error
        wanted = np.array([piece.wanted for piece in pieces])
        if not wanted.any():
            return torch.empty(0, self.model.config.vocab_size)
        at_n = np.concatenate([np.arange(end - want, end) for end, want in zip(ends, wanted, strict=True)])
        hidden_nD = hidden_1TD[0] if len(at_n) == len(ids) else hidden_1TD[0, torch.from_numpy(at_n).to(device)]
        return self.model.logits(hidden_nD)


_demands = 0  # runners that need the kernels' one order of sums, which is the whole process's choice
_demands_lock = threading.Lock()


def _demand(change: int) -> None:
    global _demands
    with _demands_lock:
        _demands += change
        ops.deterministic(_demands > 0)


def _ids(piece: Piece) -> Ids[int]:
    sequence = piece.sequence
    known = sequence.tokens[sequence.computed : sequence.computed + piece.count]
    return [*known, *piece.guesses] if piece.guesses else known


def _slots(table: np.ndarray, tokens: int) -> np.ndarray:
    """Slots of a sequence's first tokens: int64 [tokens]."""
    slots = table[: -(-tokens // BLOCK_TOKENS), None].astype(np.int64) * BLOCK_TOKENS + np.arange(BLOCK_TOKENS)
    return slots.reshape(-1)[:tokens]


def _tokens_alone(pieces: Ids[Piece]) -> Iterator[Piece]:
    """Each token as a piece; the sequence moves on as they are taken, and back at the end, a failed pass's too."""
    for piece in pieces:
        sequence, tokens = piece.sequence, _ids(piece)
        start = sequence.computed
        try:
            for number in range(len(tokens)):
                sequence.computed = start + number
                guess = tokens[number : number + 1] if number >= piece.count else ()
                wanted = int(number >= len(tokens) - piece.wanted)
                yield Piece(sequence, 0 if guess else 1, guess, wanted)
        finally:
            sequence.computed = start
