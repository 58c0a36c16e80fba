"""`mlalign doctor [CONFIG] [a.b=c ...]`: can training start here, and how fast do the ranks speak to each other?

mlalign doctor                                   this machine
launch/torchrun.sh doctor recipe.yaml            its GPUs together, and what the recipe needs
slurm/submit train.sbatch recipe.yaml            runs it first, on all ranks of the job
"""

import os
import socket
import statistics
import time
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch
import torch.distributed as dist
from rich.table import Table

from mlalign import distributed, launchers
from mlalign.checks import GIB, Finding, check_device, check_here, run_folder, versions
from mlalign.config import Config
from mlalign.errors import UserError
from mlalign.tracker import console
from mlalign.watchdog import Watchdog

_COLOURS = {"ok": "green", "note": "yellow", "problem": "red"}
_MESSAGE = 64 * 2**20  #: bytes of the all-reduce that measures bandwidth
_SKEW = 1.0  #: seconds between clocks that are worth a note
_STUCK_AFTER = Config.model_fields["stuck_after"].default


@dataclass(frozen=True)
class Report:
    """What a rank tells the others."""

    rank: int
    local_rank: int
    host: str
    device: str
    device_id: str  #: of the GPU, unique in the world; empty on a CPU
    memory: float  #: GiB of the device, or of the host
    versions: dict[str, str]
    findings: list[Finding]


def doctor(config: Config | None) -> None:
    """Print what was found, problems with what to do. Raises UserError, on all ranks, where training cannot start."""
    findings = _said(check_here(config))  # before the ranks meet: should they not, this may say why
    if launchers.started_together() > 1:
        with distributed.StopSignals() as signals:
            distributed.init()
            findings = _check_together(findings + _said(check_device(config)), config)
            signals.check()
    else:
        findings += _said(check_device(config))
    problems = [finding for finding in findings if finding.level == "problem"]
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise UserError(f"training cannot start: {problems[0].subject}: {problems[0].text}{more}")
    if launchers.rank_of() == 0:
        notes = sum(finding.level == "note" for finding in findings)
        console.print(f"training can start{f', {notes} notes above' if notes else ''}", style="green")


def _said(findings: list[Finding]) -> list[Finding]:
    """The findings, printed on rank 0."""
    if launchers.rank_of() == 0:
        for finding in findings:
            line = f"[{_COLOURS[finding.level]}]{finding.level:8}[/]"
            console.print(line, f"{finding.subject:14}", end="")
            console.print(finding.text, markup=False, soft_wrap=True)
    return findings


def _check_together(own: list[Finding], config: Config | None) -> list[Finding]:
    """The findings of all ranks, and what only all of them can find. The same list on all ranks.

    They are printed as they come: one may explain why a later check hangs.
    """
    with Watchdog(config.stuck_after if config else _STUCK_AFTER, None, name="doctor") as watch:
        watch.at("what each rank found", 0)
        reports = distributed.gather_objects(_report(own))
        if distributed.is_main():
            console.print(_table(reports))
        findings = _said([*_elsewhere(reports), *_differing_versions(reports), *_shared_devices(reports)])
        checks = {
            "shared files": lambda: _shared_folder(config),
            "clocks": _clocks,
            "all-reduce": _speed,
            "gather": _gather,
        }
        for name, check in checks.items():
            watch.at(name, 0)
            findings += _said([check()])
    return list(reports[0].findings) + findings


def _report(findings: list[Finding]) -> Report:
    if distributed.uses_cuda():
        properties = torch.cuda.get_device_properties(distributed.device())
        name, memory, number = properties.name, properties.total_memory, str(properties.uuid)
    else:
        name, number = f"{os.cpu_count()} CPU cores", ""
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    here = (distributed.rank(), distributed.local_rank(), socket.gethostname())
    return Report(*here, name, number, memory / GIB, versions(), findings)


def _table(reports: list[Report]) -> Table:
    table = Table("ranks", "host", "local ranks", "device", "GiB", box=None, pad_edge=False)
    for (host, device, memory), group in groupby(reports, lambda one: (one.host, one.device, one.memory)):
        ranks = list(group)
        numbers = _range([one.rank for one in ranks]), host, _range([one.local_rank for one in ranks])
        table.add_row(*numbers, device, f"{memory:.0f}")
    return table


def _range(numbers: list[int]) -> str:
    first, last = min(numbers), max(numbers)
    return f"{first}-{last}" if last > first else str(first)


def _elsewhere(reports: list[Report]) -> list[Finding]:
    """What other ranks found and rank 0 did not, but for what is well: said once for each host."""
    found: dict[tuple[str, Finding], None] = {}
    for report in reports[1:]:
        for finding in report.findings:
            if finding.level != "ok" and finding not in reports[0].findings:
                found[report.host, finding] = None
    return [Finding(one.level, one.subject, f"on {host}: {one.text}") for host, one in found]


