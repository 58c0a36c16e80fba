"""`mlalign VERB ...` or `python -m mlalign VERB ...`: how a verb is run, and how it ends."""

import os
import signal
import sys
import time
import warnings

from mlalign import jobs
from mlalign.errors import NotMetError, StoppedError, UserError
from mlalign.launchers import nvidia_driver, rank_of
from mlalign.verbs import app

_OTHER_GPU_DRIVERS = ("/dev/dxg", "/dev/kfd")  # Windows's Linux, AMD


def main() -> None:
    """Exit codes: 2, with one sentence on stderr, for a mistake the user can fix; 75 (EX_TEMPFAIL) where the same
    command will continue: the ranks did not meet, or a signal stopped a process that is on its own, so that what
    follows `mlalign train ... &&` does not begin with half a run.
    """
    if not nvidia_driver() and not any(map(os.path.exists, _OTHER_GPU_DRIVERS)):
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed warns of having to find that out
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|torch")  # of theirs to each other
    if "MLALIGN_JOB_DIR" in os.environ:
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, _stop_before_it_begins)
    try:
        app(standalone_mode=True)
    except SystemExit as leaving:  # the way out of every verb that succeeded, or was called with unknown options
        if leaving.code == 2:
            jobs.say_error(rank_of(), "the command line was refused")
        if "RANK" not in os.environ:
            raise
        _leave(leaving.code or 0)
    except StoppedError as stopped:
        together = int(os.environ.get("WORLD_SIZE", "1")) > 1  # a launcher would take the others for crashed
        code = 0 if together else 75
        if rank_of() > 0:
            _leave(code)
        jobs.say_stopped()
        where = f" {stopped}" if str(stopped) else ""
        _leave(code, f"stopped by a signal{where}: what is finished is kept, and the same command resumes")
    except NotMetError as error:
        _leave(75, f"error: {error}")
    except UserError as error:
        rank = rank_of()
        jobs.say_error(rank, str(error))
        if rank > 0:
            time.sleep(3)  # most mistakes are every rank's: let rank 0 say it, and its launcher end the others
        _leave(2, f"error: rank {rank}: {error}" if rank > 0 else f"error: {error}")
    except OSError as error:  # a full disk, a permission, a directory that went away
        _leave(2, f"error: rank {rank_of()}: {error}")
    except (RuntimeError, MemoryError) as error:
        from mlalign.guards import is_of_memory

        if not is_of_memory(error):
            raise
        sentence = "memory is used up: try a smaller --batch-size, or fewer tokens, layers or sentences at a time"
        jobs.say_error(rank_of(), sentence)
        _leave(2, f"error: rank {rank_of()}: {sentence}")


def _stop_before_it_begins(number: int, frame: object) -> None:
    """A job preempted while it imports, tokenises or loads has not crashed: it is to be started again."""
    if rank_of() == 0:
        jobs.say_stopped()
    _leave(75, "stopped by a signal before it had begun")  # not 0: the launcher is to end ranks that wait for this one


def _leave(code: int, sentence: str = "") -> None:
    """End a process that may belong to a group: tearing down the group's threads can hang or abort when all is done."""
    if sentence:
        print(f"mlalign: {sentence}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
