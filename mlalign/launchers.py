"""Which rank is this process? Read from what deepspeed, torchrun, mpirun or srun leave in the environment.

In this order: RANK and WORLD_SIZE, as deepspeed and torchrun set them; MPI's, asked through mpi4py; a Slurm step of
several tasks; else one process alone. What contradicts itself is refused, for each process would train by itself.
"""

import os
import re
import socket
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from mlalign.errors import UserError

MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")


@dataclass(frozen=True)
class Place:
    """Where a process stands among all of them, and where they meet."""

    launcher: str  #: none, deepspeed, torchrun, mpirun or srun
    rank: int
    world_size: int
    local_rank: int  #: among those on the same host
    address: str  #: of rank 0
    port: int


def started_together(environment: Mapping[str, str] = os.environ) -> int:
    """How many processes the launcher started, as far as the environment says; 1 where there is no launcher."""
    for name in ("WORLD_SIZE", *MPI_SIZES):
        if name in environment:
            return _number(environment, name)
    return _slurm_tasks(environment)


def discover(environment: Mapping[str, str] = os.environ) -> Place:
    """This process's place. Under mpirun every process must call it, for they agree on where to meet.

    Raises UserError, naming the variable, for an environment that is incomplete or contradicts itself.
    """
    if "RANK" in environment:
        return _from_torch(environment)
    mpi = next((name for name in MPI_SIZES if name in environment), None)
    if mpi is not None and _number(environment, mpi) > 1:
        return _from_mpi(environment, mpi)
    if _slurm_tasks(environment) > 1:
        return _from_slurm(environment)
    return Place("none", 0, 1, 0, "127.0.0.1", free_port())


def rank_of(environment: Mapping[str, str] = os.environ) -> int:
    """This process's rank as far as the environment says, for messages before ranks meet."""
    names = ["RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "MV2_COMM_WORLD_RANK"]
    names += ["SLURM_PROCID"] if _slurm_tasks(environment) > 1 else []
    return next((int(environment[name]) for name in names if environment.get(name, "").isdecimal()), 0)


def nvidia_driver() -> bool:
    """Whether this host shows an NVIDIA driver: in /proc, or, where a container has a /proc of its own, in /dev."""
    return any(map(os.path.exists, ("/proc/driver/nvidia/version", "/dev/nvidiactl")))


def cores() -> int:
    """Cores of this host that this process may use."""
    allowed = len(os.sched_getaffinity(0))
    with suppress(OSError, ValueError):  # in a container, which may have a quota of them; "max" where it has none
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        allowed = min(allowed, int(quota) // int(period))
    return max(allowed, 1)


def threads(ranks: int) -> int:
    """OpenMP threads of each of so many ranks on this host: their share of the cores."""
    return max(cores() // ranks, 1)


def free_port() -> int:
    """A port that nobody on this host listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _from_torch(environment: Mapping[str, str]) -> Place:
    launcher = "torchrun" if "TORCHELASTIC_RUN_ID" in environment else "deepspeed"
    missing = [name for name in ("WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in environment]
    if missing:
        raise UserError(f"RANK is set but {missing[0]} is not: unset RANK, or start through a script in launch/")
    rank, size, local = (_number(environment, name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    if not rank < size:
        raise UserError(f"RANK is {rank}, but WORLD_SIZE is {size}: unset both, or start through a script in launch/")
    others = {name: _number(environment, name) for name in MPI_SIZES if name in environment}
    others["SLURM_STEP_NUM_TASKS"] = _slurm_tasks(environment)
    for name, tasks in others.items():
        if tasks > size:
            raise UserError(
                f"WORLD_SIZE is {size}, but {name} says that {tasks} processes were started: each group of {size} "
                "would train alone, so unset RANK and WORLD_SIZE"
            )
    return Place(launcher, rank, size, local, environment["MASTER_ADDR"], _number(environment, "MASTER_PORT"))


def _from_mpi(environment: Mapping[str, str], variable: str) -> Place:
    try:
        from mpi4py import MPI  # here: it loads the MPI library, and starts it
    except (ImportError, RuntimeError) as error:
        raise UserError(f"mpirun started this process, but mpi4py finds no MPI library: {error}") from error
    world, size = MPI.COMM_WORLD, _number(environment, variable)
    if world.Get_size() != size:
        raise UserError(
            f"mpirun started {size} processes, but mpi4py sees {world.Get_size()}: it uses another MPI, "
            "so install mpi4py for that, or start through launch/torchrun.sh"
        )
    local = world.Split_type(MPI.COMM_TYPE_SHARED)
    one_host = local.Get_size() == world.Get_size()
    here = (environment.get("MASTER_ADDR", "127.0.0.1" if one_host else socket.gethostname()), free_port())
    address, port = world.bcast(here, root=0)
    place = Place("mpirun", world.Get_rank(), size, local.Get_rank(), address, port)
    MPI.Finalize()  # its work is done, and a process that leaves without is a failure to mpirun
    return place


def _slurm_tasks(environment: Mapping[str, str]) -> int:
    """Tasks of the Slurm step that this process is in; the batch script itself is in none."""
    if "SLURM_STEP_ID" not in environment or "SLURM_STEP_NUM_TASKS" not in environment:
        return 1
    return _number(environment, "SLURM_STEP_NUM_TASKS")


def _from_slurm(environment: Mapping[str, str]) -> Place:
    hosts = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "")
    address = environment.get("MASTER_ADDR") or first_host(hosts)
    # The same for all tasks of a job, and another for each job that shares the host.
    port = environment.get("MASTER_PORT") or str(20000 + _number(environment, "SLURM_JOB_ID") % 10000)
    rank, local = _number(environment, "SLURM_PROCID"), _number(environment, "SLURM_LOCALID")
    return Place("srun", rank, _slurm_tasks(environment), local, address, _number({"MASTER_PORT": port}, "MASTER_PORT"))


def first_host(nodes: str) -> str:
    """The first host of Slurm's `gpu[012-014,17],x1`: gpu012. Containers often lack `scontrol`, which would know."""
    first = re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", nodes).split(",")[0]
    if not first:
        raise UserError("SLURM_STEP_NODELIST and MASTER_ADDR are not set: start with srun inside a Slurm job")
    return first


def _number(environment: Mapping[str, str], name: str) -> int:
    value = environment.get(name, "")
    if not value.isdecimal():
        raise UserError(f"{name} is {value!r}, expected a number: unset it, or start through a script in launch/")
    return int(value)
