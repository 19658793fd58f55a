"""Routed experts, one at a time and at the disk's speed: from a file of records, or from the shards in place.

direct.py   positioned reads past the page cache, into aligned memory
layout.py   the file `experts.k2experts`: header, index, records; every number checked
source.py   what a source is: which experts, where their bytes lie, and what is done with them (`ExpertSource`)
records.py  the records of that file (`PackedRecords`), and its tensors under their stored names
shards.py   safetensors shards in place (`ShardRecords`)
opening.py  the source of a checkpoint (`open_expert_source`)
"""

from karakoram.checkpoint.experts.direct import aligned_bytes
from karakoram.checkpoint.experts.opening import open_expert_source
from karakoram.checkpoint.experts.records import PackedRecords
from karakoram.checkpoint.experts.shards import ShardRecords
from karakoram.checkpoint.experts.source import ExpertSource, Extent, read_record

__all__ = [
    "ExpertSource",
    "Extent",
    "PackedRecords",
    "ShardRecords",
    "aligned_bytes",
    "open_expert_source",
    "read_record",
]
