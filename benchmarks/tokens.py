"""What tokenising costs at a start, and what the cache leaves of it: `python benchmarks/tokens.py`.

Times `load_dataset`, from checked sources to orders that can be drawn from, each way in a process of its own that has
loaded the tokenizer before: each text in a call of its own; texts together, kept in the cache; and from the cache.
Made-up rows and a byte-level BPE trained on them by default; with real ones, as `mlalign prepare` makes them:

    python benchmarks/tokens.py --model MODEL --task 'data/massive/train.*.jsonl' --bitext 'data/bitext/train.*.jsonl'

CPU seconds are of all threads: on a busy machine they say more than seconds.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from resident import resident
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from mlalign import data
from mlalign.config import Config
from mlalign.dataset import load_dataset
from mlalign.model import load_tokenizer

ROWS = 20_000
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WAYS = ("one by one", "together, and kept", "from the cache")


def make_inputs(folder: Path) -> tuple[str, str, str]:
    """A tokenizer, and chat rows and pairs of about the lengths of MASSIVE's and Tatoeba's."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9))) for _ in range(20_000)]

    def text(low: int, high: int) -> str:
        return " ".join(rng.choices(words, k=rng.randint(low, high)))

    system = text(40, 40)
    task = [
        {"messages": [{"role": "system", "content": system}, *_turn(text(4, 12), text(1, 8))], "lang": "en"}
        for _ in range(ROWS)
    ]
    bitext = [{"src": text(4, 12), "tgt": text(4, 12), "src_lang": "es", "tgt_lang": "en"} for _ in range(ROWS)]
    for name, rows in (("task", task), ("bitext", bitext)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<|im_start|>", "<|im_end|>"]
    bpe.train_from_iterator(words, trainers.BpeTrainer(vocab_size=16_000, special_tokens=special, show_progress=False))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder / "model")
    return str(folder / "model"), str(folder / "task.jsonl"), str(folder / "bitext.jsonl")


def _turn(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def measure(way: str, model: str, task: str, bitext: str) -> dict[str, float]:
    """Of this process: rows, seconds, CPU seconds, and MiB that are its own and that it shares, above those before."""
    if way == "one by one":
        data._TOGETHER = 0
    config = Config.model_validate(
        {
            "run_dir": "runs/none",
            "model": {"path": model},
            "task": {"train": task},
            "alignment": {"train": bitext},
            "optimizer": {"steps": 1},
        }
    )
    tokenizer, before = load_tokenizer(config.model), _resident()
    start, cpu = time.perf_counter(), time.process_time()
    dataset = load_dataset(config, tokenizer)
    found = {"seconds": time.perf_counter() - start, "cpu": time.process_time() - cpu}
    after = _resident()
    rows = sum(counts.rows for counts in dataset.counts.values())
    return found | {"rows": rows} | {name: after[name] - before[name] for name in after}


def _resident() -> dict[str, float]:
    """MiB of this process: its own, and mapped from files, which processes share."""
    return {"own": resident("RssAnon") / 2**20, "shared": resident("RssFile") / 2**20}


def main(model: str | None, task: str | None, bitext: str | None) -> None:
    table = Table("way", "rows", "seconds", "CPU seconds", "own MiB", "shared MiB")
    with tempfile.TemporaryDirectory(prefix="tokens-benchmark-") as name:
        made = make_inputs(Path(name)) if None in (model, task, bitext) else (model, task, bitext)
        inputs = [given or own for given, own in zip((model, task, bitext), made)]
        for way in WAYS:
            folder = "unused" if way == "one by one" else "cache"
            environment = os.environ | {"MLALIGN_CACHE": f"{name}/{folder}"}
            command = [sys.executable, __file__, "--way", way, "--model", inputs[0]]
            command += ["--task", inputs[1], "--bitext", inputs[2]]
            done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
            found = json.loads(done.stdout.splitlines()[-1])
            numbers = [
                f"{found['seconds']:.2f}",
                f"{found['cpu']:.2f}",
                f"{found['own']:.0f}",
                f"{found['shared']:.0f}",
            ]
            table.add_row(way, f"{found['rows']:,}", *numbers)
    Console(width=100).print(table)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", help="A tokenizer with a chat template; a made-up one by default.")
    parser.add_argument("--task", help="Task rows; made-up ones by default.")
    parser.add_argument("--bitext", help="Pairs; made-up ones by default.")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    arguments = vars(parser.parse_args())
    way = arguments.pop("way")
    if way:
        print(json.dumps(measure(way, **arguments)))
    else:
        main(**arguments)
