"""How near `mlalign plan` comes to the memory that `mlalign train` takes: `python benchmarks/plan.py`.

Made-up Llamas of 20 to 60M parameters, two epochs of made-up rows of mixed lengths, 2 ranks with gloo on this machine's
CPUs, fp32. Estimated is what `mlalign plan` says is the peak of a rank. Measured is what /proc calls VmHWM, the largest
resident memory of a process, of the rank that has more, minus what was resident before the run. Before that, the same
process trains a model of nearly no size with the same layout: what libraries, threads and rows take is not counted.

Two runs each. `given back`: MALLOC_MMAP_THRESHOLD_=65536, with which glibc's malloc gives freed tensors back at once, as
CUDA's `max_memory_allocated` does not count what is freed. `glibc`: as it comes. It keeps freed blocks of up to 32 MiB on
its heap, and lengths differ from batch to batch, so that the heap is never quite filled again: no sum of tensors tells
how much that is.
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

from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mlalign import distributed, tracker
from mlalign.config import Config

MIB = 2**20
console = Console(width=110)

#: hidden, MLP, blocks, heads, key-value heads, vocabulary, tied embeddings; all but the first line of each differ
SHAPES = {
    "tiny": (16, 16, 2, 2, 1, 300, True),
    "wide": (768, 2048, 4, 12, 4, 8_000, False),
    "deep": (320, 1280, 16, 5, 5, 4_000, True),
    "words": (384, 1024, 6, 6, 2, 64_000, True),
}
#: shape, LoRA rank (0 = full fine-tuning), gradient checkpointing, attention
CASES = [
    ("wide", 0, False, "sdpa"),
    ("wide", 0, True, "sdpa"),
    ("deep", 8, False, "eager"),
    ("deep", 8, True, "sdpa"),
    ("words", 0, False, "sdpa"),
    ("words", 16, False, "sdpa"),
]


def make_model(shape: str, folder: Path) -> str:
    """A random Llama and a tokenizer of bytes."""
    hidden, mlp, blocks, heads, kv_heads, vocabulary, tied = SHAPES[shape]
    words = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    bytes_ = Tokenizer(models.BPE(vocab=words, merges=[]))
    bytes_.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_.decoder = decoders.ByteLevel()
    bytes_.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=bytes_, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(folder / shape)
    settings = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=1024,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    LlamaForCausalLM(settings).save_pretrained(folder / shape)
    return str(folder / shape)


def write_rows(folder: Path, rows: int = 32) -> None:
    """Task rows of 60 to 250 tokens and pairs of 20 to 120 tokens a side."""
    rng = random.Random(0)

    def text(length: int) -> str:
        return "".join(rng.choice("abcdefgh ") for _ in range(length))

    with (folder / "task.jsonl").open("w") as file:
        for _ in range(rows):
            half = rng.randint(30, 125)
            file.write(json.dumps({"prompt": text(half), "completion": text(half), "lang": "en"}) + "\n")
    with (folder / "bitext.jsonl").open("w") as file:
        for i in range(rows):
            sides = {side: f"{text(rng.randint(20, 115))}{side}{i}" for side in ("src", "tgt")}
            file.write(json.dumps(sides | {"src_lang": "de", "tgt_lang": "en"}) + "\n")


def config_of(case: tuple, stage: str, folder: Path) -> dict[str, Any]:
    shape, lora, checkpointing, attention = case
    return {
        "run_dir": str(folder / f"run-{os.getpid()}-{shape}-{stage}"),
        "model": {
            "path": str(folder / shape),
            "gradient_checkpointing": checkpointing,
            "attention": attention,
            "precision": "fp32",
        },
        "lora": {"r": lora} if lora else None,
        "task": {"train": str(folder / "task.jsonl"), "batch_size": 16, "micro_batch_size": 4},
        "alignment": {"train": str(folder / "bitext.jsonl"), "batch_size": 32, "micro_batch_size": 8},
        "optimizer": {"steps": 3},
        "deepspeed": f"ds_configs/{stage}.json",
    }


# -------------------------------------------------------------------------------------------------------- one process


def resident(name: str) -> int:
    """Bytes: VmRSS is what is resident now, VmHWM the most since the mark was reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def measure(path: str) -> None:
    """On each rank: train nearly nothing, then train; prints what the second took."""
    from mlalign.commands.train import train

    small, large = (Config.model_validate(values) for values in json.loads(Path(path).read_text()))
    train(small)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    before = resident("VmRSS")
    train(large)
    peaks = distributed.gather_objects(resident("VmHWM") - before)
    if distributed.is_main():
        print("PEAK", max(peaks))


def estimate(values: dict[str, Any]) -> tuple[int, str]:
    """The plan's peak in bytes, and the phase that it is in."""
    from mlalign.commands.plan import Settings, plan

    tracker.console.quiet = True
    result = plan(Config.model_validate(values), Settings(ranks=2))
    return result["memory"]["peak"], result["memory"]["peak_phase"]


# -------------------------------------------------------------------------------------------------------------- table


def measured(small: dict, large: dict, folder: Path, give_back: bool) -> int:
    (folder / "configs.json").write_text(json.dumps([small, large]))
    launcher = [str(Path(sys.executable).with_name("torchrun")), "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | ({"MALLOC_MMAP_THRESHOLD_": "65536"} if give_back else {})
    output = subprocess.run(
        [*launcher, __file__, "--measure", str(folder / "configs.json")],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if "PEAK" not in output.stdout:
        sys.exit(output.stdout + output.stderr)
    return int(output.stdout.split("PEAK ")[1].split()[0])


def main(stages: list[str], shapes: list[str]) -> None:
    table = Table(
        "model", "trained", "ckpt", "attention", "ZeRO", "phase", "estimated", "given back", "ratio", "glibc", "ratio"
    )
    with tempfile.TemporaryDirectory(prefix="memory-benchmark-") as name:
        folder = Path(name)
        for shape in SHAPES:
            make_model(shape, folder)
        write_rows(folder)
        for case in (case for case in CASES if case[0] in shapes):
            for stage in stages:
                small, large = config_of(("tiny", *case[1:]), stage, folder), config_of(case, stage, folder)
                expected, phase = estimate(large)
                found = []
                for turn, give_back in enumerate((True, False)):
                    runs = [values | {"run_dir": f"{values['run_dir']}-{turn}"} for values in (small, large)]
                    found.append(measured(*runs, folder, give_back))
                shape, lora, checkpointing, attention = case
                row = [
                    shape,
                    f"LoRA {lora}" if lora else "full",
                    "yes" if checkpointing else "no",
                    attention,
                    stage[4:],
                    phase,
                ]
                row += [f"{expected / MIB:.0f}"]
                for peak in found:
                    row += [f"{peak / MIB:.0f}", f"{expected / peak:.2f}"]
                table.add_row(*row)
                print("|", " | ".join(row), "|", flush=True)
    console.print(table)


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
