"""What the exact global gather of embeddings costs: `python benchmarks/gather.py`, a minute.

Measured: `distributed.gather_rows_with_grad` as `objectives.alignment_loss` calls it, on 1, 2 and 4 gloo ranks of one
thread each on this machine. Forward gathers the fp32 embeddings of both sides, backward sums their gradients and
scatters them, and the keys, 24 bytes a pair, are gathered beside. Bytes are counted from shapes, 2 x pairs x hidden x 4
received from each other rank in each direction, and seen as what a rank has written to its sockets, by /proc/self/io.
The ranks of a ring send as much as they receive. Times are those of the slowest rank, medians of rounds that go through
all sizes and numbers of ranks in turn.

On paper: the same for many GPUs, from the latency and bandwidth that fit the times of 2 ranks here, and from those that
on_paper.py assumes. Every rank keeps its number of pairs, so the alignment batch grows with the ranks, and with it what
each of them receives: the columns. Block: similarities of a rank's pairs with all columns in one direction. Products:
what it takes to compute both blocks and their gradients. A step is on_paper.py's computation with Llama 3 8B and LoRA.
"""

import argparse
import os
import statistics
import time

os.environ["DS_ACCELERATOR"] = "cpu"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import on_paper as paper
import torch
from ranks import Ranks, sent
from rich.console import Console
from rich.table import Table

from mlalign import distributed

MIB = 2**20
RANKS = (1, 2, 4)
SHOWN = ((32, 1024), (32, 4096), (256, 4096))  # pairs of a rank x hidden
FITTED = ((1, 64), (8, 512), *SHOWN)
GPUS = (8, 64, 256, 1024)
console = Console(width=130)

Sample = dict[str, tuple[float, int]]  #: all-gather, reduce-scatter, keys -> seconds and bytes sent


def gather(pairs: int, hidden: int) -> Sample:
    """On each rank: one gather of random embeddings and back, and one of keys."""
    rows = torch.rand(pairs, 2, hidden, requires_grad=True)
    keys = torch.zeros(pairs, 3, dtype=torch.long)
    sample: Sample = {}

    def timed(name: str, call):
        distributed.barrier()
        before, start = sent(), time.perf_counter()
        result = call()
        sample[name] = time.perf_counter() - start, sent() - before
        return result

    columns = timed("all-gather", lambda: distributed.gather_rows_with_grad(rows))
    gradient = torch.ones_like(columns)
    timed("reduce-scatter", lambda: columns.backward(gradient) if columns is not rows else None)
    timed("keys", lambda: distributed.gather_rows(keys))
    return sample


def slowest(samples: list[Sample]) -> Sample:
    """Times of the slowest rank; bytes are the same on all, but for a few of a barrier that is still on its way."""
    return {name: tuple(max(values) for values in zip(*(each[name] for each in samples))) for name in samples[0]}


def measure(rounds: int) -> dict[tuple[int, int, int], Sample]:
    """(ranks, pairs, hidden) -> medians over rounds, after a first one that connects and allocates."""
    groups = {size: Ranks(size) for size in RANKS}
    cases = [(size, *shape) for shape in FITTED for size in RANKS]
    found: dict[tuple, list[Sample]] = {case: [] for case in cases}
    for _ in range(1 + rounds):
        for size, pairs, hidden in cases:
            found[size, pairs, hidden].append(slowest(groups[size].run(gather, pairs, hidden)))
    return {
        case: {name: tuple(statistics.median(v) for v in zip(*(s[name] for s in samples[1:]))) for name in samples[0]}
        for case, samples in found.items()
    }


def show_measured(found: dict[tuple[int, int, int], Sample], gloo: paper.Network) -> None:
    table = Table(title="measured: MiB sent by a rank, and milliseconds (in brackets: what the fit to 2 ranks says)")
    for name in ("pairs", "hidden", "ranks", "counted", "seen, there", "seen, back", "ms there", "ms back", "ms keys"):
        table.add_column(name)
    for pairs, hidden in SHOWN:
        for ranks in RANKS:
            sample = found[ranks, pairs, hidden]
            counted = 2 * pairs * hidden * 4 * (ranks - 1)
            seen = (f"{sample[name][1] / MIB:.2f}" for name in ("all-gather", "reduce-scatter"))
            times = (
                f"{sample[each.kind][0] * 1e3:.1f} ({paper.seconds([each], ranks, gloo) * 1e3:.1f})"
                for each in paper.embeddings(pairs, hidden, ranks)
            )
            keys = f"{sample['keys'][0] * 1e3:.1f}"
            table.add_row(str(pairs), str(hidden), crowded(ranks), f"{counted / MIB:.2f}", *seen, *times, keys)
    console.print(table)


def crowded(ranks: int) -> str:
    return f"{ranks} on {os.cpu_count()} cores" if ranks > os.cpu_count() else str(ranks)


def show_paper(networks: list[paper.Network]) -> None:
    model, half = paper.LLAMA_8B, paper.LLAMA_8B.layers // 2
    table = Table(title=f"on paper, {model.name}: a rank receives and holds MiB; milliseconds (and share of a step)")
    for name in ("pairs", "ranks", "received", "columns", "block", "products", *(each.name for each in networks)):
        table.add_column(name)
    for pairs in (32, 256):
        aligned = 2 * pairs * paper.SIDE_TOKENS
        step = paper.compute_seconds(model, paper.LORA_RANK, half, paper.TASK_TOKENS, aligned)
        console.print(f"{pairs} pairs: a step computes for {step:.2f} s")
        for ranks in GPUS:
            traffic = paper.embeddings(pairs, model.hidden, ranks)
            columns = traffic[0].whole
            block = 4 * paper.block_rows(pairs, ranks) * pairs * ranks
            sizes = (paper.moved(columns, ranks), columns, block)
            products = paper.similarity_seconds(pairs, model.hidden, ranks)
            times = (products, *(paper.seconds(traffic, ranks, network) for network in networks))
            shown = (f"{seconds * 1e3:,.1f} ({seconds / step:,.1%})" for seconds in times)
            table.add_row(str(pairs), f"{ranks:,}", *(f"{size / MIB:,.1f}" for size in sizes), *shown)
    console.print(table)


def main(rounds: int) -> None:
    found = measure(rounds)
    samples = [
        (each, 2, found[2, pairs, hidden][each.kind][0])
        for pairs, hidden in FITTED
        for each in paper.embeddings(pairs, hidden, 2)
    ]
    gloo = paper.fit("gloo, as here", samples)
    networks = [paper.WIDE, paper.NARROW, gloo]
    show_measured(found, gloo)
    for line in (*map(paper.describe, networks), paper.assumptions()):
        console.print(line)
    show_paper(networks)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=15)
    main(parser.parse_args().rounds)
