"""Memory of a run before it runs: a config and what it works through become bytes by phase and part, and advice.

`estimate(job)` puts together what the others find: `activations` what passes take, `memory` what DeepSpeed holds around
them. `advise(job, gib)` names the lowest of the shipped ZeRO files that fits. Used by `mlalign plan`.
"""

from dataclasses import dataclass, field, replace
from itertools import chain
from math import ceil
from typing import Any

import torch
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from mlalign import model, sharding
from mlalign.activations import PaperModel, alignment_pass, on_paper, task_pass
from mlalign.config import Config
from mlalign.errors import UserError
from mlalign.memory import Layout, Pass, checkpoint_size, model_states, phases
from mlalign.workload import Workload
from mlalign.zero import fit_section, read_deepspeed, saves_in_background

GIB = 2**30
SHIPPED = tuple(f"ds_configs/{n}.json" for n in ("zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload"))
#: Share of a GPU that advice leaves free: CUDA's context, NCCL's buffers, holes in the caching allocator. Not measured.
RESERVE = 0.1
_MOST_RANKS = 1024


@dataclass
class Job:
    """A run and where it is to run."""

    config: Config
    zero: dict[str, Any]  #: the section zero_optimization of DeepSpeed's config
    ranks: int
    cuda: bool
    layer: int
    workloads: dict[str, Workload]
    traces: dict[tuple, Any] = field(default_factory=dict)  #: what was found already, for other layouts of the same run

    @property
    def dtype(self) -> torch.dtype:
        """auto is what it would be on that device."""
        precision = self.config.model.precision
        return model.precision_dtype(("bf16" if self.cuda else "fp32") if precision == "auto" else precision)


@dataclass(frozen=True)
class Estimate:
    """Memory of one rank, and disk of all."""

    phases: dict[str, dict[str, int]]  #: see `memory.phases`
    host: dict[str, int]  #: part -> bytes of host memory on a rank with a GPU: what is offloaded, and for checkpoints
    parameters: int
    trainable: int
    checkpoint: int  #: bytes of one checkpoint
    result: int  #: bytes of the exported adapter (fp32) or model

    @property
    def peak_phase(self) -> str:
        return max(self.phases, key=lambda name: sum(self.phases[name].values()))

    @property
    def peak(self) -> int:
        return sum(self.phases[self.peak_phase].values())


def estimate(job: Job) -> Estimate:
    """Build the model on paper, run its passes on paper, add the model states."""
    config = job.config
    key = (config.model.gradient_checkpointing,)
    if key not in job.traces:
        job.traces[key] = on_paper(config, job.layer, job.dtype, job.cuda)
    paper = job.traces[key]
    groups = sharding.parameter_groups(paper.aligned, config.optimizer.weight_decay)
    sizes = tuple(tuple(p.numel() for p in group["params"]) for group in groups)
    layout = Layout(
        zero=DeepSpeedZeroConfig(**fit_section(job.zero, list(chain(*sizes)), adapters=config.lora is not None)),
        ranks=job.ranks,
        width=job.dtype.itemsize,
        groups=sizes,
        frozen=tuple(p.numel() for p in paper.parameters() if not p.requires_grad),
        cuda=job.cuda,
    )
    passes = {f"{name} pass": _pass(job, paper, name, layout.stage == 3) for name in job.workloads}
    parameters = sum(layout.tensors)
    return Estimate(
        phases=phases(layout, passes),
        host=model_states(layout)[1] | _saving(config, layout),
        parameters=parameters,
        trainable=layout.trainable,
        checkpoint=checkpoint_size(layout),
        result=4 * layout.trainable if config.lora else layout.width * parameters,
    )


def _saving(config: Config, layout: Layout) -> dict[str, int]:
    """Host memory of a checkpoint that is written while training goes on: a copy of a rank's masters and moments."""
    if not saves_in_background(config, layout.cuda, layout.offloads_optimizer):
        return {}
    return {"checkpoint": 12 * ceil(layout.trainable / layout.ranks)}


