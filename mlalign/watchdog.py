"""Ends a job that is stuck, and names the rank that holds it up: a stopped process, a lost host.

Ranks wait for each other in collectives, so one that is stuck holds up all of them forever, and GPUs cost by the hour.
Every rank tells the others where it is through the store at which they met. If none makes progress for long enough,
each process ends with exit code 75, EX_TEMPFAIL, by which a job script knows to start it again.
"""

import faulthandler
import json
import os
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as TookTooLongError
from pathlib import Path
from typing import NamedTuple

import torch

from mlalign import distributed

_LONGEST_INTERVAL = 5.0  #: seconds between two signs of life
_LONGEST_FAREWELL = 10.0  #: seconds to say why
_TRIES = 3  #: to reach the store


class _Sign(NamedTuple):
    """What a rank last reported of itself."""

    beat: int  #: counts while its process is alive
    marks: int  #: how many calls of `at` it has reached, the same ones on all ranks
    touches: int  #: counts the progress of its main thread
    phase: str
    step: int
    place: str  #: process and host

    def __str__(self) -> str:
        return f"{self.phase} of step {self.step}" if self.step else self.phase


def meet(seconds: float) -> None:
    """Exchange first words in each way that ranks have. Called by all ranks, once they have joined.

    That they found each other says little: what carries nothing, of gloo's connections or NCCL's, shows only now, and
    would be waited for as long as any collective.
    """
    with Watchdog(seconds, None, name="meeting") as watch:
        watch.at("the first words by gloo", 0)
        distributed.any_rank(False)
        watch.at("the first all-reduce", 0)
        distributed.all_sum(torch.zeros((), device=distributed.device())).item()


class Watchdog:
    """Watches the main thread during the body of a `with`, on all ranks; 0 seconds: it does nothing."""

    def __init__(self, seconds: float, run_dir: Path | None, name: str = "run") -> None:
        """seconds: without progress on any rank, after which the process ends; run_dir: for stacks, None: stderr alone;
        name: by which the ranks' signs are told from those of another watchdog.
        """
        self._seconds, self._folder = seconds, run_dir and run_dir / "stuck"
        self._key = f"mlalign/watchdog/{name}/{{}}"
        self._interval = min(_LONGEST_INTERVAL, seconds / 20)
        self._over = threading.Event()
        self._marks, self._touches, self._since = 0, 0, time.monotonic()
        self.phase, self.step = "start", 0

    def __enter__(self) -> "Watchdog":
        if self._seconds:
            self.touch()
            for loop in (self._tell, self._watch):
                threading.Thread(target=loop, daemon=True).start()
        return self

    def __exit__(self, *exception) -> None:
        self._over.set()

    def at(self, phase: str, step: int) -> None:
        """The main thread begins another part of its work, as on all ranks."""
        self.phase, self.step = phase, step
        self._marks += 1
        self.touch()

    def touch(self) -> None:
        """The main thread makes progress within that part."""
        self._touches += 1
        self._since = time.monotonic()

    def _tell(self) -> None:
        store, beat = distributed.own_store(), 0
        place = f"process {os.getpid()} on host {socket.gethostname()}"
        while store is not None and not self._over.wait(self._interval):
            beat += 1
            sign = _Sign(beat, self._marks, self._touches, self.phase, self.step, place)
            try:
                store.set(self._key.format(distributed.rank()), json.dumps(sign))
            except Exception:  # rank 0 is gone: the others are about to find out, one way or another
                return

    def _watch(self) -> None:
        reader, store = ThreadPoolExecutor(1), distributed.own_store()
        before: dict[int, _Sign] | None = None
        awake = unanswered = 0
        while not self._over.wait(self._interval):
            waited = time.monotonic() - self._since
            if waited < self._seconds / 2:
                awake = unanswered = 0
                continue
            awake += 1
            if awake == 1:
                before = self._signs(reader, store)
            if waited < self._seconds or awake * self._interval < 0.4 * self._seconds:
                continue  # it has not been long enough, or this process was stopped itself and has just woken up
            now = self._signs(reader, store)
            if now is None and unanswered < _TRIES - 1:
                unanswered += 1
            elif now and before and any(now[rank].touches > before[rank].touches for rank in now):
                self._since = time.monotonic()  # another rank is at work, and this one waits for it
            else:
                self._end(_sentence(now, before, waited, self._folder))

    def _signs(self, reader: ThreadPoolExecutor, store) -> dict[int, _Sign] | None:
        """Every rank's last sign; None if the store does not answer."""
        if store is None:
            return {}
        try:
            return reader.submit(_read_signs, store, self._key).result(timeout=max(1.0, self._interval))
        except (TookTooLongError, RuntimeError):
            return None

    def _end(self, sentence: str) -> None:
        """Leave, from this thread: the main one may never come back."""
        if self._over.is_set():
            return
        last = threading.Timer(_LONGEST_FAREWELL, os._exit, (os.EX_TEMPFAIL,))  # what follows may hang as well
        last.daemon = True
        last.start()
        try:
            print(f"mlalign: error: rank {distributed.rank()}: {sentence}", file=sys.stderr, flush=True)
            faulthandler.dump_traceback(sys.stderr, all_threads=True)
            if self._folder:
                self._folder.mkdir(exist_ok=True)
                with (self._folder / f"rank-{distributed.rank()}.txt").open("w") as file:
                    file.write(sentence + "\n\n")
                    file.flush()
                    faulthandler.dump_traceback(file, all_threads=True)
            time.sleep(2)  # the launcher ends the others when the first leaves, and they have something to say as well
        finally:
            os._exit(os.EX_TEMPFAIL)


def _read_signs(store, key: str) -> dict[int, _Sign]:
    keys = [key.format(rank) for rank in range(distributed.world_size())]
    found = store.multi_get(keys) if store.check(keys) else [store.get(k) if store.check([k]) else None for k in keys]
    silent = _Sign(0, 0, 0, "start", 0, "not heard of yet")
    return {rank: _Sign(*json.loads(value)) if value else silent for rank, value in enumerate(found)}


def _sentence(now: dict[int, _Sign] | None, before: dict[int, _Sign] | None, waited: float, folder: Path | None) -> str:
    """What holds the job up, from two readings of all ranks' signs."""
    start = f"no progress on any rank for {waited:.0f} s"
    end = f"the ranks' stacks are in {folder}" if folder else "this rank's stacks follow"
    if now is None:
        return f"{start}: rank 0 does not answer, through which the ranks tell where they are; {end}"
    silent = [rank for rank in now if before and now[rank].beat == before[rank].beat]
    if silent:
        told = ", ".join(f"rank {rank} ({now[rank].place}), last heard of in {now[rank]}" for rank in silent[:8])
        return f"{start}: no sign of life from {told}; {end}"
    last = min(now.values(), key=lambda sign: sign.marks, default=None)
    behind = [rank for rank in now if now[rank].marks == last.marks]
    if last is None or len(behind) == len(now):
        return f"{start}: all are alive, in {last}; {end}" if last else f"{start}; {end}"
    told = ", ".join(f"rank {rank} ({now[rank].place})" for rank in behind[:8])
    return f"{start}: all are alive, and behind the others is {told}, in {last}; {end}"
