"""What a model costs, from its `config.json` alone. Pure arithmetic, no torch.

weights.py   parameters, stored bytes, FLOPs of decoding
training.py  FLOPs of a training token, of Newton-Schulz, and what a token leaves for its backward pass
layout.py    which GPU holds what, and the memory that takes
traffic.py   what a GPU sends in a step, by kind and link
step.py      how long a step takes, on what is assumed about overlap;  gpus.py: cards, and what they reach
"""

from karakoram.model.cost.weights import BF16_BYTES as BF16_BYTES
from karakoram.model.cost.weights import COMPONENTS as COMPONENTS
from karakoram.model.cost.weights import FORMATS as FORMATS
from karakoram.model.cost.weights import FP32_BYTES as FP32_BYTES
from karakoram.model.cost.weights import Component as Component
from karakoram.model.cost.weights import Matrix as Matrix
from karakoram.model.cost.weights import ParameterCount as ParameterCount
from karakoram.model.cost.weights import components as components
from karakoram.model.cost.weights import decode_bytes_per_token as decode_bytes_per_token
from karakoram.model.cost.weights import flops_per_token as flops_per_token
from karakoram.model.cost.weights import kv_bytes_per_token as kv_bytes_per_token
from karakoram.model.cost.weights import matrices as matrices
from karakoram.model.cost.weights import parameters as parameters
from karakoram.model.cost.weights import stored_bytes as stored_bytes
