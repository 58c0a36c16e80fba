"""Compiled kernels and the lock files of the dead."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import alone_in_the_world

from mlalign import kernels

LOAD = "from mlalign import kernels; kernels.load('CPUAdamBuilder'); print('loaded')"


def loading(**environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", LOAD],
        env=alone_in_the_world() | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def lock() -> Path:
    """Where torch's lock lies beside a kernel that is compiled."""
    assert "loaded" in loading().communicate(timeout=300)[0]
    return kernels.state("CPUAdamBuilder").folder / "lock"


def test_a_lock_left_by_a_killed_process_holds_nobody_up(lock):
    lock.touch()
    out, err = loading().communicate(timeout=120)
    assert "loaded" in out, err
    assert not lock.exists()


def test_a_lock_that_is_held_is_waited_for(lock):
    with open(lock, "x"):
        process = loading()
        time.sleep(9)  # it takes 5 s to come to the lock
        held = process.poll() is None and lock.exists()
        lock.unlink()
    assert held
    out, err = process.communicate(timeout=120)
    assert "loaded" in out, err


def test_an_activated_environment_and_a_bare_one_compile_once(lock, tmp_path):
    kernel = lock.with_name("cpu_adam.so")
    compiled = kernel.stat().st_mtime_ns
    other = tmp_path / "ninja"  # of a version whose notes on what is compiled the environment's own cannot read
    other.write_text("#!/bin/sh\nexit 1\n")
    other.chmod(0o755)
    environment = str(Path(sys.executable).parent)
    for first in (environment, str(tmp_path)):
        out, err = loading(PATH=f"{first}:{os.environ['PATH']}").communicate(timeout=120)
        assert "loaded" in out, err
    assert kernel.stat().st_mtime_ns == compiled
