"""Weights in the order in which the kernels read them: panels of 16 outputs, one pass over memory each.

`PackedMatrix` is one matrix, `PackedExperts` the routed experts of a layer, one contiguous record each: gate, up,
down. The layout is described where it is decoded (`cpu/src/isa/kernels.hpp`); it has a version, takes no more bytes
than the checkpoint (outputs are padded to 16, inputs to 64, which no released size needs), serves every instruction
set, and goes to disk as it is (`checkpoint/experts/layout.py`). This file is its plain twin: packing and unpacking in
torch, slow and obvious.

Legend: P panels, B blocks of 64 inputs, n output within a panel, g group of 32 within a block, c vector, j pair, b
parity.
"""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from karakoram.errors import FormatError
from karakoram.formats import fp8_block, int4_group

LAYOUT_VERSION = 1  # K2_LAYOUT_VERSION in karakoram.h
PANEL, BLOCK = 16, 64
Kind = Literal["int4", "bf16", "fp8"]
BLOCK_BYTES: dict[Kind, int] = {"int4": 576, "bf16": 2 * PANEL * BLOCK, "fp8": PANEL * BLOCK}


def packed_bytes(kind: Kind, outputs: int, inputs: int) -> int:
    """Bytes of a packed matrix [outputs, inputs]."""
    scales = 4 * -(-outputs // 128) * -(-inputs // 128) if kind == "fp8" else 0
    return -(-outputs // PANEL) * -(-inputs // BLOCK) * BLOCK_BYTES[kind] + scales


@dataclass(frozen=True, slots=True)
class PackedMatrix:
    """`data` uint8, 64-byte aligned, holds a matrix [outputs, inputs] as panels."""

    data: Tensor
    kind: Kind
    outputs: int
    inputs: int
    # by implementation, once
    described: dict[str, Any] = field(default_factory=dict, init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        wanted = packed_bytes(self.kind, self.outputs, self.inputs)
        if self.data.dtype != torch.uint8 or self.data.numel() != wanted or not self.data.is_contiguous():
            raise FormatError(
                f"{self.data.numel():,} bytes are no packed {self.kind} matrix [{self.outputs}, {self.inputs}].",
                f"It takes {wanted:,} contiguous bytes.",
            )

    def __reduce__(self) -> tuple[type["PackedMatrix"], tuple[Tensor, Kind, int, int]]:
        return PackedMatrix, (self.data, self.kind, self.outputs, self.inputs)  # a copy lies elsewhere: not `described`

    def dense(self) -> Tensor:
        """The weights it means, bf16 [outputs, inputs]."""
        if self.kind == "int4":
            codes, scale = unpack_int4(self)
            return int4_group.dequantize(codes, scale)
        if self.kind == "bf16":
            return _unpack_pairs(self.data.view(torch.bfloat16), self.outputs, self.inputs)
        return fp8_block.dequantize(*unpack_fp8(self))


@dataclass(frozen=True)
class PackedExperts:
    """All routed experts of a layer: `records` uint8 [experts, bytes], each gate [I, D], up [I, D], down [D, I]."""

    records: Tensor
    hidden: int
    intermediate: int
    kind: Kind = "int4"

    def __post_init__(self) -> None:
        size = record_bytes(self.hidden, self.intermediate, self.kind)
        if self.records.dtype != torch.uint8 or self.records.ndim != 2 or self.records.shape[1] != size:
            raise FormatError(
                f"{self.records.dtype} {list(self.records.shape)} are no records of experts "
                f"[{self.hidden}, {self.intermediate}].",
                f"They are torch.uint8 [experts, {size}].",
            )
        if self.records.stride(1) != 1:
            raise FormatError("The bytes of an expert's record do not lie one after another.", "Make them contiguous.")

    @property
    def experts(self) -> int:
        """How many there are."""
        return self.records.shape[0]

    @cached_property
    def addresses(self) -> tuple[int, ...]:
        """Where each expert's record lies in memory."""
        first, stride = self.records.data_ptr(), self.records.stride(0)
        return tuple(first + expert * stride for expert in range(self.experts))

    def parts(self, expert: int) -> tuple[PackedMatrix, PackedMatrix, PackedMatrix]:
        """Views of one expert's gate, up and down."""
        record, d, i = self.records[expert], self.hidden, self.intermediate
        wide, narrow = packed_bytes(self.kind, i, d), packed_bytes(self.kind, d, i)
        up, down = _aligned(wide), 2 * _aligned(wide)
        return (
            PackedMatrix(record[:wide], self.kind, i, d),
            PackedMatrix(record[up : up + wide], self.kind, i, d),
            PackedMatrix(record[down : down + narrow], self.kind, d, i),
        )


def _aligned(size: int) -> int:
    return -(-size // 64) * 64  # only the scales of fp8 leave a rest


def record_bytes(hidden: int, intermediate: int, kind: Kind = "int4") -> int:
    """Bytes of one expert's record."""
    return 2 * _aligned(packed_bytes(kind, intermediate, hidden)) + _aligned(packed_bytes(kind, hidden, intermediate))


def empty_experts(experts: int, hidden: int, intermediate: int, kind: Kind = "int4") -> PackedExperts:
    """Room for a layer's experts, to be filled part by part."""
    records = torch.empty(experts, record_bytes(hidden, intermediate, kind), dtype=torch.uint8)
    return PackedExperts(records, hidden, intermediate, kind)


# ------------------------------------------------------------------------------------------------ plain twins


def pack_int4(codes: Tensor, scale: Tensor) -> Tensor:
    """weight_packed int32 [N, K/8], weight_scale bf16 [N, K/32] -> uint8 panels (twin of k2_pack_int4)."""
    outputs, groups = scale.shape
    q = int4_group.unpack(codes, groups * 32) + 8
    q = F.pad(q, (0, groups % 2 * 32, 0, -outputs % PANEL), value=8).to(torch.int32)
    scale = F.pad(scale, (0, groups % 2, 0, -outputs % PANEL))
    if not bool(scale.isfinite().all()):
        raise FormatError("A scale of an int4 weight is infinite or not a number.", "The checkpoint is damaged.")
    # input = 64·B + 32·g + 8·c + 2·j + b
    q_PnBgcjb = q.view(-1, PANEL, q.shape[1] // BLOCK, 2, 4, 4, 2)
    shift_jb = 4 * torch.arange(4)[:, None] + 16 * torch.arange(2)[None]
    lanes = (q_PnBgcjb.long() << shift_jb).sum((-2, -1))
    lanes = (lanes - (lanes >> 31 << 32)).to(torch.int32)  # as two's complement
    code_bytes = lanes.permute(0, 2, 3, 4, 1).contiguous().view(torch.uint8).flatten(2)
    scale_bytes = scale.view(-1, PANEL, q.shape[1] // BLOCK, 2).permute(0, 2, 3, 1).contiguous().view(torch.uint8)
    return torch.cat((code_bytes, scale_bytes.flatten(2)), -1).flatten()


def unpack_int4(matrix: PackedMatrix) -> tuple[Tensor, Tensor]:
    """Back to weight_packed int32 [N, K/8] and weight_scale bf16 [N, K/32], bit for bit (twin of k2_unpack_int4)."""
    blocks = -(-matrix.inputs // BLOCK)
    data = matrix.data.view(-1, blocks, BLOCK_BYTES["int4"])
    lanes = data[..., :512].contiguous().view(torch.int32).view(-1, blocks, 2, 4, PANEL)
    shift_jb = 4 * torch.arange(4)[:, None] + 16 * torch.arange(2)[None]
    q = (lanes[..., None, None] >> shift_jb) & 15
    q = q.permute(0, 4, 1, 2, 3, 5, 6).reshape(-1, blocks * BLOCK)[: matrix.outputs, : matrix.inputs]
    scale = data[..., 512:].contiguous().view(torch.bfloat16).view(-1, blocks, 2, PANEL).permute(0, 3, 1, 2)
    scale = scale.reshape(-1, blocks * 2)[: matrix.outputs, : matrix.inputs // 32]
    return int4_group.pack((q - 8).to(torch.int8).contiguous()), scale.contiguous()


def unpack_fp8(matrix: PackedMatrix) -> tuple[Tensor, Tensor]:
    """Back to weight float8_e4m3fn [N, K] and weight_scale_inv float32 [N/128, K/128] (a view)."""
    panels = packed_bytes("bf16", matrix.outputs, matrix.inputs) // 2
    codes = _unpack_pairs(matrix.data[:panels], matrix.outputs, matrix.inputs)
    scale = matrix.data[panels:].view(torch.float32).view(-(-matrix.outputs // 128), -(-matrix.inputs // 128))
    return codes.view(torch.float8_e4m3fn), scale


SHADOW_BLOCK_BYTES = BLOCK_BYTES["int4"] - 256


def shadow_make(panels: Tensor) -> Tensor:
    """Bytes of int4 panels -> the upper two bits of every code and all scales (twin of k2_shadow_make)."""
    blocks = panels.view(-1, BLOCK_BYTES["int4"])
    low, high = blocks[:, :256], blocks[:, 256:512]
    codes = (low >> 2 & 0x03) | (low >> 4 & 0x0C) | (high << 2 & 0x30) | (high & 0xC0)
    return torch.cat((codes, blocks[:, 512:]), -1).flatten()


def shadow_expand(shadow: Tensor) -> Tensor:
    """Back to panels: codes 4·t + 1 and 4·t + 2 by the parity of their place (twin of k2_shadow_expand)."""
    blocks = shadow.view(-1, SHADOW_BLOCK_BYTES)
    codes = blocks[:, :256]
    low = (codes << 2 & 0x0C) | (codes << 4 & 0xC0) | 0x21
    high = (codes >> 2 & 0x0C) | (codes & 0xC0) | 0x21
    return torch.cat((low, high, blocks[:, 256:]), -1).flatten()


def pack_pairs(weight: Tensor) -> Tensor:
    """bf16 or fp8 codes [N, K] -> the same numbers pair by pair in panels, flat (twin of k2_pack_bf16)."""
    weight = F.pad(weight, (0, -weight.shape[1] % BLOCK, 0, -weight.shape[0] % PANEL))
    return weight.view(-1, PANEL, weight.shape[1] // 2, 2).transpose(1, 2).contiguous().flatten()


def _unpack_pairs(data: Tensor, outputs: int, inputs: int) -> Tensor:
    padded = -(-inputs // BLOCK) * BLOCK
    pairs = data.view(-1, padded // 2, PANEL, 2).transpose(1, 2).reshape(-1, padded)
    return pairs[:outputs, :inputs].contiguous()
