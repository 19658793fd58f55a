"""Experts in an accelerator's memory, computed there with plain torch.

The card keeps what is wanted most: demands are counted for WATCHED_PASSES passes, then the experts wanted most often
are chosen, once, and each is copied when it next is in memory. From then on it never leaves the card, and its place in
memory is free for another. So for one placement the result is always the same bits; they are not those of the CPU's
kernels: products are rounded to bf16 between gate, up and down (relative error of a layer's sum at most 1e-2).

Weights stay int4 with their scales (a record's bytes); they are made bf16 when they are used.

Legend: M tokens of one expert, D hidden, K experts per token, N tokens.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from karakoram.checkpoint.experts import ExpertSource
from karakoram.errors import InputError
from karakoram.formats import int4_group
from karakoram.kernels.packed import PackedExperts, PackedMatrix, unpack_int4

WATCHED_PASSES = 64


class _Weight:
    """One projection on the card."""

    def __init__(self, matrix: PackedMatrix, device: torch.device) -> None:
        if matrix.kind == "int4":
            self._parts: tuple[Tensor, ...] = tuple(part.to(device) for part in unpack_int4(matrix))
        else:
            self._parts = (matrix.dense().to(device),)

    def dense(self) -> Tensor:
        """bf16 [out, in]."""
        return self._parts[0] if len(self._parts) == 1 else int4_group.dequantize(self._parts[0], self._parts[1])


class Card:
    """At most `capacity_bytes` of records on `device`."""

    def __init__(self, device: torch.device, capacity_bytes: int, source: ExpertSource) -> None:
        each = source.record_bytes * (4 if source.kind == "fp8" else 1)  # fp8 is kept as bf16
        everything = len(source.layers) * source.experts
        self.slots = min(capacity_bytes // each, everything)
        if self.slots < 1:
            raise InputError(
                f"{capacity_bytes:,} bytes on {device} hold no expert of {each:,}.", "Give more --vram, or none."
            )
        self.device = device
        self._source = source
        self._held: dict[int, tuple[_Weight, _Weight, _Weight]] = {}
        self._uses = np.zeros(everything, np.int64)
        self._passes = 0
        self._chosen: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self._held)

    def see(self, keys: np.ndarray, first_layer: bool) -> None:
        """Demands of a layer, until the choice is made."""
        if self._chosen is not None:
            return
        self._passes += first_layer
        self._uses[keys] += 1
        if self._passes > WATCHED_PASSES:
            best = np.argsort(-self._uses, kind="stable")[: self.slots]
            self._chosen = np.zeros(len(self._uses), bool)
            self._chosen[best] = True

    def holds(self, keys: np.ndarray) -> np.ndarray:
        """Which of them are on the card: bool."""
        return np.fromiter((key in self._held for key in keys.tolist()), bool, len(keys))

    def wants(self, key: int) -> bool:
        """Whether it is chosen, and not there yet."""
        return self._chosen is not None and bool(self._chosen[key]) and key not in self._held

    def put(self, key: int, record: Tensor) -> None:
        """Copy a record that is in memory."""
        s = self._source
        gate, up, down = PackedExperts(record[None], s.hidden, s.intermediate, s.kind).parts(0)
        self._held[key] = (_Weight(gate, self.device), _Weight(up, self.device), _Weight(down, self.device))

    @torch.inference_mode()
    def begin(self, keys: list[int], x_ND: Tensor, ids_NK: Tensor) -> list[tuple[int, Tensor]]:
        """Start computing these experts; (expert, its rows float32 [M, D] on the card) each."""
        x = x_ND.to(self.device, non_blocking=True)
        found: list[tuple[int, Tensor]] = []
        for key in keys:
            expert = key % self._source.experts
            rows_M = (ids_NK == expert).nonzero()[:, 0].to(self.device, non_blocking=True)
            gate, up, down = (weight.dense() for weight in self._held[key])
            x_MD = x[rows_M]
            inner = (F.silu(F.linear(x_MD, gate).float()) * F.linear(x_MD, up).float()).bfloat16()
            found.append((expert, F.linear(inner, down).float()))
        return found
