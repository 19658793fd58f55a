"""Machines described by a few numbers, for plans that must not depend on the one that runs the tests."""

from collections import Counter
from collections.abc import Callable

import pytest

from karakoram.evals.plan import disk, kernels, machine
from karakoram.evals.plan.hits import Hits
from karakoram.evals.plan.kernels import Memory
from karakoram.evals.plan.rates import Card, Curve, Rates
from karakoram.evals.plan.workload import Workload
from karakoram.kernels.packed import BLOCK_BYTES, Kind

# Kimi-Linear with a policy like the store's (docs/expert-plan.md), and what a few tokens visit together
PUBLISHED = Hits(
    ((0.0, 0.0), (0.03, 0.13), (0.06, 0.40), (0.12, 0.62), (0.24, 0.85), (0.48, 0.94), (1.0, 1.0)),
    ((1.0, 0.02), (16.0, 0.15), (512.0, 0.9)),
    "published",
)
CARD = Card(read_bytes_per_s=500e9, transfer_bytes_per_s=25e9, call_s=50e-6)


def described(
    load: Workload, disk_bytes_per_s: float = 5e9, memory_bytes_per_s: float = 60e9, flops_per_s: float = 1e12
) -> Rates:
    """A machine whose kernels reach these rates, whichever takes longer; a read takes 100 µs more."""
    c = load.config
    expert_flops = 6 * c.hidden_size * c.moe_intermediate_size

    def seconds(nbytes: float, flops: float) -> float:
        return max(nbytes / memory_bytes_per_s, flops / flops_per_s)

    def weight(kind: Kind, rows: int) -> float:
        return seconds(BLOCK_BYTES[kind] / 1024, 2 * rows)

    kinds: tuple[Kind, ...] = ("bf16", "fp8", "int4")
    return Rates(
        expert=Curve.of([(n, seconds(load.record_bytes, n * expert_flops)) for n in (1, 4, 16, 64)]),
        linear={kind: Curve.of([(n, weight(kind, n)) for n in (1, 16, 512)]) for kind in kinds},
        reads=Curve.of([(n, 1e-4 + n * load.record_bytes / disk_bytes_per_s) for n in (1, 2, 4, 8, 32)]),
        decode_pair_s=1e-9,
        prefill_pair_s=1e-9,
        whole_layer_s=2e-5,
        fed_layer_s=1e-4,
        memory_bytes_per_s=memory_bytes_per_s,
        one_thread_bytes_per_s=memory_bytes_per_s / 4,
        matmul_flops_per_s=flops_per_s,
        threads=16,
        card=CARD,
    )


Counted = Counter[str]


def at_once(monkeypatch: pytest.MonkeyPatch) -> Counted:
    """From here on every measurement gives a number at once, and is counted."""
    counted: Counted = Counter()

    def counting(name: str, result: object) -> Callable[..., object]:
        def measure(*_: object) -> object:
            counted[name] += 1
            return result

        return measure

    curve = [(1.0, 1e-3), (4.0, 2e-3)]
    for module, name, result in (
        (kernels, "memory_rates", Memory(1e10, 2e10, 1e12)),
        (kernels, "expert_seconds", curve),
        (kernels, "token_of_experts", lambda: None),
        (kernels, "linear_seconds", [(1.0, 1e-10), (512.0, 1e-9)]),
        (kernels, "attention_seconds", (1e-9, 2e-9)),
        (kernels, "layer_seconds", None),
        (disk, "burst_seconds", curve),
        (disk, "depth_bytes_per_s", [(1.0, 1e9), (4.0, 3e9)]),
    ):
        monkeypatch.setattr(module, name, counting(name, result))
    monkeypatch.setattr(machine, "typical_hits", counting("typical_hits", PUBLISHED))
    monkeypatch.setattr(disk, "FILE_BYTES", 1 << 20)
    return counted
