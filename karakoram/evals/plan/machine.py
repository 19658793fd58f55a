"""What was measured on this machine, kept from one run to the next in the user's cache folder.

One file per machine: processor, cores, memory, kernels, torch and card, all of which must be as they were. In it,
numbers by what was measured: a shape of experts, a width, a disk and a size of records. What is missing is measured
and added. A file that is damaged, or of another machine, counts as none; one that cannot be written costs the next run
its time and nothing else.
"""

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from karakoram import env
from karakoram.checkpoint.experts import ExpertSource
from karakoram.config import ModelConfig
from karakoram.errors import InputError
from karakoram.evals.plan import disk, kernels
from karakoram.evals.plan.hits import TYPICAL, Hits, typical_hits
from karakoram.evals.plan.rates import Card, Curve, Rates
from karakoram.evals.plan.workload import Workload
from karakoram.kernels import ops
from karakoram.kernels.packed import LAYOUT_VERSION, Kind

VERSION = 1
_MOST_FILE_BYTES = 4 << 20
# What is kept, by the first word of its key; `CURVES` are lists of pairs, all else single numbers.
NAMES = {
    "memory": {"one_bytes_per_s", "all_bytes_per_s", "matmul_flops_per_s"},
    "layers": {"whole", "fed"},
    "experts": {"curve"},
    "linear": {"curve"},
    "attention": {"decode", "prefill"},
    "disk": {"bursts", "depths"},
    "card": {"read_bytes_per_s", "transfer_bytes_per_s", "call_s"},
    "routing": {"hit", "distinct"},
}
CURVES = {"curve", "bursts", "depths", "hit", "distinct"}
DEFAULT_LAYER_S = (4e-5, 5e-4)  # whole, fed: where no bundled model is there to be timed; as measured on 2 cores
Say = Callable[[str], None]
Measured = dict[str, Any]  # of one key: numbers, or lists of pairs of numbers, by name


def identity() -> dict[str, Any]:
    """What makes this machine this machine."""
    cpu, library = env.processor(), ops.chosen()
    if library is None:
        raise InputError("A plan needs the CPU kernels, which are not here.", "`k2 doctor` says how to get them.")
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "processor": cpu.model, "architecture": cpu.architecture, "cores": cpu.cores,
        "features": sorted(cpu.features), "memory_bytes": env.memory().total_bytes, "torch": torch.__version__,
        "isa": library.isa, "threads": library.threads, "layout": LAYOUT_VERSION, "card": card,
    }  # fmt: skip


def disk_name(path: Path) -> str:
    """The disk that holds, or would hold, `path`: its device and size."""
    place = next((p for p in (path, *path.parents) if p.exists()), Path("/"))
    found = env.disk(place)
    return f"{os.stat(place).st_dev}:{found.total_bytes if found else 0}"


class Kept:
    """The file. `note` says why it could not be written, else None."""

    def __init__(self, folder: Path | None = None) -> None:
        self.identity = identity()
        digest = hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()[:16]
        self.path = (folder or env.cache_dir() / "plan") / f"{digest}.json"
        self.note: str | None = None
        self._measured: dict[str, Measured] = self._read()

    def get(self, key: str) -> Measured | None:
        """What is kept under this key."""
        return self._measured.get(key)

    def ask(self, key: str, measure: Callable[[], Measured], again: bool = False) -> Measured:
        """What is kept, else what `measure` finds, kept from now on."""
        found = None if again else self.get(key)
        if found is None:
            found = measure()
            self._measured[key] = found
            self._write()
        return found

    def _read(self) -> dict[str, Measured]:
        try:
            if self.path.stat().st_size > _MOST_FILE_BYTES:
                return {}
            raw = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return {}
        if not isinstance(raw, dict) or raw.get("version") != VERSION or raw.get("identity") != self.identity:
            return {}
        found = raw.get("measured")
        if not isinstance(found, dict):
            return {}
        return {key: value for key, value in found.items() if _is_measured(key, value)}

    def _write(self) -> None:
        text = json.dumps({"version": VERSION, "identity": self.identity, "measured": self._measured}, indent=1)
        name = None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            descriptor, name = tempfile.mkstemp(prefix=self.path.name, dir=self.path.parent)
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(text)
            os.replace(name, self.path)
        except OSError as error:
            self.note = f"what was measured is not kept: {self.path.parent}: {error.strerror or error}"
            if name is not None:
                with suppress(OSError):
                    os.unlink(name)


def _is_measured(key: str, value: object) -> bool:
    """Whether these are the names that such a key has, with positive finite numbers or lists of pairs of them."""
    if not isinstance(value, dict) or value.keys() != NAMES.get(key.split(" ")[0]):
        return False
    return all(_is_pairs(found) if name in CURVES else _is_number(found) for name, found in value.items())


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0


def _is_pairs(value: object) -> bool:
    if not isinstance(value, list) or not value:
        return False
    pairs = [pair for pair in value if isinstance(pair, list) and len(pair) == 2 and all(map(_is_number, pair))]
    return len(pairs) == len(value) and all(a[0] < b[0] for a, b in zip(pairs, pairs[1:]))


# ------------------------------------------------------------------------------------------------ what is measured


def rates(kept: Kept, load: Workload, place: Path, source: ExpertSource | None, again: bool, say: Say) -> Rates:
    """Of this machine, for this model, reading experts from `source` or else from a file on the disk of `place`.

    Measures what is not kept, or everything `again`. Raises InputError where the disk or memory is too full for it.
    """
    found: dict[str, Measured] = {}
    for key, what, measure in _measurements(load, place, source):
        if again or kept.get(key) is None:
            say(what)
        found[key] = kept.ask(key, measure, again)
    return _rates(found, load, place, kept.identity["threads"])


