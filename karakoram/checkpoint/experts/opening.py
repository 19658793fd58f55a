"""The source of a checkpoint's experts: its file of records where there is one, else its shards in place."""

from pathlib import Path
from typing import Protocol

from karakoram.checkpoint.experts.direct import Preadv
from karakoram.checkpoint.experts.layout import FILE_NAME, Layout
from karakoram.checkpoint.experts.records import PackedRecords
from karakoram.checkpoint.experts.shards import ShardRecords
from karakoram.checkpoint.experts.source import ExpertSource
from karakoram.checkpoint.safetensors import TensorEntry
from karakoram.config import ModelConfig
from karakoram.errors import CheckpointError


class _Opened(Protocol):
    """An opened checkpoint (`index.Checkpoint`)."""

    @property
    def dir(self) -> Path: ...
    @property
    def config(self) -> ModelConfig: ...
    @property
    def tensors(self) -> dict[str, TensorEntry]: ...


def open_expert_source(checkpoint: _Opened, preadv: Preadv | None = None, direct: bool = True) -> ExpertSource:
    """Open the experts of a checkpoint whose `check()` has passed. Raises CheckpointError for a dense model.

    preadv: who reads, for tests. direct: past the page cache, where the file system can.
    """
    config = checkpoint.config
    if not config.n_routed_experts or config.first_k_dense_replace >= config.num_hidden_layers:
        raise CheckpointError(f"{checkpoint.dir} is a dense model without routed experts.", "Run it as it is.")
    path = checkpoint.dir / FILE_NAME
    if not path.is_file():
        return ShardRecords(checkpoint.tensors, config, preadv, direct)
    source = PackedRecords(path, preadv, direct)
    try:
        check_geometry(path, source.layout, config)
    except CheckpointError:
        source.close()
        raise
    return source


def check_geometry(path: Path, layout: Layout, config: ModelConfig) -> None:
    """Raises CheckpointError where a file holds other experts than the configuration has."""
    layers = tuple(range(config.first_k_dense_replace, config.num_hidden_layers))
    found = layout.layers, layout.experts, layout.hidden, layout.intermediate
    if found != (layers, config.n_routed_experts, config.hidden_size, config.moe_intermediate_size):
        raise CheckpointError(
            f"{path} holds {layout.experts} experts [{layout.hidden}, {layout.intermediate}] in {len(layout.layers)} "
            f"layers, config.json has {config.n_routed_experts} [{config.hidden_size}, "
            f"{config.moe_intermediate_size}] in {len(layers)}.",
            "They belong to different models: pack it again with k2 pack SRC DST.",
        )
