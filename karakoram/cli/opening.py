"""From what a user types as MODEL to a model, a chat format and sampling defaults.

MODEL is `nano` (the bundled model), a checkpoint directory, or a Hugging Face id `owner/name`.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from karakoram.config import PRESETS
from karakoram.env import bundled_model_dir
from karakoram.errors import CheckpointError, ConfigError, InputError
from karakoram.session import Session, check_sampling, check_vocabulary

BUNDLED = "nano"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_MAX_JSON_BYTES = 16_000_000  # config.json of K2.5 has 4 kB, a thousand tools have less than 2 MB


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. `source` says where the values come from, for the user."""

    temperature: float
    top_p: float
    source: str

    def __str__(self) -> str:
        if self.temperature == 0:
            return f"greedy ({self.source})"
        return f"temperature {self.temperature:g}, top_p {self.top_p:g} ({self.source})"


def names_a_model(text: str) -> bool:
    """Whether a lone argument is meant as MODEL rather than as a prompt: a known name, a path or `owner/name`."""
    if text == BUNDLED or text in PRESETS or _HUB_ID.fullmatch(text):
        return True
    return text.startswith(("./", "../", "/", "~", ".\\")) or _is_directory(text)


def locate(model: str) -> str:
    """MODEL as a checkpoint directory or hub id. Raises CheckpointError for what can be neither."""
    if model == BUNDLED:
        if not bundled_model_dir().is_dir():
            raise CheckpointError("The bundled model is not in this copy of the package.", "Train it: k2 train nano.")
        return str(bundled_model_dir())
    if _is_directory(model) or _HUB_ID.fullmatch(model):
        return model
    if model in PRESETS:
        raise CheckpointError(
            f"{model!r} is a preset: it has a configuration but no weights.",
            f"Give a checkpoint directory or a Hugging Face id; 'k2 inspect {model}' shows its sizes.",
        )
    raise CheckpointError(
        f"No model {model!r}: it is not an existing directory.",
        f"Give a checkpoint directory, a Hugging Face id owner/name, or '{BUNDLED}'.",
    )


def _is_directory(text: str) -> bool:
    try:
        return bool(text) and Path(text).expanduser().is_dir()
    except (OSError, ValueError, RuntimeError):  # a long prompt, a NUL byte, an unknown ~user: no path
        return False


def open_directory(model: str) -> Path:
    """The checkpoint directory of MODEL, downloaded if it is a hub id."""
    located = locate(model)
    if _is_directory(located):
        return Path(located).expanduser()
    from karakoram.checkpoint.hf import resolve

    return resolve(located)


@dataclass(frozen=True)
class Opened:
    """A checkpoint ready to talk."""

    directory: Path
    model: Any
    fmt: Any
    store: Any = None  # of experts, where they are not all in memory
    plan: str | None = None  # what is expected of that, in a line

    @property
    def where(self) -> str:
        """Device and dtype, and what is in memory where not all is, for the user."""
        place = f"{self.model.device} {str(self.model.dtype).removeprefix('torch.')}"
        return place if self.store is None else " · ".join(filter(None, (place, str(self.store), self.plan)))

    def approximated(self) -> str:
        """How many tokens so far are not exact, for the user; empty where all are."""
        touched = None if self.store is None else self.store.approximated()
        return "" if touched is None else f"{touched} tokens so far touched approximate experts"

    def close(self) -> None:
        """End what reads experts."""
        if self.store is not None:
            self.store.close()

    def session(self) -> Session:
        return Session(self.model, self.fmt)


def open_for_chat(
    model: str,
    dialect: str | None,
    device: str,
    dtype: str,
    allow_config_keys: list[str],
    experts: Any = None,
    cache_tokens: int | None = None,
) -> Opened:
    """Open MODEL with its chat format. The format comes first: a mistake in it should not cost the time of a load.

    experts: `StoreOptions`, for commands that can run a model bigger than memory.
    """
    from karakoram.chat import load_chat_format

    directory = open_directory(model)
    fmt = load_chat_format(directory, dialect=dialect)
    loaded, store, checkpoint = _load_fed(directory, device, dtype, allow_config_keys, experts, cache_tokens)
    check_vocabulary(fmt.tokenizer, loaded.config)
    if store is None:
        return Opened(directory, loaded, fmt)
    from karakoram.evals.plan.plan import plan_line

    return Opened(directory, loaded, fmt, store, plan_line(checkpoint, store))