def _pass(job: Job, paper: PaperModel, name: str, zero3: bool) -> Pass:
    work = job.workloads[name]
    key = (name, work.shapes, work.micro_batches, job.ranks, job.config.model.gradient_checkpointing, zero3)
    if key not in job.traces:
        if name == "task":
            job.traces[key] = task_pass(paper, work.shapes, work.learned, zero3)
        else:
            settings = job.config.alignment
            job.traces[key] = alignment_pass(paper, work.shapes, settings, job.ranks, work.micro_batches, zero3)
    return job.traces[key]


def advise(job: Job, gib: float) -> tuple[dict[str, int], str]:
    """Which shipped ZeRO file to take on devices of so many GiB.

    Returns: bytes of one rank under each file; and a sentence: the lowest stage that fits, offloading last, or what to
    change where none does.
    """
    room = gib * GIB * (1 - RESERVE if job.cuda else 1)
    needed = {file: estimate(_under(job, file)).peak for file in SHIPPED}
    fits = next((file for file, size in needed.items() if size <= room), None)
    if fits:
        return needed, f"deepspeed={fits} fits, with {needed[fits] / GIB:.1f} of {room / GIB:.1f} GiB"
    leanest = min(needed, key=needed.get)
    smaller, changes = _shrunk(_under(job, leanest), room)
    if not changes:
        return needed, f"nothing fits into {room / GIB:.1f} GiB: shorten max_length, or take a smaller model"
    return needed, (
        f"none fits into {room / GIB:.1f} GiB as it is, but deepspeed={leanest} {' '.join(changes)} does, with "
        f"{estimate(smaller).peak / GIB:.1f}"
    )


def _under(job: Job, file: str) -> Job:
    return replace(job, zero=read_deepspeed(file)["zero_optimization"])


def _shrunk(job: Job, room: float) -> tuple[Job, list[str]]:
    """Change what helps, cheapest first, until the job fits; no changes where nothing helps."""
    changes = {}
    if not job.config.model.gradient_checkpointing:
        settings = job.config.model.model_copy(update={"gradient_checkpointing": True})
        job = replace(job, config=job.config.model_copy(update={"model": settings}))
        changes["model.gradient_checkpointing"] = "model.gradient_checkpointing=true"
    while (found := estimate(job)).peak > room:
        name = found.peak_phase.removesuffix(" pass")
        work = job.workloads.get(name)
        least = 2 if name == "alignment" and job.config.alignment.negatives == "local" else 1
        if work and _rows(name, work) > least:
            job = replace(job, workloads=job.workloads | {name: _halved(name, work)})
            changes[name] = f"{name}.micro_batch_size={_rows(name, job.workloads[name])}"
        elif job.ranks < _MOST_RANKS and _divides(job.config, 2 * job.ranks):
            job = replace(job, ranks=2 * job.ranks)
            changes["ranks"] = f"on {job.ranks} ranks"
        else:
            return job, []
    return job, list(changes.values())


def _divides(config: Config, ranks: int) -> bool:
    """Whether `train` would take so many ranks."""
    try:
        config.check_ranks(ranks)
    except UserError:
        return False
    return True


def _rows(name: str, work: Workload) -> int:
    """Rows or pairs of the largest micro-batch on one rank."""
    rows = sum(rows for rows, _ in work.shapes)
    return rows if name == "task" else rows // 2


def _halved(name: str, work: Workload) -> Workload:
    rows = _rows(name, work)
    half = (rows + 1) // 2
    sides = sum(each for each, _ in work.shapes) // rows * half
    shapes = []
    for each, width in work.shapes:  # longest rows first: what rounding leaves over is counted as long
        shapes.append((min(-(-each * half // rows), sides), width))
        sides -= shapes[-1][0]
    shapes = tuple((each, width) for each, width in shapes if each)
    learned = -(-work.learned * half // rows)
    return replace(work, shapes=shapes, learned=learned, micro_batches=2 * work.micro_batches)
