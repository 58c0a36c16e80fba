"""What ZeRO-3 costs beside its gathers: `python benchmarks/zero3.py`, some minutes.

DeepSpeed hooks every module of a model, and LoRA multiplies modules. Here is the real joint step of `mlalign train`,
with adapters of all linear layers, on gloo ranks of one thread each, of a made-up Llama that is as deep as an 8B and of
almost no width: what takes time is what Python does, which on a GPU is time in which no kernels are launched. ZeRO-3 as
mlalign drives it is compared with ZeRO-3 that has neither hooks taken off nor one gather of what is kept whole, and
with layouts that gather nothing; medians of rounds that go through all of them in turn, and of ratios within a round.
Gathers are counted by DeepSpeed's own counters, which leave out that of what is kept whole. What it gathers ahead and
keeps for the backward pass is set to as many blocks as its defaults are for an 8B.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

os.environ["DS_ACCELERATOR"] = "cpu"
os.environ.setdefault("OMP_NUM_THREADS", "1")

from byte_llama import save_byte_llama, save_rows
from ranks import Ranks
from rich.console import Console
from rich.table import Table

BLOCKS, HIDDEN, MLP = 32, 64, 192
ROWS, TOKENS, PAIRS, SIDE = 4, 32, 4, 16  # of a rank and step
BLOCK = 3 * HIDDEN * HIDDEN + 3 * HIDDEN * MLP  #: elements; two of four heads have keys and values
ADAPTER = 8 * MLP  #: elements of the largest tensor of an adapter
#: Of an 8B's blocks of 218M elements, DeepSpeed's default of 50M gathered ahead is 0.23, and of 1,000M kept, 4.6.
SECTION = {
    "stage": 3,
    "stage3_param_persistence_threshold": ADAPTER,
    "stage3_prefetch_bucket_size": int(0.23 * BLOCK),
    "stage3_max_reuse_distance": int(4.6 * BLOCK),
    "stage3_max_live_parameters": int(4.6 * BLOCK),
}
console = Console(width=120)
running: dict[str, Any] = {}  #: on each rank: the steps, and what was counted


class Way(NamedTuple):
    name: str
    stage: int
    all_hooks: bool = False
    checkpointing: bool = False


WAYS = [
    Way("ZeRO-0", 0),
    Way("ZeRO-2", 2),
    Way("ZeRO-3", 3),
    Way("ZeRO-3, DeepSpeed's hooks and gather", 3, all_hooks=True),
]
WAYS += [way._replace(checkpointing=True) for way in WAYS if way.stage in (0, 3)]


def prepare(folder: Path) -> None:
    """The model, and rows of one length."""
    save_byte_llama(
        folder / "model",
        hidden_size=HIDDEN,
        intermediate_size=MLP,
        num_hidden_layers=BLOCKS,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    save_rows(folder, TOKENS, SIDE)
    for stage in (0, 2, 3):
        section = SECTION if stage == 3 else {"stage": stage}
        (folder / f"zero{stage}.json").write_text(json.dumps({"zero_optimization": section}))


def begin(folder: str, way: Way) -> None:
    """On each rank: build the engine and take the first steps, in which DeepSpeed learns what to gather ahead."""
    from deepspeed.runtime.zero import partitioned_param_coordinator as coordinator
    from deepspeed.runtime.zero import partitioned_param_profiler as profiler

    from mlalign import distributed, sharding
    from mlalign.commands.train import real_steps
    from mlalign.config import Config

    if way.all_hooks:
        sharding.unhook_whole_modules = lambda *_: None
    coordinator.ENABLE_PROFILER = True
    running["gathers"], ranks = 0, distributed.world_size()

    def add_up(self) -> None:
        for counter in self.event_counters.values():
            if counter.name.endswith("all_gather"):
                running["gathers"] += counter.num_elem
            counter.reset()

    profiler.PartitionedParameterProfiler.reset_events = add_up
    values = {
        "run_dir": f"{folder}/run",
        "model": {"path": f"{folder}/model", "precision": "fp32", "gradient_checkpointing": way.checkpointing},
        "lora": {"r": 8},
        "task": {"train": f"{folder}/task.jsonl", "batch_size": ROWS * ranks, "micro_batch_size": ROWS},
        "alignment": {"train": f"{folder}/bitext.jsonl", "batch_size": PAIRS * ranks, "micro_batch_size": PAIRS},
        "optimizer": {"steps": 1},
        "deepspeed": f"{folder}/zero{way.stage}.json",
    }
    running["steps"] = real_steps(Config.model_validate(values))
    for _ in range(3):
        next(running["steps"])


def step() -> tuple[float, int]:
    """On each rank: seconds of one step, and elements gathered in about one: the last pass counts in the next."""
    from mlalign import distributed

    distributed.barrier()
    before, start = running["gathers"], time.perf_counter()
    next(running["steps"])
    return time.perf_counter() - start, running["gathers"] - before


def measure(ranks: int, rounds: int, folder: Path) -> dict[Way, list[tuple[float, int]]]:
    """Of each round: seconds of the slowest rank, and elements gathered."""
    groups = {way: Ranks(ranks) for way in WAYS}  # of their own: DeepSpeed changes torch for a whole process
    for way, group in groups.items():
        group.run(begin, str(folder), way)
    found: dict[Way, list[tuple[float, int]]] = {way: [] for way in WAYS}
    for _ in range(rounds):
        for way, group in groups.items():
            seconds, elements = zip(*group.run(step))
            found[way].append((max(seconds), max(elements)))
    return found


def show(found: dict[Way, list[tuple[float, int]]], ranks: int) -> None:
    table = Table(title=f"the joint step of {BLOCKS} blocks of {HIDDEN}, LoRA, {ranks} ranks, {os.cpu_count()} cores")
    for column in ("layout", "checkpointing", "seconds", "of ZeRO-0's", "weights gathered"):
        table.add_column(column)
    weights = BLOCKS * BLOCK
    for way, rounds in found.items():
        base = found[next(each for each in WAYS if each.stage == 0 and each.checkpointing == way.checkpointing)]
        seconds, elements = (statistics.median(values) for values in zip(*rounds))
        ratio = statistics.median(one[0] / other[0] for one, other in zip(rounds, base))
        times = f"{elements / weights:.2f} times" if way.stage == 3 else ""
        table.add_row(way.name, "yes" if way.checkpointing else "no", f"{seconds:.2f}", f"{ratio:.2f}", times)
    console.print(table)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="zero3-benchmark-") as name:
        prepare(Path(name))
        show(measure(options.ranks, options.rounds, Path(name)), options.ranks)
