"""The latent cache: what MLA remembers of a token, 576 numbers a layer for K2 (512 latent + 64 rope key).

**Contiguous.** A slot *is* a position: row b keeps the token at position p in slot p. A query at position p sees the
slots 0…p. That one rule serves prefill, decode, and batches of unequal lengths (right-padded prompts write their
padding above p, where no query looks before it has been overwritten), without a mask that anyone must carry around.

**In blocks**, for many sequences at once: everything but attention looks at one token at a time, so sequences of any
number and length are simply concatenated, [1, T]. Attention finds in a `PagedPass` where each new token's row goes and
which rows it sees. The first `single` tokens attend absorbed, each as a query of its own over its sequence's blocks
(decoding, short pieces); the others come in `spans`, pieces of prompts that attend expanded.

Legend: B rows, T new tokens, S slots, L latent, R rope key, W latent + rope key, M most blocks of a sequence.
"""

from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from karakoram.config import ModelConfig
from karakoram.errors import InputError


class Cache(Protocol):
    """What attention needs of a cache; the contiguous one is below, a paged one may take its place."""

    @property
    def length(self) -> int:
        """Slots in use: one more than the highest position of the passes so far."""
        ...

    def append(
        self, layer: int, latent_BTL: Tensor, rope_key_BTR: Tensor, positions_BT: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Store new tokens at their positions; return all slots up to the highest one used: [B, S, L] and [B, S, R]."""
        ...


class LatentCache:
    """Contiguous memory for `batch` rows of `capacity` tokens; 2 · (L + R) bytes per token and layer in bfloat16.

    rows  [layers, B, S, L + R]: a token's latent and rope key lie side by side, so that decoding reads one stretch
    """

    def __init__(
        self,
        config: ModelConfig,
        batch: int,
        capacity: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        self.latent, width = config.kv_lora_rank, config.kv_lora_rank + config.qk_rope_head_dim
        self.capacity, self.length, self.used = capacity, 0, 0
        self.rows = lazy_zeros((config.num_hidden_layers, batch, capacity, width), dtype, torch.device(device))

    def append(
        self, layer: int, latent_BTL: Tensor, rope_key_BTR: Tensor, positions_BT: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See `Cache.append`. Raises InputError as `reserve` does."""
        rows_BSx = self.reserve(layer, positions_BT)
        batch_B1 = torch.arange(positions_BT.shape[0], device=positions_BT.device)[:, None]
        rows_BSx[batch_B1, positions_BT] = torch.cat((latent_BTL, rope_key_BTR), -1).to(rows_BSx.dtype)
        used = self.used
        return rows_BSx[:, :used, : self.latent], rows_BSx[:, :used, self.latent :]

    def reserve(self, layer: int, positions_BT: Tensor) -> Tensor:
        """A layer's rows [B, S, L + R], to be written at these positions.

        Raises InputError past the capacity, or for another number of rows than the cache has.
        """
        if positions_BT.shape[0] != self.rows.shape[1]:
            raise InputError(
                f"{positions_BT.shape[0]} rows do not fit a latent cache of {self.rows.shape[1]}.",
                "Make the cache with `new_cache(batch=…)` for as many rows as the token ids have.",
            )
        if layer == 0:  # every layer of a pass sees the same positions
            self.used = int(positions_BT.max()) + 1
        if self.used > self.capacity:
            raise InputError(
                f"Position {self.used - 1} does not fit a latent cache of {self.capacity} tokens.",
                "Make the cache larger or the prompt shorter.",
            )
        # the last layer ends the pass, so that `length` is steady during it
        if layer == self.rows.shape[0] - 1:
            self.length = max(self.length, self.used)
        return self.rows[layer]

    def keep_rows(self, rows: Tensor) -> None:
        """Drop all batch rows but these (a finished sequence leaves the batch)."""
        self.rows = self.rows[:, rows]


class Span(NamedTuple):
    """Tokens `first` to `first + count` of the batch belong to one sequence, whose context lies in `slots_S`."""

    first: int
    count: int
    slots_S: Tensor  # int64: slots of positions 0 … S-1, this piece's own included


@dataclass
class PagedPass:
    """Where the tokens of a pass live; made anew for each pass by whoever owns the blocks.

    rows      [layers, blocks, block tokens, W]
    slots_T   int64: block · block tokens + offset of each new token
    seen_T    int64: how many tokens each query sees, itself included
    tables    int32 [single, M]: blocks of each single token's sequence, in order
    """

    rows: Tensor
    slots_T: Tensor
    seen_T: Tensor
    single: int
    tables: Tensor
    spans: list[Span] = field(default_factory=list)

    @property
    def length(self) -> int:
        """Slots in use by the longest sequence."""
        return int(self.seen_T.max())

    def flat(self, layer: int) -> Tensor:
        """A layer's rows by slot: [slots, W]."""
        return self.rows[layer].flatten(0, 1)

    def singles(self, layer: int) -> tuple[Tensor, Tensor]:
        """Rows that the single tokens' sequences hold, [single, S, W], and which of them each sees, [single, 1, S]."""
        rows = self.rows[layer][self.tables.long()].flatten(1, 2)
        seen = self.seen_T[: self.single, None, None]
        return rows, torch.arange(rows.shape[1], device=rows.device) < seen

    def context(self, layer: int, span: Span) -> tuple[Tensor, Tensor]:
        """Rows of a span's context, [1, S, W], and which of them each of its tokens sees, [1, count, S]."""
        rows = self.flat(layer)[span.slots_S][None]
        seen = self.seen_T[span.first : span.first + span.count, None]
        return rows, (torch.arange(rows.shape[1], device=rows.device) < seen)[None]


def lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros whose memory is taken from the system when it is first written: NumPy's are, torch's are not.

    They must be zeros: torch's attention multiplies unwritten rows by 0, and chance memory may hold NaN.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(shape, f"i{dtype.itemsize}")).view(dtype)
