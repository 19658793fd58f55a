"""Cards that K2 may be trained on: what their makers state, and which share of it is assumed to be reached.

Rates are of one card and one direction. bf16 is dense (datasheets print twice that, for 2:4 sparse matrices). H800 has
H100's chip and memory with NVLink cut from 900 to 400 GB/s (both directions together). Sources: NVIDIA's datasheets of
H100 SXM, H200 SXM and DGX B200 (8 cards: 1,440 GB, 64 TB/s); 8 x 400 Gb/s of network and 2 TB of RAM to a node of 8,
as in K2's own (arXiv 2507.20534, section 2.4), assumed for the others too; PCIe 5 x16 to the host.
"""

from dataclasses import dataclass

GPUS_PER_NODE = 8
NETWORK_BYTES_PER_S = 50e9  # 400 Gb/s
HOST_BYTES_PER_S = 64e9  # PCIe 5.0 x16
NODE_HOST_BYTES = 2e12
LINK_SHARE = 0.8  # of a link's rate that large messages reach; DeepEP's all-to-all is said to reach 158 of 200 GB/s
MEMORY_SHARE = 0.92  # of a card's memory; the rest: driver, NCCL's buffers, fragments
HOST_SHARE = 0.9
# Of the peak, over all that a layer does: its products, and what is bound by memory beside them (norms, SwiGLU,
# sorting). An assumption. K2 with Muon is said to run at 1,080 TFLOPS on a GB300, all else included: 43 % of 2,500, its
# dense bf16, if that is what it ran in.
EFFICIENCY = 0.5


@dataclass(frozen=True)
class Gpu:
    """One card."""

    name: str
    flops_per_s: float  # bf16, dense
    memory_bytes: float
    memory_bytes_per_s: float
    nvlink_bytes_per_s: float  # one direction
    network_bytes_per_s: float = NETWORK_BYTES_PER_S
    host_bytes_per_s: float = HOST_BYTES_PER_S

    @property
    def usable_bytes(self) -> float:
        return MEMORY_SHARE * self.memory_bytes

    @property
    def usable_host_bytes(self) -> float:
        """Of the node's memory, this card's part."""
        return HOST_SHARE * NODE_HOST_BYTES / GPUS_PER_NODE


GPUS = {
    "h800": Gpu("H800", 989.5e12, 80e9, 3.35e12, 200e9),
    "h100": Gpu("H100", 989.5e12, 80e9, 3.35e12, 450e9),
    "h200": Gpu("H200", 989.5e12, 141e9, 4.8e12, 450e9),
    "b200": Gpu("B200", 2250e12, 180e9, 8e12, 900e9),
}
