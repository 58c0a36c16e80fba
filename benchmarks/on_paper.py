"""A training step on paper: what a rank sends and computes. Pure numbers, for gather.py and scaling.py.

Collectives are rings: W ranks pass a whole around in W - 1 steps, and each rank sends (W - 1) / W of its bytes. An
all-reduce is two rings, a reduce-scatter and an all-gather. The time of a ring is that of NCCL's own model: a start, a
latency for each step, and bytes through the narrowest link (its src/graph/tuning.cc; Thakur et al. 2005 for MPI). NCCL
takes trees for all-reduces that are small for their number of ranks, which is faster: not counted here.
"""

from collections.abc import Iterable
from math import ceil
from typing import NamedTuple

import numpy as np

#: ------------------------------------------------------------------------------------------------------- assumptions
GPU = "H100 SXM, bf16"
GPU_FLOPS = 989e12  # dense, from its data sheet
GPU_FLOPS_FP32 = 67e12  # for similarities, which are fp32
GPU_BYTES = 80e9
EFFICIENCY = 0.4  # of the peak, recomputation counted as work
TASK_TOKENS = 8 * 512  # of a rank and step: mlalign's micro-batch and max_length
PAIRS, SIDE_TOKENS = 32, 32  # of a rank and step: mlalign's micro-batch; tokens of a sentence
LORA_RANK = 8
WIDTH = 2  # bytes of parameters and gradients on the way


class Protocol(NamedTuple):
    """A way to run rings. Seconds."""

    start: float  #: before anything moves
    step: float  #: of a ring, inside a node
    far_step: float  #: of a ring, from node to node
    share: float = 1.0  #: of the bandwidth that is left for data


class Network(NamedTuple):
    """Ranks in nodes. Bytes a second in one direction."""

    name: str
    per_node: int  #: ranks of a node
    protocols: tuple[Protocol, ...]  #: the fastest one is taken
    bandwidth: float  #: of a rank, inside its node
    far_bandwidth: float  #: of a node, all its adapters together; a ring goes through each of them in turn
    scatter_rings: int = 1  #: of a reduce-scatter; torch's gloo all-reduces instead, which is 2


#: NCCL's Simple and LL128, with its latencies (src/graph/tuning.cc). NVLink is its 18 x 20.6 GB/s (src/graph/topo.h),
#: InfiniBand its line rate.
NCCL = (Protocol(8.4e-6, 3.4e-6, 14e-6), Protocol(14e-6, 1.9e-6, 4e-6, share=0.92))
WIDE = Network("8 x 400 Gbit/s", 8, NCCL, 18 * 20.6e9, 8 * 50e9)
NARROW = WIDE._replace(name="1 x 400 Gbit/s", far_bandwidth=50e9)


class Traffic(NamedTuple):
    """What a step does of one collective."""

    kind: str  #: all-gather, reduce-scatter, all-reduce
    whole: float  #: bytes of the whole tensors, all calls together
    calls: int = 1


class Llama(NamedTuple):
    """A shape. Biases there are none, and norms are too small to count."""

    name: str
    hidden: int
    mlp: int
    layers: int
    key_values: int  #: width of keys, and of values
    vocabulary: int

    @property
    def matrices(self) -> list[tuple[int, int]]:
        """In and out of q, k, v, o, gate, up, down."""
        h, kv, mlp = self.hidden, self.key_values, self.mlp
        return [(h, h), (h, kv), (h, kv), (h, h), (h, mlp), (h, mlp), (mlp, h)]

    @property
    def block(self) -> int:
        return sum(rows * columns for rows, columns in self.matrices)

    @property
    def words(self) -> int:
        """Of the embeddings, and as many of the LM head."""
        return self.vocabulary * self.hidden

    def adapter(self, rank: int) -> int:
        """Elements of LoRA's matrices in one block."""
        return sum(rank * (rows + columns) for rows, columns in self.matrices)


LLAMA_8B = Llama("Llama 3 8B", 4096, 14_336, 32, 1024, 128_256)
LLAMA_70B = Llama("Llama 3 70B", 8192, 28_672, 80, 1024, 128_256)


