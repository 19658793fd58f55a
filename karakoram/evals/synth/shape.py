"""Which checkpoint is written: a preset's config.json with so many layers, and in which format each tensor is stored.

  int4      the published layout (K2-Thinking): the routed experts in int4, all else bf16, biases of routers float32
  int4-all  every linear layer, embedding and head in int4, as `k2 quantize --format int4-all` writes it

Presets whose published form is fp8 or bf16 (K2, Moonlight) get int4 experts all the same. K2.5 and Kimi-VL get the
names of their text model (`language_model.…`); their image towers are left out.
"""

import copy
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from karakoram.checkpoint import names
from karakoram.config import PRESETS, ModelConfig, int4_quantization_config
from karakoram.errors import ConfigError, InputError
from karakoram.formats import int4_group
from karakoram.quantize.weights import IMAGE_MODULES

FORMATS = ("int4", "int4-all")
DIALECTS = {
    "nano": "kimi-k2.5",
    "moonlight-16b": "moonlight",
    "kimi-vl-a3b": "kimi-vl",
    "k2": "kimi-k2",
    "k2-0905": "kimi-k2",
    "k2-thinking": "kimi-k2-thinking",
    "k2.5": "kimi-k2.5",
    "k2.6": "kimi-k2.6",
}


class Stored(NamedTuple):
    """One weight: the family's name, the name in the file, dense shape, and whether it is stored as int4."""

    name: str
    stored: str
    shape: tuple[int, ...]
    int4: bool

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        count = math.prod(self.shape)
        if self.int4:
            return count // 2 + 2 * (count // int4_group.GROUP) + 8
        return count * (4 if self.name.endswith(".e_score_correction_bias") else 2)


class Shape:
    """A preset cut to `layers` layers (None: all) in a format of `FORMATS`.

    ConfigError: no such preset. InputError: no such format, or layers that hold no mixture of experts.
    """

    def __init__(self, preset: str, layers: int | None = None, format: str = "int4") -> None:
        if preset not in PRESETS:
            raise ConfigError(f"there is no preset {preset!r}.", f"Choose one of {', '.join(PRESETS)}.")
        if format not in FORMATS:
            raise InputError(f"there is no format {format!r}.", f"Choose one of {', '.join(FORMATS)}.")
        self.preset, self.format = preset, format
        self.raw: dict[str, Any] = copy.deepcopy(PRESETS[preset])
        self.wrapped = "text_config" in self.raw
        text = self.raw["text_config"] if self.wrapped else self.raw
        least, most = text["first_k_dense_replace"] + 1, text["num_hidden_layers"]
        if layers is not None and not least <= layers <= most:
            raise InputError(
                f"{layers} layers are no part of {preset}, which has {most} and a mixture of experts from {least} on.",
                f"Choose --layers from {least} to {most}.",
            )
        text["num_hidden_layers"] = layers or most
        text["quantization_config"] = self._section(bool(text["tie_word_embeddings"]))
        self.raw["karakoram"] = {"dialect": DIALECTS[preset]}
        self.config = ModelConfig.from_dict(self.raw)

    def weights(self) -> Iterator[Stored]:
        """Everything that is stored, layer by layer."""
        prefix = "language_model." if self.wrapped else ""
        for name, shape, _ in names.expected_tensors(self.config):
            int4 = names.is_routed_expert(name)
            if self.format == "int4-all":
                int4 = names.is_linear(name) or names.is_table(name)
            yield Stored(name, prefix + name, shape, int4 and shape[-1] % int4_group.GROUP == 0)

    def _section(self, tied: bool) -> dict[str, Any]:
        """`quantization_config`, as `k2 quantize` writes it."""
        section = int4_quantization_config()
        images = list(IMAGE_MODULES) if self.wrapped else []
        if self.format == "int4":
            section["ignore"] += ["re:.*lm_head.*", *images] if self.wrapped else []
            return section
        section["config_groups"]["group_0"]["targets"] = ["Linear", "Embedding"]
        section["ignore"] = ["re:.*mlp\\.gate$", *(["re:.*lm_head.*"] if tied else []), *images]
        return section
