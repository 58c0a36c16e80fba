"""Real ranks for benchmarks: processes of one thread each that form a gloo group and run functions on demand.

Groups of several sizes live side by side, so that rounds can go through all of them in turn: what other work on the
machine costs is then shared out among them.
"""

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Ranks:
    """`Ranks(n).run(function, *args)` runs a function of a module on n ranks at once, as often as wanted."""

    def __init__(self, size: int) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        context = multiprocessing.get_context("spawn")
        self._pipes = []
        for rank in range(size):
            ours, theirs = context.Pipe()
            context.Process(target=_serve, args=(rank, size, port, theirs), daemon=True).start()
            self._pipes.append(ours)

    def start(self, function: Callable, *args: Any) -> None:
        """Let the ranks begin; `results` waits for them. Between the two, other groups can begin too."""
        for pipe in self._pipes:
            pipe.send((function, args))

    def results(self) -> list[Any]:
        """What each rank returned, in rank order. Ends the benchmark where one failed."""
        waiting = dict.fromkeys(self._pipes)
        for pipe in multiprocessing.connection.wait(waiting):  # a failure first, for the others may wait for that rank
            waiting[pipe] = pipe.recv()
            if not waiting[pipe][0]:
                raise SystemExit(waiting[pipe][1])
        return [(waiting[pipe] or pipe.recv())[1] for pipe in self._pipes]

    def run(self, function: Callable, *args: Any) -> list[Any]:
        self.start(function, *args)
        return self.results()


def sent() -> int:
    """Bytes that this process has written to sockets and files so far. gloo writes to TCP sockets, and so it counts."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("wchar"))


def _serve(rank: int, size: int, port: str, pipe) -> None:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()}, MASTER_ADDR="127.0.0.1")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)  # what libraries say of themselves; failures go through the pipe
    os.dup2(nowhere, 2)
    import torch

    from mlalign import distributed

    torch.set_num_threads(1)
    distributed.init()
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:  # the benchmark is done
            os._exit(0)
        try:
            pipe.send((True, function(*args)))
        except BaseException:  # the parent ends everything
            pipe.send((False, traceback.format_exc()))
