"""DeepSpeed's compiled kernels, loaded without waiting for the dead.

torch lets one process compile while the others wait, by a file named `lock` beside the kernel. A process that is killed
meanwhile leaves it behind, and whoever comes next waits for ever, without a word. Here a lock that dies with its holder
(flock) lets one process of ours in at a time; a `lock` file that it finds is nobody's, unless a program has it open.
"""

import fcntl
import hashlib
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from glob import glob
from pathlib import Path

import torch
from torch.utils.cpp_extension import _get_build_directory, get_cxx_compiler, get_default_build_root, is_ninja_available


@dataclass(frozen=True)
class State:
    """Whether a kernel can be loaded at once."""

    name: str
    folder: Path  #: where it is compiled
    ready: bool
    missing: str | None  #: the program that compiling it would need


def _prepare() -> None:
    """Before DeepSpeed is imported: where it compiles, and what it compiles with.

    Each environment has a folder of its own, unless TORCH_EXTENSIONS_DIR is set: in the one that torch has for a user,
    whoever comes from another environment compiles everything anew.
    """
    environment = hashlib.blake2b(f"{sys.prefix} {torch.__version__}".encode(), digest_size=4).hexdigest()
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", os.path.join(get_default_build_root(), f"mlalign-{environment}"))
    # Always the ninja of this environment, activated or not: another version's takes what this one compiled for stale.
    programs = Path(sys.executable).parent
    if (programs / "ninja").exists() and shutil.which("ninja") != str(programs / "ninja"):
        os.environ["PATH"] = os.pathsep.join([str(programs), os.environ.get("PATH", os.defpath)])


def load(builder: str) -> None:
    """Load a kernel by the name of its DeepSpeed builder, such as CPUAdamBuilder, compiling it where that was not done.

    DeepSpeed finds it loaded from then on. Does nothing where the accelerator has no such kernel.
    """
    _prepare()
    import deepspeed  # here: it takes seconds
    from deepspeed.accelerator import get_accelerator

    op = get_accelerator().create_op_builder(builder)
    if op is None or not deepspeed.ops.__compatible_ops__.get(op.NAME, False):
        return
    folder = Path(_get_build_directory(op.name, False))
    with _one_at_a_time(folder / "one_at_a_time") as locked:
        left = folder / "lock"
        if locked and left.exists() and not _is_open(left):
            left.unlink(missing_ok=True)
        op.load(verbose=False)


def state(builder: str) -> State:
    """What `load` would find. Nothing is compiled."""
    _prepare()
    from deepspeed.accelerator import get_accelerator
    from deepspeed.git_version_info import installed_ops

    name = get_accelerator().create_op_builder(builder).name
    folder = Path(_get_build_directory(name, False))
    ready = bool(installed_ops.get(name)) or (folder / f"{name}.so").exists()
    programs = {get_cxx_compiler(): shutil.which(get_cxx_compiler()), "ninja": is_ninja_available()}
    missing = next((program for program, found in programs.items() if not found), None)
    return State(name, folder, ready, None if ready else missing)


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
