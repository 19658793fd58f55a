"""The whole model: embedding, layers, norm, head. Mathematics only: whatever a layer reads arrives as an argument.

A layer is `h = x + attention(norm(x))`, `h + feed_forward(norm(h))`; the first `first_k_dense_replace` layers have a
dense SwiGLU, the others a mixture of experts. Parameters carry the checkpoint's names, except that a layer's routed
experts are three stacks (`mlp.experts.gate_proj` [E, I, D] …). Source: DeepSeek-V3 (arXiv 2412.19437, §2.1) and its
released code.

Legend: B batch, T tokens, D hidden, V vocabulary.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from karakoram.config import ModelConfig
from karakoram.errors import InputError
from karakoram.model.attention import LatentAttention
from karakoram.model.cache import Cache, LatentCache, PagedPass
from karakoram.model.documents import Documents
from karakoram.model.layers import RMSNorm, SwiGLU, linear
from karakoram.model.moe import ExpertBank, MixtureOfExperts
from karakoram.model.rope import inverse_frequencies, rotation_scale, rotations
from karakoram.model.watch import Watch


class Layer(nn.Module):
    """One transformer layer, pre-norm."""

    def __init__(self, config: ModelConfig, layer: int, device: torch.device | str | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.self_attn = LatentAttention(config, layer, device, dtype)
        self.mlp = (
            SwiGLU(config.hidden_size, config.intermediate_size, device, dtype)
            if layer < config.first_k_dense_replace
            else MixtureOfExperts(config, layer, device, dtype)
        )
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, device, dtype)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, device, dtype)

    def forward(
        self,
        x_BTD: Tensor,
        rotation: tuple[Tensor, Tensor],
        positions_BT: Tensor,
        cache: Cache | PagedPass | None = None,
        experts: ExpertBank | None = None,
        watch: Watch | None = None,
        documents: Documents | None = None,
    ) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), rotation, positions_BT, cache, watch, documents)
        normed_BTD = self.post_attention_layernorm(x_BTD)
        if isinstance(self.mlp, MixtureOfExperts):
            return x_BTD + self.mlp(normed_BTD, experts, watch)
        return x_BTD + self.mlp(normed_BTD)


class Decoder(nn.Module):
    """Embedding, layers and final norm: what checkpoints call `model.`."""

    def __init__(self, config: ModelConfig, device: torch.device | str | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, device=device, dtype=dtype)
        self.layers = nn.ModuleList(Layer(config, i, device, dtype) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, device, dtype)

    def forward(
        self,
        x_BTD: Tensor,
        rotation: tuple[Tensor, Tensor],
        positions_BT: Tensor,
        cache: Cache | PagedPass | None = None,
        experts: ExpertBank | None = None,
        watch: Watch | None = None,
        documents: Documents | None = None,
    ) -> Tensor:
        """Embedded tokens through the layers and the final norm: [B, T, D] -> [B, T, D]."""
        for layer in self.layers:
            x_BTD = layer(x_BTD, rotation, positions_BT, cache, experts, watch, documents)
        return self.norm(x_BTD)


class Transformer(nn.Module):
    """A K2-shaped language model; weights are uninitialised until they are loaded, or drawn by `train.initialize`."""

    def __init__(
        self,
        config: ModelConfig,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config, device, dtype)
        self.lm_head = (
            None if config.tie_word_embeddings else linear(config.hidden_size, config.vocab_size, device, dtype)
        )
        self._inverse_frequencies: Tensor | None = None

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.model.norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The parameters' dtype."""
        return self.model.norm.weight.dtype

    def forward(
        self,
        token_ids_BT: Tensor,
        cache: Cache | PagedPass | None = None,
        positions: Tensor | None = None,
        experts: ExpertBank | None = None,
        logits_for: Literal["all", "last"] = "all",
        watch: Watch | None = None,
    ) -> Tensor:
        """Token ids int64 [B, T] -> logits float32 [B, T, V], or [B, 1, V] of the last position.

        cache      see `new_cache`; it is written. Without one, the T tokens see each other causally.
        positions  int64 [B, T]; default: on from what the cache holds, else 0…T-1. With a cache they are also the slots
                   written, and a token sees slots 0…position.
        experts    another home of the routed experts than this module's own stacks.
        Raises InputError for ids outside the vocabulary, wrong shapes, or positions before 0 or past the cache.
        """
        if logits_for not in ("all", "last"):
            raise InputError(f"There are no logits for {logits_for!r}.", "Ask for 'all' positions or the 'last'.")
        self._check(token_ids_BT, positions)
        x_BTD = self.hidden(token_ids_BT, cache, positions, experts, watch)
        return self.logits(x_BTD if logits_for == "all" else x_BTD[:, -1:])

    def hidden(
        self,
        token_ids_BT: Tensor,
        cache: Cache | PagedPass | None = None,
        positions: Tensor | None = None,
        experts: ExpertBank | None = None,
        watch: Watch | None = None,
        documents: Documents | None = None,
    ) -> Tensor:
        """Token ids [B, T] -> final normed hidden states [B, T, D]; unchecked, for callers that made the ids.

        documents  without a cache: rows hold several documents, which do not see each other
        """
        if positions is None and documents is not None:
            positions = documents.positions_BT
        if positions is None:
            start, count = 0 if cache is None else cache.length, token_ids_BT.shape[1]
            positions = torch.arange(start, start + count, device=token_ids_BT.device).expand_as(token_ids_BT)
        rotation = rotations(self.inverse_frequencies(), positions, rotation_scale(self.config))
        x_BTD = self.model.embed_tokens(token_ids_BT)
        return self.model(x_BTD, rotation, positions, cache, experts, watch, documents)

    def logits(self, x_BTD: Tensor) -> Tensor:
        """Normed hidden states -> float32 logits."""
        if self.lm_head is None:
            return F.linear(x_BTD, self.model.embed_tokens.weight).float()
        return self.lm_head(x_BTD).float()

    def new_cache(self, batch: int = 1, capacity: int | None = None) -> LatentCache:
        """An empty latent cache in the model's dtype, by default for the whole declared context."""
        return LatentCache(self.config, batch, capacity or self.config.max_position_embeddings, self.device, self.dtype)

    def inverse_frequencies(self) -> Tensor:
        """RoPE's angle per position [P] on the model's device; float32 whatever the model's dtype is."""
        if self._inverse_frequencies is None or self._inverse_frequencies.device != self.device:
            self._inverse_frequencies = inverse_frequencies(self.config).to(self.device)
        return self._inverse_frequencies

    def _check(self, token_ids_BT: Tensor, positions: Tensor | None) -> None:
        if token_ids_BT.ndim != 2 or token_ids_BT.numel() == 0:
            raise InputError(
                f"Token ids have shape {tuple(token_ids_BT.shape)}.", "Give [batch, tokens], neither empty."
            )
        if token_ids_BT.dtype not in (torch.int64, torch.int32):
            raise InputError(f"Token ids are {token_ids_BT.dtype}.", "Give integers: torch.long.")
        low, high = int(token_ids_BT.min()), int(token_ids_BT.max())
        if low < 0 or high >= self.config.vocab_size:
            bad = low if low < 0 else high
            raise InputError(
                f"Token id {bad} is outside the vocabulary of {self.config.vocab_size}.",
                "Use the tokenizer that came with this checkpoint.",
            )
        if positions is not None and positions.shape != token_ids_BT.shape:
            raise InputError(
                f"Positions {tuple(positions.shape)} do not match token ids {tuple(token_ids_BT.shape)}.",
                "Give one position for each id.",
            )
        if positions is not None and int(positions.min()) < 0:
            raise InputError(f"Position {int(positions.min())} is before the first.", "Positions count from 0.")
