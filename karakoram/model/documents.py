"""Several documents in one row: who attends to whom, and where positions begin again.

Training packs documents behind one another; a token must see its own only. A `Documents` says where they lie. On a CPU
attention runs span by span, elsewhere under a mask.

Legend: B batch, T tokens.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from karakoram.model.backward.causal import Span


@dataclass(frozen=True)
class Documents:
    """`index_BT`: which document of its row a token belongs to, int [B, T], equal numbers side by side."""

    index_BT: Tensor

    @cached_property
    def starts_BT(self) -> Tensor:
        """bool [B, T]: whether a document begins here."""
        index = self.index_BT
        return torch.cat((torch.ones_like(index[:, :1], dtype=torch.bool), index[:, 1:] != index[:, :-1]), 1)

    @cached_property
    def positions_BT(self) -> Tensor:
        """int64 [B, T]: a token's place in its document."""
        place_BT = torch.arange(self.index_BT.shape[1], device=self.index_BT.device).expand(self.index_BT.shape)
        return place_BT - torch.where(self.starts_BT, place_BT, 0).cummax(1).values

    @cached_property
    def spans(self) -> list[Span]:
        """Row, first token and token behind the last of every document."""
        T = self.index_BT.shape[1]
        rows, starts = (x.tolist() for x in self.starts_BT.nonzero(as_tuple=True))
        stops = [
            starts[i + 1] if i + 1 < len(rows) and rows[i + 1] == rows[i] else T for i in range(len(rows))
        ]  # a row's last document ends with the row
        return list(zip(rows, starts, stops))

    @cached_property
    def visible_BTT(self) -> Tensor:
        """bool [B, T, T]: whether a token may look at another: earlier, or itself, and of its document."""
        T = self.index_BT.shape[1]
        same_BTT = self.index_BT[:, :, None] == self.index_BT[:, None, :]
        return same_BTT & torch.ones(T, T, dtype=torch.bool, device=self.index_BT.device).tril()
