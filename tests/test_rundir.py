"""One process at a time in a directory, and what it leaves."""

import errno
import os
import subprocess
import sys
from contextlib import ExitStack
from threading import Timer

import pytest

from mlalign.errors import UserError
from mlalign.rundir import locked

#: Takes the lock again and again; says it where another was in the directory with it.
_TAKER = """
import sys
from pathlib import Path
from mlalign.errors import UserError
from mlalign.rundir import locked

folder, taken = Path(sys.argv[1]), 0
while taken < 300:
    try:
        with locked(folder, "output"):
            (folder / "inside").touch(exist_ok=False)
            taken += 1
            (folder / "inside").unlink()
    except UserError:
        pass
"""


def test_nobody_else_is_in_a_directory_that_is_locked(tmp_path):
    """Though the file of the lock is deleted each time, between another's opening and locking it, too."""
    takers = [
        subprocess.Popen([sys.executable, "-c", _TAKER, tmp_path], stderr=subprocess.PIPE, text=True) for _ in range(3)
    ]
    for taker in takers:
        _, said = taker.communicate(timeout=120)
        assert taker.returncode == 0, said
    assert not list(tmp_path.iterdir())


def test_where_nothing_can_be_locked_it_is_said(tmp_path, monkeypatch, capsys):
    def unsupported(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("mlalign.rundir.fcntl.flock", unsupported)
    with locked(tmp_path, "output"):
        pass
    assert "cannot be locked (No locks available)" in " ".join(capsys.readouterr().out.split())


def test_a_job_that_resumes_waits_for_the_lock_of_a_host_that_was_lost(tmp_path, monkeypatch):
    monkeypatch.setenv("MLALIGN_JOB_DIR", str(tmp_path))
    with ExitStack() as before:
        before.enter_context(locked(tmp_path, "run_dir"))
        Timer(1, before.close).start()
        with locked(tmp_path, "run_dir"):
            pass
    monkeypatch.setattr("mlalign.rundir._LEASE", 0.1)
    with locked(tmp_path, "run_dir"), pytest.raises(UserError, match="is in use by"), locked(tmp_path, "run_dir"):
        pass


def test_who_has_a_directory_is_named(tmp_path):
    with locked(tmp_path, "output"):
        with pytest.raises(UserError, match=rf"output {tmp_path} is in use by process {os.getpid()} on host"):
            with locked(tmp_path, "output"):
                pass
    with locked(tmp_path, "output"):
        pass
