"""`k2 bench moe`: the routed experts of one layer, in int4, at a given shape and number of tokens.

Few tokens are bound by reading weights, many by multiplying; so every row tells both: bytes of the distinct experts
that the calls visited over the read bandwidth, and products over torch's bf16 matmul on as many rows as an expert gets
in the mean (tokens · K / experts rows, gate and up side by side), measured right after.

Calls walk through at least `ROTATED_BYTES` of weights, several sets of experts where one is smaller, so that none finds
its weights in a cache. One token walks through the experts in turn; more are routed at random, from one set to the
next.

Legend: T tokens, D hidden, I expert width, E experts, K experts per token.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from karakoram.errors import InputError
from karakoram.evals.bench import memory
from karakoram.evals.bench.clock import BUDGET_S, Timing, median_seconds
from karakoram.evals.bench.moe_error import FOLLOWED, Followed, follow, relative_error
from karakoram.evals.bench.report import Say, bracketed, silent
from karakoram.evals.bench.threads import implementation_of
from karakoram.kernels import ops
from karakoram.kernels.packed import PANEL, PackedExperts, PackedMatrix, empty_experts, packed_bytes, record_bytes

ROTATED_BYTES = 600_000_000  # more than the last cache of nearly every processor
ROUTES = 8  # different routings of several tokens
ERROR_LIMIT = 1.5  # times the error of torch's own bf16 chain
NOTE = (
    "GB/s: bytes of the distinct experts that a call visits, in the mean, over the median time. TFLOPS: 6·D·I·T·K."
    " matmul_share: of torch's bf16 matmul at M = T·K / experts, K = hidden, N = 2·intermediate."
    f" Errors: max|Δ| / max|exact|, exact in float64, of at most {FOLLOWED} tokens a row, Gaussian activations and with"
    " 1 % of the channels × 50, the worse; torch_bf16_error is of the same tokens."
)


@dataclass(frozen=True)
class Shape:
    """A layer of experts: sizes in numbers."""

    hidden: int
    intermediate: int
    experts: int
    top_k: int

    def check(self) -> None:
        """Raises InputError for a shape that no int4 layer has."""
        if self.hidden % 32 or self.intermediate % 32 or min(self.hidden, self.intermediate) < 32:
            raise InputError(
                f"hidden {self.hidden} and intermediate {self.intermediate} do not fit int4.",
                "Both are multiples of 32.",
            )
        if not 1 <= self.top_k <= self.experts:
            raise InputError(f"{self.top_k} of {self.experts} experts cannot be chosen.", "Lower --top-k.")

    @property
    def expert_bytes(self) -> int:
        """Of one expert's weights, scales included."""
        return record_bytes(self.hidden, self.intermediate)


@dataclass(frozen=True)
class MoeRow:
    """One number of tokens."""

    tokens: int
    timing: Timing
    weight_bytes: float  # of a call's distinct experts, in the mean
    flops: int
    matmul: memory.Matmul
    error: float
    torch_error: float

    @property
    def problem(self) -> str | None:
        """Tells an error over the limit."""
        if self.error <= ERROR_LIMIT * self.torch_error:
            return None
        return (
            f"At {self.tokens} tokens the error is {self.error:.2e}, more than {ERROR_LIMIT} times that of torch's bf16"
            f" arithmetic, {self.torch_error:.2e}."
        )

    def to_dict(self, read_gb_per_s: float) -> dict[str, Any]:
        """JSON-ready."""
        seconds = self.timing.seconds
        gb_per_s, tflops = self.weight_bytes / seconds / 1e9, self.flops / seconds / 1e12
        return {
            "tokens": self.tokens,
            "ms_median": 1e3 * seconds,
            "gb_per_s": gb_per_s,
            "read_share": gb_per_s / read_gb_per_s,
            "tflops": tflops,
            "matmul_share": tflops / self.matmul.tflops,
            "max_rel_error": self.error,
            "torch_bf16_error": self.torch_error,
            "calls": self.timing.calls,
            "weight_bytes": self.weight_bytes,
            "matmul": {"m": self.matmul.m, "k": self.matmul.k, "n": self.matmul.n, "tflops": self.matmul.tflops},
        }


# ------------------------------------------------------------------------------------------------ weights and routes


