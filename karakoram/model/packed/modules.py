"""A model whose weights stay as the checkpoint holds them: int4 experts, everything else bf16 (or int4 where it is), on
the CPU kernels. For inference only; the mathematics is that of the modules these stand in for.

What changes in numbers (docs/numerics.md): activations are bf16 between operations as in torch, but inside one
operation nothing is rounded that torch would round: silu(gate) · up comes from float32 sums, a token's experts and
the shared one are summed in float32 and rounded once, logits are float32.

Legend: as in the modules: B batch, T tokens, H heads, N nope, R rope, V value, L latent.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from karakoram.errors import InputError
from karakoram.formats import int4_group
from karakoram.kernels import ops
from karakoram.kernels.packed import PackedExperts, PackedMatrix
from karakoram.model.attention import LatentAttention
from karakoram.model.cache import Cache, LatentCache, PagedPass
from karakoram.model.documents import Documents
from karakoram.model.moe import ExpertBank, MixtureOfExperts
from karakoram.model.router import Router
from karakoram.model.watch import Watch


class PackedLinear(nn.Module):
    """A projection on a packed matrix."""

    def __init__(self, matrix: PackedMatrix, out_dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self.matrix, self.out_dtype = matrix, out_dtype

    def forward(self, x: Tensor) -> Tensor:
        """bf16 [..., K] -> [..., N]."""
        rows = x.reshape(-1, x.shape[-1])
        return ops.linear(rows, self.matrix, self.out_dtype).view(*x.shape[:-1], -1)


class PackedEmbedding(nn.Module):
    """Rows of an int4 table, decoded as they are looked up: codes int32 [V, D/8], scale bf16 [V, D/32]."""

    def __init__(self, codes: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.codes, self.scale = codes, scale

    def forward(self, token_ids: Tensor) -> Tensor:
        """int64 [...] -> bf16 [..., D]."""
        return int4_group.dequantize(self.codes[token_ids], self.scale[token_ids])


class PackedNorm(nn.Module):
    """RMSNorm in one pass."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(weight, requires_grad=False), eps

    def forward(self, x: Tensor) -> Tensor:
        """bf16 [..., D] -> [..., D]."""
        return ops.rms_norm(x.reshape(-1, x.shape[-1]), self.weight, self.eps).view(x.shape)


class PackedRouter(Router):
    """The router on a bf16 matrix; products of bf16 numbers are exact in float32, so its logits are float32 ones."""

    matrix: PackedMatrix

    def logits(self, x_ND: Tensor) -> Tensor:
        """See `Router.logits`."""
        return ops.linear(x_ND, self.matrix, torch.float32)

    def forward(self, x_ND: Tensor) -> tuple[Tensor, Tensor]:
        """See `Router.forward`."""
        c = self.config
        return ops.route(
            self.logits(x_ND), self.e_score_correction_bias, c.num_experts_per_tok, c.n_group, c.topk_group,
            c.norm_topk_prob, c.routed_scaling_factor,
        )  # fmt: skip


class PackedFeedForward(nn.Module):
    """SwiGLU on packed matrices: gate, up, down."""

    def __init__(self, gate: PackedMatrix, up: PackedMatrix, down: PackedMatrix) -> None:
        super().__init__()
        self.matrices = (gate, up, down)

    def forward(self, x: Tensor) -> Tensor:
        """bf16 [..., D] -> [..., D]."""
        return ops.mlp(x.reshape(-1, x.shape[-1]), *self.matrices).view(x.shape)


SharedExperts = tuple[PackedMatrix, PackedMatrix, PackedMatrix]  # gate, up, down


class PackedBank(nn.Module):
    """The routed experts of a layer, all in memory."""

    def __init__(self, experts: PackedExperts) -> None:
        super().__init__()
        self.packed = experts

    def forward(self, x_ND: Tensor, ids_NK: Tensor, weights_NK: Tensor) -> Tensor:
        """See `ExpertBank.__call__`."""
        return self.mix(x_ND, ids_NK, weights_NK, None)

    def mix(self, x_ND: Tensor, ids_NK: Tensor, weights_NK: Tensor, shared: SharedExperts | None) -> Tensor:
        """Routed and shared experts in one float32 sum: bf16 [N, D]."""
        return ops.moe(x_ND, ids_NK, weights_NK, self.packed, shared)


