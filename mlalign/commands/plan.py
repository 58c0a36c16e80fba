"""`mlalign plan CONFIG [a.b=c ...]`: what a run will take, before it is queued. No weights are read.

mlalign plan recipe.yaml --ranks 8 --memory-per-gpu 80              memory, steps, disk, which ZeRO stage, #SBATCH lines
mlalign plan recipe.yaml --ranks 8 --tokens-per-second 20000        and how long it takes
launch/torchrun.sh plan recipe.yaml --measure 5                     the same, measured in real steps on the ranks here
"""

import json
import math
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

from rich.table import Table

from mlalign import distributed, launchers, model
from mlalign.commands import train
from mlalign.config import Config
from mlalign.durable import write_whole
from mlalign.errors import UserError
from mlalign.estimate import GIB, RESERVE, SHIPPED, Estimate, Job, advise, estimate
from mlalign.memory import PARTS
from mlalign.tracker import console, say
from mlalign.workload import negatives, steps_of_run, survey
from mlalign.zero import read_deepspeed

_SLACK = 1.25  #: of the time that is asked for: evaluations, checkpoints, other work on the file system
_START = 600  #: seconds for loading the model and reading rows


@dataclass(frozen=True)
class Settings:
    """What `mlalign plan` is asked for beside the config."""

    config: str = "CONFIG"  #: as on the command line, with overrides
    ranks: int | None = None
    device: Literal["cuda", "cpu"] | None = None  #: None = what is here
    gpus_per_node: int = 4
    memory_per_gpu: float | None = None  #: GiB
    tokens_per_second: float | None = None  #: over all ranks
    measure: int | None = None  #: steps
    json: Path | None = None


def plan(config: Config, settings: Settings) -> dict[str, Any]:
    """Print and return what the run will take; with `settings.measure`, called by all ranks.

    Returns: sizes in bytes, times in seconds; None for what cannot be known.
    Raises UserError for what `train` would refuse.
    """
    job, deepspeed = _job(config, settings)
    found = estimate(job)
    measured = train.measure(config, settings.measure) if settings.measure else {}
    result = _result(job, deepspeed, found, settings, measured)
    if settings.memory_per_gpu:
        needed, sentence = advise(job, settings.memory_per_gpu)
        result["advice"] = {"memory_per_gpu": settings.memory_per_gpu, "needed": needed, "sentence": sentence}
    result["sbatch"] = sbatch_lines(job.ranks, settings.gpus_per_node, result["time"]["wall_seconds"], job.cuda)
    if distributed.is_main():
        _show(result, settings)
        if settings.json:
            settings.json.parent.mkdir(parents=True, exist_ok=True)
            write_whole(settings.json, json.dumps(result, indent=2) + "\n")
    return result


def _job(config: Config, settings: Settings) -> tuple[Job, str]:
    """What is to be planned, checked as `train` checks it; and the name of the ZeRO file."""
    device = settings.device or ("cuda" if distributed.uses_cuda() else "cpu")
    here = launchers.started_together()
    ranks = settings.ranks or here
    if settings.measure and (ranks != here or (device == "cuda") != distributed.uses_cuda()):
        what = "GPUs" if distributed.uses_cuda() else "CPUs"
        raise UserError(
            f"--measure {settings.measure} runs on what is here, {here} ranks on {what}: start it with a script in "
            f"launch/ on the machines that are meant, or leave out {'--ranks' if ranks != here else '--device'}"
        )
    zero = read_deepspeed(config.deepspeed)["zero_optimization"]
    config.check_ranks(ranks)
    tokenizer = model.load_tokenizer(config.model)
    layer = model.checked_layer(config)
    workloads = survey(config, ranks, tokenizer)
    return Job(config, zero, ranks, device == "cuda", layer, workloads), config.deepspeed or "ZeRO-0"


def _result(job: Job, deepspeed: str, found: Estimate, settings: Settings, measured: dict) -> dict[str, Any]:
    config, ranks = job.config, job.ranks
    work = {
        name: asdict(each) | {"batch_size": getattr(config, name).batch_size} for name, each in job.workloads.items()
    }
    if config.alignment:
        anchor, batch = negatives(config.alignment, ranks)
        work["alignment"]["negatives_per_anchor"] = anchor
        work["alignment"]["negatives_per_step"] = round(batch * work["alignment"]["batches_per_step"])
    per_step = [each.tokens_per_step for each in job.workloads.values()]
    steps = steps_of_run(config, job.workloads)
    speed = measured.get("tokens_per_second") or settings.tokens_per_second
    tokens = sum(per_step) * steps if None not in (*per_step, steps) else None
    return {
        "model": {
            "path": config.model.path,
            "parameters": found.parameters,
            "trainable": found.trainable,
            "precision": str(job.dtype).removeprefix("torch."),
            "layer": job.layer if config.alignment else None,
        },
        "run": {"ranks": ranks, "device": "cuda" if job.cuda else "cpu", "deepspeed": deepspeed, "steps": steps},
        "work": work,
        "memory": {"phases": found.phases, "peak": found.peak, "peak_phase": found.peak_phase, "host": found.host},
        "disk": {"checkpoint": found.checkpoint, "result": found.result},
        "time": {
            "tokens": round(tokens) if tokens else None,
            "tokens_per_second": speed,
            "wall_seconds": tokens / speed if tokens and speed else None,
        },
        "measured": measured or None,
    }


