"""`k2 plan`'s report: budgets, placement, speeds, the limit, and what would help; one JSON-ready dictionary.

Every name is part of the interface: other programs read them.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from karakoram.engine.expert_store.budget import CACHE_TOKENS, GB, PROCESS_BYTES, Budget, budget_from, keys_bytes
from karakoram.evals.plan.hits import Hits
from karakoram.evals.plan.predict import Placement, Predictor, Times
from karakoram.evals.plan.rates import Card, Rates
from karakoram.evals.plan.workload import Workload

VERSION = 1
GIB = 1 << 30
PROMPT_TOKENS = 512  # of `prefill`
FIRST_TOKENS = (16, 512)  # of `first_token_s`
DECODED_AFTER = 512  # tokens of context, where nobody says how many
CARD_SHARE, CARD_SPARE_BYTES = 0.95, GB // 2  # of a card's memory for experts, less the driver's context
MORE_RAM_BYTES, ANOTHER_CARD_BYTES = 32 * GB, 24 * GB
LEAST_GAIN = 0.02  # what helps less is not said
# A card that nobody has measured, by an RTX 4090's 1,008 GB/s: torch reads int4, writes bf16 and reads that again,
# eight bytes of traffic to a byte of int4; PCIe 4.0 x16
TYPICAL_CARD = Card(read_bytes_per_s=0.12e12, transfer_bytes_per_s=20e9, call_s=1e-4)
_LIMITS = {"disk": "the disk", "memory": "processor and memory", "card": "the card"}


@dataclass(frozen=True)
class Means:
    """What a model may use, in bytes. expert_bytes: of the experts in RAM alone, within ram_bytes."""

    ram_bytes: int
    vram_bytes: int = 0
    expert_bytes: int | None = None
    cache_tokens: int = CACHE_TOKENS
    context: int = DECODED_AFTER


def budget(load: Workload, means: Means) -> Budget:
    """As the store's own (`engine/expert_store/budget.py`)."""
    others = load.weights_bytes + keys_bytes(load.config) + PROCESS_BYTES
    return budget_from(load.config, load, means.ram_bytes, others, means.expert_bytes, means.cache_tokens)


def place(load: Workload, means: Means) -> Placement:
    """As many experts on the card as fit, then in RAM. Raises InputError with the least budget for too little."""
    found = budget(load, means)
    if not load.experts:
        return Placement(0, 0, 0)
    on_card = (
        max(0, int(CARD_SHARE * means.vram_bytes) - CARD_SPARE_BYTES) // load.slot_bytes if means.vram_bytes else 0
    )
    on_card = min(on_card, load.experts)
    in_ram = min(found.slots(), load.experts - on_card)
    return Placement(on_card, in_ram, load.experts - on_card - in_ram, means.expert_bytes is not None)


def report(load: Workload, rates: Rates, hits: Hits, means: Means, notes: tuple[str, ...] = ()) -> dict[str, Any]:
    """The plan. Raises InputError for a budget that the model cannot run in."""
    if means.vram_bytes and rates.card is None:
        rates = replace(rates, card=TYPICAL_CARD)
        notes = (*notes, "no card was measured: one like an RTX 4090 is assumed")
    predictor, where = Predictor(load, rates, hits), place(load, means)
    decode = predictor.decode(where, means.context)
    prompt = predictor.prompt(where, PROMPT_TOKENS, cold=False)
    c = load.config
    return {
        "version": VERSION,
        "model": load.name,
        "expert_format": load.kind,
        "expert_bytes": load.record_bytes,
        "budget": {
            "ram_bytes": means.ram_bytes,
            "vram_bytes": means.vram_bytes,
            "least_ram_bytes": budget(load, means).least_bytes,
            "cache_tokens": means.cache_tokens,
        },
        "placement": {
            "on_card": where.on_card,
            "in_ram": where.in_ram,
            "on_disk": where.on_disk,
            "all_in_memory_ram_bytes": budget(load, means).fixed_bytes + load.experts * load.slot_bytes,
        },
        "hit_rate": {"card": predictor.shares(where)[0], "ram": predictor.shares(where)[1], "source": hits.source},
        "decode": {"context": means.context, "tokens_per_s": 1 / decode.seconds, **_times(decode)},
        "prefill": {"tokens": PROMPT_TOKENS, "tokens_per_s": PROMPT_TOKENS / prompt.seconds, **_times(prompt)},
        "first_token_s": {str(n): predictor.prompt(where, n, cold=True).seconds for n in FIRST_TOKENS},
        "limit": decode.limit,
        "helps": _helps(load, rates, hits, means, 1 / decode.seconds),
        "machine": rates.to_dict(load.record_bytes, 6 * c.hidden_size * c.moe_intermediate_size),
        "assumptions": [*_assumptions(load, hits, where), *notes],
    }


