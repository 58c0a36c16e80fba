"""A run that is killed anywhere goes on as if nothing had happened: some of what benchmarks/faults.py tries."""

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import alone_in_the_world

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.mark.timeout(900)
def test_a_run_killed_in_three_phases_reaches_the_undisturbed_runs_losses():
    program = [sys.executable, str(BENCHMARKS / "faults.py"), "--kills", "3", "--seed", "1"]
    done = subprocess.run(program, env=alone_in_the_world(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("│ all")]
    assert line.split("│")[2].strip() == line.split("│")[3].strip() == "3"
