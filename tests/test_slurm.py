"""The shipped sbatch files on a real Slurm of two nodes: train, probe and evaluate, stop, crash, and come back."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import slurm
from omegaconf import OmegaConf

from mlalign import kernels

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
#: Kernels are taken from where other tests have compiled them, for a node of its own would take a minute.
COMPILED = kernels.state("ShareMemCommBuilder").folder.parent
SITE = f"NODES=2\nTASKS_PER_NODE=2\nWARNING=30\nexport DS_ACCELERATOR=cpu TORCH_EXTENSIONS_DIR={COMPILED}\n"


class Cluster:
    """Submits jobs as a user does, in a directory of its own."""

    def __init__(self, environment: dict[str, str], folder: Path) -> None:
        self.folder = folder
        (folder / "site.env").write_text(SITE)
        self.environment = environment | {
            "MLALIGN_SITE": str(folder / "site.env"),
            "PATH": f"{BIN}:{environment['PATH']}",
            "OMP_NUM_THREADS": "1",
        }

    def ask(self, *words: object) -> str:
        done = subprocess.run(
            [str(word) for word in words],
            env=self.environment,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def submit(self, *words: object) -> str:
        """The job's id."""
        return re.search(r"Submitted batch job (\d+)", self.ask(ROOT / "slurm" / "submit", *words))[1]

    def state(self, job: str) -> dict[str, str]:
        shown = self.ask("scontrol", "show", "job", "-o", job).split()
        return dict(word.split("=", 1) for word in shown if "=" in word)

    def wait(self, job: str, *states: str, timeout: float = 240) -> dict[str, str]:
        """Until the job is in one of the states (its end by default)."""
        states = states or ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            found = self.state(job)
            if found["JobState"] in states:
                return found
            time.sleep(0.5)
        raise AssertionError(f"job {job} is {found['JobState']}\n{self.log(job)}")

    def log(self, job: str) -> str:
        """Of the job's script and of its ranks."""
        paths = [*self.folder.glob(f"logs/*-{job}.log"), *sorted(self.folder.glob(f"logs/*-{job}/rank-*.log"))]
        return "\n".join(f"== {path.name}\n{path.read_text()}" for path in paths)

    def until(self, job: str, metrics: Path, step: int) -> None:
        """Until the run has logged a step."""
        end = time.monotonic() + 240
        while time.monotonic() < end:
            if metrics.exists() and any(row["step"] >= step for row in steps(metrics)):
                return
            time.sleep(0.05)
        raise AssertionError(f"no step {step}\n{self.log(job)}")


def steps(metrics: Path) -> list[dict]:
    """Rows of metrics.jsonl that are whole."""
    lines = metrics.read_text().split("\n")[:-1]
    return [json.loads(line) for line in lines]


def losses(run_dir: Path) -> list[tuple]:
    """(step, name, value) of all losses and learning rates, in the order of the file."""
    names = ("loss", "train/lr", "norm", "accuracy")
    return [
        (row["step"], name, value)
        for row in steps(run_dir / "metrics.jsonl")
        for name, value in row.items()
        if name.endswith(names)
    ]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    with slurm(tmp_path_factory.mktemp("slurm")) as environment:
        yield Cluster(environment, tmp_path_factory.mktemp("jobs"))


@pytest.fixture(scope="module")
def recipe(cluster, tiny_model, rows):
    """recipe(name, **changes): a config file and its run directory."""

    def write(name: str, **changes) -> tuple[Path, Path]:
        settings = {
            "run_dir": str(cluster.folder / "runs" / name),
            "model": {"path": str(tiny_model)},
            "lora": {"dropout": 0.1},
            "task": {"train": str(rows["task"]), "batch_size": 8, "micro_batch_size": 1, "max_length": 200},
            "alignment": {"train": str(rows["bitext"]), "batch_size": 8, "micro_batch_size": 2},
            "optimizer": {"steps": 6, "lr": 1e-3, "schedule": "cosine"},
            "deepspeed": "ds_configs/zero2.json",
            "checkpoint_every": 1000,
            "log_every": 1,
        }
        path = cluster.folder / f"{name}.yaml"
        OmegaConf.save(OmegaConf.merge(settings, changes), path)
        return path, Path(settings["run_dir"])

    return write


