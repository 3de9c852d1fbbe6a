"""Public peak figures of the shipped GPU types.

Sources: NVIDIA data sheets (L40S, A100 80GB SXM, H100 SXM, H200 SXM, HGX B200), dense bfloat16 without sparsity, one
direction of each link. Prices and network: AWS on-demand list, us-east-1, node price and EFA bandwidth / 8 (g6e and
p4de 400 Gbit/s, p5, p5en and p6-b200 3,200); a cluster file overrides the price.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class GpuType:
    """Peak figures of one GPU.

    Attributes:
        flops: Dense bfloat16 FLOP/s.
        hbm_bytes_per_s: Device memory bandwidth.
        memory_bytes: Device memory.
        peer_bytes_per_s: To another GPU of the node, one direction (NVLink, else PCIe).
        host_bytes_per_s: To host memory over PCIe, one direction.
        network_bytes_per_s: Its share of the node's network, one direction.
        has_nvlink: Whether peers are joined by NVLink.
        usd_per_h: Price of one GPU-hour.
    """

    name: str
    flops: float
    hbm_bytes_per_s: float
    memory_bytes: float
    peer_bytes_per_s: float
    host_bytes_per_s: float
    network_bytes_per_s: float
    has_nvlink: bool
    usd_per_h: float


GPUS = {
    gpu.name: gpu
    for gpu in (
        GpuType("L40S", 362e12, 864e9, 48e9, 32e9, 32e9, 6.25e9, False, 3.77),
        GpuType("A100-80G", 312e12, 2039e9, 80e9, 300e9, 32e9, 6.25e9, True, 3.43),
        GpuType("H100", 989e12, 3350e9, 80e9, 450e9, 64e9, 50e9, True, 6.88),
        GpuType("H200", 989e12, 4800e9, 141e9, 450e9, 64e9, 50e9, True, 7.91),
        GpuType("B200", 2250e12, 8000e9, 180e9, 900e9, 64e9, 50e9, True, 14.24),
    )
}
"""Shipped GPU types by name."""
