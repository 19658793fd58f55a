"""One checkpoint: every tensor under its canonical name, read one at a time, checked against the configuration.

Opening reads headers only: for K2.5 that is 64 files, 208,550 tensors, and 595 GB that stay untouched. The headers are
the truth; `model.safetensors.index.json` says which files belong to the checkpoint, and each of its claims is verified.
How a weight is stored is seen from its tensors, weight by weight, so formats may be mixed:
  X.weight                                           bf16, fp16 or fp32, as it is
  X.weight + X.weight_scale_inv                      fp8 in blocks
  X.weight_packed + X.weight_scale + X.weight_shape  int4 in groups
Routed experts may lie in one file of records instead (`experts/`): they look like the tensors it was made from.
"""

import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from karakoram.checkpoint import hf, names
from karakoram.checkpoint.experts.layout import FILE_NAME
from karakoram.checkpoint.experts.records import PackedTensors
from karakoram.checkpoint.safetensors import TensorEntry, read_header, read_tensor
from karakoram.config import ModelConfig, load_json_object
from karakoram.errors import CheckpointError, FormatError, InputError
from karakoram.formats import fp8_block, int4_group

INDEX_NAME = "model.safetensors.index.json"
MAX_INDEX_BYTES = 1 << 28  # K2.5's index has 30 MB
SHOWN = 5  # how many names of each kind an error lists

_FLOATS = {"BF16": "bf16", "F16": "fp16", "F32": "fp32"}
_PACKED_PARTS = ("weight_packed", "weight_scale", "weight_shape")


class Checkpoint:
    """An opened checkpoint. Holds names and offsets, no file handle and no tensor.

    `tensors`   what the text model is made of, as stored, under canonical names
    `vision`, `mtp`, `ignored`   what was set aside, under stored names: image tower and projector; layers of
                multi-token prediction; stale buffers, and the head of a model whose head is its embedding
    `files`     the safetensors files, in order
    `packed`    the file of packed experts, where there is one: its tensors are among `tensors`, like those of shards
    """

    def __init__(self, directory: Path, config: ModelConfig, raw_config: dict[str, Any], files: list[Path]) -> None:
        self.dir = directory
        self.config = config
        self.raw_config = raw_config
        self.files = files
        self.tensors: dict[str, TensorEntry] = {}
        self.vision: dict[str, TensorEntry] = {}
        self.mtp: dict[str, TensorEntry] = {}
        self.ignored: dict[str, TensorEntry] = {}
        self.packed: PackedTensors | None = None

    def read(self, name: str) -> Tensor:
        """The tensor of that canonical name exactly as stored: packed words, fp8 codes or scales included."""
        return read_tensor(self._entry(name))

    def read_weight(self, name: str, dtype: torch.dtype) -> Tensor:
        """A tensor of the model as numbers: whatever the format it is stored in, dense and in `dtype`."""
        kind = self.format_of(name)
        try:
            if kind == "int4":
                stem = name.removesuffix("weight")
                packed, scale, shape = (self.read(stem + part) for part in _PACKED_PARTS)
                _check_stated_shape(shape.tolist(), [packed.shape[0], scale.shape[-1] * int4_group.GROUP])
                return int4_group.dequantize(packed, scale, dtype)
            if kind == "fp8":
                return fp8_block.dequantize(self.read(name), self.read(name + "_scale_inv"), dtype)
        except FormatError as error:
            raise FormatError(f"{name} in {self.dir}: {error.what}", error.fix) from error
        return self.read(name).to(dtype)

    def expert(self, layer: int, expert: int, projection: str, dtype: torch.dtype) -> Tensor:
        """One projection ('gate_proj', 'up_proj', 'down_proj') of one routed expert, dense [out, in]."""
        if projection not in names.PROJECTIONS:
            raise InputError(
                f"there is no projection {projection!r}.", f"Choose one of {', '.join(names.PROJECTIONS)}."
            )
        return self.read_weight(names.expert_weight(layer, expert, projection), dtype)

    def format_of(self, name: str) -> str:
        """How `name` (a canonical name as the model knows it) is stored: 'bf16', 'fp16', 'fp32', 'fp8' or 'int4'."""
        if name.endswith(".weight") and f"{name}_packed" in self.tensors:
            return "int4"
        entry = self._entry(name)
        if entry.dtype == "F8_E4M3":
            return "fp8"
        if entry.dtype not in _FLOATS:
            raise CheckpointError(f"{name} is stored as {entry.dtype}.", "Weights are bf16, fp16, fp32, fp8 or int4.")
        return _FLOATS[entry.dtype]

    def check(self) -> None:
        """Every tensor of the model is there, in the right shape and dtype, and nothing else; else CheckpointError."""
        problems, known = _compare(self.tensors, names.expected_tensors(self.config))
        problems["unexpected"] = [name for name in self.tensors if name not in known]
        if not any(problems.values()):
            return
        total = sum(len(found) for found in problems.values())
        lines = [f"{len(found)} {kind}: {_first(found)}" for kind, found in problems.items() if found]
        fix = "Download the missing shards again, or check that config.json belongs to these tensors."
        if any(name.endswith("mlp.experts.gate_up_proj") for name in problems["unexpected"]):
            fix = "These experts are fused in memory layout: save the model again with transformers' save_pretrained."
        raise CheckpointError(
            f"{self.dir} does not hold the model of its config.json ({total}): {'; '.join(lines)}.", fix
        )

    @property
    def notes(self) -> tuple[str, ...]:
        """What was set aside, in words; empty where every tensor is used."""
        kinds = (
            (self.vision, "vision tensors set aside"),
            (self.mtp, "tensors of multi-token-prediction layers ignored"),
            (self.ignored, "stale or redundant tensors ignored"),
        )
        return tuple(f"{len(found)} {what} ({next(iter(found))} …)" for found, what in kinds if found)

    def _entry(self, name: str) -> TensorEntry:
        try:
            return self.tensors[name]
        except KeyError:
            raise CheckpointError(f"{self.dir} has no tensor {name}.", "`k2 inspect` lists what is missing.") from None

    def _add(self, entry: TensorEntry) -> None:
        stored = entry.stored_name
        name = names.canonical_name(stored)
        if names.is_vision(stored):
            place = self.vision
        elif names.is_stale_buffer(name) or (name.startswith("lm_head.weight") and self.config.tie_word_embeddings):
            place = self.ignored
        elif (names.layer_of(name) or 0) >= self.config.num_hidden_layers:
            place = self.mtp
        else:
            place, stored = self.tensors, name
        if stored in place:
            raise CheckpointError(
                f"{stored} is stored twice: in {place[stored].file} and in {entry.file}.",
                "Keep one of them; a directory holds one checkpoint.",
            )
        place[stored] = entry