def sbatch_lines(ranks: int, gpus_per_node: int, seconds: float | None, cuda: bool) -> list[str]:
    """Flags for slurm/submit and slurm/train.sbatch: one task per GPU, the time with slack or left out if unknown.

    Raises UserError where the ranks do not fill their nodes evenly.
    """
    nodes = math.ceil(ranks / gpus_per_node)
    if ranks % nodes:
        raise UserError(
            f"--ranks {ranks} cannot be spread evenly over nodes of {gpus_per_node}: take a multiple, or "
            "another --gpus-per-node"
        )
    flags = [f"--nodes={nodes}", f"--ntasks-per-node={ranks // nodes}"]
    if cuda:
        flags.append(f"--gpus-per-node={ranks // nodes}")
    if seconds is not None:
        minutes = 5 * math.ceil((seconds * _SLACK + _START) / 300)
        days, hours = divmod(minutes // 60, 24)
        flags.append(f"--time={f'{days}-' * (days > 0)}{hours:02}:{minutes % 60:02}:00")
    return [f"#SBATCH {flag}" for flag in flags]


# ----------------------------------------------------------------------------------------------------------- printing


def _show(result: dict[str, Any], settings: Settings) -> None:
    about, run, memory, disk = (result[name] for name in ("model", "run", "memory", "disk"))
    share = about["trainable"] / about["parameters"]
    what = "GPUs" if run["device"] == "cuda" else "CPU ranks"
    aligned = f", aligned at layer {about['layer']}" if about["layer"] else ""
    say(f"{about['path']}: {about['parameters']:,} parameters, {about['trainable']:,} trainable ({share:.2%})")
    say(f"{run['ranks']} {what}, {about['precision']}, {run['deepspeed']}{aligned}")
    console.print(_work_table(result["work"]))
    for name, each in result["work"].items():
        if each["missing"]:
            say(f"{name}: {each['missing']}: rows of {name}.max_length are assumed")
    console.print(_memory_table(memory))
    offloaded = sum(size for part, size in memory["host"].items() if part != "checkpoint")
    if offloaded:
        where = "of them in" if run["device"] == "cpu" else "and, offloaded,"
        say(f"{where} {_size(offloaded)} of host memory per rank")
    if "checkpoint" in memory["host"]:
        copied = _size(memory["host"]["checkpoint"])
        say(f"and {copied} of host memory per rank for a copy of a checkpoint, while it is written")
    if result["measured"]:
        of = "its process, libraries included" if run["device"] == "cpu" else "tensors"
        say(f"measured in {settings.measure} steps on rank 0: {_size(result['measured']['memory'])} of {of}")
    kept = "best and last two are kept, and one more while it is written"
    result_kept = "twice while it is written, when rank 0 holds it in host memory too"
    say(f"disk: {_size(disk['checkpoint'])} a checkpoint, {kept}; result {_size(disk['result'])}, {result_kept}")
    say(_time_line(run["steps"], result["time"]))
    if "advice" in result:
        console.print(_advice_table(result["advice"], run["device"]))
        say(f"advice: {result['advice']['sentence']}")
    for line in result["sbatch"]:
        say(line)
    flags = " ".join(line.removeprefix("#SBATCH ") for line in result["sbatch"])
    say(f"slurm/submit {flags} train.sbatch {settings.config}")


def _work_table(work: dict[str, dict[str, Any]]) -> Table:
    table = _table("work", "", list(work))
    rows = {
        "rows per epoch": "rows_per_epoch",
        "tokens per epoch": "tokens_per_epoch",
        "steps per epoch": "steps_per_epoch",
        "tokens per step": "tokens_per_step",
        "batch size, all ranks": "batch_size",
        "micro-batches per rank": "micro_batches",
        "largest, rows x tokens": "shapes",
        "negatives per anchor": "negatives_per_anchor",
        "negatives per step": "negatives_per_step",
    }
    for label, key in rows.items():
        table.add_row(label, *(_cell(each.get(key, "")) for each in work.values()))
    return table


def _cell(value: Any) -> str:
    if isinstance(value, tuple):
        return " + ".join(f"{rows} x {width}" for rows, width in value)
    return "?" if value is None else value if isinstance(value, str) else f"{value:,.0f}"


def _memory_table(memory: dict[str, Any]) -> Table:
    phases, peak = memory["phases"], memory["peak_phase"]
    table = _table("memory of one rank", "part", list(phases))
    for part in PARTS:
        table.add_row(part, *(_size(each[part]) for each in phases.values()), end_section=part == PARTS[-1])
    sums = {name: _size(sum(each.values())) for name, each in phases.items()}
    table.add_row("sum", *(f"[bold]{size}[/]" if name == peak else size for name, size in sums.items()))
    return table


def _advice_table(advice: dict[str, Any], device: str) -> Table:
    gib = advice["memory_per_gpu"]
    kept = f", {RESERVE:.0%} kept free" if device == "cuda" else ""
    table = _table(f"of {gib:g} GiB a rank{kept}", "deepspeed", ["peak"])
    for file in SHIPPED:
        table.add_row(file, _size(advice["needed"][file]))
    return table


def _table(title: str, first: str, others: list[str]) -> Table:
    table = Table(first, title=title, title_justify="left")
    for name in others:
        table.add_column(name, justify="right")
    return table


def _time_line(steps: int | None, time: dict[str, Any]) -> str:
    if steps is None:
        return "time: unknown, for the number of rows is"
    line = f"time: {steps:,} steps"
    if time["tokens"] is None:
        return f"{line}, of unknown length"
    line += f", {time['tokens']:,} tokens"
    if time["wall_seconds"] is None:
        return f"{line}; --tokens-per-second N or --measure N says how long that is"
    wall = timedelta(seconds=round(time["wall_seconds"]))
    return f"{line}, {wall} at {time['tokens_per_second']:,.0f} tokens a second, evaluations not counted"


def _size(size: float) -> str:
    return f"{size / GIB:,.1f} GiB" if size >= GIB else f"{size / 2**20:,.1f} MiB"
