"""What one waits for before the first step: `python benchmarks/startup.py`.

`mlalign --help`, and `mlalign train` until it has taken one step and saved it, with a model of nearly no size, so that
hardly any of the time is its loading: with rows that are tokenised first, with rows from the cache, and on two ranks.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from byte_llama import save_byte_llama
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table
from step import write_rows

PROGRAMS = Path(sys.executable).parent
ALONE = [str(PROGRAMS / "mlalign")]
TWO = [str(PROGRAMS / "torchrun"), "--standalone", "--nproc-per-node=2", "-m", "mlalign"]
SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}


def seconds(command: list[str], cache: Path) -> float:
    """On the clock, from the command to its end. Raises CalledProcessError."""
    environment = os.environ | {"MLALIGN_CACHE": str(cache), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    start = time.perf_counter()
    subprocess.run(command, env=environment, check=True, capture_output=True)
    return time.perf_counter() - start


def main(rounds: int) -> None:
    with tempfile.TemporaryDirectory(prefix="startup-benchmark-") as name:
        folder = Path(name)
        task, bitext = write_rows(folder)
        config = {
            "run_dir": "",
            "model": {"path": save_byte_llama(folder / "model", **SHAPE)},
            "task": {"train": task, "batch_size": 8},
            "alignment": {"train": bitext, "batch_size": 8},
            "optimizer": {"steps": 1},
        }
        OmegaConf.save(OmegaConf.create(config), folder / "config.yaml")
        taken: dict[str, list[float]] = {}
        for number in range(1 + rounds):
            cache = folder / f"cache{number}"

            def train(launcher: list[str], run: str, cache: Path = cache, number: int = number) -> float:
                override = f"run_dir={folder / f'{run}{number}'}"
                return seconds([*launcher, "train", str(folder / "config.yaml"), override], cache)

            found = {
                "mlalign --help": seconds([*ALONE, "--help"], cache),
                "train, rows tokenised first": train(ALONE, "fresh"),
                "train, rows from the cache": train(ALONE, "cached"),
                "train, rows from the cache, two ranks": train(TWO, "two"),
            }
            for what, second in found.items():
                if number:  # the first compiles a kernel, and fills the page cache
                    taken.setdefault(what, []).append(second)
    table = Table("command", "seconds")
    for what, each in taken.items():
        table.add_row(what, f"{statistics.median(each):.2f}")
    Console(width=100).print(table)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    main(parser.parse_args().rounds)
