"""Ranks: join them, gather with exact gradients, reduce.

`init()` joins the processes that a launcher started, see `launchers`, or makes a lone process a group of one. All else
here works on one rank too, so that callers never ask how many there are.
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

from mlalign import launchers
from mlalign.errors import NotMetError, StoppedError, UserError, one_line
from mlalign.launchers import Place

_TIMEOUT = timedelta(hours=2)  # of a collective: one host may have to tokenise while the others find it done
_met_at: dist.Store | None = None  # where the ranks found each other
_local_rank = 0
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


def init() -> None:
    """Join the process group: nccl on CUDA, gloo on CPU. RENDEZVOUS_TIMEOUT (seconds, 300) bounds the wait for others.

    Raises UserError, naming rank, host and variable, where the processes do not find each other.
    """
    if dist.is_initialized():
        return
    global _local_rank
    place = launchers.discover()
    _local_rank = place.local_rank
    where = {"MASTER_ADDR": place.address, "MASTER_PORT": place.port}
    names = {"RANK": place.rank, "WORLD_SIZE": place.world_size, "LOCAL_RANK": place.local_rank, **where}
    os.environ.update({name: str(value) for name, value in names.items()})  # for torch and DeepSpeed
    if uses_cuda():
        torch.cuda.set_device(_device_index(place))
        os.environ["LOCAL_RANK"] = str(torch.cuda.current_device())  # by which DeepSpeed chooses its device
    _join(place)

    import deepspeed  # here: it takes seconds, and commands that need no engine should not pay for it

    if not uses_cuda():
        # A kernel for inference: compiled for a minute, and every run would leave 69 MB a rank in /dev/shm behind. With
        # a GPU DeepSpeed does not come to it, and asking for the list would run its compilers on every rank.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist.get_backend(), auto_mpi_discovery=False, timeout=_TIMEOUT, verbose=False)
    # ZeRO has a group of its own, with torch's timeout if DeepSpeed makes it: 10 minutes with NCCL, as the watchdog's.
    deepspeed.utils.groups._WORLD_GROUP = dist.new_group(timeout=_TIMEOUT)


def launched() -> bool:
    """Whether a launcher started this process as one of several."""
    return launchers.started_together() > 1


def _device_index(place: Place) -> int:
    """`srun --gpus-per-task=1` shows each rank a single GPU, its own; elsewhere all ranks see all of their host's."""
    count = torch.cuda.device_count()
    if place.launcher == "srun" and count == 1:
        return 0
    if place.local_rank >= count:
        raise UserError(
            f"local rank {place.local_rank} finds {count} GPUs on {socket.gethostname()}: start one process per GPU at "
            "most, or set DS_ACCELERATOR=cpu"
        )
    return place.local_rank


def _join(place: Place) -> None:
    """Meet the others at rank 0's store, within the rendezvous timeout, and form the group."""
    global _met_at
    who = f"rank {place.rank} on host {socket.gethostname()}"
    seconds = os.environ.get("RENDEZVOUS_TIMEOUT", "300")
    if not seconds.isdecimal() or int(seconds) == 0:
        raise UserError(f"RENDEZVOUS_TIMEOUT is {seconds!r}, expected a number of seconds")
    try:
        socket.getaddrinfo(place.address, place.port)
    except OSError as error:
        raise UserError(
            f"{who}: MASTER_ADDR {place.address} is no host that is known here: set it to rank 0's host name or address"
        ) from error
    try:
        store, *_ = next(dist.rendezvous("env://", timeout=timedelta(seconds=int(seconds))))
        store.set_timeout(_TIMEOUT)
        backend = "nccl" if uses_cuda() else "gloo"
        ranks = {"rank": place.rank, "world_size": place.world_size}
        dist.init_process_group(backend, store=store, timeout=_TIMEOUT, **ranks)
        _met_at = store
    except (RuntimeError, ValueError, OSError) as error:
        meeting = f"{place.address}:{place.port} (MASTER_ADDR and MASTER_PORT)"
        if "EADDRINUSE" in str(error) or "address already in use" in str(error).lower():
            reason = f"the port of {meeting} is taken by another program: set another MASTER_PORT"
        elif place.rank == 0:
            reason = (
                f"not all of {place.world_size} ranks (WORLD_SIZE) came to {meeting} within {seconds} s: were so many "
                "started, and can the others reach this host?"
            )
        else:
            reason = f"no rank 0 at {meeting} within {seconds} s: is it running on that host, and is the port open?"
        raise NotMetError(f"{who}: {reason}") from error


def own_store() -> dist.Store | None:
    """The store at which the ranks met, for the use of one thread: no other's calls block it. None: no group."""
    return None if _met_at is None else _met_at.clone()


def lost_a_rank(error: Exception) -> bool:
    """Whether a collective failed because another rank, or the way to it, is gone. gloo has no exception of its own."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def rank() -> int:
    """This process's number among all ranks; 0 where no group was started."""
    return dist.get_rank() if dist.is_initialized() else 0


def local_rank() -> int:
    """This process's number on its host, whichever GPUs it sees."""
    return _local_rank


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
    """Wait for all ranks: for their processes, not for what is queued on their GPUs."""
    if world_size() > 1:
        dist.barrier(group=_control_group())


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
    """A gloo group for decisions and objects, beside the nccl group that carries tensors: no GPU is waited for."""
    if dist.get_backend() == "gloo":
        return dist.group.WORLD
    try:
        return dist.new_group(backend="gloo", timeout=_TIMEOUT)
    except RuntimeError as error:  # gloo goes by the host's own name, which may lead to the host alone, as 127.0.1.1
        raise NotMetError(
            f"rank {rank()} on host {socket.gethostname()}: gloo reaches no other rank: set GLOO_SOCKET_IFNAME to "
            f"the network interface that leads to them, such as ib0 ({one_line(error)})"
        ) from error


def broadcast_object(value):
    """Rank 0's value on every rank."""
    box = [value]
    if world_size() > 1:
        dist.broadcast_object_list(box, src=0, group=_control_group())
    return box[0]


def gather_objects(value) -> list:
    """Every rank's value, in rank order, on every rank. For results, not for tensors on the training path."""
    boxes = [value]
    if world_size() > 1:
        boxes = [None] * world_size()
        dist.all_gather_object(boxes, value, group=_control_group())
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
        part = torch.empty_like(value, memory_format=torch.contiguous_format)
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
        # Not empty_like: of a transposed gradient it has the strides, which NCCL takes no notice of and gloo does.
        own = grad.new_empty(len(grad) // world_size(), *grad.shape[1:])
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

    def check(self) -> None:
        """Raise StoppedError on all ranks where a signal reached any. Called by all ranks, between units of work."""
        if any_rank(self.received):
            raise StoppedError

    def _note(self, number: int, frame: Any) -> None:
        if number == signal.SIGINT and self.received:
            raise KeyboardInterrupt
        self.received = True

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        crashed = kind is not None and not issubclass(kind, StoppedError)
        for number, handler in self._before.items():
            # Of a job that crashed, `__main__` would say that a signal stopped it: its launcher sends one to end it.
            ours = callable(handler) and handler is not signal.default_int_handler
            signal.signal(number, signal.SIG_DFL if crashed and ours else handler)
