"""What a model is, from `config.json` alone: `ModelConfig`, the presets, and the rules by which a file is refused.

`keys.py` lists every known key as data, `reading.py` applies the lists, `rope.py` and `quantization.py` read the two
nested blocks, `presets.py` holds the published models, `model_config.py` the dataclass and its bounds.
Standard library only.
"""

from karakoram.config.model_config import ModelConfig
from karakoram.config.presets import PRESETS
from karakoram.config.quantization import fp8_quantization_config, int4_quantization_config
from karakoram.config.reading import load_json_object
from karakoram.config.rope import RopeScaling

__all__ = [
    "PRESETS",
    "ModelConfig",
    "RopeScaling",
    "fp8_quantization_config",
    "int4_quantization_config",
    "load_json_object",
]
