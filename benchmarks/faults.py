"""Kills a run anywhere, and sees whether it goes on as if nothing had happened: `python benchmarks/faults.py`.

Two ranks train a tiny model with dropout, evaluation, checkpoints and exports. In every trial one of them is killed
(SIGKILL) at a random point of a phase that is drawn first: before, within or after a random call of what the phase is
made of; the other a moment later, as a launcher would. Then the run is started again, and must reach the undisturbed
run's losses, and its weights, to the last bit. Trials go through LoRA under ZeRO-2 and full fine-tuning under ZeRO-3,
with checkpoints written at once and in the background. Ranks are forks of this process, which spares them the imports.
"""

import argparse
import collections
import json
import mmap
import os
import random
import shutil
import signal
import statistics
import struct
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

os.environ |= {"DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
os.environ |= {"OMP_NUM_THREADS": "1"}

import deepspeed  # noqa: F401 (before the forks, which would each take seconds over it)
import torch
from byte_llama import save_byte_llama
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from torch.utils.tensorboard import SummaryWriter  # noqa: F401

from mlalign import checkpoint, dataset, evaluation, model, objectives, resharding  # noqa: F401
from mlalign.commands import train
from mlalign.config import Config
from mlalign.launchers import free_port
from mlalign.loader import Loader

#: Phase -> what it is made of: an object and the name of a function of it.
PHASES: dict[str, tuple[Any, str]] = {
    "resume": (checkpoint, "load"),
    "optimizer step": (train, "_optimizer_step"),
    "save": (checkpoint, "_write_files"),
    "rename": (Path, "rename"),
    "export": (checkpoint, "export"),
    "start": (train, "_make_engine"),
    "data": (Loader, "_make"),
    "passes": (train, "_backward"),
    "evaluation": (train, "evaluate"),
    "sync": (os, "fsync"),
}
ON_RANK_0 = {"rename", "sync"}  # the other rank renames nothing
SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
STEPS, EVERY = 12, 3  #: of a run, and between checkpoints
VARIANTS = [(2, True, False), (3, False, False), (2, True, True), (3, False, True)]  # ZeRO stage, LoRA, in background


class Kill(NamedTuple):
    """When a rank dies: at which call of a phase, and how."""

    phase: str
    rank: int
    call: int  #: from 1
    moment: str  #: before, within, after
    delay: float  #: seconds into the call, for `within`


def write_data(folder: Path) -> dict[str, str]:
    rng = random.Random(0)
    words = ["wake", "me", "up", "play", "the", "song", "weather", "in", "paris", "tomorrow", "nine", "lights", "off"]
    rows = [" ".join(rng.choices(words, k=rng.randint(3, 9))) for _ in range(160)]
    task = [{"prompt": f"{row} =>", "completion": f" {row.split()[0]};", "lang": "en"} for row in rows]
    pairs = [{"src": row, "tgt": row.upper(), "src_lang": "de", "tgt_lang": "en"} for row in rows]
    found = {}
    for name, lines in {"task": task[:120], "task_dev": task[120:], "bitext": pairs[:120], "dev": pairs[120:]}.items():
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        found[name] = str(path)
    return found


def make_config(folder: Path, run: str, stage: int, lora: bool, in_background: bool) -> Config:
    data = {path.stem: str(path) for path in folder.glob("*.jsonl")}
    values = {
        "run_dir": str(folder / run),
        "model": {"path": str(folder / "model")},
        "lora": {"dropout": 0.1} if lora else None,
        "task": {"train": data["task"], "dev": data["task_dev"], "batch_size": 8, "micro_batch_size": 2},
        "alignment": {"train": data["bitext"], "dev": data["dev"], "batch_size": 8, "micro_batch_size": 2},
        "optimizer": {"steps": STEPS, "lr": 1e-3},
        "evaluation": {"every": 4, "patience": 0},
        "checkpoint_every": EVERY,
        "async_checkpoint": in_background,
        "log_every": 1,
        "deepspeed": f"ds_configs/zero{stage}.json",
    }
    return Config.model_validate(values)


class Board:
    """Memory that forks share: steps taken, and how often and how long each phase was entered, of each rank."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 8 * 64)

    def _place(self, rank: int, slot: int) -> int:
        return 8 * (32 * rank + slot)

    def add(self, rank: int, slot: int, value: float) -> None:
        self._memory.seek(self._place(rank, slot))
        before = struct.unpack("d", self._memory.read(8))[0]
        self._memory.seek(self._place(rank, slot))
        self._memory.write(struct.pack("d", before + value))

    def get(self, rank: int, slot: int) -> float:
        self._memory.seek(self._place(rank, slot))
        return struct.unpack("d", self._memory.read(8))[0]


STEPS_TAKEN = 0  #: slots of the board; then calls of each phase, and seconds in it
CALLS = {phase: 1 + number for number, phase in enumerate(PHASES)}
SECONDS = {phase: 1 + len(PHASES) + number for number, phase in enumerate(PHASES)}


def watched(function: Callable, phase: str, rank: int, board: Board, kill: Kill | None) -> Callable:
    """The function, which counts and times its calls, and dies where it is to."""
    lock = threading.Lock()

    def wrapped(*args, **kwargs):
        with lock:
            board.add(rank, CALLS[phase], 1)
        due = kill is not None and kill.phase == phase and board.get(rank, CALLS[phase]) == kill.call
        if due and kill.moment == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        if due and kill.moment == "within":
            threading.Thread(target=lambda: (time.sleep(kill.delay), os.kill(os.getpid(), signal.SIGKILL))).start()
        begun = time.perf_counter()
        result = function(*args, **kwargs)
        board.add(rank, SECONDS[phase], time.perf_counter() - begun)
        if due:  # after, or the call was shorter than the delay
            os.kill(os.getpid(), signal.SIGKILL)
        if phase == "optimizer step":
            board.add(rank, STEPS_TAKEN, 1)
        return result

    return wrapped


def run(config: Config, folder: Path, kill: Kill | None, rng: random.Random) -> tuple[list[int], Board, str]:
    """Both ranks, until they end or one is killed. Returns exit codes, what they counted, and what rank 0 said."""
    board, port, children = Board(), free_port(), []
    for rank in (0, 1):
        child = os.fork()
        if child == 0:
            be_rank(
                config, rank, port, board, kill if kill and kill.rank == rank else None, folder / f"rank-{rank}.log"
            )
        children.append(child)
    codes: dict[int, int] = {}
    while len(codes) < 2:
        child, status = os.wait()
        codes[child] = os.waitstatus_to_exitcode(status)
        if codes[child] != 0 and len(codes) == 1:
            time.sleep(rng.uniform(0, 0.05))  # a launcher takes a moment
            os.kill(next(each for each in children if each != child), signal.SIGKILL)
    return [codes[child] for child in children], board, (folder / "rank-0.log").read_text()


def be_rank(config: Config, rank: int, port: int, board: Board, kill: Kill | None, log: Path) -> None:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()}, MASTER_ADDR="127.0.0.1")
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    code = 1
    try:
        for phase, (owner, name) in PHASES.items():
            setattr(owner, name, watched(getattr(owner, name), phase, rank, board, kill))
        train.train(config)
        code = 0
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", flush=True)
    finally:
        sys.stdout.flush()
        os._exit(code)


def result(run_dir: Path) -> dict[str, Any]:
    """Losses by step, and the weights that were exported. Raises SystemExit for a step that was logged twice."""
    losses: dict[tuple[int, str], float] = {}
    for line in (run_dir / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        for name, value in row.items():
            if name.endswith(("_loss", "accuracy", "lr", "grad_norm")):
                if (row["step"], name) in losses:
                    raise SystemExit(f"{run_dir}: step {row['step']} was logged twice")
                losses[row["step"], name] = value
    (weights,) = [*run_dir.glob("adapter/*.safetensors"), *run_dir.glob("model/*.safetensors")]
    return {"losses": losses, "weights": load_file(weights)}


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return (
        a["losses"] == b["losses"]
        and a["weights"].keys() == b["weights"].keys()
        and all(torch.equal(a["weights"][name], b["weights"][name]) for name in a["weights"])
    )


def draw(rng: random.Random, phase: str, calm: Board) -> Kill:
    """A point of the phase, by how often and how long the undisturbed run was in it."""
    rank = 0 if phase in ON_RANK_0 else rng.randrange(2)
    if phase == "resume":  # which the undisturbed run does not
        return Kill(phase, rank, 1, rng.choice(["before", "within", "after"]), rng.uniform(0, 0.1))
    calls = int(calm.get(rank, CALLS[phase]))
    delay = rng.uniform(0, calm.get(rank, SECONDS[phase]) / calls)
    return Kill(phase, rank, rng.randint(1, calls), rng.choice(["before", "within", "after"]), delay)


class Trial(NamedTuple):
    """What became of a run that was killed once, or twice."""

    kill: Kill
    exact: bool
    redone: int  #: steps
    last: str  #: what the resumed run said, for those that are not exact


def attempt(folder: Path, number: int, phase: str, rng: random.Random, calm: dict[int, tuple[dict, Board]]) -> Trial:
    variant = (number + number // len(PHASES)) % len(VARIANTS)
    config = make_config(folder, f"killed-{number}", *VARIANTS[variant])
    run_dir = Path(config.run_dir)
    wanted, board = calm[variant]
    kill = draw(rng, phase, board)
    if phase == "resume":
        run(config, folder, draw(rng, "passes", board)._replace(call=rng.randint(5, STEPS)), rng)
    codes, counted, _ = run(config, folder, kill, rng)
    if -signal.SIGKILL not in codes:
        raise SystemExit(f"trial {number}: {kill} killed nothing: {codes}")
    latest = run_dir / "checkpoints" / "latest"
    saved = int(latest.read_text().removeprefix("step-")) if latest.exists() else 0
    begun = saved if phase == "resume" else 0
    taken = begun + max(int(counted.get(rank, STEPS_TAKEN)) for rank in (0, 1))
    codes, _, said = run(config, folder, None, rng)
    exact = codes == [0, 0] and same(result(run_dir), wanted)
    shutil.rmtree(run_dir, ignore_errors=True)
    return Trial(kill, exact, taken - saved, said[-2000:])


def main(kills: int, seed: int) -> int:
    rng, trials = random.Random(seed), []
    with tempfile.TemporaryDirectory(prefix="faults-benchmark-") as name:
        folder = Path(name)
        os.environ["MLALIGN_CACHE"] = str(folder / "cache")
        torch.manual_seed(0)
        torch.set_num_threads(1)
        save_byte_llama(folder / "model", **SHAPE)
        write_data(folder)
        run(
            make_config(folder, "first", *VARIANTS[0]), folder, None, rng
        )  # fills the cache of tokens, as no other does
        calm = {}
        for variant, settings in enumerate(VARIANTS):
            config = make_config(folder, f"calm-{variant}", *settings)
            codes, board, said = run(config, folder, None, rng)
            if codes != [0, 0]:
                raise SystemExit(said)
            calm[variant] = (result(Path(config.run_dir)), board)
        for number in range(kills):
            phase = list(PHASES)[number % len(PHASES)]
            trials.append(attempt(folder, number, phase, rng, calm))
            if not trials[-1].exact:
                print(f"NOT EXACT: trial {number}, {trials[-1].kill}: {trials[-1].last}", flush=True)
    show(trials)
    return sum(not trial.exact for trial in trials)


def show(trials: list[Trial]) -> None:
    table = Table(title=f"{len(trials)} runs killed, a checkpoint every {EVERY} steps (and after each evaluation)")
    for column in ("killed in", "runs", "bit for bit", "steps redone: mean", "most"):
        table.add_column(column, justify="left" if column == "killed in" else "right")
    by_phase = collections.defaultdict(list)
    for trial in trials:
        by_phase[trial.kill.phase].append(trial)
    for phase, own in [*by_phase.items(), ("all", trials)]:
        redone = [trial.redone for trial in own]
        exact = sum(trial.exact for trial in own)
        table.add_row(phase, str(len(own)), str(exact), f"{statistics.mean(redone):.1f}", str(max(redone)))
    Console(width=100).print(table)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    sys.exit(1 if main(arguments.kills, arguments.seed) else 0)
