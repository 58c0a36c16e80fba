"""A run is its directory: made, or checked to belong to the same config, before anything else happens.

config.yaml        the resolved config          checkpoints/      see `checkpoint`
deepspeed.json     what DeepSpeed is told       adapter/, model/  the result: best on dev, else the last
environment.txt    of every start               tensorboard/      the same as metrics.jsonl, as curves
metrics.jsonl      one line per log step        .lock             held by the run that writes here
"""

import fcntl
import hashlib
import json
import os
import platform
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import IO

import torch

from mlalign import distributed
from mlalign.config import Config, dump, load
from mlalign.durable import write_whole
from mlalign.errors import UserError
from mlalign.tracker import say

_LEASE = 150.0  #: seconds after which NFS (RFC 7530: 90 s, by default) lets go of what a lost host had locked


def open_run(config: Config, run_dir: Path) -> None:
    """Make the run directory, or check that it belongs to this config. Rank 0 alone; a failure there ends all ranks."""
    with distributed.on_main():
        if not distributed.is_main():
            return
        path = run_dir / "config.yaml"
        started = (run_dir / "metrics.jsonl").exists() or (run_dir / "checkpoints").exists()
        if path.exists() and started:
            different = config.differences(load(path))
            if different:
                raise UserError(
                    f"run_dir {run_dir} belongs to a run with another config (different: {', '.join(different)}): "
                    "choose another run_dir, or the same values to resume"
                )
        write_whole(path, dump(config))
        if not started:
            (run_dir / "environment.txt").unlink(missing_ok=True)
        with (run_dir / "environment.txt").open("a") as file:
            file.write(_environment())


@contextmanager
def held(folder: Path, name: str) -> Iterator[None]:
    """`locked` by rank 0, for all: called by all ranks."""
    with ExitStack() as stack:
        with distributed.on_main():
            if distributed.is_main():
                stack.enter_context(locked(folder, name))
        yield


@contextmanager
def locked(folder: Path, name: str) -> Iterator[None]:
    """`make_writable`, and keep other processes out for the body. A dead one holds nothing.

    Raises UserError where another has it.
    """
    make_writable(folder, name)
    path = folder / ".lock"
    with ExitStack() as stack:
        for _ in range(10):
            file = stack.enter_context(path.open("a+"))
            _lock_patiently(file, folder, name)
            with suppress(FileNotFoundError):
                if path.stat().st_ino == os.fstat(file.fileno()).st_ino:
                    break  # else who had it has just deleted it, and another may have made it again
        try:
            yield
        finally:
            with suppress(OSError):
                path.unlink(missing_ok=True)


def _lock_patiently(file: IO[str], folder: Path, name: str) -> None:
    """In a job that resumes by itself, give a server time to notice that the host of the attempt before is gone."""
    end = time.monotonic() + (_LEASE if "MLALIGN_JOB_DIR" in os.environ else 0)
    while True:
        try:
            _lock(file, folder, name)
            return
        except UserError:
            if time.monotonic() >= end:
                raise
            time.sleep(2)


def _lock(file: IO[str], folder: Path, name: str) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.seek(0)
        who = file.read().strip() or "another run"
        raise UserError(f"{name} {folder} is in use by {who}: wait for its end, or choose another") from error
    except OSError as error:
        say(f"WARNING: {name} {folder} cannot be locked ({error.strerror}): see that no other process writes there")
        return
    file.truncate(0)
    file.write(f"process {os.getpid()} on host {platform.node()}\n")
    file.flush()


#: What commands leave in their output directories -> what such a directory is.
_SIGNS = {
    "metrics.jsonl": "a run of `mlalign train`",
    "checkpoints": "a run of `mlalign train`",
    "evaluation.json": "an evaluation",
    "probe.json": "a probe",
    "compare.json": "a comparison",
    "merge.json": "a merged adapter",
    "config.json": "a model",
}


def refuse_others(output: Path, own: str) -> None:
    """Raise UserError where a directory is the output of another command, whose pictures and curves would be lost.

    Args: own: the file that the caller leaves there.
    """
    for name, what in _SIGNS.items():
        if what != _SIGNS[own] and (output / name).exists():
            raise UserError(
                f"output {output} is {what}: choose a directory of its own, such as {output}/{Path(own).stem}"
            )


def make_writable(folder: Path, name: str) -> None:
    """Make a directory, or check that files can be written into it; `name` is what the user calls it. For rank 0."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        trial = folder / ".writable"
        trial.touch()
        trial.unlink()
    except OSError as error:
        raise UserError(f"{name} {folder} cannot be written: {error.strerror}") from error


def digest(value: object) -> str:
    """Stands for a value that JSON can hold: equal values, equal digests."""
    return hashlib.blake2b(json.dumps(value, default=str).encode(), digest_size=8).hexdigest()


def files_of(path: str | None) -> list:
    """Of a directory: names, sizes and times of its files, so that results of older weights are never taken."""
    if path is None or not os.path.isdir(path):
        return []
    files = [entry for entry in os.scandir(path) if entry.is_file()]
    return sorted([entry.name, entry.stat().st_size, entry.stat().st_mtime_ns] for entry in files)


def _environment() -> str:
    """One block per start."""
    packages = ("mlalign", "torch", "deepspeed", "transformers", "peft", "datasets", "numpy")
    lines = [f"python {platform.python_version()}", *(f"{name} {version(name)}" for name in packages)]
    gpu = torch.cuda.get_device_name() if distributed.uses_cuda() else "no GPU"
    return "\n".join([*lines, f"host {platform.node()}, {gpu}, {distributed.world_size()} ranks"]) + "\n\n"
