"""How near `mlalign plan` comes to the memory that `mlalign train` takes: `python benchmarks/plan.py`, ten minutes.

Three made-up Llamas under three ZeRO stages, three steps on made-up rows of like lengths, 2 ranks with gloo on this
machine's CPUs, fp32. Estimated is what `mlalign plan` says is the peak of a rank. Measured is VmHWM of /proc, the
largest resident memory of a process, of the rank that has more, less what was resident before the run. Just before, the
same process trains a model of nearly no size in the same layout, so that libraries and threads do not count.

Runs are measured with MALLOC_MMAP_THRESHOLD_=65536, with which glibc's malloc gives freed tensors back at once, so that
they do not count, as they do not in CUDA's `max_memory_allocated`. One run is repeated without: glibc then keeps freed
blocks of up to 32 MiB on its heap, and how much that is no sum of tensors tells.
"""

import argparse
import gc
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"
os.environ.setdefault("OMP_NUM_THREADS", "1")

from byte_llama import save_byte_llama
from resident import forget_peak, resident
from rich.console import Console
from rich.table import Table

from mlalign import distributed, tracker
from mlalign.config import Config

MIB = 2**20
console = Console(width=110)

#: hidden, MLP, blocks, heads, key-value heads, vocabulary, tied embeddings
SHAPES = {
    "tiny": (16, 16, 2, 2, 1, 300, True),
    "wide": (512, 1536, 3, 8, 4, 2_000, False),
    "deep": (256, 704, 12, 4, 4, 2_000, True),
    "words": (256, 512, 4, 4, 2, 32_000, True),
}
#: shape -> LoRA rank (0 = full fine-tuning), gradient checkpointing, attention
CASES = {"wide": (0, False, "sdpa"), "deep": (8, False, "eager"), "words": (0, True, "sdpa")}


def make_model(shape: str, folder: Path) -> None:
    hidden, mlp, blocks, heads, kv_heads, vocabulary, tied = SHAPES[shape]
    save_byte_llama(
        folder / shape,
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        tie_word_embeddings=tied,
    )


def write_rows(folder: Path, rows: int = 16) -> None:
    """Task rows of 240 to 250 tokens and pairs of 110 to 120 tokens a side: batches hold rows of like lengths."""
    rng = random.Random(0)

    def text(length: int) -> str:
        return "".join(rng.choice("abcdefgh ") for _ in range(length))

    with (folder / "task.jsonl").open("w") as file:
        for _ in range(rows):
            half = rng.randint(120, 125)
            file.write(json.dumps({"prompt": text(half), "completion": text(half), "lang": "en"}) + "\n")
    with (folder / "bitext.jsonl").open("w") as file:
        for i in range(rows):
            sides = {side: f"{text(rng.randint(110, 115))}{side}{i}" for side in ("src", "tgt")}
            file.write(json.dumps(sides | {"src_lang": "de", "tgt_lang": "en"}) + "\n")


def config_of(size: str, shape: str, stage: str, folder: Path) -> dict[str, Any]:
    """Values of a config: a model of one size, trained as `shape` is, under a stage."""
    lora, checkpointing, attention = CASES[shape]
    return {
        "run_dir": str(folder / f"run-{size}-{shape}-{stage}"),
        "model": {
            "path": str(folder / size),
            "gradient_checkpointing": checkpointing,
            "attention": attention,
            "precision": "fp32",
        },
        "lora": {"r": lora} if lora else None,
        "task": {"train": str(folder / "task.jsonl"), "batch_size": 8, "micro_batch_size": 2},
        "alignment": {"train": str(folder / "bitext.jsonl"), "batch_size": 16, "micro_batch_size": 4},
        "optimizer": {"steps": 3},
        "deepspeed": f"ds_configs/{stage}.json",
    }


def measure(path: str) -> None:
    """On each rank, for each pair of configs: train nearly nothing, then train; print what the second took."""
    from mlalign.commands.train import train

    for small, large in json.loads(Path(path).read_text()):
        train(Config.model_validate(small))
        gc.collect()
        forget_peak()
        before = resident("VmRSS")
        train(Config.model_validate(large))
        peaks = distributed.gather_objects(resident("VmHWM") - before)
        if distributed.is_main():
            print("PEAK", max(peaks), flush=True)
        gc.collect()


def measured(pairs: list[tuple[dict, dict]], folder: Path, give_back: bool) -> list[int]:
    """Peaks in bytes of the second config of each pair, one after the other in the same two processes."""
    (folder / "configs.json").write_text(json.dumps(pairs))
    launcher = [str(Path(sys.executable).with_name("torchrun")), "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | ({"MALLOC_MMAP_THRESHOLD_": "65536"} if give_back else {})
    command = [*launcher, __file__, "--measure", str(folder / "configs.json")]
    output = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    peaks = [int(line.split()[1]) for line in output.stdout.splitlines() if line.startswith("PEAK")]
    if len(peaks) < len(pairs):
        sys.exit(output.stdout + output.stderr)
    return peaks


def estimate(values: dict[str, Any]) -> tuple[int, str]:
    """The plan's peak in bytes, and the phase that it is in."""
    from mlalign.commands.plan import Settings, plan

    tracker.console.quiet = True
    result = plan(Config.model_validate(values), Settings(ranks=2, device="cpu"))
    return result["memory"]["peak"], result["memory"]["peak_phase"]


def main(stages: list[str], shapes: list[str]) -> None:
    table = Table("model", "trained", "checkpointing", "ZeRO", "phase", "estimated, MiB", "measured, MiB", "ratio")
    with tempfile.TemporaryDirectory(prefix="memory-benchmark-") as name:
        folder = Path(name)
        for shape in SHAPES:
            make_model(shape, folder)
        write_rows(folder)
        cases = [(shape, stage) for shape in shapes for stage in stages]
        pairs = [[config_of(size, shape, stage, folder) for size in ("tiny", shape)] for shape, stage in cases]
        peaks = measured(pairs, folder, give_back=True)
        [as_it_comes] = measured([again(pair) for pair in pairs[:1]], folder, give_back=False)
        for (shape, stage), (_, large), peak in zip(cases, pairs, peaks):
            lora, checkpointing, _ = CASES[shape]
            expected, phase = estimate(large)
            trained = f"LoRA {lora}" if lora else "full"
            sizes = (f"{expected / MIB:.0f}", f"{peak / MIB:.0f}", f"{expected / peak:.2f}")
            table.add_row(shape, trained, "yes" if checkpointing else "no", stage[4:], phase, *sizes)
    console.print(table)
    console.print(f"{cases[0]}: {peaks[0] / MIB:.0f} MiB, with malloc as it comes {as_it_comes / MIB:.0f} MiB")


def again(pair: list[dict]) -> list[dict]:
    """The same runs in directories of their own."""
    return [values | {"run_dir": f"{values['run_dir']}-again"} for values in pair]


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--measure")
    parser.add_argument("--stages", default="zero0,zero2,zero3")
    parser.add_argument("--shapes", default="wide,deep,words")
    options = parser.parse_args()
    if options.measure:
        measure(options.measure)
        sys.stdout.flush()
        os._exit(0)
    main(options.stages.split(","), options.shapes.split(","))