class Reach(NamedTuple):
    """The parameters that a pass goes through."""

    parameters: int
    trainable: int
    tensors: int  #: large ones


def reach(model: Llama, lora: int, layers: int, head: bool) -> Reach:
    """Embeddings and so many blocks, and the LM head or not. lora: the adapters' rank, 0 = all is trained."""
    frozen = layers * model.block + model.words * (1 + head)
    adapters = layers * model.adapter(lora)
    return Reach(frozen + adapters, adapters if lora else frozen, layers * len(model.matrices) + 1 + head)


# ------------------------------------------------------------------------------------------------------------ network


def moved(whole: float, ranks: int) -> float:
    """Bytes that a rank sends, and receives, in one ring."""
    return whole * (ranks - 1) / ranks


def rings(kind: str, network: Network) -> int:
    return {"all-gather": 1, "reduce-scatter": network.scatter_rings, "all-reduce": 2}[kind]


def sends(traffic: Iterable[Traffic], ranks: int, network: Network) -> float:
    """Bytes that a rank sends for all of it."""
    return sum(rings(each.kind, network) * moved(each.whole, ranks) for each in traffic)


def seconds(traffic: Iterable[Traffic], ranks: int, network: Network) -> float:
    """Of all of it, one call after the other."""
    if ranks == 1:
        return 0.0
    nodes = ceil(ranks / network.per_node)
    bandwidth = min(network.bandwidth, network.far_bandwidth) if nodes > 1 else network.bandwidth

    def ring(size: float) -> float:
        return min(
            each.start
            + (ranks - nodes) * each.step
            + (nodes - 1) * each.far_step
            + moved(size, ranks) / (each.share * bandwidth)
            for each in network.protocols
        )

    return sum(rings(each.kind, network) * each.calls * ring(each.whole / each.calls) for each in traffic)


def gloo(name: str, step: float = 0.0, bandwidth: float = 1.0) -> Network:
    """Every rank a node of its own, without a start: what torch's gloo does of a collective."""
    return Network(name, 1, (Protocol(0, 0, step),), bandwidth, bandwidth, scatter_rings=2)


def fit(name: str, samples: list[tuple[Traffic, int, float]]) -> Network:
    """The latency of a ring's step and the bandwidth that come nearest to measured (traffic, ranks, seconds) of gloo.

    Relative errors count, or the largest sizes alone would: least squares of prediction / measured - 1.
    """
    unknown = gloo(name)
    rows = [
        [rings(each.kind, unknown) * each.calls * (ranks - 1) / taken, sends([each], ranks, unknown) / taken]
        for each, ranks, taken in samples
    ]
    (step, per_byte), *_ = np.linalg.lstsq(np.array(rows), np.ones(len(rows)), rcond=None)
    return gloo(name, step, 1 / per_byte)


def describe(network: Network) -> str:
    """In a line."""
    near, far = (f"{bandwidth / 1e9:,.1f} GB/s" for bandwidth in (network.bandwidth, network.far_bandwidth))
    if network.per_node == 1:
        return f"{network.name}: {far}, a step takes {network.protocols[0].far_step * 1e6:,.0f} us"
    steps = " or ".join(f"{p.step * 1e6:.1f} / {p.far_step * 1e6:.1f} us ({p.share:.0%})" for p in network.protocols)
    return f"{network.name}: a GPU {near}, a node of {network.per_node} {far}; a step inside / between {steps}"


def assumptions() -> str:
    """Of a step, in a few lines."""
    return (
        f"{GPU}: {EFFICIENCY:.0%} of {GPU_FLOPS / 1e12:,.0f} TFLOP/s ({GPU_FLOPS_FP32 / 1e12:,.0f} in fp32) reached, "
        f"with checkpointing, {GPU_BYTES / 1e9:.0f} GB;\n{TASK_TOKENS:,} task tokens and {PAIRS} pairs of "
        f"2 x {SIDE_TOKENS} tokens a GPU and step, alignment at half the depth, LoRA of rank {LORA_RANK};\n"
        f"{WIDTH} bytes a parameter and a gradient on the way"
    )


