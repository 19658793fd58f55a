"""Packed modules in the places of plain ones, each weight in the format that its source holds it in.

Legend: H heads, N nope, V value, L latent.
"""

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from karakoram.checkpoint import Checkpoint, names
from karakoram.checkpoint.names import PROJECTIONS
from karakoram.config import ModelConfig
from karakoram.kernels import ops
from karakoram.kernels.packed import Kind, PackedMatrix, empty_experts
from karakoram.model.attention import LatentAttention
from karakoram.model.moe import MixtureOfExperts
from karakoram.model.packed.layers import join
from karakoram.model.packed.modules import (
    FedBank,
    PackedAttention,
    PackedBank,
    PackedEmbedding,
    PackedFeedForward,
    PackedLinear,
    PackedMixture,
    PackedNorm,
    PackedRouter,
)
from karakoram.model.transformer import Transformer


def can_run_packed(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels are there for this device and dtype, and serve the checkpoint as well as torch does."""
    c = checkpoint.config
    sixteen = all(n % 16 == 0 for n in (c.qk_nope_head_dim, c.v_head_dim, c.kv_lora_rank))  # heads begin with a panel
    library = ops.chosen()
    if device.type != "cpu" or dtype != torch.bfloat16 or not sixteen or library is None:
        return False
    kinds: dict[str, set[Kind]] = {}  # by layer, of the routed experts
    for name in (tensor.name for tensor in names.expected_tensors(c) if names.is_routed_expert(tensor.name)):
        kinds.setdefault(name.split(".experts.")[0], set()).add(_kind(checkpoint, name))
    if any(len(found) > 1 for found in kinds.values()):
        return False
    # without vector instructions of their own, the kernels' only gain is to leave int4 as it is
    return library.isa != "scalar" or {"int4"} in kinds.values()


def _kind(checkpoint: Checkpoint, name: str) -> Kind:
    found = checkpoint.format_of(name)
    return found if found in ("int4", "fp8") else "bf16"


class Weights(Protocol):
    """Where packed weights come from: a checkpoint, or chance (`k2 bench model`)."""

    def kind(self, name: str) -> Kind:
        """What `matrix` will be packed as; the same for all of a layer's experts."""
        ...

    def plain(self, name: str, like: Tensor) -> Tensor:
        """A norm, a router's weight or bias: in the shape and dtype of `like`."""
        ...

    def table(self, name: str, like: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """The embedding: bf16 [V, D], or int4 codes and scales."""
        ...

    def matrix(self, name: str, outputs: int, inputs: int, out: Tensor | None = None) -> PackedMatrix:
        """A projection as panels, in the bytes `out` if given."""
        ...

    def dense(self, name: str, like: Tensor) -> Tensor:
        """A projection as bf16 [outputs, inputs]."""
        ...


class CheckpointWeights:
    """Each weight in the format that the checkpoint holds it in."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint

    def kind(self, name: str) -> Kind:
        """See `Weights`."""
        return _kind(self.checkpoint, name)

    def plain(self, name: str, like: Tensor) -> Tensor:
        """See `Weights`."""
        return self.checkpoint.read(name).to(like.dtype)

    def table(self, name: str, like: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """See `Weights`."""
        if self.checkpoint.format_of(name) == "int4":
            return self._int4_parts(name)
        return self.checkpoint.read_weight(name, like.dtype)

    def matrix(self, name: str, outputs: int, inputs: int, out: Tensor | None = None) -> PackedMatrix:
        """See `Weights`; the checkpoint's shapes have been checked."""
        if self.checkpoint.packed is not None and names.is_routed_expert(name):
            return self.checkpoint.packed.matrix(name, out)
        match self.kind(name):
            case "int4":
                return ops.pack_int4(*self._int4_parts(name), out)
            case "fp8":
                return ops.pack_fp8(self.checkpoint.read(name), self.checkpoint.read(f"{name}_scale_inv"), out)
            case _:
                return ops.pack_bf16(self.dense(name, torch.empty(0)), out)

    def dense(self, name: str, like: Tensor) -> Tensor:
        """See `Weights`."""
        return self.checkpoint.read_weight(name, torch.bfloat16)

    def _int4_parts(self, name: str) -> tuple[Tensor, Tensor]:
        return self.checkpoint.read(f"{name}_packed"), self.checkpoint.read(f"{name}_scale").to(torch.bfloat16)


@torch.no_grad()
def assemble(model: Transformer, weights: Weights, routed_experts: bool = True) -> None:
    """Fill a model on the meta device with packed weights, one by one; peak memory is the model and one expert.

    Without routed experts, each layer's bank is a `FedBank`.
    """
    c, decoder, table = model.config, model.model, "model.embed_tokens.weight"
    rows = weights.table(table, decoder.embed_tokens.weight)
    if isinstance(rows, Tensor):
        decoder.embed_tokens.weight = nn.Parameter(rows, requires_grad=False)
    else:
        _put(decoder, "embed_tokens", PackedEmbedding(*rows))
    head = weights.matrix(table if c.tie_word_embeddings else "lm_head.weight", c.vocab_size, c.hidden_size)
    _put(model, "lm_head", PackedLinear(head, torch.float32))
    _put(decoder, "norm", _norm(decoder.norm, weights, "model.norm"))
    for number in range(c.num_hidden_layers):
        layer: Any = decoder.layers[number]
        stem = f"model.layers.{number}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            setattr(layer, norm, _norm(getattr(layer, norm), weights, f"{stem}.{norm}"))
        _pack_attention(layer.self_attn, weights, f"{stem}.self_attn")
        if number < c.first_k_dense_replace:
            layer.mlp = PackedFeedForward(*_triple(weights, f"{stem}.mlp", c.hidden_size, c.intermediate_size))
        else:
            _pack_mixture(layer.mlp, weights, f"{stem}.mlp", c, routed_experts)
    join(decoder)


def _put(parent: nn.Module, name: str, value: object) -> None:
    """A packed module, or a matrix, in the place of a plain one."""
    setattr(parent, name, value)


def _norm(norm: nn.Module, weights: Weights, name: str) -> PackedNorm:
    return PackedNorm(weights.plain(f"{name}.weight", norm.weight), norm.eps)  # pyright: ignore[reportArgumentType]


Triple = tuple[PackedMatrix, PackedMatrix, PackedMatrix]


def _triple(weights: Weights, stem: str, hidden: int, inner: int) -> Triple:
    return (
        weights.matrix(f"{stem}.gate_proj.weight", inner, hidden),
        weights.matrix(f"{stem}.up_proj.weight", inner, hidden),
        weights.matrix(f"{stem}.down_proj.weight", hidden, inner),
    )


def _pack_mixture(mixture: MixtureOfExperts, weights: Weights, stem: str, c: ModelConfig, routed_experts: bool) -> None:
    gate = mixture.gate
    gate.weight = nn.Parameter(weights.plain(f"{stem}.gate.weight", gate.weight), requires_grad=False)
    gate.__class__ = PackedRouter
    _put(gate, "matrix", ops.pack_bf16(gate.weight.detach()))
    bias = "e_score_correction_bias"
    gate.e_score_correction_bias = weights.plain(f"{stem}.gate.{bias}", gate.e_score_correction_bias)
    bank = _packed_bank(weights, f"{stem}.experts", c) if routed_experts else FedBank()
    inner = c.n_shared_experts * c.moe_intermediate_size
    _put(mixture, "experts", bank)
    if inner:
        triple = _triple(weights, f"{stem}.shared_experts", c.hidden_size, inner)
        _put(mixture, "shared_experts", PackedFeedForward(*triple))
    mixture.__class__ = PackedMixture


def _packed_bank(weights: Weights, stem: str, c: ModelConfig) -> PackedBank:
    kind = weights.kind(f"{stem}.0.{PROJECTIONS[0]}.weight")
    experts = empty_experts(c.n_routed_experts, c.hidden_size, c.moe_intermediate_size, kind)
    for expert in range(c.n_routed_experts):
        for projection, part in zip(PROJECTIONS, experts.parts(expert), strict=True):
            weights.matrix(f"{stem}.{expert}.{projection}.weight", part.outputs, part.inputs, part.data)
    return PackedBank(experts)


def _pack_attention(attention: LatentAttention, weights: Weights, stem: str) -> None:
    keys = pack_keys(weights.dense(f"{stem}.kv_b_proj.weight", attention.kv_b_proj.weight), attention.config)
    for name, module in list(attention.named_children()):
        if isinstance(module, nn.Linear):
            shape = module.out_features, module.in_features
            setattr(attention, name, PackedLinear(weights.matrix(f"{stem}.{name}.weight", *shape)))
        else:
            setattr(attention, name, _norm(module, weights, f"{stem}.{name}"))
    attention.__class__ = PackedAttention
    _put(attention, "keys", keys)


def pack_keys(kv_b: Tensor, c: ModelConfig) -> PackedMatrix:
    """`kv_b_proj` bf16 [H·(N + V), L] -> its key half, transposed: packed [H·L, N]."""
    keys_HNL = kv_b.unflatten(0, (c.num_attention_heads, -1))[:, : c.qk_nope_head_dim]
    return ops.pack_bf16(keys_HNL.transpose(1, 2).flatten(0, 1).contiguous())