def _differing_versions(reports: list[Report]) -> list[Finding]:
    differing = []
    for report in reports[1:]:
        for name, version in reports[0].versions.items():
            other = report.versions.get(name, "missing")
            if other != version:
                text = f"{name} is {version} on rank 0, {other} on rank {report.rank} ({report.host})"
                differing.append(Finding("problem", "versions", f"{text}: start both from one environment"))
    return differing or [Finding("ok", "versions", f"the same on all {len(reports)} ranks")]


def _shared_devices(reports: list[Report]) -> list[Finding]:
    users: dict[str, list[int]] = {}
    for report in reports:
        users.setdefault(report.device_id, []).append(report.rank)
    users.pop("", None)
    return [
        Finding("problem", "GPUs", f"ranks {ranks} share one GPU: start one process per GPU, see launch/")
        for ranks in users.values()
        if len(ranks) > 1
    ]


def _shared_folder(config: Config | None) -> Finding:
    """Whether what rank 0 writes is there for the others: checkpoints need a file system that all of them see."""
    token = Path(distributed.broadcast_object(str(run_folder(config) / f".doctor-{os.getpid()}")))
    failed = None
    if distributed.is_main():
        try:
            token.touch()
        except OSError as error:
            failed = f"{token.parent} cannot be written: {error.strerror}"
    failed = distributed.broadcast_object(failed)
    if failed:
        return Finding("problem", "shared files", failed)
    seen = distributed.gather_objects((os.path.exists(token), socket.gethostname()))
    if distributed.is_main():
        token.unlink(missing_ok=True)
    blind = [f"rank {rank} ({host})" for rank, (there, host) in enumerate(seen) if not there]
    if blind:
        text = f"{token.parent} of rank 0 is not seen by {', '.join(blind)}"
        return Finding("problem", "shared files", f"{text}: put run_dir on a file system that all hosts share")
    return Finding("ok", "shared files", f"all ranks see {token.parent}")


def _clocks() -> Finding:
    distributed.barrier()
    times = distributed.gather_objects(time.time())
    skew = max(times) - min(times)
    if skew > _SKEW:
        return Finding("note", "clocks", f"they differ by {skew:.1f} s, so do times in logs: ask for NTP")
    return Finding("ok", "clocks", f"within {skew * 1000:.0f} ms, the meeting included")


def _speed() -> Finding:
    """All-reduce: latency of a small one, bus bandwidth of a large one as NVIDIA's nccl-tests count it."""
    ranks, device = distributed.world_size(), distributed.device()
    latency = _time_all_reduce(torch.empty(1, device=device), repeats=20)
    large = torch.empty(_MESSAGE // 4, device=device)
    bandwidth = _MESSAGE / _time_all_reduce(large, repeats=4) * 2 * (ranks - 1) / ranks
    if distributed.any_rank(bool((large != ranks).any())):
        return Finding("problem", "all-reduce", "gives wrong sums: the network or its library is broken")
    text = f"{latency * 1e6:,.0f} µs, {bandwidth / 1e9:.1f} GB/s bus bandwidth at {_MESSAGE >> 20} MiB"
    return Finding("ok", "all-reduce", f"{text} ({dist.get_backend()})")


def _gather() -> Finding:
    """The alignment loss's gather and its gradient, as they come over this network: the tests know gloo's alone."""
    ranks, rank, device = distributed.world_size(), distributed.rank(), distributed.device()
    whole = torch.arange(24.0 * ranks, device=device).view(2, 3 * ranks, 4)  # sides, pairs, hidden
    mine = slice(3 * rank, 3 * rank + 3)
    own = whole[:, mine].clone().requires_grad_()
    every = distributed.gather_rows_with_grad(own.transpose(0, 1)).transpose(0, 1)
    (every * whole).sum().backward()
    exact = torch.equal(every, whole) and torch.equal(own.grad, ranks * whole[:, mine])
    if distributed.any_rank(not exact):
        return Finding("problem", "gather", "gives wrong rows or gradients: the network or its library is broken")
    return Finding("ok", "gather", "all ranks get the rows of all, and exact gradients of their own")


def _time_all_reduce(values: torch.Tensor, repeats: int) -> float:
    """Seconds, the median over repeats, of the slowest rank. Leaves the sum of ones in `values`."""
    times = []
    wait = torch.cuda.synchronize if values.is_cuda else lambda: None
    for _ in range(2 + repeats):  # the first bring the ranks into step, which a barrier would do less well
        values.fill_(1)
        wait()
        start = time.perf_counter()
        dist.all_reduce(values)
        wait()
        times.append(time.perf_counter() - start)
    return max(distributed.gather_objects(statistics.median(times[2:])))
