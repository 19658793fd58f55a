"""Read a single expert out of a checkpoint, without loading anything else: headers first, then three tensors.

    python examples/read_one_expert.py [CHECKPOINT_DIRECTORY_OR_HUB_ID]

Works the same on 14 MB and on 595 GB.
"""

import sys

import torch

from karakoram.checkpoint import open_checkpoint
from karakoram.env import bundled_model_dir

source = sys.argv[1] if len(sys.argv) > 1 else bundled_model_dir()
checkpoint = open_checkpoint(source)
layer = checkpoint.config.first_k_dense_replace  # the first layer that has experts
print(f"{len(checkpoint.tensors)} tensors in {checkpoint.dir.name}; expert 3 of layer {layer}:")
for projection in ("gate_proj", "up_proj", "down_proj"):
    weight = checkpoint.expert(layer, 3, projection, torch.float32)
    distinct = weight[0, :32].unique().numel()
    print(f"{projection:10s} {list(weight.shape)} std {weight.std():.4f}, {distinct} distinct values in the first 32")
