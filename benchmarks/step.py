"""What alignment adds to a training step, against the least it could: `python benchmarks/step.py`.

A made-up Llama with LoRA, through the real step of `mlalign train`: the task alone, alignment alone, and both, one step
of each in turn, on one rank of this machine. With real rows, as `mlalign prepare` makes them:

    python benchmarks/step.py --task data/massive/train.en.jsonl --bitext data/bitext/train.spa-eng.jsonl

The limit is from token counts alone. An alignment token passes k of L blocks, a task token all of them, and a learned
one the LM head: with A, T and n of them, joint / task is at least 1 + A k / (T L + n head / block), block and head
being the weights of one of each, for forward and backward do the same number of multiplications with every weight.
"""

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from pathlib import Path

os.environ["DS_ACCELERATOR"] = "cpu"
os.environ.setdefault("OMP_NUM_THREADS", "2")

from byte_llama import save_byte_llama
from rich.console import Console
from rich.table import Table

from mlalign.commands.train import real_steps
from mlalign.config import Config
from mlalign.dataset import load_dataset
from mlalign.model import load_tokenizer

HIDDEN, MLP, BLOCKS, VOCABULARY, ROWS = 512, 1536, 8, 32_000, 32
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": MLP,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
}
VARIANTS = {
    "task": {"alignment": None, "interleave": {"ratio": "1:0"}},
    "alignment": {"task": None, "interleave": {"ratio": "0:1"}},
    "joint": {},
}


def write_rows(folder: Path) -> tuple[str, str]:
    """Lengths like MASSIVE's with its prompt, and Tatoeba's, in bytes."""
    rng = random.Random(0)

    def text(low: int, high: int) -> str:
        return "".join(rng.choice("abcdefgh ") for _ in range(rng.randint(low, high)))

    task = [{"prompt": text(60, 200), "completion": text(4, 60), "lang": "en"} for _ in range(400)]
    pairs = [{"src": text(15, 80), "tgt": text(15, 80), "src_lang": "es", "tgt_lang": "en"} for _ in range(400)]
    for name, rows in (("task", task), ("bitext", pairs)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / "task.jsonl"), str(folder / "bitext.jsonl")


def limit(config: Config, rounds: int) -> float:
    """Of joint / task, from the tokens of the first batches."""
    dataset = load_dataset(config, load_tokenizer(config.model))
    rows = dataset.orders["task"].take(rounds * ROWS)
    pairs = dataset.orders["alignment"].take(rounds * ROWS)
    tokens, learned = sum(map(len, rows)), sum(row.learned for row in rows)
    aligned = sum(len(pair.src) + len(pair.tgt) for pair in pairs)
    block, head = 4 * HIDDEN**2 + 3 * HIDDEN * MLP, HIDDEN * VOCABULARY
    return 1 + aligned * (BLOCKS // 2) / (tokens * BLOCKS + learned * head / block)


def main(task: str | None, bitext: str | None, rounds: int) -> None:
    with tempfile.TemporaryDirectory(prefix="step-benchmark-") as name:
        folder = Path(name)
        made = write_rows(folder)
        values = {
            "run_dir": str(folder / "run"),
            "model": {"path": save_byte_llama(folder / "model", **SHAPE), "precision": "fp32"},
            "lora": {"r": 8},
            "task": {"train": task or made[0], "batch_size": ROWS, "micro_batch_size": 8},
            "alignment": {"train": bitext or made[1], "batch_size": ROWS, "micro_batch_size": ROWS},
            "optimizer": {"steps": rounds},
        }
        configs = {name: Config.model_validate(values | changes) for name, changes in VARIANTS.items()}
        running = {name: real_steps(config) for name, config in configs.items()}
        seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
        for number in range(1 + rounds):
            for name, steps in running.items():
                start = time.perf_counter()
                next(steps)
                if number:  # the first loads and allocates
                    seconds[name].append(time.perf_counter() - start)
        least = limit(configs["joint"], 1 + rounds)
    ratios = {name: [a / b for a, b in zip(times, seconds["task"])] for name, times in seconds.items()}
    table = Table("step", "seconds", "of the task's", "limit", "above the limit")
    for name in VARIANTS:
        of_task = statistics.median(ratios[name])
        shown = [f"{least:.2f}", f"{of_task / least:.2f}"] if name == "joint" else ["", ""]
        table.add_row(name, f"{statistics.median(seconds[name]):.2f}", f"{of_task:.2f}", *shown)
    Console(width=100).print(table)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--task", help="Task rows; made-up ones by default.")
    parser.add_argument("--bitext", help="Pairs; made-up ones by default.")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    main(options.task, options.bitext, options.rounds)
