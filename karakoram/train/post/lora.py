"""LoRA: a frozen model learns through low-rank additions to its projections (arXiv 2106.09685, §4.1).

    y = W x + alpha/rank · B A x        W [out, in] frozen, A [rank, in] Kaiming-uniform, B [out, rank] zero

B is zero at first, so the adapted model begins as the very model it was. Adapters sit on the attention's projections
and the shared experts, which every token passes; the routed experts (stacks, perhaps int4 published) and the router
stay as they are: a token visits few experts, and moving the router moves the load. All of the base asks for no
gradient, so that only A and B have gradients, masters and optimizer state.

While adapters are in place, `state_dict` shows the merged model under the checkpoint's own names: whatever is exported
is an ordinary checkpoint, in which int4 experts are the same codes as before. Dropout is not built in.

The files are PEFT's (`adapter_config.json`, `adapter_model.safetensors`, names `base_model.model.….lora_A.weight`):
PEFT 0.21 reads them and they read PEFT's, logits equal within 1e-6. But for a `deepseek_v3` model of transformers 5 it
takes every name that ends in `gate_proj`, `up_proj` or `down_proj` for a routed expert, and loses adapters of shared
experts (`kimi_k2` models are spared): merge there, or adapt attention alone. Options of PEFT that would be other
mathematics are refused by name.
"""

import json
import math
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from karakoram.errors import CheckpointError, InputError
from karakoram.model.layers import linear
from karakoram.model.transformer import Transformer
from karakoram.train.config import TrainConfig

ATTENTION = ("*.self_attn.*_proj", "*.self_attn.kv_a_proj_with_mqa")
SHARED_EXPERTS = ("*.shared_experts.*_proj",)
CONFIG_FILE, TENSOR_FILE = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_TENSOR = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
_MAX_CONFIG_BYTES = 1 << 20  # PEFT's are below 2 kB; a list of every projection of K2 by name is 40 kB
# Keys of PEFT's file that say nothing about the forward pass; every other unknown key must be empty.
_IGNORED = {
    "auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "exclude_modules", "inference_mode",
    "layers_pattern", "layers_to_transform", "lora_dropout", "megatron_core", "peft_version", "qalora_group_size",
    "revision", "target_modules", "task_type",
}  # fmt: skip
_PLAIN: dict[str, tuple[Any, ...]] = {"bias": ("none",), "init_lora_weights": (True, False, "gaussian")}


class AdaptedLinear(nn.Module):
    """A projection with its addition; `weight` is the merged matrix, for those who read it (absorbed attention)."""

    def __init__(self, base: nn.Linear, rank: int, scale: float, generator: torch.Generator) -> None:
        super().__init__()
        self.base_layer, self.scale = base, scale
        weight = base.weight
        self.lora_A = linear(base.in_features, rank, weight.device, weight.dtype)
        self.lora_B = linear(rank, base.out_features, weight.device, weight.dtype)
        bound = 1 / math.sqrt(base.in_features)  # Kaiming-uniform with a = √5, as PEFT draws it
        with torch.no_grad():
            self.lora_A.weight.copy_((torch.rand(rank, base.in_features, generator=generator) * 2 - 1) * bound)
            self.lora_B.weight.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return self.base_layer(x) + self.scale * self.lora_B(self.lora_A(x))

    @property
    def weight(self) -> Tensor:
        """W + scale · B A, summed in float32 and rounded once to W's dtype: [out, in]."""
        wide = self.base_layer.weight.float()
        return (wide + self.scale * (self.lora_B.weight.float() @ self.lora_A.weight.float())).to(
            self.base_layer.weight.dtype
        )

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """The merged matrix under the plain projection's name."""
        destination = {} if destination is None else destination
        destination[f"{prefix}weight"] = self.weight if keep_vars else self.weight.detach()
        return destination