def open_checkpoint(
    path_or_hub_id: str | Path, allow_config_keys: Collection[str] = (), revision: str | None = None
) -> Checkpoint:
    """Open a directory, or download a hub id first. Reads config.json and headers; `check()` compares the two."""
    directory = hf.resolve(path_or_hub_id, revision)
    claims = _index_claims(directory)  # before config.json: a folder without weights should be told what it lacks
    files = _files(directory, claims)
    raw_config = load_json_object(directory / "config.json")
    checkpoint = Checkpoint(directory, ModelConfig.from_dict(raw_config, allow_config_keys), raw_config, files)
    for file in files:
        for entry in read_header(file):
            claimed = claims.pop(entry.stored_name, None) if claims else None
            if claimed is not None and claimed != file.name:
                raise CheckpointError(
                    f"{directory / INDEX_NAME} places {entry.stored_name} in {claimed}, but it is in {file.name}.",
                    "The index belongs to other files; download both again.",
                )
            checkpoint._add(entry)
    if claims:
        raise CheckpointError(
            f"{directory / INDEX_NAME} names {len(claims)} tensors that its files do not have: {_first(list(claims))}.",
            "The index belongs to other files; download both again.",
        )
    if (directory / FILE_NAME).is_file():
        checkpoint.packed = PackedTensors(directory / FILE_NAME)
        for entry in checkpoint.packed.entries():
            checkpoint._add(entry)
    return checkpoint


def _index_claims(directory: Path) -> dict[str, str]:
    """Tensor name -> file name, from the index; empty where there is none."""
    path = directory / INDEX_NAME
    if not path.is_file():
        return {}
    try:
        if path.stat().st_size > MAX_INDEX_BYTES:
            raise ValueError(f"it has {path.stat().st_size} bytes")
        claims = json.loads(path.read_bytes())["weight_map"]
        if not isinstance(claims, dict) or not claims or not all(type(file) is str for file in claims.values()):
            raise ValueError("weight_map does not map names to files")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} is not a checkpoint index: {error}.", "Download it again.") from error
    return claims