class FedBank(nn.Module):
    """The routed experts of a layer, fed from elsewhere while the layer runs: an expert store sets `feed`.

    feed    as `PackedBank.mix`, bit for bit
    """

    feed: Callable[[Tensor, Tensor, Tensor, SharedExperts | None], Tensor] | None = None

    def forward(self, x_ND: Tensor, ids_NK: Tensor, weights_NK: Tensor) -> Tensor:
        """See `ExpertBank.__call__`."""
        return self.mix(x_ND, ids_NK, weights_NK, None)

    def mix(self, x_ND: Tensor, ids_NK: Tensor, weights_NK: Tensor, shared: SharedExperts | None) -> Tensor:
        """See `PackedBank.mix`. Raises InputError where nothing feeds it."""
        if self.feed is None:
            raise InputError("This model was loaded without its routed experts.", "Attach an expert store to it.")
        return self.feed(x_ND, ids_NK, weights_NK, shared)


class PackedMixture(MixtureOfExperts):
    """Routed and shared experts in one float32 sum; with a bank that is handed in, as the plain one."""

    def forward(self, x: Tensor, experts: ExpertBank | None = None, watch: Watch | None = None) -> Tensor:
        """See `MixtureOfExperts.forward`."""
        if experts is not None:
            return super().forward(x, experts, watch)
        x_ND = x.reshape(-1, x.shape[-1])
        bank, shared = self.experts, self.shared_experts
        assert isinstance(bank, PackedBank | FedBank) and (shared is None or isinstance(shared, PackedFeedForward))
        ids_NK, weights_NK = self.gate(x_ND)
        if watch is not None:
            watch.see_routing(self.layer, ids_NK, self.gate.config.n_routed_experts)
        return bank.mix(x_ND, ids_NK, weights_NK, None if shared is None else shared.matrices).view(x.shape)


