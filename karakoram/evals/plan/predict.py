"""The time of a token and of a prompt.

A decoded token, fed by a store, takes for each layer with a mixture

    max(reading m missing experts, and computing one when the last is there;  computing all K and the shared ones)

in the mean over m (binomial: K demands, each missing with the curve's chance), and beside that, for nothing waits for
the disk there, all other weights, attention to the context, the head, and what a layer costs whatever its size.
Experts on a card are computed there at the same time. In a prompt of T tokens each expert is read once a pass and
serves several rows; the head runs once.

Why a mean over m and not the time of the mean: two layers in three may miss nothing and wait for no disk, the third
misses two; max() of the mean would let computing hide what it cannot.

Legend: K experts a token visits in a layer, T tokens of a pass.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from karakoram.engine.expert_store.budget import PASS_TOKENS
from karakoram.evals.plan.hits import Hits
from karakoram.evals.plan.rates import Rates
from karakoram.evals.plan.workload import Workload
from karakoram.kernels.packed import Kind

Limit = Literal["disk", "memory", "card"]


@dataclass(frozen=True)
class Placement:
    """How many experts are where, the most wanted ones nearest. stored: a store feeds the model even if all fit."""

    on_card: int
    in_ram: int
    on_disk: int
    stored: bool = False

    @property
    def fed(self) -> bool:
        """Whether a store feeds the model; without one, all layers run in one call."""
        return self.stored or self.on_disk + self.on_card > 0


@dataclass(frozen=True)
class Times:
    """Seconds of one token or prompt. `disk_s`: waited for with nothing to compute; the four add up."""

    disk_s: float
    experts_s: float  # routed and shared
    others_s: float  # all other weights, head and attention
    layers_s: float  # what layers cost beside their weights
    card_s: float = 0.0  # waited for
    read_s: float = 0.0  # the disk is busy, waited for or not

    @property
    def seconds(self) -> float:
        """All of it."""
        return self.disk_s + self.experts_s + self.others_s + self.layers_s + self.card_s

    @property
    def limit(self) -> Limit:
        """What takes most: the disk, the card, or processor and memory."""
        here = self.experts_s + self.others_s + self.layers_s
        return max((("memory", here), ("disk", self.disk_s), ("card", self.card_s)), key=lambda pair: pair[1])[0]  # type: ignore[return-value]


@dataclass(frozen=True)
class Predictor:
    """One model on one machine."""

    load: Workload
    rates: Rates
    hits: Hits

    def decode(self, placement: Placement, context: int) -> Times:
        """One token after `context` others, with a memory that has seen many tokens."""
        c, load = self.load.config, self.load
        card, ram = self.shares(placement)
        others = self._weights(load.decode, 1) + self._head() + self._attention(context)
        disk = experts = waited = read = 0.0
        for on_card, missing, chance in _draws(c.num_experts_per_tok, card, 1 - card - ram):
            one = self._layer(c.num_experts_per_tok - on_card, on_card, missing, 1.0, 1)
            experts += chance * one.experts_s
            disk, waited, read = disk + chance * one.disk_s, waited + chance * one.card_s, read + chance * one.read_s
        n = c.num_moe_layers
        return Times(n * disk, n * experts, others, self._beside(placement), n * waited, n * read)

    def prompt(self, placement: Placement, tokens: int, cold: bool) -> Times:
        """A prompt's passes and its first token's logits. cold: a store has nothing in memory yet."""
        total, before = Times(0, 0, self._head(), 0), 0
        while tokens > 0:
            part = min(tokens, PASS_TOKENS)
            one = self._pass(placement, part, before, cold and before == 0)
            total = Times(*(getattr(total, name) + getattr(one, name) for name in _FIELDS))
            tokens, before = tokens - part, before + part
        return total

    def _pass(self, placement: Placement, tokens: int, before: int, cold: bool) -> Times:
        c, n = self.load.config, self.load.config.num_moe_layers
        visited = self.hits.visited(tokens) * c.n_routed_experts
        rows = tokens * c.num_experts_per_tok / visited if visited else 0.0
        pairs = c.num_hidden_layers * c.num_attention_heads * tokens * (before + tokens / 2)
        others = self._weights(self.load.prefill, tokens) + pairs * self.rates.prefill_pair_s
        on_card = 0.0 if not self.load.experts else visited * placement.on_card / self.load.experts
        if not placement.fed:
            missing = 0.0
        elif cold:
            missing = visited - on_card
        else:
            missing = max(0.0, visited - c.n_routed_experts * (1 - placement.on_disk / self.load.experts))
        one = self._layer(visited - on_card, on_card, missing, rows, tokens)
        return Times(n * one.disk_s, n * one.experts_s, others, self._beside(placement), n * one.card_s, n * one.read_s)

    def _layer(self, here: float, on_card: float, missing: float, rows: float, tokens: int) -> Times:
        """One layer's mixture: experts computed here (the missing ones among them) and on the card, `rows` each."""
        each = self.rates.expert.at(rows)
        kind, weights = self.load.shared
        computing = here * each + weights * self.rates.linear[kind].at(tokens)
        reading = self.rates.reads.at(missing)
        arrived = reading + min(missing, 1.0) * each
        there = 0.0
        if on_card > 0 and self.rates.card is not None:
            there = self.rates.card.call_s + on_card * self.load.record_bytes / self.rates.card.read_bytes_per_s
        waits = max(0.0, arrived - computing)
        return Times(waits, computing, 0, 0, max(0.0, there - max(computing, arrived)), reading)

    def shares(self, placement: Placement) -> tuple[float, float]:
        """Chances that an expert is found on the card, and in RAM."""
        total = self.load.experts
        if not total or not placement.fed:
            return 0.0, 1.0
        card = self.hits.rate(placement.on_card / total)
        return card, max(0.0, self.hits.rate((placement.on_card + placement.in_ram) / total) - card)

    def _weights(self, weights: Mapping[Kind, int], rows: int) -> float:
        return sum(count * self.rates.linear[kind].at(rows) for kind, count in weights.items())

    def _head(self) -> float:
        kind, count = self.load.head
        return count * self.rates.linear[kind].at(1)

    def _attention(self, context: int) -> float:
        c = self.load.config
        return c.num_hidden_layers * c.num_attention_heads * context * self.rates.decode_pair_s

    def _beside(self, placement: Placement) -> float:
        each = self.rates.fed_layer_s if placement.fed else self.rates.whole_layer_s
        return self.load.config.num_hidden_layers * each


_FIELDS = ("disk_s", "experts_s", "others_s", "layers_s", "card_s", "read_s")


def _draws(count: int, card: float, disk: float) -> list[tuple[int, int, float]]:
    """(on the card, missing, chance) of `count` demands, each on the card, missing, or in RAM by itself."""
    found = []
    ram = max(0.0, 1 - card - disk)
    for a in range(count + 1):
        for b in range(count + 1 - a):
            ways = math.comb(count, a) * math.comb(count - a, b)
            chance = ways * card**a * max(0.0, disk) ** b * ram ** (count - a - b)
            if chance > 0:
                found.append((a, b, chance))
    return found
