"""What the models of the family weigh, from their configurations alone. Loads no torch and no weights.

python examples/count_parameters.py
"""

import sys

import karakoram
from karakoram.config import PRESETS
from karakoram.model import cost

print(f"{'preset':14s} {'parameters':>13s} {'active':>9s} {'stored':>10s} {'cache':>13s} {'read per token':>15s}")
for name in PRESETS:
    config = karakoram.ModelConfig.preset(name)
    count = cost.parameters(config)
    print(
        f"{name:14s} {count.total / 1e9:11.3f} B {count.active / 1e9:7.3f} B {cost.stored_bytes(config) / 1e9:7.1f} GB"
        f" {cost.kv_bytes_per_token(config) / 1e3:5.1f} kB/token {cost.decode_bytes_per_token(config) / 1e9:12.2f} GB"
    )
assert "torch" not in sys.modules
