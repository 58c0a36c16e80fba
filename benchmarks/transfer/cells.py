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
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from studies import PAPER_ADAPTERS, SMALL_ADAPTERS, Arm

from mlalign.durable import write_whole
from mlalign.errors import UserError
from mlalign.tracker import say

GROUPS = ("supervised", "aligned", "unseen")
RECIPE = Path(__file__).with_name("recipe.yaml")


@dataclass
class Setting:
    """What all cells of a study have in common."""

    folder: Path  #: of the cells
    data: Path  #: see material.prepare
    base: str  #: directory or hub id of the base model
    depth: int  #: blocks of the base model
    pretrained: bool  #: by others: --model
    steps: int
    lr: float
    supervised: tuple[str, ...]
    aligned: tuple[str, ...]
    test_rows: int
    deadline: float = float("inf")  #: by time.monotonic; what runs then is stopped, to go on another time
    environment: dict[str, str] = field(default_factory=dict)
    running: set[subprocess.Popen] = field(default_factory=set)

    @property
    def layer(self) -> int:
        """At which the recipe aligns and adapters are merged: half the depth."""
        return max(1, self.depth // 2)


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
        if not path.exists():
            return None
        result = json.loads(path.read_text())
        if result["made_by"] != self.made_by():
            raise UserError(f"{path} is of an arm of this name that was made otherwise: remove {path.parent}")
        return result

    def made_by(self) -> list:
        """What tells it from another arm of the same name; as in JSON."""
        arm = self.arm
        adapters = [*SMALL_ADAPTERS] if arm.adapter else []
        task = json.loads(json.dumps(asdict(arm.task)))
        return [[*arm.changes], adapters, task, arm.merge, [part.made_by() for part in self.parts()]]


def run_all(cells: list[Cell], setting: Setting, jobs: int) -> None:
    """Run what is not done, `jobs` at a time, in order, until the deadline.

    Raises UserError where a command failed, after the cells that run beside it have ended.
    """
    pending = [cell for cell in cells if cell.result(setting) is None]
    running: dict[Future, Cell] = {}
    with ThreadPoolExecutor(jobs) as pool, _stopping(setting):
        while True:
            for cell in list(pending):
                ready = all(part.result(setting) for part in cell.parts())
                if ready and len(running) < jobs and time.monotonic() < setting.deadline:
                    pending.remove(cell)
                    running[pool.submit(_run, cell, setting)] = cell
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                del running[future]
                try:
                    future.result()
                except OutOfTimeError:
                    pass
                except UserError:
                    pending.clear()
                    wait(running)
                    raise


@contextmanager
def _stopping(setting: Setting) -> Iterator[None]:
    """On Ctrl-C: no command is started any more, and those that run are asked to stop, which leaves them to go on."""
    try:
        yield
    except KeyboardInterrupt:
        setting.deadline = 0.0
        for process in list(setting.running):
            process.terminate()
        raise


def _run(cell: Cell, setting: Setting) -> dict:
    folder, start = cell.folder(setting), time.monotonic()
    log, arm = folder / "commands.log", cell.arm
    folder.mkdir(parents=True, exist_ok=True)
    rows = setting.data / arm.task.name
    supervised, aligned = trained_languages(arm, setting)
    run = folder / "run"
    with _counting(folder / "seconds.json") as count:
        if arm.parts:
            task, alignment = (part.folder(setting) / "run" for part in cell.parts())
            dev = [word for each in supervised for word in ("--dev", rows / f"dev.{each}.jsonl")]
            tuned = [*_scoring(arm), *dev, "--grid", "0.1,0.2,0.3,0.4,0.5,0.6,0.7"] if arm.merge == "auto" else []
            weight = ["--weight", arm.merge, "--layers", setting.layer]
            mlalign(log, "merge", task, alignment, "--output", run, *weight, *tuned, setting=setting)
        else:
            mlalign(log, "train", RECIPE, *_overrides(cell, setting, run), setting=setting)
    seconds = count() + sum(part.result(setting)["seconds"] for part in cell.parts())
    if not any(path.exists() for path in (run / "model", run / "adapter", run / "adapter_config.json")):
        raise UserError(f"{run} is not whole: its command was stopped from outside, and the same one goes on")
    model = [run / "model"] if (run / "model").exists() else [setting.base, "--adapter", run]
    result = {"arm": arm.name, "seed": cell.seed, "made_by": cell.made_by(), "seconds": seconds}
    if "task=null" not in arm.changes:
        mlalign(
            log, "evaluate", *model, "--test", rows / "test.*.jsonl", *_scoring(arm),
            "--output", folder / "evaluation", "--max-rows", setting.test_rows,
            "--supervised", ",".join(supervised), "--aligned", ",".join(aligned), setting=setting,
        )  # fmt: skip
        report = _read(folder / "evaluation/report.json")
        result["scores"] = report["scores"][arm.task.metric]
        result["groups"] = {name: group["scores"][arm.task.metric] for name, group in report["groups"].items()}
    if (run / "metrics.jsonl").exists():  # of a merged adapter there is none
        result["gradients"] = _gradients(run / "metrics.jsonl")
    if arm.task.corpus == "massive":  # of whose languages there is parallel text
        result["retrieval"] = probe(log, setting, folder / "probe", *model)
    write_whole(folder / "cell.json", json.dumps(result, indent=1) + "\n")
    announce(f"{arm.name}, seed {cell.seed}: {_summary(result)}  ({time.monotonic() - start:.0f} s)")
    return result


@contextmanager
def _counting(path: Path) -> Iterator[Callable[[], float]]:
    """Adds the seconds of the block to those of earlier tries, stopped ones too; what it yields says the sum."""
    before, start = json.loads(path.read_text()) if path.exists() else 0.0, time.monotonic()
    try:
        yield lambda: json.loads(path.read_text())
    finally:
        write_whole(path, json.dumps(before + time.monotonic() - start))


def _gradients(path: Path) -> dict[str, list[float]]:
    """`cosine_layer_04`, `norm_ratio_layer_04`, ...: a value for each log step; nothing of a run with one objective."""
    found: dict[str, list[float]] = {}
    for line in map(json.loads, path.read_text().splitlines()):
        for name, value in line.items():
            if name.startswith("gradients/"):
                found.setdefault(name.removeprefix("gradients/"), []).append(value)
    return found


def _summary(result: dict) -> str:
    found = [f"{name} {result['groups'][name]:.3f}" for name in GROUPS if name in result.get("groups", {})]
    return "  ".join(found) or "trained"


def _scoring(arm: Arm) -> list[object]:
    """How answers are generated and scored."""
    return ["--task", arm.task.scorer, "--batch-size", 200, "--max-new-tokens", arm.task.max_new_tokens]


def trained_languages(arm: Arm, setting: Setting) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Supervised and aligned languages: the task's own, or those of the size."""
    return arm.task.supervised or setting.supervised, arm.task.aligned or setting.aligned


def _overrides(cell: Cell, setting: Setting, run: Path) -> list[str]:
    """Of recipe.yaml: what the study fills in, then what the arm changes."""
    rows = setting.data / cell.arm.task.name
    values = {"run_dir": run, "seed": cell.seed, "model.path": setting.base, "optimizer.steps": setting.steps}
    values["optimizer.lr"] = setting.lr
    if "task=null" not in cell.arm.changes:
        dev = [str(rows / f"dev.{language}.jsonl") for language in trained_languages(cell.arm, setting)[0]]
        values |= {"task.train": rows / "train.*.jsonl", "task.dev": f"[{','.join(dev)}]"}
    if "alignment=null" not in cell.arm.changes:
        values |= {f"alignment.{split}": setting.data / f"massive/{split}.*.jsonl" for split in ("train", "dev")}
    filled = [f"{key}={value}" for key, value in values.items()]
    if setting.pretrained:
        filled += PAPER_ADAPTERS
    elif cell.arm.adapter:
        filled += SMALL_ADAPTERS
    known = {"data": setting.data, "twice": 2 * setting.steps, "half": setting.steps // 2}
    known |= {"quarter": max(1, setting.depth // 4), "three_quarters": setting.depth * 3 // 4, "depth": setting.depth}
    return filled + [change.format(**known) for change in cell.arm.changes]


def probe(log: Path, setting: Setting, output: Path, *model: object) -> dict:
    """`languages`, and by `directions` the retrieval accuracy (cosine), [layers + 1][languages][languages]."""
    mlalign(log, "probe", *model, "--data", setting.data / "parallel", "--output", output, setting=setting)
    found = _read(output / "probe.json")
    directions = next(iter(found["models"].values()))["mean"]["directions"]["cosine"]
    return {"languages": found["languages"], "directions": directions}


def _read(path: Path) -> dict:
    """What a command wrote last. Raises UserError where it did not come so far, though it did not fail."""
    if not path.exists():
        raise UserError(f"{path} is missing: its command was stopped from outside, and the same one goes on")
    return json.loads(path.read_text())


def mlalign(log: Path, *arguments: object, setting: Setting | None = None) -> None:
    """Run a command of mlalign; what it prints goes to `log`.

    Raises UserError if it fails, and OutOfTimeError if the deadline came, at which it was asked to stop.
    """
    command = [sys.executable, "-m", "mlalign", *map(str, arguments)]
    log.parent.mkdir(parents=True, exist_ok=True)
    left = setting.deadline - time.monotonic() if setting else float("inf")
    if left <= 0:
        raise OutOfTimeError
    with log.open("a", encoding="utf-8") as file:
        file.write(f"$ {shlex.join(['mlalign', *command[3:]])}\n")
        file.flush()
        environment = os.environ | (setting.environment if setting else {})
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
        if setting:
            setting.running.add(process)
        timer = threading.Timer(min(left, threading.TIMEOUT_MAX), process.terminate)
        timer.daemon = True
        timer.start()
        if setting and time.monotonic() >= setting.deadline:  # Ctrl-C came in between
            process.terminate()
        status = process.wait()
        timer.cancel()
        if setting:
            setting.running.discard(process)
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