def kept_rates(kept: Kept, load: Workload, place: Path) -> Rates | None:
    """As `rates`, without measuring anything: None where something is missing."""
    found = {key: kept.get(key) for key, _, _ in _measurements(load, place, None)}
    present = {key: value for key, value in found.items() if value is not None}
    return _rates(present, load, place, kept.identity["threads"]) if len(present) == len(found) else None


def hits_key(c: ModelConfig) -> str:
    """Of typical routing."""
    return f"routing {c.n_routed_experts}/{c.num_experts_per_tok}"


def hits(kept: Kept, c: ModelConfig, say: Say) -> Hits:
    """Of typical routing. Kept like a measurement: it takes some seconds, and is always the same."""
    if kept.get(hits_key(c)) is None:
        say("typical routing, replayed")
    return _to_hits(kept.ask(hits_key(c), lambda: _of_hits(typical_hits(c.n_routed_experts, c.num_experts_per_tok))))


def kept_hits(kept: Kept, c: ModelConfig) -> Hits | None:
    """As `hits`, where it is kept."""
    found = kept.get(hits_key(c))
    return None if found is None else _to_hits(found)


def _of_hits(found: Hits) -> Measured:
    return {"hit": [list(pair) for pair in found.hit if min(pair) > 0], "distinct": [list(p) for p in found.distinct]}


def _to_hits(found: Mapping[str, Any]) -> Hits:
    hit = ((0.0, 0.0), *((x, y) for x, y in found["hit"]))
    return Hits(hit, tuple((x, y) for x, y in found["distinct"]), TYPICAL)


def _kinds(load: Workload) -> list[Kind]:
    """Formats of everything but routed experts."""
    return sorted({*load.decode, *load.prefill, load.shared[0], load.head[0]})


def _keys(load: Workload, place: Path) -> dict[str, str]:
    c = load.config
    how = "in place" if load.room_bytes else "records"
    return {
        "expert": f"experts {load.kind} {c.hidden_size}x{c.moe_intermediate_size} k{c.num_experts_per_tok}",
        "attention": f"attention {c.num_attention_heads} {c.kv_lora_rank}+{c.qk_rope_head_dim}"
        f" {c.qk_nope_head_dim} {c.v_head_dim}",
        "disk": f"disk {disk_name(place)} {how} {load.slot_bytes}",
        **{kind: f"linear {kind} {c.hidden_size}" for kind in _kinds(load)},
    }


def _measurements(
    load: Workload, place: Path, source: ExpertSource | None
) -> list[tuple[str, str, Callable[[], Measured]]]:
    """(key, what is said while it is measured, how)."""
    c, keys = load.config, _keys(load, place)
    threads = ops.chosen().threads if ops.chosen() is not None else 1  # type: ignore[union-attr]

    def linear(kind: Kind) -> Callable[[], Measured]:
        return lambda: {"curve": _pairs(kernels.linear_seconds(c.hidden_size, kind))}

    found: list[tuple[str, str, Callable[[], Measured]]] = [
        ("memory", "reading memory, multiplying", lambda: asdict(kernels.memory_rates(threads))),
        ("layers", "layers of the bundled model", _layers),
        (keys["expert"], "experts", lambda: {"curve": _pairs(kernels.expert_seconds(c, load.kind))}),
        (keys["attention"], "attention", lambda: dict(zip(("decode", "prefill"), kernels.attention_seconds(c)))),
        (keys["disk"], "reading from disk", lambda: _read_disk(load, place, source)),
    ]
    found += [(keys[kind], f"{kind} matrices", linear(kind)) for kind in _kinds(load)]
    if torch.cuda.is_available():
        found.append(("card", "the card", lambda: asdict(kernels.card_rates())))
    return found


def _layers() -> Measured:
    return dict(zip(("whole", "fed"), kernels.layer_seconds() or DEFAULT_LAYER_S))


def _read_disk(load: Workload, place: Path, source: ExpertSource | None) -> Measured:
    if source is None:
        with disk.temporary_records(place, load.record_bytes) as written:
            return _read_disk(load, place, written)
    meanwhile = kernels.token_of_experts(load.config, load.kind)
    bursts = disk.burst_seconds(source, meanwhile)
    return {"bursts": _pairs(bursts), "depths": _pairs(disk.depth_bytes_per_s(source))}


def _pairs(points: list[tuple[float, float]]) -> list[list[float]]:
    return [list(pair) for pair in points]


def _rates(found: Mapping[str, Measured], load: Workload, place: Path, threads: int) -> Rates:
    keys = _keys(load, place)
    memory, layers, attention = found["memory"], found["layers"], found[keys["attention"]]
    card = found.get("card")
    return Rates(
        expert=Curve.of(found[keys["expert"]]["curve"]),
        linear={kind: Curve.of(found[keys[kind]]["curve"]) for kind in _kinds(load)},
        reads=Curve.of(found[keys["disk"]]["bursts"]),
        decode_pair_s=attention["decode"],
        prefill_pair_s=attention["prefill"],
        whole_layer_s=layers["whole"],
        fed_layer_s=layers["fed"],
        memory_bytes_per_s=memory["all_bytes_per_s"],
        one_thread_bytes_per_s=memory["one_bytes_per_s"],
        matmul_flops_per_s=memory["matmul_flops_per_s"],
        threads=threads,
        depths=tuple((x, y) for x, y in found[keys["disk"]]["depths"]),
        card=None if card is None else Card(**card),
    )