def _times(times: Times) -> dict[str, Any]:
    """Where the time goes; the five add up, `read_s` is how long the disk is busy."""
    return {
        "disk_s": times.disk_s,
        "experts_s": times.experts_s,
        "others_s": times.others_s,
        "layers_s": times.layers_s,
        "card_s": times.card_s,
        "read_s": times.read_s,
    }


def _helps(load: Workload, rates: Rates, hits: Hits, means: Means, now: float) -> list[dict[str, Any]]:
    """Decoded tokens/s with more of one thing, what helps most first; nothing that does not."""

    def speed(rates: Rates, means: Means) -> float:
        return 1 / Predictor(load, rates, hits).decode(place(load, means), means.context).seconds

    more_ram = replace(
        means,
        ram_bytes=means.ram_bytes + MORE_RAM_BYTES,
        expert_bytes=None if means.expert_bytes is None else means.expert_bytes + MORE_RAM_BYTES,
    )
    carded = rates if rates.card is not None else replace(rates, card=TYPICAL_CARD)
    card = replace(means, vram_bytes=means.vram_bytes + ANOTHER_CARD_BYTES)
    tries: list[tuple[str, str, Callable[[], float]]] = [
        ("ram", f"+{MORE_RAM_BYTES // GB} GB RAM", lambda: speed(rates, more_ram)),
        ("disk", "a disk twice as fast", lambda: speed(rates.with_disk(2), means)),
        ("memory", "processor and memory twice as fast", lambda: speed(rates.with_memory(2), means)),
        ("card", f"a card with {ANOTHER_CARD_BYTES // GB} GB for experts", lambda: speed(carded, card)),
    ]
    found = [{"what": what, "description": words, "tokens_per_s": run()} for what, words, run in tries]
    found.sort(key=lambda one: -one["tokens_per_s"])
    return [one for one in found if one["tokens_per_s"] > (1 + LEAST_GAIN) * now]


def _assumptions(load: Workload, hits: Hits, where: Placement) -> list[str]:
    found = ["one sequence at a time, nothing else on this machine; drawing tokens from logits is not counted"]
    if where.fed:
        found.append(f"experts found in memory: {hits.source}")
        found.append("memory has seen some hundred tokens; prefetching neither helps nor costs")
    else:
        found.append("all is in memory, but timed expert by expert, as a store computes: without one it is faster")
    if where.on_card:
        found.append("the card keeps the most wanted experts and computes them itself, beside the processor")
    if load.room_bytes:
        found.append("experts are read in place, from the checkpoint's shards; `k2 pack` makes it faster")
    return found


def line(plan: dict[str, Any]) -> str:
    """The plan in one line, for who starts a model."""
    first = plan["first_token_s"][str(FIRST_TOKENS[0])]
    text = f"plan: {plan['decode']['tokens_per_s']:.2g} tok/s, first token {first:.2g} s, limited by {limit(plan)}"
    if plan["helps"]:
        best = plan["helps"][0]
        text += f" ({best['description']}: {best['tokens_per_s']:.2g} tok/s)"
    return text


def limit(plan: dict[str, Any]) -> str:
    """The limiting resource in words."""
    return _LIMITS[plan["limit"]]