def load_fed(
    directory: Path,
    device: str,
    dtype: str,
    allow_config_keys: list[str],
    experts: Any = None,
    cache_tokens: int | None = None,
) -> tuple[Any, Any]:
    """The model, and the store of its experts where it has one. Options that need a store and find none are errors."""
    return _load_fed(directory, device, dtype, allow_config_keys, experts, cache_tokens)[:2]


def _load_fed(
    directory: Path, device: str, dtype: str, allow_config_keys: list[str], experts: Any, cache_tokens: int | None
) -> tuple[Any, Any, Any]:
    """The same, and the checkpoint of a model that a store feeds: its headers are read once."""
    from karakoram.engine.expert_store.budget import CACHE_TOKENS
    from karakoram.engine.expert_store.opening import open_fed

    asked = experts is not None and experts.asked
    on_cpu = (asked and device == "auto") or _first_device(device) == "cpu"
    if experts is not None and dtype == "bfloat16" and on_cpu:
        from karakoram.checkpoint import open_checkpoint

        checkpoint = open_checkpoint(directory, allow_config_keys)
        checkpoint.check()
        fed = open_fed(checkpoint, experts, cache_tokens=cache_tokens or CACHE_TOKENS)
        if fed is None:
            return load(checkpoint, device, dtype, allow_config_keys), None, None
        import torch

        torch.set_num_threads(1)  # its second thread would spin where the kernels' and the readers' should run: 10 %
        return fed.model, fed.store, checkpoint
    if asked:
        raise InputError(
            f"--ram, --expert-ram, --vram, --expert-policy and --trace do not go with {dtype} on {device}.",
            "Add --device cpu, and leave --dtype out.",
        )
    return load(directory, device, dtype, allow_config_keys), None, None


def load(directory: Any, device: str, dtype: str, allow_config_keys: list[str], dense: bool = False) -> Any:
    """The model of a checkpoint directory, or of an opened checkpoint. `device` "auto": a CUDA device, if any."""
    from karakoram.model.load import load_model

    return load_model(directory, _first_device(device), dtype, tuple(allow_config_keys), dense)


def _first_device(device: str) -> str:
    if device != "auto":
        return device
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def sampling_for(
    directory: Path, fmt: Any, temperature: float | None = None, top_p: float | None = None, thinking: bool = True
) -> Sampling:
    """The options where given; else generation_config.json of the checkpoint; else the dialect's defaults."""
    defaults = _from_generation_config(directory)
    if defaults is None:
        values = fmt.sampling(thinking=thinking)
        defaults = Sampling(float(values["temperature"]), float(values["top_p"]), f"default of {fmt.dialect}")
    if temperature is None and top_p is None:
        return defaults
    temperature = defaults.temperature if temperature is None else temperature
    top_p = defaults.top_p if top_p is None else top_p
    check_sampling(temperature, top_p)
    return Sampling(temperature, top_p, "as asked")


def _from_generation_config(directory: Path) -> Sampling | None:
    path = directory / "generation_config.json"
    if not path.is_file():
        return None
    raw = read_json(path)
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} does not hold a JSON object.", "Mend or remove the file.")
    if raw.get("do_sample") is False:
        return Sampling(0.0, 1.0, path.name)
    if "temperature" not in raw and "top_p" not in raw:
        return None
    temperature, top_p = raw.get("temperature", 1.0), raw.get("top_p", 1.0)
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in (temperature, top_p))
    if not (numbers and temperature >= 0 and 0 < top_p <= 1):
        raise ConfigError(
            f"{path}: temperature {temperature!r} and top_p {top_p!r} are no sampling settings.",
            "temperature must be at least 0, top_p above 0 and at most 1.",
        )
    return Sampling(float(temperature), float(top_p), path.name)


def read_json(path: Path) -> Any:
    """The JSON value of a file. InputError for what is missing, too large or no JSON."""
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise InputError(f"{path} has {path.stat().st_size} bytes.", f"At most {_MAX_JSON_BYTES} are read as JSON.")
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"Cannot read {path}: {error.strerror}.", "Check the path.") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON: {error}.", "Mend the file.") from error


def read_tools(path: Path) -> list[dict[str, Any]]:
    """OpenAI tool declarations from a JSON file; their schemas are checked where they are rendered."""
    tools = read_json(path)
    right = isinstance(tools, list) and all(
        isinstance(tool, dict)
        and isinstance(tool.get("function"), dict)
        and isinstance(tool["function"].get("name"), str)
        for tool in tools
    )
    if not right:
        raise InputError(
            f"{path} does not hold a list of tools.",
            'Write [{"type": "function", "function": {"name": …, "description": …, "parameters": {…}}}].',
        )
    return tools