def _files(directory: Path, claims: Mapping[str, str]) -> list[Path]:
    if claims:
        listed = sorted(set(claims.values()))
        outside = [name for name in listed if Path(name).name != name or name in (".", "..") or "\\" in name]
        if outside:
            raise CheckpointError(
                f"{directory / INDEX_NAME} points to {outside[0]!r}.", "Only files beside it are read."
            )
        absent = [name for name in listed if not (directory / name).is_file()]
        if absent:
            raise CheckpointError(
                f"{directory} lacks {len(absent)} of the {len(listed)} files its index names: {_first(absent)}.",
                "Download them again; an interrupted download can be repeated and resumes.",
            )
        return [directory / name for name in listed]
    found = sorted(directory.glob("*.safetensors"))
    single = directory / "model.safetensors"
    if single in found or len(found) == 1:
        return [single if single in found else found[0]]
    if found:
        raise CheckpointError(
            f"{directory} has {len(found)} .safetensors files and no {INDEX_NAME}.", "Download it too."
        )
    pickled = sorted(p.name for p in directory.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt"))
    if pickled:
        raise CheckpointError(
            f"{directory} has no .safetensors files, only {_first(pickled)}, which can run code when opened.",
            "Such files are never read here; convert them to safetensors elsewhere, on a machine you can spare.",
        )
    raise CheckpointError(
        f"{directory} has no .safetensors files.", "A checkpoint is config.json and safetensors files."
    )


def _compare(
    tensors: Mapping[str, TensorEntry], expected: Iterator[names.Expected]
) -> tuple[dict[str, list[str]], set[str]]:
    """Problems by kind, and all stored names that are accounted for."""
    problems: dict[str, list[str]] = {"missing": [], "wrong-shaped": [], "of the wrong dtype": []}
    known: set[str] = set()
    for name, shape, linear in expected:
        quantizable = linear or names.is_table(name)
        parts = _parts(name, shape, tensors) if quantizable else [(name, tuple(_FLOATS), shape)]
        for part, dtypes, part_shape in parts:
            entry = tensors.get(part)
            known.add(part)
            if entry is None:
                problems["missing"].append(part)
            elif entry.shape != part_shape:
                problems["wrong-shaped"].append(f"{part} {list(entry.shape)}, expected {list(part_shape)}")
            elif entry.dtype not in dtypes:
                problems["of the wrong dtype"].append(f"{part} {entry.dtype}, expected {' or '.join(dtypes)}")
    return problems, known


def _parts(
    name: str, shape: tuple[int, ...], tensors: Mapping[str, TensorEntry]
) -> list[tuple[str, tuple[str, ...], tuple[int, ...]]]:
    """The stored tensors of one linear weight [out, in], by the format its tensors show: (name, dtypes, shape)."""
    rows, columns = shape
    if name + "_packed" in tensors:
        words, groups = -(-columns // int4_group.CODES_PER_WORD), -(-columns // int4_group.GROUP)
        return [
            (name + "_packed", ("I32",), (rows, words)),
            (name + "_scale", tuple(_FLOATS), (rows, groups)),
            (name + "_shape", ("I32", "I64"), (2,)),
        ]
    entry = tensors.get(name)
    if entry is not None and (entry.dtype == "F8_E4M3" or name + "_scale_inv" in tensors):
        return [(name, ("F8_E4M3",), shape), (name + "_scale_inv", ("F32",), fp8_block.scale_shape(rows, columns))]
    return [(name, tuple(_FLOATS), shape)]


def _check_stated_shape(stated: list[int], actual: list[int]) -> None:
    """`weight_shape` repeats what the other two tensors imply; [0, 0] (a file of holes) states nothing."""
    if stated not in (actual, [0, 0]):
        raise FormatError(
            f"weight_shape states {stated}, the packed words and scales {actual}.", "The file is damaged."
        )


def _first(found: list[str]) -> str:
    return ", ".join(found[:SHOWN]) + (f" and {len(found) - SHOWN} more" if len(found) > SHOWN else "")
