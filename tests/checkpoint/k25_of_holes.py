"""A directory with the true names, shapes and dtypes of Kimi-K2.5: 208,550 tensors, 595 GB, all of it holes.

A script too: `python tests/checkpoint/k25_of_holes.py DIRECTORY`. Shards follow the release: one per layer and the rest
at the end, 64 files. Every file is extended with `truncate`, so the directory takes 52 MB of disk.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

from karakoram.checkpoint.names import expected_tensors, is_routed_expert, layer_of
from karakoram.checkpoint.safetensors import header_of
from karakoram.config import PRESETS, ModelConfig

TENSORS = 208_550
Entry = tuple[str, str, tuple[int, ...]]


def text_entries() -> Iterator[tuple[int | None, Entry]]:
    """(layer, entry) for every tensor of the text model."""
    for name, shape, _ in expected_tensors(ModelConfig.preset("k2.5")):
        stored = "language_model." + name
        if is_routed_expert(name):
            rows, columns = shape
            yield layer_of(name), (stored + "_packed", "I32", (rows, columns // 8))
            yield layer_of(name), (stored + "_scale", "BF16", (rows, columns // 32))
            yield layer_of(name), (stored + "_shape", "I32", (2,))
        else:
            yield layer_of(name), (stored, "F32" if name.endswith("_bias") else "BF16", shape)


def vision_entries() -> Iterator[Entry]:
    """The projector and the image tower, as K2.5 stores them."""

    def pair(name: str, shape: tuple[int, ...], bias: int) -> Iterator[Entry]:
        yield name + ".weight", "BF16", shape
        yield name + ".bias", "BF16", (bias,)

    yield from pair("mm_projector.pre_norm", (1152,), 1152)
    yield from pair("mm_projector.proj.0", (4608, 4608), 4608)
    yield from pair("mm_projector.proj.2", (7168, 4608), 7168)
    yield from pair("vision_tower.patch_embed.proj", (1152, 3, 14, 14), 1152)
    yield "vision_tower.patch_embed.pos_emb.weight", "BF16", (64, 64, 1152)
    for block in range(27):
        prefix = f"vision_tower.encoder.blocks.{block}."
        for norm in ("norm0", "norm1"):
            yield from pair(prefix + norm, (1152,), 1152)
        yield from pair(prefix + "wqkv", (3456, 1152), 3456)
        yield from pair(prefix + "wo", (1152, 1152), 1152)
        yield from pair(prefix + "mlp.fc0", (4304, 1152), 4304)
        yield from pair(prefix + "mlp.fc1", (1152, 4304), 1152)
    yield from pair("vision_tower.encoder.final_layernorm", (1152,), 1152)


def write(directory: Path) -> int:
    """Write the directory; returns the bytes its files claim to have."""
    shards: dict[int, list[Entry]] = {number: [] for number in range(1, 65)}
    for layer, entry in text_entries():
        shards[62 if layer is None else layer + 1].append(entry)
    vision = list(vision_entries())
    shards[63] = [entry for entry in vision if entry[0].startswith("mm_projector")]
    shards[64] = [entry for entry in vision if entry[0].startswith("vision_tower")]
    directory.mkdir(parents=True, exist_ok=True)
    weight_map: dict[str, str] = {}
    total = 0
    for number, entries in shards.items():
        name = f"model-{number:05d}-of-000064.safetensors"
        weight_map.update((entry[0], name) for entry in entries)
        total += _write_holes(directory / name, entries)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    (directory / "config.json").write_text(json.dumps(PRESETS["k2.5"]))
    return total


def _write_holes(path: Path, entries: list[Entry]) -> int:
    header = header_of(entries)
    data_bytes = json.loads(header[8:])[entries[-1][0]]["data_offsets"][1]
    with open(path, "wb") as file:
        file.write(header)
        file.truncate(len(header) + data_bytes)
    return data_bytes


if __name__ == "__main__":
    print(f"{write(Path(sys.argv[1])):,} bytes of holes")