class Adapters:
    """The adapters of one model, by the names of the projections that they stand in for; made by `adapt` or `load`."""

    def __init__(self, model: Transformer, rank: int, alpha: float, names: Sequence[str], seed: int) -> None:
        self.model, self.rank, self.alpha = model, rank, alpha
        self._asked = {name: p.requires_grad for name, p in model.named_parameters()}
        model.requires_grad_(False)
        generator = torch.Generator().manual_seed(seed)
        self.modules: dict[str, AdaptedLinear] = {}
        for name in names:
            adapted = AdaptedLinear(_projection(model, name), rank, alpha / rank, generator)
            model.set_submodule(name, adapted)
            self.modules[name] = adapted

    def parameters(self) -> dict[str, Tensor]:
        """What is trained, by its name in the model."""
        found: dict[str, Tensor] = {}
        for name, module in self.modules.items():
            found[f"{name}.lora_A.weight"] = module.lora_A.weight
            found[f"{name}.lora_B.weight"] = module.lora_B.weight
        return found

    @torch.no_grad()
    def merge(self) -> None:
        """Fold every adapter into its projection and put the plain projection back; the adapters are gone."""
        for module in self.modules.values():
            module.base_layer.weight.copy_(module.weight)
        self.remove()

    def remove(self) -> None:
        """Put the plain projections back as they were before; the adapters are gone."""
        for name, module in self.modules.items():
            self.model.set_submodule(name, module.base_layer)
        self.modules = {}
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(self._asked[name])

    def adapter_state(self) -> dict[str, Tensor]:
        """All A and B under PEFT's names, the tensors themselves."""
        return {f"{_PREFIX}{name}": parameter.detach() for name, parameter in self.parameters().items()}

    def save(self, out: Path, base_model: str | None = None) -> None:
        """Write the directory `out`, whole or not at all; an older one of adapters is replaced.

        base_model  name or path of the model underneath, for PEFT's readers. Raises InputError where there is nothing
        to save, CheckpointError where `out` is something else or cannot be written.
        """
        if not self.modules:
            raise InputError("The adapters were merged or removed.", "Save them before.")
        if out.exists() and not (out / CONFIG_FILE).is_file():
            raise CheckpointError(f"{out} exists and holds no adapters.", "Name another directory.")
        partial = out.with_name(f".{out.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir(parents=True)
            save_file({name: t.contiguous() for name, t in self.adapter_state().items()}, partial / TENSOR_FILE)
            (partial / CONFIG_FILE).write_text(json.dumps(self._config(base_model), indent=2) + "\n")
            shutil.rmtree(out, ignore_errors=True)
            os.replace(partial, out)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{out} could not be written: {error}.", "Check its path and the disk.") from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def _config(self, base_model: str | None) -> dict[str, Any]:
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base_model,
            "r": self.rank,
            "lora_alpha": self.alpha,
            "lora_dropout": 0.0,
            "bias": "none",
            "target_modules": sorted(self.modules),
            "fan_in_fan_out": False,
            "inference_mode": True,
            "init_lora_weights": True,
            "use_rslora": False,
            "use_dora": False,
            "modules_to_save": None,
            "rank_pattern": {},
            "alpha_pattern": {},
        }


def adapt(
    model: Transformer,
    rank: int = 16,
    alpha: float = 32.0,
    targets: Sequence[str] = ATTENTION + SHARED_EXPERTS,
    seed: int = 0,
) -> Adapters:
    """Put adapters on the projections whose names match one of the shell patterns `targets`, and freeze all else.

    Raises InputError for a rank or alpha that cannot be, for a pattern that matches nothing, and for something that is
    no plain projection (a packed model: load it dense).
    """
    if not math.isfinite(alpha) or alpha <= 0:
        raise InputError(f"alpha is {alpha}.", "Give a number above 0; twice the rank is usual.")
    found = {
        name: module
        for name, module in model.named_modules()
        if any(fnmatchcase(name, pattern) for pattern in targets) and ".experts" not in name
    }
    for pattern in targets:
        if not any(fnmatchcase(name, pattern) for name in found):
            raise InputError(
                f"No projection of this model is named like {pattern!r}.",
                "Patterns are of whole names, as '*.self_attn.o_proj'; routed experts and routers take no adapter.",
            )
    for name in found:
        _check_rank(name, _projection(model, name), rank)
    return Adapters(model, rank, alpha, list(found), seed)


def load(model: Transformer, path: Path) -> Adapters:
    """Put the adapters of a directory in PEFT's layout on the model they were made for.

    Raises CheckpointError where files are missing or damaged, of a model of other names or shapes, or made with options
    that are other mathematics: it names the tensor or the key. The model is then as it was.
    """
    rank, alpha = _read_config(path / CONFIG_FILE)
    tensors = _read_tensors(path / TENSOR_FILE, model, rank)
    names = sorted({name for name, _ in tensors})
    order = [name for name, _ in model.named_modules() if name in set(names)]
    adapters = Adapters(model, rank, alpha, order, seed=0)
    with torch.no_grad():
        for (name, half), tensor in tensors.items():
            module = adapters.modules[name]
            (module.lora_A if half == "A" else module.lora_B).weight.copy_(tensor)
    return adapters


