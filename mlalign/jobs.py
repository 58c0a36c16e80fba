"""What a job script learns of its run: files in MLALIGN_JOB_DIR, which slurm/job.sh sets. Elsewhere nothing is written.

progress       what was saved last; a job that crashes twice at the same place is not started a third time
stopped        a signal asked to stop and all is saved: the job is to be started again
error-rank-N   a mistake that starting again would only repeat
"""

import os
from pathlib import Path


def say_progress(text: str) -> None:
    """Something was saved: a restart goes on from here. On rank 0."""
    _write("progress", text)


def say_stopped() -> None:
    """All is saved after a signal. On rank 0."""
    _write("stopped", "stopped by a signal")


def say_error(rank: int, sentence: str) -> None:
    """The user has to fix something first."""
    _write(f"error-rank-{rank}", sentence)


def _write(name: str, text: str) -> None:
    folder = os.environ.get("MLALIGN_JOB_DIR")
    if folder:
        (Path(folder) / name).write_text(text + "\n")
