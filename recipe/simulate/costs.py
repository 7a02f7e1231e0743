"""What a step on many GPUs costs: computation, communication that FSDP cannot hide, data, checkpoints, failures.

Everything here is arithmetic on counts from elsewhere: FLOPs from `recipe.callbacks.throughput`, bytes from the model's
shapes. Bandwidths are in bytes per second.

A collective takes the time of its bytes over the slowest link, and of its hops. A ring over `n` GPUs moves (n - 1) / n
of the bytes over each link; between nodes one ring per GPU of a node shares them. It passes every GPU once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf, sqrt

DAY = 86400.0


@dataclass(frozen=True)
class Cluster:
    """The machines; every rate is per GPU or per node as its name says."""

    gpus_per_node: int
    flops_per_second: float  # model FLOPs that one GPU achieves in training
    link_in_node: float  # of one GPU, one direction
    link_between_nodes: float  # of one GPU, one direction
    hop_in_node: float  # seconds that a message needs from GPU to GPU
    hop_between_nodes: float
    disk_per_node: float
    store_per_node: float
    failures_per_gpu_day: float  # that end the run
    restart: float  # seconds from a failure to the next step


@dataclass(frozen=True)
class Unit:
    """Parameters that FSDP gathers and frees together."""

    gathered: int  # bytes, in the precision of the computation
    reduced: int  # bytes of the gradients, in the precision of their sum; 0 if frozen


@dataclass(frozen=True)
class Work:
    """What one GPU does in an optimizer step, and what belongs to the whole run.

    Attributes:
        flops: Of one microbatch by part, forward and backward, without what is computed twice.
        microbatches: Per step.
        tokens: Of one microbatch.
        images: Of one microbatch.
        bytes_per_image: As stored.
        units: Of FSDP, the root first.
        replicated: Bytes of gradients that DDP sums; 0: FSDP.
        reshards: Whether the backward pass gathers again.
        checkpoint: Bytes of a whole one.
        is_sharded: Whether each GPU writes its part of it; else the first one writes all.
        save_interval: Steps.
    """

    flops: Mapping[str, float]
    microbatches: int
    tokens: int
    images: float
    bytes_per_image: float
    units: Sequence[Unit]
    replicated: int
    reshards: bool
    checkpoint: int
    is_sharded: bool
    save_interval: int


def ring(size: float, num_nodes: int, gpus: int, cluster: Cluster) -> float:
    """Return the seconds of an all-gather, or of a reduce-scatter, of `size` bytes over `gpus` GPUs of each node."""
    ranks = num_nodes * gpus
    if ranks == 1 or not size:
        return 0.0
    links = [cluster.link_in_node] if gpus > 1 else []
    links += [gpus * cluster.link_between_nodes] if num_nodes > 1 else []
    between = num_nodes if num_nodes > 1 else 1  # of the hops; a ring of one node needs one less
    hops = (ranks - between) * cluster.hop_in_node + between * (num_nodes > 1) * cluster.hop_between_nodes
    return size * (ranks - 1) / ranks / min(links) + hops


def sum_between_nodes(size: float, num_nodes: int, cluster: Cluster) -> float:
    """Return the seconds of an all-reduce of `size` bytes that the GPUs of a node hold in equal parts."""
    # Each GPU sums its own part with those of the same place: a reduce-scatter, then an all-gather.
    return 2 * ring(size / cluster.gpus_per_node, num_nodes, 1, cluster)


def step(work: Work, num_nodes: int, cluster: Cluster, hybrid: bool) -> dict[str, float]:
    """Return the seconds of an optimizer step by part, and how much of the communication is not hidden.

    A third of the FLOPs are the forward pass's. While one unit is computed the next one is gathered and the last one's
    gradients are summed, so communication shows as far as it takes longer than the pass; and so do the first unit's
    gathering and the last one's sum. The slowdown of what runs at the same time is not counted. `hybrid` shards within
    a node and replicates across; else parameters are sharded over all GPUs.
    """
    parts = {name: work.microbatches * flops / cluster.flops_per_second for name, flops in work.flops.items()}
    compute = sum(parts.values())
    forward, backward = compute / work.microbatches / 3, 2 * compute / work.microbatches / 3
    if work.replicated:  # with DDP the gradients are summed behind the last backward pass
        communication = 2 * ring(work.replicated, num_nodes, cluster.gpus_per_node, cluster)
        exposed = max(0.0, communication - backward)
    else:
        shards = (1 if hybrid else num_nodes, cluster.gpus_per_node)
        gathers = [ring(unit.gathered, *shards, cluster) for unit in work.units]
        sums = [ring(unit.reduced, *shards, cluster) for unit in work.units]
        if hybrid:
            pairs = zip(sums, work.units, strict=True)
            sums = [seconds + sum_between_nodes(unit.reduced, num_nodes, cluster) for seconds, unit in pairs]
        ahead, behind = sum(gathers), sum(gathers) * work.reshards + sum(sums)
        # The root, which is the first unit, is gathered first and summed last.
        shown = max(ahead - forward, gathers[0]) + max(behind - backward, sums[0])
        communication, exposed = work.microbatches * (ahead + behind), work.microbatches * shown
    return {**parts, "communication": communication, "exposed": exposed, "step": compute + exposed}


def demand(work: Work, num_nodes: int, cluster: Cluster, seconds: float) -> dict[str, float]:
    """Return what the loaders must deliver and the store must send, per second, at `seconds` per step."""
    images = work.microbatches * work.images / seconds
    gpus = num_nodes * cluster.gpus_per_node
    return {
        "tokens_per_s_per_gpu": work.microbatches * work.tokens / seconds,
        "images_per_s_per_node": images * cluster.gpus_per_node,
        "images_per_s": images * gpus,
        "store_bytes_per_s": images * gpus * work.bytes_per_image,
    }


def failures(work: Work, num_nodes: int, cluster: Cluster, seconds: float) -> dict[str, float]:
    """Return a checkpoint's time, and the work that failures and checkpoints cost per day.

    The first-order model of J. W. Young, "A first order approximation to the optimum checkpoint interval",
    Communications of the ACM 17 (1974), and J. T. Daly, Future Generation Computer Systems 22 (2006): with `C` seconds
    per checkpoint, `T` between two and `M` between failures a share of C / T + T / 2M is lost, which is least at
    T = sqrt(2 C M). Each failure costs the restart too. It holds for T much smaller than M.
    """
    gpus = num_nodes * cluster.gpus_per_node
    share = work.checkpoint / (num_nodes if work.is_sharded else 1)  # of a node
    saving = share / cluster.disk_per_node
    interval = work.save_interval * seconds
    per_day = cluster.failures_per_gpu_day * gpus
    between = DAY / per_day if per_day else inf
    best = sqrt(2 * saving * between) if per_day else inf

    def lost(every: float) -> float:
        return DAY * (saving / every + every / (2 * between) + cluster.restart / between)

    return {
        "checkpoint_s": saving,
        "upload_s": share / cluster.store_per_node,
        "failures_per_day": per_day,
        "lost_hours_per_day": min(DAY, lost(interval)) / 3600,
        "best_interval_steps": best / seconds,
        "lost_hours_per_day_at_best": min(DAY, lost(best)) / 3600 if per_day else 0.0,
    }


def simulate(work: Work, num_nodes: int, cluster: Cluster, hybrid: bool) -> dict[str, float]:
    """Return all of the above for one number of nodes."""
    times = step(work, num_nodes, cluster, hybrid)
    return {
        **times,
        **demand(work, num_nodes, cluster, times["step"]),
        **failures(work, num_nodes, cluster, times["step"]),
    }
