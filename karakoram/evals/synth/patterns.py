"""Every tensor of a synthetic model as a pattern: weight[o, i] = rows[o] · columns[i] · chance, and what is no chance.

Chance has standard deviation 1. Patterns say how large weights are, so that each projection has the output that
`stream.py` promises; `chance.py` fills them. Columns are alike within a group of 32, as int4 needs it. In a matrix
with `constant`, the first 32 columns hold that number instead: they meet the stream's constant (or the constant part
of the query's latent), which makes an output without chance.

Legend: D hidden, F dimensions of the fast part, I inner width, H heads, N nope, R rope, V value, L latent.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from karakoram.checkpoint import names
from karakoram.config import ModelConfig
from karakoram.evals.synth.recency import CONTENT_SCORE, Recency, recencies
from karakoram.evals.synth.routing import TARGET, Routing, Statistics, solve
from karakoram.evals.synth.stream import CONSTANT, CONSTANT_VALUE, Stream, stream_of
from karakoram.model.rope import softmax_scale

SILU_POWER = 0.3558  # E[silu(z)²] for a standard normal z; times E[u²] = 1 that of SwiGLU's inner numbers
LOGIT = 3.0  # standard deviation of the logits: lively, and no token far ahead
SPECIAL_LOGIT = 0.5  # times that for special tokens: greedy text does not end by itself
SLOW_LOGIT = 0.3  # times that from slow dimensions: the context tells which token follows a token
INNER_SLOW = 0.2  # of a feed-forward's weights on slow dimensions. With 1 fast dimensions become slow layer by layer,
# means over the past larger, and repetition rises from 33 to 43 % over 13 layers of the tests' small shape (measured)
EMBEDDED_SLOW = 0.05  # of an embedding's slow dimensions, where a fast one has 1
LEAK = 0.02  # of attention's output in the fast dimensions, where a slow one has 1


@dataclass(frozen=True)
class Pattern:
    """Of a matrix [out, in]: float32 `rows` [out], `columns` [in], `constant` [out] or None."""

    rows: Tensor
    columns: Tensor
    constant: Tensor | None = None


class Patterns:
    """The patterns of one configuration, by canonical name."""

    def __init__(self, config: ModelConfig, target: Statistics = TARGET) -> None:
        self.config = config
        self.routing: Routing = solve(config.n_routed_experts, config.num_experts_per_tok, target)
        self.stream: Stream = stream_of(config, self.routing.layer)
        self.recencies: list[Recency] = recencies(config)
        self.first_special = config.bos_token_id if config.bos_token_id is not None else config.vocab_size

    def matrix(self, name: str, shape: tuple[int, int]) -> Pattern:
        """The pattern of a matrix: a projection, a table or a router's weight."""
        layer = names.layer_of(name)
        if layer is None:
            return self._embedding(shape) if name == names.TABLES[0] else self._head(shape)
        part = name.removeprefix(f"model.layers.{layer}.").removesuffix(".weight")
        if part.startswith("self_attn."):
            return getattr(self, f"_{part.removeprefix('self_attn.')}")(layer, shape)
        if part == "mlp.gate":
            return self._router(layer, shape)
        return self._down(layer, part, shape) if part.endswith("down_proj") else self._inner(layer, shape)

    def blocks(self, constant: float, slow: float, fast: float) -> Tensor:
        """One number for each block of the hidden dimensions: float32 [D]."""
        s = self.stream
        return torch.cat([torch.full((n,), v) for n, v in ((CONSTANT, constant), (s.slow, slow), (s.fast, fast))])

    def slow_share(self) -> float:
        """Of the variance of a router's scores, what slow dimensions give."""
        means = sum(recency.correlation for recency in self.recencies) / len(self.recencies)
        return min(self.routing.token / means, 1.0)

    def _embedding(self, shape: tuple[int, int]) -> Pattern:
        return Pattern(torch.ones(shape[0]), self.blocks(0, EMBEDDED_SLOW, 1), torch.full(shape[:1], CONSTANT_VALUE))

    def _head(self, shape: tuple[int, int]) -> Pattern:
        rows = torch.full(shape[:1], LOGIT / math.sqrt(self.stream.fast))
        rows[self.first_special :] *= SPECIAL_LOGIT
        return Pattern(rows, self.blocks(0, SLOW_LOGIT * math.sqrt(self.stream.fast / self.stream.slow), 1))

    def _router(self, layer: int, shape: tuple[int, int]) -> Pattern:
        """Rows whose scores have variance 1, `slow_share` of it from slow dimensions."""
        s, slow = self.stream, self.slow_share()
        size = s.rms_behind(layer) / math.sqrt(s.variance(layer))
        parts = size * math.sqrt(slow / s.slow), size * math.sqrt((1 - slow) / s.fast)
        return Pattern(torch.ones(shape[0]), self.blocks(0, *parts))

    # ------------------------------------------------------------------------------------------ feed-forward layers

    def _inner(self, layer: int, shape: tuple[int, int]) -> Pattern:
        """gate_proj and up_proj: outputs of variance 1."""
        s = self.stream
        size = s.rms_behind(layer) / math.sqrt(s.variance(layer) * (INNER_SLOW**2 * s.slow + s.fast))
        return Pattern(torch.full(shape[:1], size), self.blocks(0, INNER_SLOW, 1))

    def _down(self, layer: int, part: str, shape: tuple[int, int]) -> Pattern:
        """down_proj: δ of the stream's variance, half of it by routed experts where there are others; fast rows only.

        K experts of equal weights scaling / K add scaling² / K times the variance of one.
        """
        c, s = self.config, self.stream
        variance = s.growth * s.variance(layer) / (shape[1] * SILU_POWER)
        if part.startswith("mlp.experts."):
            weights = c.num_experts_per_tok if not c.norm_topk_prob else 1 / c.num_experts_per_tok
            variance /= c.routed_scaling_factor**2 * weights
        if part != "mlp.down_proj" and c.n_shared_experts:
            variance /= 2
        return Pattern(self.blocks(0, 0, math.sqrt(variance)), torch.ones(shape[1]))

    # ---------------------------------------------------------------------------------------------------- attention

    def _from_fast(self, layer: int) -> float:
        """The size of weights on fast dimensions, in front of attention, that gives outputs of variance 1."""
        s = self.stream
        return s.rms_before(layer) / math.sqrt(s.variance(layer) * s.fast)

    def _from_constant(self, layer: int) -> float:
        """The number on the constant's dimensions that gives the output 1."""
        return self.stream.rms_before(layer) / (CONSTANT * CONSTANT_VALUE)

    def _kv_a_proj_with_mqa(self, layer: int, shape: tuple[int, int]) -> Pattern:
        """A latent of the fast dimensions; in every rotary pair the key (1, 0)."""
        latent = self.config.kv_lora_rank
        rows, constant = torch.zeros(shape[0]), torch.zeros(shape[0])
        rows[:latent] = self._from_fast(layer)
        constant[latent::2] = self._from_constant(layer)
        return Pattern(rows, self.blocks(0, 0, 1), constant)

    def _kv_b_proj(self, layer: int, shape: tuple[int, int]) -> Pattern:
        return Pattern(torch.full(shape[:1], shape[1] ** -0.5), torch.ones(shape[1]))

    def _queries(self) -> tuple[Tensor, Tensor]:
        """What queries shall be: the size of their chance [H·(N + R)], 0 in rope, and what is constant, 0 in nope."""
        c = self.config
        size_Hx = torch.zeros(c.num_attention_heads, c.qk_nope_head_dim + c.qk_rope_head_dim)
        constant_Hx = torch.zeros_like(size_Hx)
        size_Hx[:, : c.qk_nope_head_dim] = CONTENT_SCORE / (softmax_scale(c) * math.sqrt(c.qk_nope_head_dim))
        for head in range(c.num_attention_heads):
            constant_Hx[head, c.qk_nope_head_dim :: 2] = self.recencies[head % len(self.recencies)].query_P
        return size_Hx.flatten(), constant_Hx.flatten()

    def _q_proj(self, layer: int, shape: tuple[int, int]) -> Pattern:
        size, constant = self._queries()
        return Pattern(size * self._from_fast(layer), self.blocks(0, 0, 1), constant * self._from_constant(layer))

    def _q_a_proj(self, layer: int, shape: tuple[int, int]) -> Pattern:
        """A latent whose first 32 numbers are 1 and whose others are chance of variance 1: its norm changes nothing."""
        rows, constant = torch.full(shape[:1], self._from_fast(layer)), torch.zeros(shape[0])
        rows[:CONSTANT], constant[:CONSTANT] = 0, self._from_constant(layer)
        return Pattern(rows, self.blocks(0, 0, 1), constant)

    def _q_b_proj(self, layer: int, shape: tuple[int, int]) -> Pattern:
        size, constant = self._queries()
        columns = torch.ones(shape[1])
        columns[:CONSTANT] = 0
        return Pattern(size * (shape[1] - CONSTANT) ** -0.5, columns, constant / CONSTANT)

    def _o_proj(self, layer: int, shape: tuple[int, int]) -> Pattern:
        """Means over n tokens have variance 1 / n; written to the slow dimensions so that they grow as promised."""
        c, s = self.config, self.stream
        tokens_H = torch.tensor([self.recencies[h % len(self.recencies)].tokens for h in range(c.num_attention_heads)])
        columns = (tokens_H / shape[1]).sqrt().repeat_interleave(c.v_head_dim)
        size = math.sqrt(s.variance(layer) - s.slow_before(layer))
        return Pattern(self.blocks(0, size, LEAK * size), columns)
