"""`state.json`: the counters of a run, and what must be found beside it.

    {"format": 1, "tensors": {NAME: [DTYPE, SHAPE]}, "files": {FILE: [BYTES, CRC32]}, "state": {…}}

dtypes by their names in safetensors; files are those in `model/`. Python writes floats so that they are read again bit
for bit. The CRC is against damage, not against malice: what is read is checked as if a stranger had written it.
"""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from karakoram.checkpoint.safetensors import DTYPES, MAX_DIMENSIONS
from karakoram.errors import TrainingError
from karakoram.train.checkpoints.find import STATE_FILE

FORMAT = 1
MAX_STATE_BYTES = 256 << 20  # K2's 190,000 tensors and 2,048 ranks' files take about 60 MB
_FILE_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,200}\.safetensors")

Spec = tuple[str, tuple[int, ...]]
"""(dtype by its name in safetensors, shape) of a whole tensor."""


class Manifest(NamedTuple):
    """What must be found in `model/`: tensors by name, files by name with their bytes and CRC-32."""

    tensors: dict[str, Spec]
    files: dict[str, tuple[int, int]]


def json_of(state: Mapping[str, Any]) -> str:
    """The state as it will stand in the file. Raises TrainingError where a value is none of JSON's."""
    try:
        return json.dumps(state)
    except (TypeError, ValueError) as error:
        raise TrainingError(
            f"The state of the run cannot be saved: {error}.",
            "Keep numbers, texts, lists and objects in it; no tensors.",
        ) from error


def write_state(directory: Path, state_json: str, manifest: Manifest) -> None:
    """Write and flush `state.json`."""
    head = json.dumps({"format": FORMAT, "tensors": manifest.tensors, "files": manifest.files}, separators=(",", ":"))
    with open(directory / STATE_FILE, "w", encoding="utf-8") as file:
        file.write(f'{head[:-1]},\n"state":{state_json}}}\n')
        file.flush()
        os.fsync(file.fileno())


def read_state(path: Path) -> tuple[dict[str, Any], Manifest]:
    """The state and the manifest of a checkpoint. Raises TrainingError where it is damaged or not ours."""
    file = path / STATE_FILE
    try:
        if file.stat().st_size > MAX_STATE_BYTES:
            raise ValueError(f"it has {file.stat().st_size} bytes, more than {MAX_STATE_BYTES}")
        found = json.loads(file.read_bytes())
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            raise ValueError(f"its format is not {FORMAT}")
        tensors, files, state = (found.get(name) for name in ("tensors", "files", "state"))
        if not isinstance(tensors, dict) or not isinstance(files, dict) or not isinstance(state, dict):
            raise ValueError("it lacks tensors, files or state")
        manifest = Manifest(
            {name: _spec(name, claim) for name, claim in tensors.items()},
            {name: _file(name, claim) for name, claim in files.items()},
        )
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise damaged(path, f"{STATE_FILE} cannot be read: {reason}") from error
    return state, manifest


def damaged(path: Path, what: str) -> TrainingError:
    """The error of a checkpoint that cannot be read."""
    return TrainingError(
        f"The checkpoint {path} is damaged: {what}.", f"Remove {path} to resume from the checkpoint before it."
    )


def _spec(name: str, claim: Any) -> Spec:
    if not isinstance(claim, list) or len(claim) != 2 or not isinstance(claim[1], list):
        raise ValueError(f"{name} lacks dtype or shape")
    dtype, shape = claim
    if not isinstance(dtype, str) or dtype not in DTYPES or len(shape) > MAX_DIMENSIONS or not _whole(shape):
        raise ValueError(f"{name} claims dtype {dtype!r}, shape {shape!r}")
    return dtype, tuple(shape)


def _file(name: str, claim: Any) -> tuple[int, int]:
    if _FILE_NAME.fullmatch(name) is None:
        raise ValueError(f"{name!r} is no name of a file in a checkpoint")
    if not isinstance(claim, list) or len(claim) != 2 or not _whole(claim):
        raise ValueError(f"{name} lacks bytes or CRC")
    return claim[0], claim[1]


def _whole(numbers: list[Any]) -> bool:
    return all(type(number) is int and 0 <= number < 2**63 for number in numbers)
