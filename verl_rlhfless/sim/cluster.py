"""Clusters: nodes of one GPU type, prices, and when preemptible nodes are up."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from verl_rlhfless.errors import ConfigError
from verl_rlhfless.policy.gpus import GPUS, GpuType
from verl_rlhfless.schema import what_to_do
from verl_rlhfless.sim import shipped

FORMAT = "rlhfless-cluster/1"


@dataclass(frozen=True, slots=True)
class Cluster:
    """Whole nodes of one GPU type.

    Attributes:
        gpus_per_node: GPUs of each node.
        num_nodes: Nodes, of which the last ``len(outages)`` may be preempted.
        outages: For each preemptible node, ``(down_s, up_s)`` intervals of the availability trace in which it is away;
            it repeats every ``period_s``.
        usd_per_gpu_h: Price of a leased GPU-hour.
        min_billing_s: Least billed seconds of a node once it is in use.
        has_kv_transfer: Whether replicas can pass on the keys and values of moved samples.
    """

    name: str
    gpu: GpuType
    num_nodes: int
    gpus_per_node: int
    usd_per_gpu_h: float
    min_billing_s: float = 60.0
    outages: tuple[tuple[tuple[float, float], ...], ...] = ()
    period_s: float = 7200.0
    has_kv_transfer: bool = False

    @property
    def num_gpus(self) -> int:
        """All GPUs."""
        return self.num_nodes * self.gpus_per_node

    @property
    def trainer_gpus(self) -> int:
        """GPUs of the nodes that are never preempted; the trainer and colocated engines live there."""
        return (self.num_nodes - len(self.outages)) * self.gpus_per_node


def _shipped(name: str, gpu: str, nodes: int, outages: tuple[tuple[tuple[float, float], ...], ...] = ()) -> Cluster:
    return Cluster(name, GPUS[gpu], nodes, 8, GPUS[gpu].usd_per_h, outages=outages)


CLUSTERS = {
    cluster.name: cluster
    for cluster in (
        _shipped("l40s-16", "L40S", 2),
        _shipped("h100-16", "H100", 2),
        _shipped("h100-160", "H100", 20),
        # Up about half of the time, as spot probes of 16 nodes in three zones found; drops inside rollouts of minutes.
        _shipped("h100-16-spot", "H100", 2, (((150.0, 400.0), (1500.0, 3600.0), (4300.0, 5600.0)),)),
    )
}
"""Shipped clusters by name."""

_KEYS = (
    *("format", "name", "gpu", "num_nodes", "gpus_per_node", "usd_per_gpu_h", "min_billing_s", "outages", "period_s"),
    "kv_transfer",
)


def load_cluster(name_or_path: str) -> Cluster:
    """Return a shipped cluster by name, or the one that a JSON file describes.

    Raises:
        ConfigError: An unknown name, or a key whose value breaks a rule.
        DataError: The file cannot be read or is no JSON.
    """
    return shipped.load("--cluster", name_or_path, CLUSTERS, parse_cluster, f"a cluster file in the format {FORMAT}")


def parse_cluster(values: object, name: str) -> Cluster:
    """Return the cluster that a parsed cluster file describes.

    Raises:
        ConfigError: A key is missing, unknown, or its value breaks a rule.
    """
    if not isinstance(values, dict):
        raise ConfigError(name, type(values).__name__, "must be a JSON object", f"Give a file in the format {FORMAT}.")
    for key in values:
        if key not in _KEYS:
            raise ConfigError(f"{name}: {key}", values[key], "is not a known key", f"Known keys: {', '.join(_KEYS)}.")
    if values.get("format") != FORMAT:
        raise ConfigError(f"{name}: format", values.get("format"), f"must be {FORMAT!r}", "Correct it.")
    gpu = values.get("gpu")
    if not isinstance(gpu, str) or gpu not in GPUS:
        raise ConfigError(
            f"{name}: gpu",
            gpu,
            f"must be one of {', '.join(GPUS)}",
            what_to_do(str(gpu), GPUS, "Choose one of them."),
        )
    nodes = int(_number(values, "num_nodes", name, (1, 100_000), is_int=True))
    cluster = Cluster(
        name=str(values.get("name", name)),
        gpu=GPUS[gpu],
        num_nodes=nodes,
        gpus_per_node=int(_number(values, "gpus_per_node", name, (1, 1024), is_int=True)),
        usd_per_gpu_h=_number({"usd_per_gpu_h": GPUS[gpu].usd_per_h} | values, "usd_per_gpu_h", name, (1e-6, 1e6)),
        min_billing_s=_number({"min_billing_s": 60.0} | values, "min_billing_s", name, (0, 1e6)),
        outages=_outages(values, name),
        period_s=_number({"period_s": 7200.0} | values, "period_s", name, (1, 1e9)),
        has_kv_transfer=values.get("kv_transfer", False),
    )
    if not isinstance(cluster.has_kv_transfer, bool):
        raise ConfigError(f"{name}: kv_transfer", values["kv_transfer"], "must be true or false", "Correct it.")
    if len(cluster.outages) >= nodes:
        raise ConfigError(
            f"{name}: outages", len(cluster.outages), f"must be fewer than num_nodes={nodes}", "Keep one node."
        )
    return cluster


def _number(
    values: Mapping[str, Any], key: str, name: str, bounds: tuple[float, float], *, is_int: bool = False
) -> float:
    """Return the number of a key, which must lie in ``bounds`` inclusive."""
    value = values.get(key)
    kind = int if is_int else (int, float)
    if isinstance(value, bool) or not isinstance(value, kind) or not bounds[0] <= value <= bounds[1]:
        what = "an integer" if is_int else "a number"
        raise ConfigError(f"{name}: {key}", value, f"must be {what} from {bounds[0]:g} to {bounds[1]:g}", "Correct it.")
    return value


def _outages(values: Mapping[str, Any], name: str) -> tuple[tuple[tuple[float, float], ...], ...]:
    """Return the outages of each preemptible node as floats, none where the file gives none."""
    rule = "must be a list per preemptible node of [down_s, up_s] pairs, increasing and not overlapping"
    raw = values.get("outages", [])
    try:
        nodes = tuple(tuple((float(down), float(up)) for down, up in node) for node in raw)
    except (TypeError, ValueError, OverflowError):
        raise ConfigError(f"{name}: outages", raw, rule, "Correct it.") from None
    for node in nodes:
        flat = [moment for pair in node for moment in pair]
        if any(not a < b for a, b in pairwise(flat)) or any(not 0 <= m < 1e12 for m in flat):
            raise ConfigError(f"{name}: outages", raw, rule, "Correct it.")
    return nodes
