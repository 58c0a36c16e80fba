"""How training scales with the number of ranks: `python benchmarks/scaling.py`, some minutes.

Measured: weak scaling of the real joint step of `mlalign train`, full fine-tuning of a made-up Llama in fp32, on 1, 2
and 4 gloo ranks of one thread each on this machine, under ZeRO-0, 2 and 3 as ds_configs/ ships them. Every rank has the
same rows of the same lengths, so that its tokens per second, of those of 1 rank, are the step's time on 1 over that on
W. As many runs of one rank at the same time do not communicate: what they lose is the machine's doing, and joined over
apart is what the ranks' talking costs. Medians of rounds that go through all of them in turn, of ratios within a round.
Bytes are counted by on_paper.py, and seen as what a rank has written to its sockets, by /proc/self/io.

On paper: seconds of computation and of communication in a step of Llama 3 8B and 70B on 8 to 1,024 GPUs, what share of
the step communication takes if none or all of it happens while the GPU computes, and what alignment adds to it. The
assumptions and their sources are in on_paper.py, and printed. Layouts whose model states exceed a GPU are left out.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import on_paper as paper
from byte_llama import WORDS, save_byte_llama, save_rows
from ranks import Ranks, sent
from rich.console import Console
from rich.table import Table

STAGES, RANKS = (0, 2, 3), (1, 2, 4)
ROWS, TOKENS, PAIRS, SIDE = 4, 128, 8, 32  # of a rank and step
MODEL = paper.Llama("made up", hidden=256, mlp=704, layers=6, key_values=128, vocabulary=len(WORDS))
GPUS = (8, 64, 256, 1024)
console = Console(width=130)
running: dict[int, Any] = {}  #: on each rank: stage -> `train.real_steps`


def prepare(folder: Path) -> None:
    """The model, and rows of one length."""
    save_byte_llama(
        folder / "model",
        hidden_size=MODEL.hidden,
        intermediate_size=MODEL.mlp,
        num_hidden_layers=MODEL.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    save_rows(folder, TOKENS, SIDE)


def begin(folder: str, stage: int) -> None:
    """On each rank: build the engine and take a first step, which loads and allocates."""
    from mlalign import distributed
    from mlalign.commands.train import real_steps
    from mlalign.config import Config

    ranks = distributed.world_size()
    values = {
        "run_dir": f"{folder}/run",
        "model": {"path": f"{folder}/model", "precision": "fp32"},
        "lora": None,
        "task": {"train": f"{folder}/task.jsonl", "batch_size": ROWS * ranks, "micro_batch_size": ROWS},
        "alignment": {"train": f"{folder}/bitext.jsonl", "batch_size": PAIRS * ranks, "micro_batch_size": PAIRS},
        "optimizer": {"steps": 1},
        "deepspeed": f"ds_configs/zero{stage}.json",
    }
    running[stage] = real_steps(Config.model_validate(values))
    next(running[stage])


def step(stage: int) -> tuple[float, int]:
    """On each rank: seconds of one step, and bytes sent in it."""
    from mlalign import distributed

    distributed.barrier()
    before, start = sent(), time.perf_counter()
    next(running[stage])
    return time.perf_counter() - start, sent() - before


def measure(rounds: int, folder: str) -> dict[tuple[str, int, int], list[tuple[float, int]]]:
    """("joined" or "apart", stage, ranks) -> of each round: seconds of the slowest rank, and bytes that one sends."""
    joined = {size: [Ranks(size)] for size in RANKS}
    apart = joined[1] + [Ranks(1) for _ in range(max(RANKS) - 1)]
    for stage in STAGES:
        for group in {*apart, *(group for [group] in joined.values())}:
            group.run(begin, folder, stage)

    def together(groups: list[Ranks], stage: int) -> tuple[float, int]:
        for group in groups:
            group.start(step, stage)
        seconds, sizes = zip(*(result for group in groups for result in group.results()))
        return max(seconds), max(sizes)

    found: dict[tuple[str, int, int], list[tuple[float, int]]] = {}
    for _ in range(rounds):
        for stage in STAGES:
            for size in RANKS:
                found.setdefault(("joined", stage, size), []).append(together(joined[size], stage))
                found.setdefault(("apart", stage, size), []).append(together(apart[:size], stage))
    return found


def counted(stage: int, ranks: int) -> float:
    """Bytes that a rank sends in a measured step: fp32, and gloo."""
    passes = [
        paper.reach(MODEL, 0, MODEL.layers, head=True),
        paper.reach(MODEL, 0, MODEL.layers // 2, head=False),
    ]
    traffic = paper.zero_traffic(stage, passes, width=4) + paper.embeddings(PAIRS, MODEL.hidden, ranks)
    return paper.sends(traffic, ranks, paper.gloo("as measured"))


def show_measured(rounds: int) -> None:
    with tempfile.TemporaryDirectory(prefix="scaling-benchmark-") as name:
        prepare(Path(name))
        found = measure(rounds, name)
    parameters = paper.reach(MODEL, 0, MODEL.layers, head=True).parameters
    table = Table(title=f"measured: the joint step of {parameters / 1e6:.1f}M parameters, {os.cpu_count()} cores")
    for column in ("ZeRO", "ranks", "seconds", "tokens/s", "of 1 rank's", "runs apart", "joined / apart"):
        table.add_column(column)
    for column in ("sent, MB", "counted, MB"):
        table.add_column(column)
    tokens = ROWS * TOKENS + 2 * PAIRS * SIDE

    def ratio(above: tuple[str, int, int], below: tuple[str, int, int]) -> str:
        """Median over rounds of what was timed in the same round."""
        return f"{statistics.median(a / b for (a, _), (b, _) in zip(found[above], found[below])):.2f}"

    for stage in STAGES:
        for ranks in RANKS:
            one, joined, apart = ("joined", stage, 1), ("joined", stage, ranks), ("apart", stage, ranks)
            seconds, size = (statistics.median(values) for values in zip(*found[joined]))
            crowd = f"{ranks} on {os.cpu_count()} cores" if ranks > os.cpu_count() else str(ranks)
            rates = (f"{seconds:.2f}", f"{ranks * tokens / seconds:,.0f}", ratio(one, joined), ratio(one, apart))
            sizes = (f"{size / 1e6:.2f}", f"{counted(stage, ranks) / 1e6:.2f}")
            table.add_row(str(stage), crowd, *rates, ratio(joined, apart), *sizes)
    console.print(table)


def show_paper(network: paper.Network) -> None:
    console.print(paper.describe(network))
    console.print(paper.assumptions())
    table = Table(title="on paper: seconds of a joint step, and the share that communication takes of it")
    for column in (
        "model",
        "trained",
        "ZeRO",
        "GPUs",
        "GB states",
        "compute",
        "communicate",
        "none hidden",
        "all hidden",
    ):
        table.add_column(column)
    for column in ("alignment adds", "of it embeddings"):
        table.add_column(column)
    for model in (paper.LLAMA_8B, paper.LLAMA_70B):
        for lora in (0, paper.LORA_RANK):
            for stage in range(4):
                for ranks in GPUS:
                    row = on_paper(model, lora, stage, ranks, network)
                    if row:
                        table.add_row(model.name, f"LoRA {lora}" if lora else "full", str(stage), f"{ranks:,}", *row)
    console.print(table)


def on_paper(model: paper.Llama, lora: int, stage: int, ranks: int, network: paper.Network) -> list[str] | None:
    """What the table says of one layout; None where its model states exceed a GPU."""
    half = model.layers // 2
    task, aligned = paper.reach(model, lora, model.layers, head=True), paper.reach(model, lora, half, head=False)
    states = paper.states(stage, task, ranks)
    if states > paper.GPU_BYTES:
        return None
    compute = paper.compute_seconds(model, lora, half, paper.TASK_TOKENS, 2 * paper.PAIRS * paper.SIDE_TOKENS)
    without = paper.seconds(paper.zero_traffic(stage, [task]), ranks, network)
    gather = paper.seconds(paper.embeddings(paper.PAIRS, model.hidden, ranks), ranks, network)
    communicate = paper.seconds(paper.zero_traffic(stage, [task, aligned]), ranks, network) + gather
    shares = (communicate / (compute + communicate), max(0, 1 - compute / communicate))
    times = (compute, communicate)
    added = (communicate - without, gather)
    return [
        f"{states / 1e9:.1f}",
        *(f"{value:.3f}" for value in times),
        *(f"{share:.0%}" for share in shares),
        *(f"{value:.3f}" for value in added),
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--narrow", action="store_true", help="One adapter of 400 Gbit/s a node, not one a GPU.")
    parser.add_argument("--paper", action="store_true", help="Measure nothing.")
    options = parser.parse_args()
    if not options.paper:
        show_measured(options.rounds)
    show_paper(paper.NARROW if options.narrow else paper.WIDE)
