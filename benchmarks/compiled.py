"""Whether torch.compile pays: `python benchmarks/compiled.py`.

Forward and backward of task micro-batches through a made-up Llama with LoRA, its blocks as they are and compiled one by
one, as `model.compile` does it, with shapes that change from batch to batch as they do in training, and with one shape.
In turn, in one process.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "2")

import torch
from byte_llama import save_byte_llama
from rich.console import Console
from rich.table import Table
from step import SHAPES

from mlalign import distributed
from mlalign.collate import collate_task
from mlalign.compiling import compile_blocks
from mlalign.config import Lora, Model
from mlalign.evaluation import to_device
from mlalign.examples import TaskExample
from mlalign.model import AlignedModel, add_lora, load_lm

ROWS, LENGTHS = 8, (90, 130, 170, 210)  #: rows of a pass; tokens of a row, in turn


def batch(length: int, device: torch.device) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 250, (ROWS, length), generator=torch.Generator().manual_seed(length)).tolist()
    return to_device(collate_task([TaskExample(row, row, length - 1, "") for row in ids], pad=0), device)


def build(folder: str, compiled: bool) -> AlignedModel:
    lm = add_lora(load_lm(Model(path=folder)), Lora()).to(distributed.device())
    if compiled:
        compile_blocks(lm)
    aligned = AlignedModel(lm, 1, "mean").train()
    aligned.ask()
    return aligned


def step(aligned: AlignedModel, length: int) -> float:
    """Seconds."""
    inputs = batch(length, distributed.device())
    start = time.perf_counter()
    aligned(task=inputs).backward()
    if distributed.uses_cuda():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main(shape: str, rounds: int) -> None:
    with tempfile.TemporaryDirectory(prefix="compile-benchmark-") as name:
        folder = save_byte_llama(Path(name) / "model", **SHAPES[shape])
        models = {way: build(folder, way == "compiled") for way in ("as they are", "compiled")}
    first = {way: sum(step(aligned, length) for length in LENGTHS) for way, aligned in models.items()}
    table = Table("lengths", "blocks", "seconds a pass", "ratio", f"first {len(LENGTHS)} passes, seconds")
    for title, lengths in (("one", LENGTHS[2:3]), ("four in turn", LENGTHS)):
        seconds: dict[str, list[float]] = {way: [] for way in models}
        for number in range(rounds * len(LENGTHS)):
            for way, aligned in models.items():
                seconds[way].append(step(aligned, lengths[number % len(lengths)]))
        for way, times in seconds.items():
            ratio = statistics.median(a / b for a, b in zip(times, seconds["as they are"]))
            table.add_row(title, way, f"{statistics.median(times):.3f}", f"{ratio:.2f}", f"{first[way]:.1f}")
    Console(width=100).print(table)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    main(options.shape, options.rounds)
