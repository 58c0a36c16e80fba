"""Cells: an arm of a study, trained with a seed, evaluated and probed, by mlalign's own commands. One process a cell.

A cell is a directory, <arm>/seed-<n>: commands.log is what was run and printed, run/ what was trained, evaluation/ and
probe/ what came out, cell.json the numbers that tables are made of, written last. A cell that was stopped goes on,
since every command does; one that has cell.json is not run again.
"""

import json
import os
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

from studies import Arm

from mlalign.errors import UserError
from mlalign.tracker import say

RECIPE = Path(__file__).with_name("recipe.yaml")


@dataclass
class Setting:
    """What all cells of a study have in common."""

    folder: Path  #: of the cells
    data: Path  #: see material.prepare
    base: str  #: directory or hub id of the base model
    layer: int  #: at which adapters are merged: half the depth
    steps: int
    supervised: tuple[str, ...]
    aligned: tuple[str, ...]
    test_rows: int
    deadline: float = float("inf")  #: by time.monotonic; what runs then is stopped, to go on another time
    environment: dict[str, str] = field(default_factory=dict)


class OutOfTimeError(Exception):
    """The budget is used up."""


@dataclass(frozen=True)
class Cell:
    """One arm with one seed."""

    arm: Arm
    seed: int

    def folder(self, setting: Setting) -> Path:
        """Where the cell lies."""
        return setting.folder / self.arm.name.replace(" ", "_").replace(",", "").replace("'", "") / f"seed-{self.seed}"

    def parts(self) -> "list[Cell]":
        """Cells that must be done before this one."""
        return [Cell(part, self.seed) for part in self.arm.parts or ()]

    def result(self, setting: Setting) -> dict | None:
        """What cell.json holds; None if the cell is not done."""
        path = self.folder(setting) / "cell.json"
        return json.loads(path.read_text()) if path.exists() else None


def run_all(cells: list[Cell], setting: Setting, jobs: int, shown: Callable[[Cell, dict], None]) -> None:
    """Run what is not done, `jobs` at a time, in order, until the deadline. `shown` is called for every cell that ends.

    Raises UserError where a command failed, after the cells that run beside it have ended.
    """
    pending = [cell for cell in cells if cell.result(setting) is None]
    running = {}
    with ThreadPoolExecutor(jobs) as pool:
        while True:
            for cell in list(pending):
                ready = all(part.result(setting) for part in cell.parts())
                if ready and len(running) < jobs and time.monotonic() < setting.deadline:
                    pending.remove(cell)
                    running[pool.submit(_run, cell, setting)] = cell
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                cell = running.pop(future)
                try:
                    shown(cell, future.result())
                except OutOfTimeError:
                    pass
                except UserError:
                    pending.clear()
                    wait(running)
                    raise


def _run(cell: Cell, setting: Setting) -> dict:
    folder, start = cell.folder(setting), time.monotonic()
    log, arm = folder / "commands.log", cell.arm
    folder.mkdir(parents=True, exist_ok=True)
    rows = setting.data / arm.answers
    run = folder / "run"
    if arm.parts:
        task, alignment = (part.folder(setting) / "run" for part in cell.parts())
        dev = [word for each in setting.supervised for word in ("--dev", rows / f"dev.{each}.jsonl")]
        tuned = [*_scoring(arm), *dev, "--grid", "0.1,0.2,0.3,0.4,0.5,0.6,0.7"] if arm.merge == "auto" else []
        weight = ["--weight", arm.merge, "--layers", setting.layer]
        mlalign(log, "merge", task, alignment, "--output", run, *weight, *tuned, setting=setting)
    else:
        mlalign(log, "train", RECIPE, *_overrides(cell, setting, run), setting=setting)
    trained = time.monotonic() - start
    result = {"arm": arm.name, "seed": cell.seed, "seconds": {"training": trained}}
    model = [run / "model"] if (run / "model").exists() else [setting.base, "--adapter", run]
    if "task=null" not in arm.changes:
        mlalign(
            log, "evaluate", *model, "--test", rows / "test.*.jsonl", *_scoring(arm),
            "--output", folder / "evaluation", "--max-rows", setting.test_rows,
            "--supervised", ",".join(setting.supervised), "--aligned", ",".join(setting.aligned), setting=setting,
        )  # fmt: skip
        report = json.loads((folder / "evaluation/report.json").read_text())
        result["f1"] = report["scores"]["f1"]
        result["groups"] = {name: group["scores"]["f1"] for name, group in report["groups"].items()}
    result["retrieval"] = probe(log, setting, folder / "probe", *model)
    result["seconds"]["whole"] = time.monotonic() - start
    aside = folder / "cell.json.new"
    aside.write_text(json.dumps(result, indent=1) + "\n")
    aside.rename(folder / "cell.json")
    return result


