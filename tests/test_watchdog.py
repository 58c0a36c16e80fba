"""A rank that stops, or waits for ever, ends the job within the timeout, and is named; a slow one does not."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import alone_in_the_world, train_with
from omegaconf import OmegaConf

from mlalign.launchers import free_port

SECONDS = 6

#: What one rank does instead of making step 4's batches.
STUCK = """
import sys, time
from mlalign import loader
take = loader.Loader.take
def stuck(self):
    while self._next == 3 and int(__import__("os").environ["RANK"]) == {rank}:
        time.sleep(1)
    return take(self)
loader.Loader.take = stuck
from mlalign.__main__ import main
main()
"""


#: A network on which nothing arrives.
BROKEN = """
import time
from mlalign import distributed
from mlalign.commands import doctor
def wait(*_, **__):
    while True:
        time.sleep(1)
{broken} = wait
from mlalign.__main__ import main
main()
"""


def start(path: Path, rank: int, port: int, program: list[str], verb: str = "train") -> subprocess.Popen:
    """One of two ranks, without a launcher that would end it when the other ends; rank 0 holds the store."""
    place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    return subprocess.Popen(
        [sys.executable, *program, verb, str(path)],
        env=alone_in_the_world() | place | {"MASTER_PORT": str(port)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def recipe(tmp_path, settings) -> Path:
    settings |= {"log_every": 1, "stuck_after": SECONDS, "deepspeed": "ds_configs/zero2.json"}
    settings["optimizer"] |= {"steps": 100_000}
    path = tmp_path / "c.yaml"
    OmegaConf.save(OmegaConf.create(settings), path)
    return path


def wait_for_step(run_dir: str, step: int, processes: list[subprocess.Popen]) -> None:
    log, deadline = Path(run_dir) / "metrics.jsonl", time.monotonic() + 120
    while not (log.exists() and f'"step": {step},' in log.read_text()):
        assert all(process.poll() is None for process in processes) and time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_stopped_rank_is_named_and_the_others_end_within_the_timeout(recipe, settings, stopped):
    port = free_port()
    processes = [start(recipe, rank, port, ["-m", "mlalign"]) for rank in (0, 1)]
    other = processes[1 - stopped]
    try:
        wait_for_step(settings["run_dir"], 20, processes)
        os.kill(processes[stopped].pid, signal.SIGSTOP)
        begun = time.monotonic()
        _, said = other.communicate(timeout=60)
        assert time.monotonic() - begun < SECONDS + 10
    finally:
        for process in processes:
            process.kill()
    assert other.returncode == 75
    assert f"mlalign: error: rank {1 - stopped}: no progress on any rank for" in said
    if stopped == 1:
        assert f"no sign of life from rank 1 (process {processes[1].pid} on host" in said
        assert "last heard of in" in said and " of step " in said
    else:
        assert "rank 0 does not answer, through which the ranks tell where they are" in said
    stack = (Path(settings["run_dir"]) / "stuck" / f"rank-{1 - stopped}.txt").read_text()
    assert "no progress on any rank" in stack and "mlalign/commands/train.py" in stack


def test_a_rank_that_waits_for_ever_is_named_by_all(recipe, settings):
    port = free_port()
    processes = [start(recipe, rank, port, ["-c", STUCK.format(rank=1)]) for rank in (0, 1)]
    try:
        texts = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert 75 in {process.returncode for process in processes}
    (text, *_) = [text for text in texts if "no progress" in text]
    assert f"behind the others is rank 1 (process {processes[1].pid} on host" in text
    assert "in data of step 4" in text


@pytest.mark.parametrize(
    ("verb", "broken", "phase"),
    [
        ("train", "distributed.any_rank", "the first words by gloo"),
        ("train", "distributed.all_sum", "the first all-reduce"),
        ("doctor", "doctor._time_all_reduce", "all-reduce"),
    ],
)
def test_a_network_that_carries_nothing_is_waited_for_no_longer(recipe, verb, broken, phase):
    """Before the first step too: with NCCL it shows in the first collective of tensors, not where the ranks meet."""
    port = free_port()
    processes = [start(recipe, rank, port, ["-c", BROKEN.format(broken=broken)], verb) for rank in (0, 1)]
    try:
        texts = [process.communicate(timeout=60)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [75, 75]
    for text in texts:
        assert f"all are alive, in {phase}; this rank's stacks follow" in text
        assert "in wait" in text
    assert not list(recipe.parent.rglob("stuck"))


def slow(values: dict, seconds: float) -> str:
    """One rank takes longer over something than the others may wait, but comes further; returns where it ends."""
    from mlalign import distributed
    from mlalign.watchdog import Watchdog

    with Watchdog(seconds, Path(values["run_dir"])) as watch:
        watch.at("work", 1)
        for _ in range(10):
            time.sleep(seconds / 4 if distributed.rank() == 1 else 0)
            if distributed.rank() == 1:
                watch.touch()
        distributed.barrier()
    return "done"


def test_a_rank_that_is_slow_but_comes_further_is_waited_for(ranks, settings):
    assert ranks(2).run(slow, settings, 2.0) == ["done", "done"]


def test_a_rank_that_was_stopped_for_long_and_goes_on_ends_nothing(recipe, settings):
    """As a job that Slurm suspends: all processes sleep for longer than they may wait for each other."""
    port = free_port()
    processes = [start(recipe, rank, port, ["-m", "mlalign"]) for rank in (0, 1)]
    try:
        wait_for_step(settings["run_dir"], 5, processes)
        for number, pause in ((signal.SIGSTOP, 1.5 * SECONDS), (signal.SIGCONT, 0)):
            for process in processes:
                os.kill(process.pid, number)
            time.sleep(pause)
        lines = len((Path(settings["run_dir"]) / "metrics.jsonl").read_text().splitlines())
        time.sleep(SECONDS)
        assert [process.poll() for process in processes] == [None, None]
        assert len((Path(settings["run_dir"]) / "metrics.jsonl").read_text().splitlines()) > lines
    finally:
        for process in processes:
            process.kill()


def without_an_ear(values: dict) -> None:
    """Stuck with a standard error that nobody reads any more, and a directory that is none."""
    from mlalign.watchdog import Watchdog

    read, write = os.pipe()
    os.close(read)
    os.dup2(write, 2)
    Path(values["run_dir"]).mkdir()
    (Path(values["run_dir"]) / "stuck").write_text("a file")
    with Watchdog(1.0, Path(values["run_dir"])):
        time.sleep(60)


def test_it_ends_even_where_it_cannot_say_why(settings):
    import multiprocessing

    process = multiprocessing.get_context("spawn").Process(target=without_an_ear, args=(settings,))
    process.start()
    process.join(50)
    assert process.exitcode == 75


def exhausted(values: dict, phase: str) -> str:
    import torch

    def greedy(backward, engine, config, batches, meter, at_batch, *told):
        at_batch(phase)
        torch.empty(2**50)  # what this asks for, no machine has

    return train_with(values, greedy)


def test_used_up_memory_is_said_with_what_to_change(ranks, settings):
    (sentence,) = ranks(1).run(exhausted, settings, "task")
    assert sentence.startswith(
        "rank 0 ran out of memory (task batch, step 1): set task.micro_batch_size=1, or set model."
    )
    settings["model"]["gradient_checkpointing"] = True
    (sentence,) = ranks(1).run(exhausted, settings, "alignment")
    assert "(alignment batch, step 1): set alignment.micro_batch_size=4, or shard more" in sentence
    settings["alignment"]["negatives"] = "local"  # then smaller micro-batches are another loss
    settings["run_dir"] += "-local"
    (sentence,) = ranks(1).run(exhausted, settings, "alignment")
    assert "(alignment batch, step 1): shard more" in sentence
