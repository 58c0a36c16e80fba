"""Real training steps in a process of their own, one at a time on demand: `Stepper(values).step()`.

Runs that are compared take turns, so that what other work on the machine costs is shared out among them.
"""

import multiprocessing
import time
from multiprocessing.connection import Connection

from resident import forget_peak, resident


class Stepper:
    """Takes steps of `mlalign train` with these config values; a step of `first` comes before memory counts."""

    def __init__(self, values: dict, first: dict | None = None) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        context.Process(target=_serve, args=(values, first, theirs), daemon=True).start()

    def step(self) -> tuple[float, int]:
        """Seconds, and the peak of memory in bytes: the GPU's, or the process's above what it had before."""
        self._pipe.send(True)
        return self._pipe.recv()

    def end(self) -> None:
        """Let the process go."""
        self._pipe.send(False)


def _serve(values: dict, first: dict | None, asked: Connection) -> None:
    import torch

    from mlalign.commands.train import real_steps
    from mlalign.config import Config
    from mlalign.distributed import uses_cuda

    running = real_steps(Config.model_validate(values))
    if first:
        next(real_steps(Config.model_validate(first)))
    before = resident("VmRSS")
    while asked.recv():
        if uses_cuda():
            torch.cuda.reset_peak_memory_stats()
        else:
            forget_peak()
        start = time.perf_counter()
        next(running)
        if uses_cuda():
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        asked.send((seconds, torch.cuda.max_memory_allocated() if uses_cuda() else resident("VmHWM") - before))
