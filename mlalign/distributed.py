"""Ranks: who am I, gather with exact gradients, reduce.

`init()` recognises the `deepspeed` and `torchrun` launchers by RANK and WORLD_SIZE, and a lone process by their
absence. Everything else here works on one rank too, so that callers never ask how many there are.
"""

import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import Any

import torch
import torch.distributed as dist

from mlalign.errors import UserError

_TIMEOUT = timedelta(minutes=30)
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


def init() -> None:
    """Join the process group: nccl on CUDA, gloo on CPU.

    Raises UserError where several processes were started without telling each its rank: training would go on as
    several independent runs.
    """
    if dist.is_initialized():
        return
    _refuse_unranked()
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=_free_port())
    needed = ("WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in needed if name not in os.environ]
    if missing:
        raise UserError(f"RANK is set but {missing[0]} is not: start through `deepspeed` or `torchrun`")
    cuda = uses_cuda()
    if cuda and local_rank() >= torch.cuda.device_count():
        raise UserError(
            f"local rank {local_rank()} finds {torch.cuda.device_count()} GPUs on {socket.gethostname()}: start one "
            "process per GPU at most, or set DS_ACCELERATOR=cpu"
        )
    if cuda:
        torch.cuda.set_device(local_rank())

    import deepspeed  # here: it takes seconds, and commands that need no engine should not pay for it

    deepspeed.init_distributed(
        "nccl" if cuda else "gloo",
        auto_mpi_discovery=False,
        timeout=_TIMEOUT,
        verbose=False,
    )


def launched() -> bool:
    """Whether a launcher started this process as one of several. Raises UserError as `init` does."""
    _refuse_unranked()
    return int(os.environ.get("WORLD_SIZE", 1)) > 1


def _refuse_unranked() -> None:
    counts = {"OMPI_COMM_WORLD_SIZE": "mpirun", "PMI_SIZE": "mpirun", "SLURM_STEP_NUM_TASKS": "srun"}
    for variable, launcher in counts.items():
        if "RANK" not in os.environ and int(os.environ.get(variable, 1)) > 1:
            raise UserError(
                f"{launcher} started {os.environ[variable]} processes but RANK and WORLD_SIZE are not set, so each "
                "would train alone: start through `deepspeed` or `torchrun`"
            )


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def rank() -> int:
    """This process's number among all ranks; 0 where no group was started."""
    return dist.get_rank() if dist.is_initialized() else 0


def local_rank() -> int:
    """This process's number on its host."""
    return int(os.environ.get("LOCAL_RANK", 0))


def world_size() -> int:
    """Number of ranks; 1 where no group was started."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


def uses_cuda() -> bool:
    """Whether there is a GPU to use. DS_ACCELERATOR=cpu, DeepSpeed's own switch, keeps everything on the CPU."""
    return torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"


def device() -> torch.device:
    """This rank's device."""
    return torch.device("cuda", torch.cuda.current_device()) if uses_cuda() else torch.device("cpu")


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()


def all_sum(values: torch.Tensor) -> torch.Tensor:
    """The sum over ranks, in place and returned; any shape, the same on every rank."""
    if world_size() > 1:
        dist.all_reduce(values)
    return values


def any_rank(flag: bool) -> bool:
    """Whether the flag is set on any rank: the same answer on all, without waiting for the GPU."""
    if world_size() == 1:
        return flag
    box = torch.tensor([int(flag)])
    dist.all_reduce(box, dist.ReduceOp.MAX, group=_control_group())
    return bool(box.item())


@cache
def _control_group() -> dist.ProcessGroup:
    """A gloo group for decisions, beside the nccl group that carries tensors."""
    return dist.group.WORLD if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")


def broadcast_object(value):
    """Rank 0's value on every rank."""
    box = [value]
    if world_size() > 1:
        dist.broadcast_object_list(box, src=0)
    return box[0]


def gather_objects(value) -> list:
    """Every rank's value, in rank order, on every rank. For results, not for tensors on the training path."""
    boxes = [value]
    if world_size() > 1:
        boxes = [None] * world_size()
        dist.all_gather_object(boxes, value)
    return boxes


def to_main(value: torch.Tensor) -> Iterator[torch.Tensor]:
    """Rank 0 gets every rank's tensor, one at a time and in rank order; the others send theirs and get none.

    Every rank must iterate, with a tensor of the same shape.
    """
    if not is_main():
        dist.send(value.contiguous(), dst=0)
        return
    yield value
    for source in range(1, world_size()):
        part = torch.empty_like(value)
        dist.recv(part, src=source)
        yield part


@contextmanager
def on_main() -> Iterator[None]:
    """Where the body fails on rank 0, all ranks leave with an error instead of waiting for it. All ranks enter."""
    failure: Exception | None = None
    try:
        yield
    except Exception as error:  # raised again below, once the others know
        failure = error
    failed = broadcast_object(failure is not None)
    if failure:
        raise failure
    if failed:
        raise UserError("rank 0 failed, see its message")


def gather_rows(rows: torch.Tensor) -> torch.Tensor:
    """Concatenate every rank's rows: [n, ...] -> [world_size * n, ...], in rank order, without gradient."""
    return rows if world_size() == 1 else _all_gather(rows)


def gather_rows_with_grad(rows: torch.Tensor) -> torch.Tensor:
    """As `gather_rows`, and differentiable: each rank receives the sum over all ranks of the gradient of its rows.

    Every rank must hold the same number of rows.
    """
    return rows if world_size() == 1 else _GatherRows.apply(rows)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: torch.Tensor) -> torch.Tensor:
        return _all_gather(rows)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> torch.Tensor:
        own = torch.empty_like(grad[: len(grad) // world_size()])
        _reduce_scatter(own, grad.contiguous())
        return own


def _all_gather(rows: torch.Tensor) -> torch.Tensor:
    every = rows.new_empty(world_size() * len(rows), *rows.shape[1:])
    _gather_into(every, rows.contiguous())
    return every


# torch 2.13 renamed both collectives and warns about the old names.
_gather_into = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


class StopSignals:
    """Notes a signal that asks to stop, for a loop to act on between steps; a second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.received = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        self._before = {number: signal.signal(number, self._note) for number in _STOP_SIGNALS}
        return self

    def _note(self, number: int, frame: Any) -> None:
        if number == signal.SIGINT and self.received:
            raise KeyboardInterrupt
        self.received = True

    def __exit__(self, *exception: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