# --------------------------------------------------------------------------------------------------------------- step


def embeddings(pairs: int, hidden: int, ranks: int) -> list[Traffic]:
    """Of the exact global InfoNCE: fp32 embeddings of both sides there, their gradients back. The keys are left out."""
    whole = 2 * pairs * ranks * hidden * 4
    return [Traffic("all-gather", whole), Traffic("reduce-scatter", whole)]


def zero_traffic(
    stage: int,
    passes: list[Reach],
    width: int = WIDTH,
    bucket: float = 500e6,
    ahead: int = 50_000_000,
    kept: int = 10**9,
) -> list[Traffic]:
    """Of parameters and gradients in one step: the task's pass first, then, if there is one, alignment's.

    Rajbhandari et al. 2020, section 7: with psi parameters, ZeRO-0 to 2 move 2 psi, ZeRO-3 moves 3 psi. DeepSpeed 0.19,
    as mlalign drives it, moves more. ZeRO-1 and 2 all-reduce the gradients (use_multi_rank_bucket_allreduce) and then
    gather the new parameters: 3 psi. ZeRO-2 and 3 reduce after each backward, but gradients of adapters once. ZeRO-3
    gathers `ahead` elements at once, or a larger tensor, in each forward and backward, but in the backward none of the
    last `kept` elements of the forward: they stay. It takes whole tensors, and so a fifth fewer calls than counted.
    """
    task, gathers = passes[0], []
    if stage == 3:
        for each in passes:
            elements = 2 * each.parameters - min(kept, each.parameters)
            gathers.append(Traffic("all-gather", width * elements, min(2 * each.tensors, ceil(elements / ahead))))
    elif stage:
        gathers = [Traffic("all-gather", width * task.trainable)]
    kind = "reduce-scatter" if stage == 3 else "all-reduce"
    each_backward = stage >= 2 and task.trainable == task.parameters
    reduced = passes if each_backward else passes[:1]
    return gathers + [Traffic(kind, width * each.trainable, ceil(each.trainable / bucket)) for each in reduced]


def states(stage: int, model: Reach, ranks: int) -> float:
    """Bytes of a rank's model states, AdamW in bf16: 2 of a parameter, 2 of its gradient, 12 of master and moments.

    Rajbhandari et al. 2020, section 5: ZeRO-1 shards the last, ZeRO-2 gradients too, ZeRO-3 all.
    """
    sharded = [ranks if stage >= least else 1 for least in (3, 2, 1)]
    return 2 * model.parameters / sharded[0] + model.trainable * (2 / sharded[1] + 12 / sharded[2])


def compute_seconds(model: Llama, lora: int, layer: int, task_tokens: int, aligned_tokens: int) -> float:
    """Of forward, recomputation and backward: all layers and the head for the task, `layer` layers for alignment.

    Two operations for a weight and a token in each of: forward, forward again with checkpointing, gradients of the
    inputs, and, where the weights are trained, gradients of the weights (Kaplan et al. 2020, section 2.1).
    """
    weights = task_tokens * (model.layers * model.block + model.words) + aligned_tokens * layer * model.block
    return (6 if lora else 8) * weights / (EFFICIENCY * GPU_FLOPS)


def block_rows(pairs: int, ranks: int) -> int:
    """Of a rank's pairs, those whose similarities to all ranks' exist at once: see `objectives.contrast`."""
    return min(pairs, max(64, 2**20 // (pairs * ranks)))


def similarity_seconds(pairs: int, hidden: int, ranks: int) -> float:
    """Of a rank's pairs against all ranks', in both directions: forward, again where there are several blocks, and the
    gradients of both factors."""
    products = 3 if block_rows(pairs, ranks) == pairs else 4
    return 2 * products * 2 * pairs * (pairs * ranks) * hidden / (EFFICIENCY * GPU_FLOPS_FP32)
