"""Machines: how fast a device computes, what it holds, and the links between devices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

GB, GIB, US = 1e9, 2**30, 1e-6


@dataclass(frozen=True)
class Link:
    """What devices that share a level of a machine send each other.

    Attributes:
        ranks: How many devices the level joins; 0 is all there are.
        rate: Bytes/s that each of them sends when all do.
        latency: Seconds that each rank adds to a collective.
        flow: Bytes/s of one device that sends to one other, alone; 0 is ``rate``.
        hop: Seconds before a message of one device to one other moves.
        all_to_all: Bytes/s of each device in an all-to-all; 0 is ``rate``.
        all_reduce: In an all-reduce; 0 is ``rate``.
    """

    ranks: int
    rate: float
    latency: float
    flow: float = 0.0
    hop: float = 0.0
    all_to_all: float = 0.0
    all_reduce: float = 0.0

    @property
    def of_flow(self) -> float:
        return self.flow or self.rate

    @property
    def of_all_to_all(self) -> float:
        return self.all_to_all or self.rate


@dataclass(frozen=True)
class Cluster:
    """Equal nodes of equal devices.

    Attributes:
        name: Of these numbers.
        node: Devices of a node.
        peak: Of a device, by dtype of its matrix products, FLOP/s: as the maker says.
        memory: Of a device, bytes.
        memory_rate: Bytes/s.
        levels: From the innermost; the last one has ``ranks`` 0 where there are several nodes.
        matrix_share, attention_share: Of ``peak`` that large products and attention reach.
        host: Bytes of a device's part of its host.
        host_rate: Bytes/s between a device and its host.
        launch: Seconds that each call of a kernel costs beside its work.
        call: Seconds that each call of attention costs beside its kernels.
        update_rate: Bytes/s of the optimizer's pass over its states; 0 is ``memory_rate``.
        contention: Of the time of a message that computation hides, the share that computation
            takes longer for it; 1 where messages are moved by the cores that compute.
        source: Where the numbers are from.
        device: What torch calls a device.
    """

    name: str
    node: int
    peak: Mapping[str, float] = field(hash=False)
    memory: float
    memory_rate: float
    levels: tuple[Link, ...]
    matrix_share: float = 0.6
    attention_share: float = 0.6
    host: float = 128 * GIB
    host_rate: float = 25 * GB
    launch: float = 10 * US
    call: float = 0.0
    update_rate: float = 0.0
    contention: float = 0.2
    source: str = ""
    device: str = "cuda"

    def matrix_rate(self, dtype: str) -> float:
        """FLOP/s of large matrix products.

        Raises:
            ValueError: nothing is known of that dtype.
        """
        if dtype not in self.peak:
            raise ValueError(f"{self.name} has no rate for {dtype}: it has {', '.join(self.peak)}")
        # 8-bit products pay for their casts and scales: NeMo's 16K row is 36 % of the peak
        return self.peak[dtype] * self.matrix_share * (0.65 if dtype == "fp8" else 1.0)

    @property
    def attention_rate(self) -> float:
        """FLOP/s of attention, whose kernels take 16-bit operands (or what there is)."""
        return self.peak.get("bf16", max(self.peak.values())) * self.attention_share

    def nodes(self, devices: int) -> int:
        return -(-devices // self.node)


# Of the rate on the sheet that collectives reach inside a node: nccl-tests show 225 to 240 of 300
# GB/s on A100 and about 360 of 450 on H100. Latencies: NCCL's src/graph/tuning.cc, protocol Simple.
_COLLECTIVE = 0.75
_NVLINK_LATENCY, _PCIE_LATENCY, _NET_LATENCY = 3.4 * US, 5.7 * US, 14 * US


def _nvlink(one_way: float) -> Link:
    return Link(8, _COLLECTIVE * one_way, _NVLINK_LATENCY, hop=15 * US)


def _network(share: float, flow: float, all_to_all: float = 0.0) -> Link:
    """Adapters at 80 % of their sheet; all-to-all over nodes at half of that, unless measured."""
    used = 0.8 * share
    return Link(0, used, _NET_LATENCY, 0.8 * flow, 25 * US, all_to_all or 0.5 * used)


# Effective, two devices under a switch, two switches a socket: from the times of short sequences.
_PCIE = (
    Link(2, 12 * GB, _PCIE_LATENCY, 13 * GB, 20 * US),
    Link(4, 3.6 * GB, _PCIE_LATENCY, 13 * GB, 20 * US),
    Link(8, 1.3 * GB, _PCIE_LATENCY, 13 * GB, 20 * US),
    _network(3.1 * GB, 12.5 * GB),
)

_USP, _OLCF = "arXiv:2405.07719", "docs.olcf.ornl.gov"

CLUSTERS = {
    cluster.name: cluster
    for cluster in (
        Cluster(
            "l20",
            *(8, {"bf16": 119.5e12, "fp8": 239e12}, 48 * GIB, 864 * GB),
            levels=_PCIE,
            matrix_share=0.8,
            attention_share=0.85,
            source=f"8 x L20, PCIe 4, two sockets: NVIDIA's sheet; rates of links from {_USP}, "
            "table 3, its row of 8K tokens",
        ),
        Cluster(
            "a100",
            *(8, {"bf16": 312e12}, 80 * GIB, 2.0e12),
            levels=(_nvlink(300 * GB), _network(25 * GB, 25 * GB)),
            source="8 x A100-SXM4-80G, 8 x 200 Gb/s: NVIDIA's sheet",
        ),
        Cluster(
            "a100-pcie",
            *(4, {"bf16": 312e12}, 80 * GIB, 1.94e12),
            levels=(*_PCIE[:2], _PCIE[3]),
            source="4 x A100 PCIe 80G: NVIDIA's sheet; rates of links assumed as those of l20",
        ),
        Cluster(
            "a800",
            *(8, {"bf16": 312e12}, 80 * GIB, 2.0e12),
            levels=(_nvlink(200 * GB), _network(25 * GB, 25 * GB)),
            source=f"8 x A800-80G, NVLink 400 GB/s, 1.6 Tb/s RDMA a node: {_USP}, section 5",
        ),
        Cluster(
            "a800-4ib",
            *(8, {"bf16": 312e12}, 80 * GIB, 2.0e12),
            levels=(_nvlink(200 * GB), _network(12.5 * GB, 25 * GB, 1.5 * GB)),
            source="8 x A800-80G, 4 adapters: thunlp/BurstEngine; 25 GB/s each assumed, the rate "
            "of all-to-all over nodes derived from its measurements",
        ),
        Cluster(
            "h100",
            *(8, {"bf16": 989e12, "fp8": 1979e12}, 80 * GIB, 3.35e12),
            levels=(_nvlink(450 * GB), _network(50 * GB, 50 * GB)),
            matrix_share=0.65,
            attention_share=0.66,
            host_rate=55 * GB,
            source="DGX H100, 8 x 400 Gb/s: NVIDIA's sheet",
        ),
        Cluster(
            "h200",
            *(8, {"bf16": 989e12, "fp8": 1979e12}, 141e9, 4.8e12),
            levels=(_nvlink(450 * GB), _network(50 * GB, 50 * GB)),
            matrix_share=0.65,
            attention_share=0.66,
            host_rate=55 * GB,
            source="8 x H200, 8 x 400 Gb/s: NVIDIA's sheet",
        ),
        Cluster(
            "b200",
            *(8, {"bf16": 2250e12, "fp8": 4500e12}, 180e9, 7.7e12),
            levels=(_nvlink(900 * GB), _network(50 * GB, 50 * GB)),
            matrix_share=0.65,
            attention_share=0.7,
            host_rate=55 * GB,
            source="DGX B200, 8 x 400 Gb/s: NVIDIA's sheet; attention at 70 % of the peak, as its "
            "fastest kernels are said to reach",
        ),
        Cluster(
            "frontier",
            *(8, {"bf16": 191.5e12}, 64 * GIB, 1.6e12),
            levels=(
                Link(2, 150 * GB, 6 * US, hop=20 * US),
                Link(8, 100 * GB, 6 * US, 37 * GB, 20 * US),
                # two parameters for RCCL's curves: 55 us a rank, 65 GB/s a node; no single message
                # between nodes takes less than the smallest collective over two of them
                Link(0, 65 * GB / 8, 55 * US, 20 * GB, 0.9e-3, 4 * GB),
            ),
            matrix_share=0.45,
            attention_share=0.35,
            host=64 * GIB,
            host_rate=36 * GB,
            source=f"a node of 4 MI250X, 8 GCDs: {_OLCF}; between nodes RCCL's rates as "
            "jqyin/ringX-attention measured them; shares of the peak assumed",
        ),
        Cluster(
            "mi300x",
            *(8, {"bf16": 1307e12, "fp8": 2615e12}, 192 * GIB, 5.3e12),
            levels=(
                Link(8, 0.7 * 448 * GB, 6 * US, 0.7 * 64 * GB, 20 * US),
                _network(50 * GB, 50 * GB),
            ),
            matrix_share=0.45,
            attention_share=0.35,
            host_rate=55 * GB,
            source="8 x MI300X, 7 links of 64 GB/s each, 8 x 400 Gb/s: AMD's sheet; shares of the "
            "peak assumed",
        ),
        Cluster(
            "laptop",
            *(4, {"bf16": 0.4e12, "fp32": 0.2e12}, 8 * GIB, 40 * GB),
            levels=(Link(0, 1.5 * GB, 50 * US, hop=50 * US),),
            host=0,
            contention=1.0,
            launch=20 * US,
            device="cpu",
            source="4 processes of a CPU with AVX2, gloo: assumed; cluster 'here' measures",
        ),
    )
}


def cluster_of(name: str) -> Cluster:
    """One of ``CLUSTERS``.

    Raises:
        ValueError: there is none of that name; lists them.
    """
    if name not in CLUSTERS:
        raise ValueError(f"unknown cluster {name!r}: there are {', '.join(CLUSTERS)}, and here")
    return CLUSTERS[name]
