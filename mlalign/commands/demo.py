"""`mlalign demo`: the whole method in minutes on a CPU, by the very commands a user has. No download, no GPU.

A small language model is trained on unlabelled utterances in seven languages, then fine-tuned twice on English labels
by `mlalign train` on 2 ranks with ZeRO-2 under the deepspeed launcher: on the task alone, and with alignment. `mlalign
evaluate` and `mlalign probe` then show what carried over. Run it again after an interruption and it goes on.
"""

import glob
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from rich.progress import Progress
from rich.table import Table

from mlalign import demo_data
from mlalign.base_model import Shape, train_base
from mlalign.errors import UserError
from mlalign.launchers import free_port
from mlalign.plots import plot_scores
from mlalign.tracker import console, say

RUNS = ("task_only", "aligned")
LAYER = Shape.layers // 2
RANKS = 2

#: Both runs see the same task batches; `aligned` adds a contrastive batch to every step.
RECIPE = """\
# One of the two runs of `mlalign demo`.  Repeat it with:  launch/deepspeed.sh {path} run_dir=somewhere/else
run_dir: {run_dir}
seed: {seed}
model: {{path: {base}}}
lora: null  # all parameters: a model this small has no room for adapters
task:
  train: {train}
  dev: {dev}
  batch_size: 32
  micro_batch_size: 16
  max_length: 128
{alignment}interleave: {{mode: joint, ratio: "{ratio}"}}
optimizer: {{lr: 3.0e-3, schedule: cosine, warmup_ratio: 0.05, steps: {steps}}}
evaluation: {{every: 100, patience: 0}}
checkpoint_every: 100
log_every: 20
deepspeed: ds_configs/zero2.json
"""
ALIGNMENT = """\
alignment:
  train: {bitext}
  dev: {bitext_dev}
  batch_size: 128
  micro_batch_size: 64
  layer: {layer}
"""
STEPS = 300


def demo(folder: Path, seed: int) -> dict:
    """Run everything into `folder`. Returns what `report.json` holds."""
    start = time.monotonic()
    _claim(folder, seed)
    data = demo_data.build(seed)
    _write_data(data, folder / "data")

    _title("1/4  A base model: seven languages, no labels")
    _train_base(data.text, folder / "base", seed)

    for number, name in enumerate(RUNS, 2):
        aligned = name == "aligned"
        extra = f" and aligned at layer {LAYER} of {Shape.layers}" if aligned else ", the task alone"
        _title(f"{number}/4  Fine-tuning on English labels{extra}: {RANKS} ranks, ZeRO-2")
        recipe = folder / f"{name}.yaml"
        data_files = {part: _quoted(folder / f"data/{part}.jsonl") for part in ("train", "dev", "bitext", "bitext_dev")}
        alignment = ALIGNMENT.format(**data_files, layer=LAYER) if aligned else ""
        recipe.write_text(
            RECIPE.format(
                path=recipe,
                run_dir=_quoted(folder / name),
                seed=seed,
                base=_quoted(folder / "base"),
                **data_files,
                alignment=alignment,
                ratio="1:1" if aligned else "1:0",
                steps=STEPS,
            )
        )
        _launch("train", recipe)

    _title("4/4  What carried over")
    for name in RUNS:
        _mlalign(
            "evaluate",
            folder / name / "model",
            "--task",
            "items",
            "--test",
            Path(glob.escape(str(folder))) / "data/test/*.jsonl",
            "--output",
            folder / name / "evaluation",
            "--batch-size",
            84,
            "--max-new-tokens",
            24,
        )
    _mlalign(
        "probe",
        folder / "base",
        "--compare",
        folder / "aligned",
        "--data",
        folder / "data/parallel",
        "--output",
        folder / "probe",
        "--report",
        folder / "task_only/evaluation",
    )
    report = _report(folder, seconds=time.monotonic() - start, seed=seed)
    _show(report, folder)
    return report


def _quoted(path: Path) -> str:
    """For YAML: a file with brackets in its name is that file, and one with a comma is one name."""
    return json.dumps(str(path), ensure_ascii=False)


