"""What alignment adds to a training step, against the least it could: `python benchmarks/step.py`.

A made-up Llama with LoRA, through the real step of `mlalign train`: the task alone, alignment alone, and both, without
and with their gradients compared, each in a process of its own. On CPUs they take turns, a step each; on a GPU they run
one after the other, or their memory would not fit (`--shape 8b` is Llama 3 8B's). With real rows, as `mlalign prepare`
makes them with `--format plain`:

    python benchmarks/step.py --task data/massive/train.en.jsonl --bitext data/bitext/train.spa-eng.jsonl

The limit is from token counts alone. An alignment token passes k of L blocks, a task token all of them, and a learned
one the LM head: with A, T and n of them, joint / task is at least 1 + A k / (T L + n head / block), block and head
being the weights of one of each, for forward and backward do the same number of multiplications with every weight.
`--peak` adds the share of so many TFLOP/s that these are: 4 a weight and token, for adapters need no gradient of the
frozen weights. Seconds, and what is divided by them, are means over the steps; ratios to the task's step are medians.
Memory is the GPU's peak; on CPUs the process's, above what it had before the model was loaded.
"""

import argparse
import json
import os
import random
import statistics
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "2")

from byte_llama import save_byte_llama
from rich.console import Console
from rich.table import Table
from stepper import Stepper

from mlalign.config import Config
from mlalign.dataset import load_dataset
from mlalign.distributed import uses_cuda
from mlalign.model import load_tokenizer

ROWS = 32


def _shape(hidden: int, mlp: int, blocks: int, heads: int, kv_heads: int, vocabulary: int) -> dict[str, Any]:
    return {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": blocks,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "tie_word_embeddings": False,
    }


SHAPES = {"small": _shape(512, 1536, 8, 8, 8, 32_000), "8b": _shape(4096, 14_336, 32, 32, 8, 128_256)}
VARIANTS = {
    "task": {"alignment": None, "interleave": {"ratio": "1:0"}},
    "alignment": {"task": None, "interleave": {"ratio": "0:1"}},
    "joint": {},
    "joint, log_gradients": {"log_gradients": True},
}


class Tokens(NamedTuple):
    """Of one step, in the mean."""

    task: float
    learned: float
    aligned: float


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


def count_tokens(config: Config, steps: int) -> Tokens:
    """Of so many steps after the first one."""
    dataset = load_dataset(config, load_tokenizer(config.model))
    rows = dataset.orders["task"].take((1 + steps) * ROWS)[ROWS:]
    pairs = dataset.orders["alignment"].take((1 + steps) * ROWS)[ROWS:]
    learned = sum(row.learned for row in rows)
    return Tokens(sum(map(len, rows)) / steps, learned / steps, sum(map(len, pairs)) / steps)


def multiplications(shape: dict[str, Any], tokens: Tokens) -> dict[str, float]:
    """With weights, in one forward pass of each variant's step; alignment at half the depth."""
    hidden, blocks = shape["hidden_size"], shape["num_hidden_layers"]
    kept = shape["num_key_value_heads"] / shape["num_attention_heads"]  # of the keys' and values' width
    block = (2 + 2 * kept) * hidden**2 + 3 * hidden * shape["intermediate_size"]
    task = tokens.task * blocks * block + tokens.learned * hidden * shape["vocab_size"]
    alignment = tokens.aligned * (blocks // 2) * block
    return {"task": task, "alignment": alignment, "joint": task + alignment}


def measure(variants: dict[str, dict], rounds: int) -> dict[str, list[tuple[float, int]]]:
    """Seconds and bytes of `rounds` steps of each, after one that loads and allocates."""
    found: dict[str, list[tuple[float, int]]] = {name: [] for name in variants}
    groups = [[name] for name in variants] if uses_cuda() else [list(variants)]
    for group in groups:
        steppers = {name: Stepper(variants[name]) for name in group}
        for _ in range(1 + rounds):
            for name, stepper in steppers.items():
                found[name].append(stepper.step())
        for stepper in steppers.values():
            stepper.end()
    return {name: steps[1:] for name, steps in found.items()}


def main(options: argparse.Namespace) -> None:
    shape = SHAPES[options.shape]
    with tempfile.TemporaryDirectory(prefix="step-benchmark-") as name:
        folder = Path(name)
        made = write_rows(folder)
        values = {
            "run_dir": str(folder / "run"),
            "model": {"path": save_byte_llama(folder / "model", **shape), "attention": options.attention},
            "lora": {"r": 8},
            "task": {"train": options.task or made[0], "batch_size": ROWS, "micro_batch_size": options.micro_batch},
            "alignment": {"train": options.bitext or made[1], "batch_size": ROWS, "micro_batch_size": ROWS},
            "optimizer": {"steps": options.rounds},
            # In bf16 DeepSpeed without ZeRO waits for the GPU once for every tensor that is trained.
            "deepspeed": "ds_configs/zero1.json" if uses_cuda() else None,
        }
        found = measure({name: values | changes for name, changes in VARIANTS.items()}, options.rounds)
        tokens = count_tokens(Config.model_validate(values), options.rounds)
    report(found, tokens, multiplications(shape, tokens), options.peak)


def report(
    found: dict[str, list[tuple[float, int]]], tokens: Tokens, products: dict[str, float], peak: float | None
) -> None:
    passed = {"task": tokens.task, "alignment": tokens.aligned, "joint": tokens.task + tokens.aligned}
    least = products["joint"] / products["task"]
    table = Table("step", "seconds", "tokens/s", "of the task's", "limit", "above the limit", "peak, MiB")
    if peak:
        table.add_column(f"of {peak:g} TFLOP/s")
    for name, steps in found.items():
        kind = name.partition(",")[0]
        seconds = statistics.mean(second for second, _ in steps)  # a mean, as tokens are: lengths vary
        of_task = statistics.median(second / other for (second, _), (other, _) in zip(steps, found["task"]))
        row = [name, f"{seconds:.2f}", f"{passed[kind] / seconds:,.0f}", f"{of_task:.2f}"]
        row += [f"{least:.2f}", f"{of_task / least:.2f}"] if kind == "joint" else ["", ""]
        row.append(f"{max(memory for _, memory in steps) / 2**20:,.0f}")
        table.add_row(*row, *([f"{4 * products[kind] / seconds / peak / 1e12:.0%}"] if peak else []))
    Console(width=110).print(table)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--task", help="Task rows; made-up ones by default.")
    parser.add_argument("--bitext", help="Pairs; made-up ones by default.")
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--attention", default="auto", help="As model.attention: sdpa, flash_attention_2, ...")
    parser.add_argument("--micro-batch", type=int, default=8, help="Task rows of one pass.")
    parser.add_argument("--peak", type=float, help="TFLOP/s of the device, such as 989 for an H100 in bf16.")
    parser.add_argument("--rounds", type=int, default=15)
    main(parser.parse_args())
