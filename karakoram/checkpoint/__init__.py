"""Where a model's tensors lie and how their bytes come and go: Hugging Face directories of safetensors files.

hf.py           a path or hub id -> a local directory
safetensors.py  one file: header -> entries; entry -> tensor
names.py        stored names -> canonical names; what a configuration expects
index.py        one checkpoint: all entries, reading, checking (`open_checkpoint`)
save.py         writing one, all or nothing (`write_checkpoint`)
experts/        routed experts one at a time, from shards or from a file of records (`open_expert_source`)
pack.py         writing that file (`pack_checkpoint`)
"""

from karakoram.checkpoint.experts.opening import open_expert_source
from karakoram.checkpoint.index import Checkpoint, open_checkpoint
from karakoram.checkpoint.pack import pack_checkpoint
from karakoram.checkpoint.safetensors import TensorEntry
from karakoram.checkpoint.save import write_checkpoint

__all__ = ["Checkpoint", "TensorEntry", "open_checkpoint", "open_expert_source", "pack_checkpoint", "write_checkpoint"]
