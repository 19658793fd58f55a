"""What a model asks of a machine: how many weights of which format a token multiplies with, and what an expert weighs.

From a configuration alone, or from a checkpoint, whose tensors tell their formats. Sizes are those of the kernels'
layout (`kernels/packed.py`), which is what lies in memory and, packed, on disk.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from karakoram.checkpoint import Checkpoint, names
from karakoram.checkpoint.experts import ExpertSource
from karakoram.checkpoint.experts.direct import up
from karakoram.config import ModelConfig
from karakoram.engine.expert_store.budget import keys_bytes
from karakoram.errors import InputError
from karakoram.kernels.packed import Kind, packed_bytes, record_bytes
from karakoram.model import cost
from karakoram.model.load import stored_bytes

FORMATS = ("bf16", "fp8", "int4", "int4-all")  # what a preset may be planned as


@dataclass(frozen=True)
class Workload:
    """One model.

    decode, prefill   weights that one token multiplies with in all layers, by format, those of routed and shared
                      experts aside; decoding reads the key half of kv_b as the bf16 copy of absorbed attention
    shared            of the shared experts of one layer, which run while routed ones are awaited
    weights_bytes     of everything that is always in memory: all but the routed experts
    room_bytes        beside its slot, of an expert that is being read (0 from packed records)
    """

    name: str
    config: ModelConfig
    kind: Kind
    decode: Mapping[Kind, int]
    prefill: Mapping[Kind, int]
    shared: tuple[Kind, int]
    head: tuple[Kind, int]
    weights_bytes: int
    room_bytes: int = 0

    @property
    def record_bytes(self) -> int:
        """Of one expert."""
        return record_bytes(self.config.hidden_size, self.config.moe_intermediate_size, self.kind)

    @property
    def slot_bytes(self) -> int:
        """Memory for one expert."""
        return up(self.record_bytes)

    @property
    def experts(self) -> int:
        """In all layers."""
        return self.config.num_moe_layers * self.config.n_routed_experts


def of_config(name: str, config: ModelConfig, weight_format: str | None = None) -> Workload:
    """A model that may not be there, in the format it declares or another of `FORMATS`. InputError for no such."""
    stored_as = weight_format or config.weight_format
    if stored_as not in FORMATS:
        raise InputError(f"There is no format {stored_as!r}.", f"Choose one of {', '.join(FORMATS)}.")
    experts: Kind = "int4" if stored_as.startswith("int4") else "fp8" if stored_as == "fp8" else "bf16"
    projections: Kind = "int4" if stored_as == "int4-all" else "fp8" if stored_as == "fp8" else "bf16"
    tables: Kind = "int4" if stored_as == "int4-all" else "bf16"

    def kind_of(component: str) -> Kind:
        return {"routed experts": experts, "router": "bf16", "embedding": tables, "output head": tables}.get(
            component, projections
        )  # type: ignore[return-value]

    total = sum(
        row.count * _bytes_of(row, kind_of) for row in cost.matrices(config) if row.component != "routed experts"
    )
    return _workload(name, config, kind_of, total)


def of_checkpoint(checkpoint: Checkpoint, source: ExpertSource) -> Workload:
    """A model that is there; formats are those of its first layers."""
    c = checkpoint.config
    mixture = f"model.layers.{c.first_k_dense_replace}"
    examples = {
        "attention": f"{mixture}.self_attn.o_proj.weight",
        "shared experts": f"{mixture}.mlp.shared_experts.up_proj.weight",
        "dense layers": "model.layers.0.mlp.up_proj.weight",
        "embedding": names.TABLES[0],
        "output head": names.TABLES[0 if c.tie_word_embeddings else 1],
    }
    found: dict[str, Kind] = {"routed experts": source.kind}

    def kind_of(component: str) -> Kind:
        if component not in found:
            stored = checkpoint.format_of(examples[component]) if component in examples else "bf16"
            found[component] = stored if stored in ("int4", "fp8") else "bf16"
        return found[component]

    return _workload(str(checkpoint.dir), c, kind_of, stored_bytes(checkpoint, routed_experts=False), source.room_bytes)


def _bytes_of(row: cost.Matrix, kind_of: Callable[[str], Kind]) -> int:
    if row.columns == 1:  # norms, biases
        return row.rows * (4 if row.kind == "float32" else 2)
    return packed_bytes(kind_of(row.component), row.rows, row.columns)


def _workload(
    name: str, c: ModelConfig, kind_of: Callable[[str], Kind], weights_bytes: int, room_bytes: int = 0
) -> Workload:
    weights: Counter[Kind] = Counter()
    for row in cost.matrices(c):
        if row.component in ("attention", "dense layers", "router") and row.columns > 1:
            weights[kind_of(row.component)] += row.active_count * row.rows * row.columns
    keys = keys_bytes(c) // 2
    decode = weights.copy()
    decode[kind_of("attention")] -= keys
    decode["bf16"] += keys
    head = kind_of("output head"), c.vocab_size * c.hidden_size
    shared = kind_of("shared experts"), 3 * c.hidden_size * c.n_shared_experts * c.moe_intermediate_size
    return Workload(
        name, c, kind_of("routed experts"), dict(decode), dict(weights), shared, head, weights_bytes, room_bytes
    )
