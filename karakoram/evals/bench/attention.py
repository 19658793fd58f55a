"""`k2 bench attention`: one decoding step of absorbed latent attention, for a context and a batch.

A step reads every cached token of every sequence once, latent and rope key, and multiplies it with all heads' queries:
2 · heads · (latent + rope) FLOPs a token for the scores, 2 · heads · latent for the sums. With K2's 64 heads that is
121 FLOPs for every byte read, near where reading and multiplying take equally long; so the limit is a roofline:
whichever of the two takes longer, bytes at the read bandwidth or FLOPs at the rate of torch's bf16 matmul with 64 rows.

Calls walk through at least `ROTATED_BYTES` of caches, so that none finds its own in a cache of the processor.

Legend: B sequences, S tokens of context, H heads, x = latent + rope.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from karakoram import env
from karakoram.errors import InputError
from karakoram.evals.bench import memory
from karakoram.evals.bench.clock import BUDGET_S, Timing, median_seconds
from karakoram.evals.bench.moe_error import relative_error
from karakoram.evals.bench.report import Say, bracketed, silent
from karakoram.evals.bench.threads import implementation_of
from karakoram.kernels import ops

LATENT, ROPE = 512, 64
WIDTH = LATENT + ROPE
SCALE = (128 + 64) ** -0.5  # of K2's queries before they are absorbed: 128 without rope, 64 with
TOKEN_BYTES = 2 * WIDTH
ROTATED_BYTES = 1 << 30
CHECKED_TOKENS = 8192  # of context against float64
DRAWN_TOKENS = 8191  # different rows in the caches; drawing all would take longer than measuring
MATMUL = (64, WIDTH, 4096)  # M, K, N of the rate: 4,096 tokens' scores for 64 heads
NOTE = (
    f"GB/s: {TOKEN_BYTES} bytes for every cached token. TFLOPS: 2 · heads · context · batch · ({WIDTH} + {LATENT})."
    f" matmul_share: of torch's bf16 matmul at M, K, N = {MATMUL}. roofline_share: of the longer of reading"
    f" and multiplying. max_rel_error: max|Δ| / max|exact|, exact in float64, of one sequence,"
    f" of at most {CHECKED_TOKENS:,} tokens."
)


@dataclass(frozen=True)
class AttentionRow:
    """One context and batch."""

    context: int
    batch: int
    timing: Timing
    flops: int
    matmul: memory.Matmul
    error: float

    problem = None  # no limit is promised

    def to_dict(self, read_gb_per_s: float) -> dict[str, Any]:
        """JSON-ready."""
        seconds, cache_bytes = self.timing.seconds, self.context * self.batch * TOKEN_BYTES
        gb_per_s, tflops = cache_bytes / seconds / 1e9, self.flops / seconds / 1e12
        read_share, matmul_share = gb_per_s / read_gb_per_s, tflops / self.matmul.tflops
        return {
            "context": self.context,
            "batch": self.batch,
            "ms_median": 1e3 * seconds,
            "gb_per_s": gb_per_s,
            "read_share": read_share,
            "tflops": tflops,
            "matmul_share": matmul_share,
            "roofline_share": max(read_share, matmul_share),  # the longer time over ours
            "max_rel_error": self.error,
            "calls": self.timing.calls,
            "cache_bytes": cache_bytes,
        }


@dataclass
class AttentionBench:
    """What all rows share: a pool of cached tokens, and how fast torch multiplies."""

    heads: int
    pool: Tensor  # bf16 [tokens, x]
    matmul: memory.Matmul
    implementation: str
    budget_s: float = BUDGET_S
    draw: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(1))

    def row(self, context: int, batch: int) -> AttentionRow:
        """Time one context and batch, then compare with float64."""
        tokens = context * batch
        lengths = torch.full((batch,), context)
        q = torch.randn(batch, self.heads, WIDTH, generator=self.draw).bfloat16()
        places = len(self.pool) // tokens

        def call(number: int) -> Tensor:
            start = number % places * tokens
            return self._run(q, self.pool[start : start + tokens].view(batch, context, WIDTH), lengths)

        timing = median_seconds(call, self.budget_s)
        flops = 2 * self.heads * tokens * (WIDTH + LATENT)
        return AttentionRow(context, batch, timing, flops, self.matmul, self._error(q, context, batch))

    def _error(self, q: Tensor, context: int, batch: int) -> float:
        """Of the last sequence, in a call of the whole batch, every sequence cut to `CHECKED_TOKENS`."""
        checked = min(context, CHECKED_TOKENS)
        cache = self.pool[: context * batch].view(batch, context, WIDTH)
        found = self._run(q, cache, torch.full((batch,), checked))[-1]
        rows = cache[-1, :checked].double()
        return relative_error(found, (q[-1].double() @ rows.T * SCALE).softmax(-1) @ rows[:, :LATENT])

    def _run(self, q: Tensor, cache: Tensor, lengths: Tensor) -> Tensor:
        return ops.mla_decode(q, cache, lengths, LATENT, SCALE, implementation=self.implementation)


def build_pool(most_tokens: int, notes: list[str]) -> Tensor:
    """bf16 [tokens, x] of `ROTATED_BYTES`, at least `most_tokens`; less than that many bytes where memory is short.

    Raises InputError where not even the largest row fits.
    """
    wanted, least = -(-ROTATED_BYTES // TOKEN_BYTES), most_tokens
    memory.require(least * TOKEN_BYTES, "The largest caches", "Lower --context or --batch.")
    available = env.memory().available_bytes
    most = wanted if available is None else int(memory.MOST_MEMORY * available) // TOKEN_BYTES
    tokens = max(min(wanted, most), least)
    if tokens < wanted:
        notes.append(f"Memory is short: calls rotate over {tokens * TOKEN_BYTES:,} bytes instead of {ROTATED_BYTES:,}.")
    pool = torch.empty(tokens, WIDTH, dtype=torch.bfloat16)
    drawn = torch.randn(min(tokens, DRAWN_TOKENS), WIDTH, generator=torch.Generator().manual_seed(0)).bfloat16()
    for start in range(0, tokens, len(drawn)):
        part = pool[start : start + len(drawn)]
        part.copy_(drawn[: len(part)])
    return pool


def attention_bench(
    heads: int,
    contexts: Sequence[int],
    batches: Sequence[int],
    threads: int,
    isa: str | None = None,
    say: Say = silent,
    budget_s: float = BUDGET_S,
) -> dict[str, Any]:
    """The report: a row for every context and batch. `budget_s` is about what each spends on its calls.

    Raises InputError for numbers under 1, for caches that do not fit, for threads or an instruction set not there.
    """
    if not contexts or not batches or min(heads, *contexts, *batches) < 1:
        raise InputError("Heads, contexts and batches are numbers of 1 or more.", "See k2 bench attention --help.")

    def rows(name: str, notes: list[str]) -> list[AttentionRow]:
        say("filling caches")
        notes.append(NOTE)
        pool = build_pool(max(contexts) * max(batches), notes)
        say(f"torch bf16 matmul {' × '.join(map(str, MATMUL))}")
        rate = memory.matmul(*MATMUL, threads, budget_s / 2)
        bench = AttentionBench(heads, pool, rate, implementation_of(name), budget_s)
        found = []
        for batch in batches:
            for context in contexts:
                say(f"context {context}, batch {batch}")
                found.append(bench.row(context, batch))
        return found

    return bracketed(isa, threads, rows, say)