def build_sets(shape: Shape, draw: torch.Generator) -> list[PackedExperts]:
    """Sets of experts that take `ROTATED_BYTES` or more. Raises InputError where memory is too short for them.

    One expert is drawn and packed; the others are its panels of outputs in another order: other weights, at the speed
    of copying. The later sets are copies of the first.
    """
    count = -(-ROTATED_BYTES // (shape.experts * shape.expert_bytes))
    memory.require(count * shape.experts * shape.expert_bytes, "The experts", "Lower --experts.")
    room = empty_experts(count * shape.experts, shape.hidden, shape.intermediate)
    sets = [
        PackedExperts(room.records[at : at + shape.experts], shape.hidden, shape.intermediate)
        for at in range(0, count * shape.experts, shape.experts)
    ]
    first = sets[0].parts(0)
    for part in first:
        _fill(part, draw)
    for expert in range(1, shape.experts):
        for source, target in zip(first, sets[0].parts(expert)):
            panels = source.data.view(-1, packed_bytes("int4", PANEL, source.inputs))
            target.data.view(panels.shape).copy_(panels.roll(expert, 0))
    for copy in sets[1:]:
        copy.records.copy_(sets[0].records)
    return sets


def _fill(part: PackedMatrix, draw: torch.Generator) -> None:
    """Uniform codes, scales such that outputs are about as large as inputs."""
    codes = torch.randint(-(2**31), 2**31, (part.outputs, part.inputs // 8), generator=draw).to(torch.int32)
    deviation = (sum(code * code for code in range(-8, 8)) / 16) ** 0.5  # of a code
    scale = (0.5 + torch.rand(part.outputs, part.inputs // 32, generator=draw)) / (deviation * part.inputs**0.5)
    ops.pack_int4(codes, scale.bfloat16(), out=part.data)


def routes(shape: Shape, tokens: int, draw: torch.Generator) -> list[Tensor]:
    """int64 [T, K] for successive calls: one token takes the next K experts, more are routed at random."""
    if tokens == 1:
        turns = range(-(-shape.experts // shape.top_k))
        return [(turn * shape.top_k + torch.arange(shape.top_k))[None] % shape.experts for turn in turns]
    return [torch.rand(tokens, shape.experts, generator=draw).argsort(-1)[:, : shape.top_k] for _ in range(ROUTES)]


# ------------------------------------------------------------------------------------------------ measuring


@dataclass
class MoeBench:
    """What all rows share; made once, for a fixed seed always the same."""

    shape: Shape
    threads: int
    implementation: str
    budget_s: float = BUDGET_S
    draw: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    def __post_init__(self) -> None:
        self.sets = build_sets(self.shape, self.draw)
        turns = torch.arange(FOLLOWED)[:, None] + torch.arange(self.shape.top_k)
        self.followed_ids = turns % self.shape.top_k
        self.followed_weights = self._weights(FOLLOWED)
        self.followed = follow(self.sets[0], self.followed_ids, self.followed_weights, self.draw)

    def row(self, tokens: int) -> MoeRow:
        """Time one number of tokens, then torch's matmul at the rows of an expert, then the errors."""
        shape = self.shape
        # of a token: x and the result, and for each expert its inputs, inner values and partial result, float32
        token_bytes = 4 * shape.hidden + shape.top_k * (8 * shape.hidden + 4 * shape.intermediate)
        memory.require(tokens * token_bytes, f"{tokens} tokens", "Lower --tokens.")
        ids, weights = routes(shape, tokens, self.draw), self._weights(tokens)
        x = torch.randn(tokens, shape.hidden, generator=self.draw).bfloat16()

        def call(number: int) -> Tensor:
            # one token visits every expert of a set before it goes to the next set
            turn = number // len(ids) if tokens == 1 else number
            experts = self.sets[turn % len(self.sets)]
            return self._run(x, ids[number % len(ids)], weights, experts)

        timing = median_seconds(call, self.budget_s)
        visited = [ids[number % len(ids)].unique().numel() for number in timing.numbers]
        matmul = memory.matmul(
            max(1, round(tokens * shape.top_k / shape.experts)),
            shape.hidden,
            2 * shape.intermediate,
            self.threads,
            self.budget_s / 2,
        )
        error, torch_error = self.errors(tokens)
        return MoeRow(
            tokens,
            timing,
            shape.expert_bytes * sum(visited) / len(visited),
            6 * shape.hidden * shape.intermediate * tokens * shape.top_k,
            matmul,
            error,
            torch_error,
        )

    def errors(self, tokens: int) -> tuple[float, float]:
        """Ours and torch's, the worse of the two kinds of activations, in a call of so many tokens."""
        count = min(tokens, FOLLOWED)
        places = torch.linspace(0, tokens - 1, count).long()
        ids = routes(self.shape, max(2, tokens), self.draw)[0][:tokens].clone()
        weights = self._weights(tokens)
        ids[places], weights[places] = self.followed_ids[:count], self.followed_weights[:count]
        pairs = [self._error_of(kind, places, ids, weights) for kind in self.followed]
        return max(ours for ours, _ in pairs), max(theirs for _, theirs in pairs)

    def _error_of(self, kind: Followed, places: Tensor, ids: Tensor, weights: Tensor) -> tuple[float, float]:
        count = len(places)
        x = torch.randn(len(ids), self.shape.hidden, generator=self.draw).bfloat16()
        x[places] = kind.x_FD[:count]
        found = self._run(x, ids, weights, self.sets[0])[places]
        exact = kind.exact_FD[:count]
        return relative_error(found, exact), relative_error(kind.torch_FD[:count], exact)

    def _weights(self, tokens: int) -> Tensor:
        weights = torch.rand(tokens, self.shape.top_k, generator=self.draw) + 0.1
        return weights / weights.sum(-1, keepdim=True)

    def _run(self, x: Tensor, ids: Tensor, weights: Tensor, experts: PackedExperts) -> Tensor:
        return ops.moe_int4(x, ids, weights, experts, implementation=self.implementation)


def moe_bench(
    shape: Shape,
    tokens: Sequence[int],
    threads: int,
    isa: str | None = None,
    say: Say = silent,
    budget_s: float = BUDGET_S,
) -> dict[str, Any]:
    """The report: a row for every number of tokens. `budget_s` is about what each spends on its calls.

    Raises InputError for an impossible shape, number of tokens, threads or instruction set.
    """
    shape.check()
    if not tokens or min(tokens) < 1:
        raise InputError(f"{list(tokens)} tokens cannot be run.", "Give numbers of 1 or more.")

    def rows(name: str, notes: list[str]) -> list[MoeRow]:
        say("packing experts, exact results")
        bench = MoeBench(shape, threads, implementation_of(name), budget_s)
        total = len(bench.sets) * shape.experts * shape.expert_bytes
        notes.append(NOTE)
        notes.append(f"Calls rotate over {total:,} bytes: {len(bench.sets)} sets of {shape.experts} experts.")
        return _each(tokens, bench.row, say)

    return bracketed(isa, threads, rows, say)


def _each(tokens: Sequence[int], row: Callable[[int], MoeRow], say: Say) -> list[MoeRow]:
    found = []
    for number in tokens:
        say(f"{number} tokens")
        found.append(row(number))
    return found
