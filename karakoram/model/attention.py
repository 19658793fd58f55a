"""Multi-head latent attention (MLA), in the two forms that are the same mathematics.

Keys and values of all heads are linear images of one latent per token. **Expanded** multiplies them out and runs
ordinary attention: right for prefill and training, where T queries share the cost. **Absorbed** moves the key half of
`kv_b_proj` onto the query and the value half onto the result, so that attention runs over the cached latents
themselves: right for decode, where one query would have to expand the whole context (DeepSeek-V2, arXiv 2405.04434,
§2.1.2 and Appendix C).

The two latent norms take eps 1e-6 whatever `rms_norm_eps` says: DeepSeek-V3's released code builds them without an eps,
and the weights were trained so. Softmax runs in float32.

Legend: B batch, T queries, S slots (keys), H heads, D hidden, N nope, R rope, V value, L latent.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from karakoram.config import ModelConfig
from karakoram.model import forms
from karakoram.model.backward.causal import causal_attention
from karakoram.model.cache import Cache, PagedPass
from karakoram.model.documents import Documents
from karakoram.model.layers import RMSNorm, linear
from karakoram.model.rope import rotate, softmax_scale
from karakoram.model.watch import Watch

LATENT_NORM_EPS = 1e-6
# Up to so many new tokens a row, attention over a cache runs absorbed, whatever the context; beyond, in the form that
# takes less time (`forms.py`).
ABSORB_UP_TO = 16


class LatentAttention(nn.Module):
    """MLA with or without the low-rank query (`q_lora_rank`), parameters under the checkpoint's names."""

    def __init__(self, config: ModelConfig, layer: int, device: torch.device | str | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        self.scale = softmax_scale(config)
        heads, hidden = config.num_attention_heads, config.hidden_size
        query_width = heads * (config.qk_nope_head_dim + config.qk_rope_head_dim)
        if config.q_lora_rank is None:
            self.q_proj = linear(hidden, query_width, device, dtype)
        else:
            self.q_a_proj = linear(hidden, config.q_lora_rank, device, dtype)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, LATENT_NORM_EPS, device, dtype)
            self.q_b_proj = linear(config.q_lora_rank, query_width, device, dtype)
        self.kv_a_proj_with_mqa = linear(hidden, config.kv_lora_rank + config.qk_rope_head_dim, device, dtype)
        self.kv_a_layernorm = RMSNorm(config.kv_lora_rank, LATENT_NORM_EPS, device, dtype)
        self.kv_b_proj = linear(
            config.kv_lora_rank, heads * (config.qk_nope_head_dim + config.v_head_dim), device, dtype
        )
        self.o_proj = linear(heads * config.v_head_dim, hidden, device, dtype)

    def forward(
        self,
        x_BTD: Tensor,
        rotation: tuple[Tensor, Tensor],
        positions_BT: Tensor,
        cache: Cache | PagedPass | None = None,
        watch: Watch | None = None,
        documents: Documents | None = None,
    ) -> Tensor:
        """Attend from x to itself and to the cache: [B, T, D] -> [B, T, D]. Without one, T counts from position 0."""
        q_nope, q_rope, latent, k_rope = self.project(x_BTD, rotation)
        if isinstance(cache, PagedPass):
            rows_TW = torch.cat((latent, k_rope), -1)[0].to(cache.rows.dtype)
            cache.flat(self.layer)[cache.slots_T] = rows_TW
            return self.o_proj(self.paged(q_nope, q_rope, cache))
        if cache is None:
            return self.o_proj(self.expanded(q_nope, q_rope, latent, k_rope, None, watch, documents))
        latent, k_rope = cache.append(self.layer, latent, k_rope, positions_BT)
        latent, k_rope = latent.to(x_BTD.dtype), k_rope.to(x_BTD.dtype)
        visible_BTS = torch.arange(latent.shape[1], device=latent.device) <= positions_BT[..., None]
        attend = self.absorbed if self.absorbs(x_BTD.shape[1], latent.shape[1]) else self.expanded
        return self.o_proj(attend(q_nope, q_rope, latent, k_rope, visible_BTS))

    def absorbs(self, count: int, tokens: int) -> bool:
        """Whether `count` new tokens of a sequence of `tokens` attend absorbed. May have to measure, once."""
        return count <= ABSORB_UP_TO or self.costs().absorbs(count, tokens)

    def costs(self) -> forms.Costs:
        """Of both forms, here."""
        c, (name, dtype, device) = self.config, self.runs_on()

        def probe(form: Callable[..., Tensor], count: int, tokens: int) -> None:
            of_query, of_token = (1, count, c.num_attention_heads), (1, tokens)
            sizes = (
                (*of_query, c.qk_nope_head_dim), (*of_query, c.qk_rope_head_dim),
                (*of_token, c.kv_lora_rank), (*of_token, c.qk_rope_head_dim),
            )  # fmt: skip
            with torch.no_grad():
                visible = torch.ones(1, count, tokens, dtype=torch.bool, device=device)
                form(*(torch.full(size, 0.1, dtype=dtype, device=device) for size in sizes), visible)
                if device.type == "cuda":
                    torch.cuda.synchronize(device)

        return forms.costs(f"{name}, {shape_of(c)}", partial(probe, self.absorbed), partial(probe, self.expanded))

    def runs_on(self) -> tuple[str, torch.dtype, torch.device]:
        """What computes both forms, and on what."""
        weight = self.kv_b_proj.weight
        return (
            f"torch {weight.dtype} on {weight.device}, {torch.get_num_threads()} threads",
            weight.dtype,
            weight.device,
        )

    def paged(self, q_nope_BTHN: Tensor, q_rope_BTHR: Tensor, batch: PagedPass) -> Tensor:
        """Attention of a ragged batch whose rows are written: [1, T, H·V]."""
        parts: list[Tensor] = []
        latent, dtype = self.config.kv_lora_rank, q_nope_BTHN.dtype
        if batch.single:
            rows, visible = batch.singles(self.layer)
            rows = rows.to(dtype)
            one = slice(0, batch.single)
            q_nope, q_rope = q_nope_BTHN[0, one, None], q_rope_BTHR[0, one, None]
            out = self.absorbed(q_nope, q_rope, rows[..., :latent], rows[..., latent:], visible)
            parts.append(out.transpose(0, 1))
        for span in batch.spans:
            rows, visible = batch.context(self.layer, span)
            rows, piece = rows.to(dtype), slice(span.first, span.first + span.count)
            q_nope, q_rope = q_nope_BTHN[:, piece], q_rope_BTHR[:, piece]
            parts.append(self.expanded(q_nope, q_rope, rows[..., :latent], rows[..., latent:], visible))
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def project(self, x_BTD: Tensor, rotation: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries [B, T, H, N] and [B, T, H, R] (rotated), latent [B, T, L] (normed), rope key [B, T, R] (rotated)."""
        c = self.config
        cos, sin = rotation
        q = self.q_proj(x_BTD) if c.q_lora_rank is None else self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x_BTD)))
        q_nope, q_rope = q.unflatten(-1, (c.num_attention_heads, -1)).split(
            (c.qk_nope_head_dim, c.qk_rope_head_dim), -1
        )
        latent, k_rope = self.kv_a_proj_with_mqa(x_BTD).split((c.kv_lora_rank, c.qk_rope_head_dim), -1)
        q_rope = rotate(q_rope, cos[:, :, None], sin[:, :, None])
        return q_nope, q_rope, self.kv_a_layernorm(latent), rotate(k_rope, cos, sin)

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
        """Ordinary attention over multiplied-out keys and values: [B, T, H·V].

        `visible` None: causal with T = S, within each of the documents if they are given.
        """
        c = self.config
        kv_BSHx = self.kv_b_proj(latent_BSL).unflatten(-1, (c.num_attention_heads, -1))
        k_nope, value = kv_BSHx.split((c.qk_nope_head_dim, c.v_head_dim), -1)
        k_rope = k_rope_BSR[:, :, None].expand(-1, -1, c.num_attention_heads, -1)
        q_BHTx = torch.cat((q_nope_BTHN, q_rope_BTHR), -1).transpose(1, 2)
        k_BHSx = torch.cat((k_nope, k_rope), -1).transpose(1, 2)
        value_BHSV = value.transpose(1, 2)
        if visible_BTS is None and trains_on_cpu(q_BHTx):
            largest_H = None if watch is None else torch.empty(c.num_attention_heads)
            spans = None if documents is None else documents.spans
            out_BHTV = causal_attention(q_BHTx, k_BHSx, value_BHSV, self.scale, spans, largest_H)
            if watch is not None and largest_H is not None:
                watch.see_logits(self.layer, largest_H)
        else:
            if watch is not None:
                watch.see_attention(self.layer, q_BHTx, k_BHSx, self.scale)
            if documents is not None:
                visible_BTS = documents.visible_BTT
            out_BHTV = scaled_attention(q_BHTx, k_BHSx, value_BHSV, visible_BTS, self.scale)
        return out_BHTV.transpose(1, 2).flatten(-2)

    def absorbed(
        self, q_nope_BTHN: Tensor, q_rope_BTHR: Tensor, latent_BSL: Tensor, k_rope_BSR: Tensor, visible_BTS: Tensor
    ) -> Tensor:
        """Attention over the latents themselves, with `kv_b_proj` folded into query and result: [B, T, H·V]."""
        c = self.config
        key_HNL, value_HVL = self.kv_b_proj.weight.unflatten(0, (c.num_attention_heads, -1)).split(
            (c.qk_nope_head_dim, c.v_head_dim), 1
        )
        q_BTHL = torch.einsum("bthn,hnl->bthl", q_nope_BTHN, key_HNL)
        scores_BHTS = torch.einsum("bthl,bsl->bhts", q_BTHL, latent_BSL).float()
        scores_BHTS = (scores_BHTS + torch.einsum("bthr,bsr->bhts", q_rope_BTHR, k_rope_BSR)) * self.scale
        scores_BHTS = scores_BHTS.masked_fill(~visible_BTS[:, None], float("-inf"))
        p_BHTS = scores_BHTS.softmax(-1).to(latent_BSL.dtype)
        mixed_BTHL = torch.einsum("bhts,bsl->bthl", p_BHTS, latent_BSL)
        return torch.einsum("bthl,hvl->bthv", mixed_BTHL, value_HVL).flatten(-2)


def trains_on_cpu(q_BHTx: Tensor) -> bool:
    """Whether attention from these queries has the backward pass of its own (`backward/causal.py`)."""
    return q_BHTx.device.type == "cpu" and torch.is_grad_enabled() and q_BHTx.requires_grad


def shape_of(c: ModelConfig) -> str:
    """What the costs of attention depend on."""
    sizes = (c.num_attention_heads, c.kv_lora_rank, c.qk_nope_head_dim, c.qk_rope_head_dim, c.v_head_dim)
    return "heads, latent, nope, rope, value " + " ".join(map(str, sizes))


def scaled_attention(
    q_BHTx: Tensor, k_BHSx: Tensor, v_BHSV: Tensor, visible_BTS: Tensor | None, scale: float
) -> Tensor:
    """softmax(q·k·scale) · v -> [B, H, T, V]; narrow values are padded to the keys' width for torch's kernel."""
    if visible_BTS is None and trains_on_cpu(q_BHTx):
        return causal_attention(q_BHTx, k_BHSx, v_BHSV, scale)
    width = v_BHSV.shape[-1]
    if width < q_BHTx.shape[-1]:
        v_BHSV = F.pad(v_BHSV, (0, q_BHTx.shape[-1] - width))
    mask = None if visible_BTS is None else visible_BTS[:, None]
    out = F.scaled_dot_product_attention(q_BHTx, k_BHSx, v_BHSV, mask, is_causal=mask is None, scale=scale)
    return out[..., :width]