def settings(config: TrainConfig) -> TrainConfig:
    """The run's settings with what a frozen base rules out: QK-Clip and balance, which would edit it; and with AdamW.

    Muon would give A and B updates of full rank and one size, and decay would pull towards the base; neither is LoRA.
    """
    optimizer = replace(config.optimizer, name="adamw", qk_clip_threshold=math.inf, weight_decay=0.0)
    return replace(config, optimizer=optimizer, balance=replace(config.balance, rule="none", sequence_loss=0.0))


def _projection(model: Transformer, name: str) -> nn.Linear:
    module = model.get_submodule(name)
    if isinstance(module, AdaptedLinear):
        raise InputError(f"{name} has an adapter already.", "Merge or remove the first one.")
    if not isinstance(module, nn.Linear):
        raise InputError(
            f"{name} is a {type(module).__name__}, no plain projection.", "Load the model with dense=True to train it."
        )
    return module


def _check_rank(name: str, projection: nn.Linear, rank: int) -> None:
    most = min(projection.in_features, projection.out_features)
    if not 1 <= rank <= most:
        raise InputError(
            f"Rank {rank} does not fit {name} [{projection.out_features}, {projection.in_features}].",
            f"Give a rank from 1 to {most}, or leave this projection out.",
        )


def _read_config(path: Path) -> tuple[int, float]:
    """Rank and alpha; everything else must leave the mathematics alone."""
    try:
        if path.stat().st_size > _MAX_CONFIG_BYTES:
            raise ValueError(f"it has more than {_MAX_CONFIG_BYTES:,} bytes")
        found: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        kind, rank, alpha = found["peft_type"], found["r"], found["lora_alpha"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}.", "It is a file that PEFT or k2 wrote.") from error
    numbers = isinstance(rank, int) and isinstance(alpha, int | float) and not isinstance(rank, bool)
    if kind != "LORA" or not numbers or not 1 <= rank <= 1 << 16 or not 0 < alpha < math.inf:
        raise CheckpointError(
            f"{path} says peft_type {kind!r}, r {rank!r}, lora_alpha {alpha!r}.", "LORA with numbers above 0 is read."
        )
    for key, value in found.items():
        if key in ("peft_type", "r", "lora_alpha") or key in _IGNORED:
            continue
        if value not in _PLAIN[key] if key in _PLAIN else value:
            raise CheckpointError(
                f"{path}: {key} is {value!r}, which is other mathematics than plain LoRA.",
                "Merge such adapters with the library that made them.",
            )
    return rank, float(alpha)


def _read_tensors(path: Path, model: Transformer, rank: int) -> dict[tuple[str, str], Tensor]:
    """(projection, "A" or "B") -> tensor; names and shapes are checked before a tensor is read."""
    modules = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and ".experts" not in n}
    tensors: dict[tuple[str, str], Tensor] = {}
    try:
        with safe_open(path, "pt") as file:
            for stored in file.keys():  # noqa: SIM118
                match = _TENSOR.fullmatch(stored)
                if match is None or match[1] not in modules:
                    raise CheckpointError(
                        f"{path} holds {stored}, and this model has no such projection.",
                        "Load adapters into the model that they were trained on, dense.",
                    )
                name, half = match[1], match[2]
                outputs, inputs = modules[name].weight.shape
                wanted = [rank, inputs] if half == "A" else [outputs, rank]
                shape = list(file.get_slice(stored).get_shape())
                if shape != wanted:
                    raise CheckpointError(
                        f"{stored} has shape {shape}; rank {rank} on this model's {name} makes it {wanted}.",
                        "Load adapters into the model that they were trained on.",
                    )
                tensors[name, half] = _finite(stored, file.get_tensor(stored))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}.", "Copy the adapters again.") from error
    for name, half in tensors:
        if (name, "B" if half == "A" else "A") not in tensors:
            raise CheckpointError(f"{path} holds only lora_{half} of {name}.", "Copy the adapters again.")
    if not tensors:
        raise CheckpointError(f"{path} holds no adapter.", "Copy the adapters again.")
    return tensors


def _finite(name: str, tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point() or not bool(tensor.isfinite().all()):
        raise CheckpointError(f"{name} holds something else than finite numbers.", "Copy the adapters again.")
    return tensor
