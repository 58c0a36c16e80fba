"""DeepSpeed's compiled kernels, loaded without waiting for the dead.

torch lets one process compile while the others wait, by a file named `lock` beside the kernel. A process that is killed
meanwhile leaves it behind, and whoever comes next waits for ever, without a word. Here a lock that dies with its holder
(flock) lets one process of ours in at a time; a `lock` file that it finds is nobody's, unless a program has it open.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from glob import glob
from pathlib import Path


def load(builder: str) -> None:
    """Load a kernel by the name of its DeepSpeed builder, such as CPUAdamBuilder, compiling it where that was not done.

    DeepSpeed finds it loaded from then on. Does nothing where the accelerator has no such kernel.
    """
    import deepspeed
    from deepspeed.accelerator import get_accelerator
    from torch.utils.cpp_extension import _get_build_directory

    op = get_accelerator().create_op_builder(builder)
    if op is None or not deepspeed.ops.__compatible_ops__.get(op.NAME, False):
        return
    folder = Path(_get_build_directory(op.name, False))
    with _one_at_a_time(folder / "one_at_a_time") as locked:
        left = folder / "lock"
        if locked and left.exists() and not _is_open(left):
            left.unlink(missing_ok=True)
        op.load(verbose=False)


@contextmanager
def _one_at_a_time(path: Path) -> Iterator[bool]:
    """Whether the file is locked for the body: not every shared file system can."""
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            locked = True
        except OSError:
            locked = False
        yield locked


def _is_open(path: Path) -> bool:
    """Whether a process on this host that we may look into has the file open."""
    for link in glob("/proc/[0-9]*/fd/*"):
        try:
            if os.path.samefile(link, path):
                return True
        except OSError:  # a process or file that is gone, or of somebody else
            continue
    return False