def _scoring(arm: Arm) -> list[object]:
    """How answers are generated and scored."""
    words = arm.answers == "words"
    return [
        "--task",
        "slot_filling" if words else "items",
        "--batch-size",
        200,
        "--max-new-tokens",
        48 if words else 16,
    ]


def _overrides(cell: Cell, setting: Setting, run: Path) -> list[str]:
    """Of recipe.yaml: what the study fills in, then what the arm changes."""
    rows = setting.data / cell.arm.answers
    values = {"run_dir": run, "seed": cell.seed, "model.path": setting.base, "optimizer.steps": setting.steps}
    if "task=null" not in cell.arm.changes:
        dev = [str(rows / f"dev.{language}.jsonl") for language in setting.supervised]
        values |= {"task.train": rows / "train.*.jsonl", "task.dev": f"[{','.join(dev)}]"}
    if "alignment=null" not in cell.arm.changes:
        values |= {f"alignment.{split}": setting.data / f"massive/{split}.*.jsonl" for split in ("train", "dev")}
    filled = [f"{key}={value}" for key, value in values.items()]
    return filled + [change.format(data=setting.data, twice=2 * setting.steps) for change in cell.arm.changes]


def probe(log: Path, setting: Setting, output: Path, *model: object) -> dict:
    """`languages`, and by `directions` the retrieval accuracy (cosine), [layers + 1][languages][languages]."""
    mlalign(log, "probe", *model, "--data", setting.data / "parallel", "--output", output, setting=setting)
    found = json.loads((output / "probe.json").read_text())
    directions = next(iter(found["models"].values()))["mean"]["directions"]["cosine"]
    return {"languages": found["languages"], "directions": directions}


def mlalign(log: Path, *arguments: object, setting: Setting | None = None) -> None:
    """Run a command of mlalign; what it prints goes to `log`.

    Raises UserError if it fails, and OutOfTimeError if the deadline came, at which it was asked to stop.
    """
    command = [sys.executable, "-m", "mlalign", *map(str, arguments)]
    log.parent.mkdir(parents=True, exist_ok=True)
    left = setting.deadline - time.monotonic() if setting else float("inf")
    with log.open("a", encoding="utf-8") as file:
        file.write(f"$ {shlex.join(['mlalign', *command[3:]])}\n")
        file.flush()
        environment = os.environ | (setting.environment if setting else {})
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
        timer = threading.Timer(min(left, threading.TIMEOUT_MAX), process.terminate)
        timer.daemon = True
        timer.start()
        try:
            status = process.wait()
        finally:
            timer.cancel()
            if process.poll() is None:  # an interrupt of the study
                process.terminate()
                process.wait()
    if setting and time.monotonic() >= setting.deadline:
        raise OutOfTimeError
    if status:
        last = log.read_text(encoding="utf-8").strip().splitlines()[-1]
        raise UserError(
            f"`{shlex.join(['mlalign', *command[3:5]])} ...` failed with exit code {status}, see {log}: {last}"
        )


def announce(text: str) -> None:
    """One line with the time of day."""
    say(f"[{time.strftime('%H:%M:%S')}] {text}")
