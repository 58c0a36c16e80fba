"""An alignment batch of any size at the memory of one micro-batch: `python benchmarks/gradcache.py`.

Real alignment steps of `mlalign train` on one rank: every pair against every other, whole batches against micro-batches
of 64 pairs. Where a batch has several, they are encoded without gradient first and again with it (GradCache, Gao et al.
2021), all but the last of up to eight. That costs a second forward pass: with adapters, whose backward pass costs about
as much as a forward pass, 1.25 times the whole for two of them, and at most 1.5 times for any number.

Each run is a process of its own, and times are taken in turn. Memory is that of other processes, one after the other,
in which glibc gives freed tensors back at once (MALLOC_MMAP_THRESHOLD_), or it would be that of holes in the heap.
"""

import argparse
import json
import os
import random
import statistics
import tempfile
from pathlib import Path

os.environ["DS_ACCELERATOR"] = "cpu"
os.environ["OMP_NUM_THREADS"] = "1"  # a thread that waits for its turn at a core would spin

from byte_llama import save_byte_llama
from rich.console import Console
from rich.table import Table
from stepper import Stepper

CHUNK = 64
SIZES = (32, 64, 128, 256, 1024, 4096, 8192)
WHOLE = 1024  #: pairs of the largest batch that is also encoded in one piece, for which this shape takes 4 GiB
SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}


def write_pairs(path: Path) -> str:
    """All of one length, so that every micro-batch takes as much memory as any other."""
    rng = random.Random(0)

    def text() -> str:
        return "".join(rng.choice("abcdefgh ") for _ in range(24))

    rows = [{"src": text(), "tgt": text(), "src_lang": "es", "tgt_lang": "en"} for _ in range(max(SIZES))]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def main(rounds: int) -> None:
    in_chunks = [(size, CHUNK) for size in SIZES if size >= CHUNK]
    whole = [(size, size) for size in SIZES if size <= WHOLE]
    runs = {run: [] for run in sorted({*in_chunks, *whole})}
    with tempfile.TemporaryDirectory(prefix="gradcache-benchmark-") as name:
        folder = Path(name)
        values = {
            "run_dir": str(folder / "run"),
            "model": {"path": save_byte_llama(folder / "model", **SHAPE), "precision": "fp32"},
            "lora": {"r": 8},
            "interleave": {"ratio": "0:1"},
            "optimizer": {"steps": 1},
        }
        pairs = write_pairs(folder / "pairs.jsonl")

        def begin(size: int, chunk: int) -> Stepper:
            """Its memory is above that of a process that has taken a step of 8 pairs."""
            whole, small = (
                values | {"alignment": {"train": pairs, "batch_size": count, "micro_batch_size": part}}
                for count, part in ((size, chunk), (8, 8))
            )
            return Stepper(whole, first=small)

        timed = {run: begin(*run) for run in runs}
        for number in range(1 + rounds):
            for run, stepper in timed.items():
                second, _ = stepper.step()
                if number:  # the first allocates what stays
                    runs[run].append(second)
        for stepper in timed.values():
            stepper.end()
        os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
        peaks = {}
        for run in runs:
            stepper = begin(*run)
            _, peaks[run] = stepper.step()
            stepper.end()
    report(runs, peaks)


def report(runs: dict[tuple[int, int], list[float]], peaks: dict[tuple[int, int], int]) -> None:
    base = peaks[CHUNK, CHUNK]
    table = Table(
        "pairs", "at a time", "seconds", "ms a pair", "of the whole batch's", "peak, MiB", f"of {CHUNK} pairs'"
    )
    for (size, chunk), seconds in runs.items():
        whole = runs.get((size, size))
        ratio = statistics.median(a / b for a, b in zip(seconds, whole)) if whole else None
        second, peak = statistics.median(seconds), peaks[size, chunk]
        table.add_row(
            f"{size:,}",
            "all" if chunk == size else f"{chunk}",
            f"{second:.2f}",
            f"{1000 * second / size:.2f}",
            f"{ratio:.2f}" if ratio else "",
            f"{peak / 2**20:.0f}",
            f"{peak / base:.2f}",
        )
    Console(width=100).print(table)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    main(parser.parse_args().rounds)
