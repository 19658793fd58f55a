"""Filling patterns with chance at the speed of memory: numbers are drawn once, into pools, and used again and again.

Every matrix starts elsewhere in its pool (by a hash of seed and name), and pools have a prime length, so that rows of a
matrix begin at different places too: no two experts and no two rows are equal. A pool is longer than any common
compressor's window. Int4 codes are -7…7, all equally likely: symmetric, since codes with a mean would give all outputs
of a matrix a common part that grows from layer to layer.

Where weights must be zero, int4 has the scale 0 and codes by chance.
"""

import hashlib

import torch
from torch import Tensor

from karakoram.evals.synth.patterns import Pattern
from karakoram.formats import int4_group

_NORMALS = 8_388_593  # prime
_CODE_BYTES = 33_554_393  # prime
_JITTERS = 1_048_573  # prime
_LARGEST_CODE = 7
CODE_SIZE = ((_LARGEST_CODE * (_LARGEST_CODE + 1)) / 3) ** 0.5  # standard deviation of -7…7: 4.32
_JITTER = 0.2  # scales differ by as much, uniformly
_FILLED_ELEMENTS = 1 << 20  # at a time: 4 MiB of float32 stay in the cache


class Chance:
    """The pools of one seed."""

    def __init__(self, seed: int) -> None:
        random = torch.Generator().manual_seed(seed)
        self.seed = seed
        self.normals = torch.randn(_NORMALS, generator=random).bfloat16()
        low, high = (torch.randint(1, 16, (_CODE_BYTES,), generator=random, dtype=torch.uint8) for _ in range(2))
        self.codes = low | (high << 4)
        jitter = 1 + _JITTER * (2 * torch.rand(_JITTERS, generator=random) - 1)
        self.jitter = jitter / jitter.square().mean().sqrt()

    def generator(self, name: str) -> torch.Generator:
        """For the few numbers that are drawn anew."""
        return torch.Generator().manual_seed(self._number(name) % 2**63)

    def dense(self, name: str, pattern: Pattern) -> Tensor:
        """The pattern as bf16 [out, in]."""
        outputs, inputs = len(pattern.rows), len(pattern.columns)
        out = torch.empty(outputs, inputs, dtype=torch.bfloat16)
        first, step = self._number(name), max(1, _FILLED_ELEMENTS // inputs)
        for row in range(0, outputs, step):
            part = slice(row, min(row + step, outputs))
            noise = torch.empty(out[part].shape, dtype=torch.bfloat16)
            _fill(noise, self.normals, first + row * inputs)
            out[part] = noise.float().mul_(pattern.columns).mul_(pattern.rows[part, None])
        if pattern.constant is not None:
            out[:, : int4_group.GROUP] = pattern.constant[:, None]
        return out

    def int4(self, name: str, pattern: Pattern) -> tuple[Tensor, Tensor]:
        """The pattern as codes int32 [out, in/8] and scales bf16 [out, in/32]."""
        outputs, inputs = len(pattern.rows), len(pattern.columns)
        packed = torch.empty(outputs, inputs // 2, dtype=torch.uint8)
        _fill(packed, self.codes, self._number(name))
        scale = torch.empty(outputs, inputs // int4_group.GROUP)
        _fill(scale, self.jitter, self._number(name))
        scale.mul_(pattern.columns[:: int4_group.GROUP] / CODE_SIZE).mul_(pattern.rows[:, None])
        if pattern.constant is not None:
            packed[:, : int4_group.GROUP // 2] = 0xFF  # two codes 7
            scale[:, 0] = pattern.constant / _LARGEST_CODE
        return packed.view(torch.int32), scale.bfloat16()

    def _number(self, name: str) -> int:
        return int.from_bytes(hashlib.blake2b(f"{self.seed} {name}".encode(), digest_size=8).digest(), "little")


def _fill(out: Tensor, pool: Tensor, first: int) -> None:
    """Copy the pool into `out`, from number `first` (modulo its length) on, over and over."""
    flat, done, at = out.view(-1), 0, first % len(pool)
    while done < len(flat):
        count = min(len(flat) - done, len(pool) - at)
        flat[done : done + count] = pool[at : at + count]
        done, at = done + count, 0