def _claim(folder: Path, seed: int) -> None:
    """Make the directory; a directory of another seed is refused, one of the same seed goes on."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        stamp = folder / "seed.txt"
        if stamp.exists() and stamp.read_text().strip() != str(seed):
            raise UserError(f"{folder} holds a demo with seed {stamp.read_text().strip()}: choose another --output")
        stamp.write_text(f"{seed}\n")
    except OSError as error:
        raise UserError(f"output {folder} cannot be written: {error.strerror}") from error


def _write_data(data: demo_data.DemoData, folder: Path) -> None:
    parts = {"train": data.train, "dev": data.dev, "bitext": data.bitext, "bitext_dev": data.bitext_dev}
    parts |= {f"test/{language}": rows for language, rows in data.test.items()}
    parts |= {f"parallel/{language}": [{"text": text} for text in texts] for language, texts in data.parallel.items()}
    parts["text"] = [{"text": text} for text in data.text]
    for name, rows in parts.items():
        path = folder / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _train_base(text: list[str], folder: Path, seed: int) -> None:
    """Train the base model, unless it is there from an earlier start."""
    if folder.exists():
        say(f"kept from an earlier start: {folder}")
        return
    steps = 600
    torch.set_num_threads(min(RANKS, os.cpu_count() or 1))
    with Progress(console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("base model", total=steps)

        def progress(step: int, loss: float) -> None:
            bar.update(task, completed=step)
            if step % 100 == 0:
                say(f"step {step}/{steps}  loss {loss:.3f}")

        train_base(text, folder, seed, steps=steps, progress=progress)


def _launch(*arguments: object) -> None:
    """`mlalign ...` on RANKS ranks under the deepspeed launcher."""
    launcher = Path(sys.executable).with_name("deepspeed")
    options = ["--master_port", free_port(), "--num_accelerators", RANKS, "--no_local_rank", "--log_level", "error"]
    _run([launcher, *options, "--module", "mlalign", *arguments], threads=1)


def _mlalign(*arguments: object) -> None:
    _run([sys.executable, "-m", "mlalign", *arguments], threads=RANKS)


def _run(command: list[object], threads: int) -> None:
    words = [str(word) for word in command]
    say(f"$ {' '.join([Path(words[0]).name, *words[1:]])}")
    # The demo is made for two CPU ranks, so that it is the same on every machine, with GPUs or without.
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "DS_ACCELERATOR": "cpu"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', '')}"
    status = subprocess.run(words, env=environment).returncode
    if status:
        raise UserError(f"the command above failed with exit code {status}")


def _report(folder: Path, seconds: float, seed: int) -> dict:
    scores = {name: json.loads((folder / name / "evaluation/report.json").read_text())["scores"]["f1"] for name in RUNS}
    f1 = {name: {language: scores[name][language] for language in demo_data.LANGUAGES} for name in RUNS}
    probe = json.loads((folder / "probe/probe.json").read_text())
    languages, measured = probe["languages"], {when: each["mean"] for when, each in probe["models"].items()}
    report = {
        "f1": f1,
        "retrieval": {
            when: _with_pivot(each["directions"]["cosine"][LAYER], languages) for when, each in measured.items()
        },
        "retrieval_all_directions": {when: each["mean"]["cosine"][LAYER] for when, each in measured.items()},
        "layer": LAYER,
        "seed": seed,
        "seconds": round(seconds, 1),
    }
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    plot_scores({"task only": f1["task_only"], "with alignment": f1["aligned"]}, folder / "f1.png", metric="F1")
    return report


def _with_pivot(directions: list[list[float | None]], languages: list[str]) -> float:
    """Mean retrieval accuracy over languages, to English and back: the directions that bitext was there for."""
    pivot = languages.index(demo_data.PIVOT)
    others = [number for number in range(len(languages)) if number != pivot]
    return sum(directions[o][pivot] + directions[pivot][o] for o in others) / (2 * len(others))


def _show(report: dict, folder: Path) -> None:
    table = Table("", *demo_data.LANGUAGES, "mean without en", title="F1 (labels in English only)")
    for name, scores in report["f1"].items():
        unlabelled = [score for language, score in scores.items() if language != demo_data.PIVOT]
        cells = [f"{score:.2f}" for score in (*scores.values(), sum(unlabelled) / len(unlabelled))]
        table.add_row(name.replace("_", " "), *cells)
    console.print(table)
    before, after = report["retrieval"]["before"], report["retrieval"]["after"]
    say(f"retrieval at layer {LAYER}, to English and back: {before:.2f} before, {after:.2f} after")
    say(f"pictures: {folder / 'f1.png'} and {folder / 'probe'}/*.png; numbers: {folder / 'report.json'}")
    say(f"curves: tensorboard --logdir {folder}")
    say(f"took {report['seconds'] / 60:.1f} minutes")


def _title(text: str) -> None:
    console.rule(text)
