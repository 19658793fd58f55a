"""How much memory the experts may have: what the process may use, less everything else that it needs.

    budget = all other weights + interpreter and libraries + cache of latents + one pass's activations + experts

Everything else is estimated before loading, so that too small a budget is refused at once, and measured after it: what
is left then belongs to the experts. While the model runs, the store compares the process with the budget at every pass
and gives slots back where it has grown.
"""

from dataclasses import dataclass
from typing import Protocol

from karakoram.checkpoint import Checkpoint
from karakoram.checkpoint.experts import ExpertSource
from karakoram.config import ModelConfig
from karakoram.env import memory, resident_bytes
from karakoram.errors import InputError
from karakoram.model.cost import kv_bytes_per_token
from karakoram.model.load import stored_bytes

GB = 10**9
SPARE_BYTES = GB // 2  # beyond what is counted: allocators, the interpreter's growth, answers
AUTO_SHARE = 0.9  # of what is free, where nobody says how much
PROCESS_BYTES = 400 << 20  # interpreter, torch and what it loads: 330 to 390 MB here
PASS_TOKENS = 1024  # of one pass: `generate`'s; the engine's have half as many
CACHE_TOKENS = 8192  # of the latent cache, where nobody says how many


class Geometry(Protocol):
    """Of the experts' source."""

    @property
    def slot_bytes(self) -> int: ...
    @property
    def room_bytes(self) -> int: ...


@dataclass(frozen=True)
class Budget:
    """Bytes of one process. `least_bytes`: what a budget must have for the model to run at all."""

    total_bytes: int
    others_bytes: int  # weights that are not routed experts, and the process without any
    cache_bytes: int
    pass_bytes: int
    slot_bytes: int
    chosen: int  # experts a token visits in a layer

    @property
    def least_bytes(self) -> int:
        """Everything but routed experts, one layer's experts for a token, and half a gigabyte."""
        return self.fixed_bytes + self.chosen * self.slot_bytes

    @property
    def fixed_bytes(self) -> int:
        """What the experts cannot have."""
        return self.others_bytes + self.cache_bytes + self.pass_bytes + SPARE_BYTES

    def holds(self, experts: int) -> bool:
        """Whether so many experts fit."""
        return self.total_bytes - self.fixed_bytes >= experts * self.slot_bytes

    def slots(self) -> int:
        """Experts that fit. Raises InputError with the least budget where not even one layer's do."""
        if self.total_bytes < self.least_bytes:
            raise InputError(
                f"A budget of {_gb(self.total_bytes)} is too small for this model: it needs "
                f"{_gb(self.others_bytes)} beside its routed experts, {_gb(self.cache_bytes + self.pass_bytes)} for "
                f"cache and activations, {_gb(self.chosen * self.slot_bytes)} for one layer's experts, and "
                f"{_gb(SPARE_BYTES)} to spare.",
                f"Give at least --ram {self.least_bytes / (1 << 30):.2f}GiB.",
            )
        return (self.total_bytes - self.fixed_bytes) // self.slot_bytes


def budget_of(
    checkpoint: Checkpoint,
    source: ExpertSource,
    ram_bytes: int | None = None,
    expert_bytes: int | None = None,
    cache_tokens: int = CACHE_TOKENS,
    pass_tokens: int = PASS_TOKENS,
    others_bytes: int | None = None,
) -> Budget:
    """The budget of a model that is fed from this source.

    ram_bytes bounds the process; None: nine tenths of what is free. expert_bytes bounds the experts alone, within it.
    others_bytes: measured after loading, where it is known.
    """
    c = checkpoint.config
    free = memory().available_bytes
    here = resident_bytes() or PROCESS_BYTES
    most = None if free is None else free + here
    if ram_bytes is None:
        if most is None:
            raise InputError("This system does not tell how much memory is free.", "Give --ram SIZE.")
        ram_bytes = int(AUTO_SHARE * most)
    elif most is not None and ram_bytes > most:
        raise InputError(
            f"--ram {_gb(ram_bytes)} is more than this process can have: {_gb(most)}.", "Give less, or leave it out."
        )
    if others_bytes is None:
        others_bytes = stored_bytes(checkpoint, routed_experts=False) + keys_bytes(c) + max(here, PROCESS_BYTES)
    return budget_from(c, source, ram_bytes, others_bytes, expert_bytes, cache_tokens, pass_tokens)


def budget_from(
    c: ModelConfig,
    source: Geometry,
    ram_bytes: int,
    others_bytes: int,
    expert_bytes: int | None = None,
    cache_tokens: int = CACHE_TOKENS,
    pass_tokens: int = PASS_TOKENS,
) -> Budget:
    """The budget by numbers alone: no file is read and no machine is asked (`k2 plan` of a preset)."""
    found = Budget(
        ram_bytes,
        others_bytes,
        kv_bytes_per_token(c) * min(cache_tokens, c.max_position_embeddings),
        pass_bytes(c, pass_tokens) + 4 * source.room_bytes,
        source.slot_bytes,
        c.num_experts_per_tok,
    )
    if expert_bytes is None:
        return found
    return Budget(
        min(ram_bytes, found.fixed_bytes + expert_bytes), found.others_bytes, found.cache_bytes, found.pass_bytes,
        found.slot_bytes, found.chosen,
    )  # fmt: skip


def keys_bytes(c: ModelConfig) -> int:
    """The transposed key halves of kv_b that absorbed attention keeps beside it, bf16."""
    return c.num_hidden_layers * c.num_attention_heads * c.kv_lora_rank * c.qk_nope_head_dim * 2


def pass_bytes(c: ModelConfig, tokens: int) -> int:
    """The largest layer of a pass of `tokens`: inputs and inner rows (4 bytes at most) and float32 partials a slot,
    queries and attention, and the residual stream several times over."""
    slots = tokens * c.num_experts_per_tok
    experts = slots * (8 * c.hidden_size + 4 * c.moe_intermediate_size)
    heads = c.num_attention_heads * (c.qk_nope_head_dim + c.qk_rope_head_dim + c.v_head_dim)
    return experts + tokens * (4 * heads + 16 * c.hidden_size)


def _gb(count: int) -> str:
    return f"{count / GB:,.2f} GB"
