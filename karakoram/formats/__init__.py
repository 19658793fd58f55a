"""What the bits of a weight mean: pack, unpack, dequantize, and the way back where nothing is lost.

Three formats, one file each: `bf16`, `fp8_block` (K2-Base, K2-Instruct) and `int4_group` (K2-Thinking, K2.5, K2.6).
A format knows tensors, never names, files or models. Each function that is written for speed has a twin whose name ends
in `_reference`: the definition spelled out on Python numbers, for tests and readers.
"""