class PackedAttention(LatentAttention):
    """MLA that decodes absorbed in the kernels; its projections have been replaced by packed ones.

    keys    `kv_b_proj`'s key half, transposed for the absorbed query: bf16 [H·L, N]
    """

    keys: PackedMatrix

    def forward(
        self,
        x_BTD: Tensor,
        rotation: tuple[Tensor, Tensor],
        positions_BT: Tensor,
        cache: Cache | PagedPass | None = None,
        watch: Watch | None = None,
        documents: Documents | None = None,
    ) -> Tensor:
        """As `LatentAttention.forward`."""
        if isinstance(cache, PagedPass) and cache.rows.dtype == torch.bfloat16:
            return self.o_proj(self.over_blocks(x_BTD, rotation, cache))
        if not isinstance(cache, LatentCache) or cache.rows.dtype != torch.bfloat16:
            return super().forward(x_BTD, rotation, positions_BT, cache, watch, documents)
        if not self.absorbs(positions_BT.shape[1], int(positions_BT.max()) + 1):
            return super().forward(x_BTD, rotation, positions_BT, cache, watch, documents)
        rows_BSx = cache.reserve(self.layer, positions_BT)
        return self.o_proj(self.decode(x_BTD, rotation, positions_BT, rows_BSx))

    def over_blocks(self, x_BTD: Tensor, rotation: tuple[Tensor, Tensor], batch: PagedPass) -> Tensor:
        """`paged` on the kernels: [1, T, H·V]."""
        c, latent = self.config, self.config.kv_lora_rank
        rows = batch.rows[self.layer]
        q_nope_nHN, queries = self._append(x_BTD[0], rotation, batch.slots_T, rows.flatten(0, 1)[None])
        parts: list[Tensor] = []
        if single := batch.single:
            ops.linear_by_head(q_nope_nHN[:single], self.keys, latent, out=queries[:single, :, :latent])
            mixed = ops.mla_decode(queries[:single], rows, batch.seen_T[:single], latent, self.scale, batch.tables)
            out = ops.linear_by_head(mixed, self.kv_b, c.v_head_dim, c.qk_nope_head_dim)
            parts.append(out.view(1, single, -1))
        for span in batch.spans:
            seen, visible = batch.context(self.layer, span)
            piece = slice(span.first, span.first + span.count)
            q_nope, q_rope = q_nope_nHN[None, piece], queries[None, piece, :, latent:]
            parts.append(self.expanded(q_nope, q_rope, seen[..., :latent], seen[..., latent:], visible))
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def decode(self, x_BTD: Tensor, rotation: tuple[Tensor, Tensor], positions_BT: Tensor, rows_BSx: Tensor) -> Tensor:
        """`project` and `absorbed` on the kernels, every query as a sequence of its own: [B, T, H·V]."""
        positions_n = positions_BT.flatten().contiguous()
        q_nope, queries = self._append(x_BTD.flatten(0, 1), rotation, positions_n, rows_BSx)
        return self._over_rows(q_nope, queries, positions_n + 1, rows_BSx).view(*positions_BT.shape, -1)

    def absorbed(
        self, q_nope_BTHN: Tensor, q_rope_BTHR: Tensor, latent_BSL: Tensor, k_rope_BSR: Tensor, visible_BTS: Tensor
    ) -> Tensor:
        """As `LatentAttention.absorbed`; every query sees the first slots, up to its own."""
        rows_BSx, latent = torch.cat((latent_BSL, k_rope_BSR), -1), latent_BSL.shape[-1]
        queries = torch.empty(*q_nope_BTHN.shape[:3], rows_BSx.shape[-1], dtype=q_nope_BTHN.dtype).flatten(0, 1)
        queries[..., latent:] = q_rope_BTHR.flatten(0, 1)
        seen_n = visible_BTS.sum(-1).flatten()
        out = self._over_rows(q_nope_BTHN.flatten(0, 1), queries, seen_n, rows_BSx)
        return out.view(*q_nope_BTHN.shape[:2], -1)

    def _over_rows(self, q_nope_nHN: Tensor, queries_nHx: Tensor, seen_n: Tensor, rows_BSx: Tensor) -> Tensor:
        """n/B queries for each row of the cache, with their rope part filled in: [n, H, V]."""
        c, latent = self.config, self.config.kv_lora_rank
        ops.linear_by_head(q_nope_nHN, self.keys, latent, out=queries_nHx[..., :latent])
        count = len(queries_nHx) // len(rows_BSx)
        row_n1 = torch.arange(len(rows_BSx), dtype=torch.int32).repeat_interleave(count)[:, None]  # a row is one block
        mixed = ops.mla_decode(queries_nHx, rows_BSx, seen_n, latent, self.scale, row_n1)
        return ops.linear_by_head(mixed, self.kv_b, c.v_head_dim, c.qk_nope_head_dim)

    def expanded(
        self,
        q_nope_BTHN: Tensor,
        q_rope_BTHR: Tensor,
        latent_BSL: Tensor,
        k_rope_BSR: Tensor,
        visible_BTS: Tensor | None,
        watch: Watch | None = None,
        documents: Documents | None = None,
    ) -> Tensor:
        """As `LatentAttention.expanded`; every query sees the first slots, up to its own."""
        if watch is not None or documents is not None:
            return super().expanded(q_nope_BTHN, q_rope_BTHR, latent_BSL, k_rope_BSR, visible_BTS, watch, documents)
        rows, count = q_nope_BTHN.shape[:2]
        seen_BT = torch.arange(1, count + 1).expand(rows, -1) if visible_BTS is None else visible_BTS.sum(-1)
        parts = [
            ops.mla_prefill(q_nope, q_rope, latent, k_rope, self.kv_b, seen, self.scale).flatten(-2)
            for q_nope, q_rope, latent, k_rope, seen in zip(
                q_nope_BTHN, q_rope_BTHR, latent_BSL, k_rope_BSR, seen_BT.expand(rows, -1), strict=True
            )
        ]
        return torch.stack(parts)

    def runs_on(self) -> tuple[str, torch.dtype, torch.device]:
        """See `LatentAttention.runs_on`."""
        library = ops.chosen()
        name = "reference" if library is None else f"{library.isa}, {library.threads} threads"
        return name, torch.bfloat16, torch.device("cpu")

    @property
    def kv_b(self) -> PackedMatrix:
        """Of `kv_b_proj`."""
        assert isinstance(self.kv_b_proj, PackedLinear)
        return self.kv_b_proj.matrix

    def _append(
        self, x_nD: Tensor, rotation: tuple[Tensor, Tensor], slots_n: Tensor, rows_BSx: Tensor
    ) -> tuple[Tensor, Tensor]:
        """New tokens into the cache; their queries: nope part [n, H, N], and [n, H, L + R] with only rope filled in."""
        c = self.config
        q_nD = self.q_proj(x_nD) if c.q_lora_rank is None else self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x_nD)))
        q_nHx = q_nD.unflatten(-1, (c.num_attention_heads, -1))
        q_nope, q_rope = q_nHx[..., : c.qk_nope_head_dim], q_nHx[..., c.qk_nope_head_dim :]
        queries = torch.empty(*q_nHx.shape[:2], rows_BSx.shape[-1], dtype=q_nHx.dtype)
        norm, cos, sin = self.kv_a_layernorm, rotation[0].flatten(0, 1), rotation[1].flatten(0, 1)
        ops.latent_append(
            self.kv_a_proj_with_mqa(x_nD), norm.weight, norm.eps, q_rope, cos, sin, slots_n, rows_BSx, queries
        )
        return q_nope, queries