@pytest.mark.parametrize("stage", [2, 3])
def test_training_on_two_nodes_with_two_ranks_each(cluster, recipe, stage):
    path, run_dir = recipe(f"zero{stage}", deepspeed=f"ds_configs/zero{stage}.json", optimizer={"steps": 3})
    job = cluster.submit("train.sbatch", path)
    assert cluster.wait(job)["JobState"] == "COMPLETED", cluster.log(job)
    assert f"4 ranks, ZeRO-{stage}" in cluster.log(job)
    assert [row["step"] for row in steps(run_dir / "metrics.jsonl")] == [1, 2, 3]
    assert (run_dir / "adapter/adapter_model.safetensors").exists()


@pytest.fixture(scope="module")
def undisturbed(cluster, recipe):
    """Losses, step by step, and weights of a run that nothing happened to."""
    path, run_dir = recipe("undisturbed", optimizer={"steps": 40})
    job = cluster.submit("train.sbatch", path)
    assert cluster.wait(job)["JobState"] == "COMPLETED", cluster.log(job)
    return losses(run_dir), (run_dir / "adapter/adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("disturbance", ["warning", "requeue"])
def test_a_job_that_is_warned_or_requeued_comes_back_with_the_same_losses(cluster, recipe, undisturbed, disturbance):
    path, run_dir = recipe(disturbance, optimizer={"steps": 40})
    job = cluster.submit("train.sbatch", path)
    cluster.until(job, run_dir / "metrics.jsonl", 5)
    if disturbance == "warning":  # as before a time limit
        cluster.ask("scancel", "--batch", "--signal=USR1", job)
    else:  # as an administrator or a preemption does
        cluster.ask("scontrol", "requeue", job)
    found = cluster.wait(job)
    assert (found["JobState"], found["Restarts"]) == ("COMPLETED", "1"), cluster.log(job)
    assert losses(run_dir) == undisturbed[0]
    assert (run_dir / "adapter/adapter_model.safetensors").read_bytes() == undisturbed[1]
    if disturbance == "warning":
        assert "stopped by a signal, all is saved: requeued" in cluster.log(job)
    assert "attempt 2" in cluster.log(job)


def kill_a_rank(path: Path, rank: int) -> None:
    """SIGKILL, as the kernel does where memory runs out."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().split(b"\0")
            environment = (process / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        is_rank = str(path).encode() in words and b"mlalign" in words and words[0].endswith(b"python")
        if is_rank and f"SLURM_PROCID={rank}".encode() in environment and b"SLURM_STEP_ID=0" in environment:
            os.kill(int(process.name), signal.SIGKILL)
            return
    raise AssertionError(f"no rank {rank} of {path}")


def test_a_job_that_loses_a_rank_comes_back_with_the_same_losses(cluster, recipe, undisturbed):
    path, run_dir = recipe("crash", optimizer={"steps": 40}, checkpoint_every=5)
    job = cluster.submit("train.sbatch", path)
    cluster.until(job, run_dir / "metrics.jsonl", 13)
    kill_a_rank(path, rank=2)
    found = cluster.wait(job)
    assert (found["JobState"], found["Restarts"]) == ("COMPLETED", "1"), cluster.log(job)
    assert "saved last: " in cluster.log(job)
    assert losses(run_dir) == undisturbed[0]
    assert (run_dir / "adapter/adapter_model.safetensors").read_bytes() == undisturbed[1]


def test_a_mistake_is_said_and_not_repeated(cluster, recipe):
    path, _ = recipe("mistake", task={"train": "nowhere.jsonl"})
    job = cluster.submit("train.sbatch", path)
    found = cluster.wait(job)
    assert (found["JobState"], found["Restarts"]) == ("FAILED", "0"), cluster.log(job)
    assert "not started again, something is to be mended first: nowhere.jsonl does not exist" in cluster.log(job)


def test_a_cancelled_job_stays_cancelled(cluster, recipe):
    path, run_dir = recipe("cancelled", optimizer={"steps": 2000})
    job = cluster.submit("train.sbatch", path)
    cluster.until(job, run_dir / "metrics.jsonl", 2)
    cluster.ask("scancel", job)
    assert cluster.wait(job)["JobState"] == "CANCELLED"
    time.sleep(3)
    assert cluster.state(job)["JobState"] == "CANCELLED", cluster.log(job)
