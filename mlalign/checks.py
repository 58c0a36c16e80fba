"""What one process can find out about where it runs, for `mlalign doctor`: no weights, no other ranks, no waiting.

Each check gives findings: `ok`, `note` (training starts, but not as it could), or `problem` (training cannot start).
"""

import json
import locale
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

import torch
from packaging.requirements import Requirement
from transformers import LlamaConfig
from transformers.utils import is_flash_attn_2_available

from mlalign import distributed, kernels, launchers, model, varlen
from mlalign.compiling import check_compile
from mlalign.config import Config, Source
from mlalign.errors import UserError
from mlalign.rows import is_local, local_files, read_rows
from mlalign.zero import offloads_optimizer, read_deepspeed

GIB = 2**30
_LLAMA = LlamaConfig(num_attention_heads=8, num_key_value_heads=2, head_dim=128)  #: whose attention is tried on a GPU
_LITTLE_DISK = 10 * GIB
_LITTLE_SHARED_MEMORY = GIB  # containers come with 64 MiB


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    level: Literal["ok", "note", "problem"]
    subject: str
    text: str  #: what was found, and after a colon what to do


def check_here(config: Config | None) -> list[Finding]:
    """All findings on this host but those of `check_device`, in the order of the report."""
    parts = [_packages(), _devices(), _kernels(config), _threads(config)]
    parts += [_shared_memory(), _locale(), _disk(config), _hub(), _slurm(), _mpi()]
    if config is not None:
        parts.append(_inputs(config))
    return [finding for part in parts for finding in part]


def check_device(config: Config | None) -> list[Finding]:
    """Findings on this process's device, which `distributed.init` chooses where there are several ranks."""
    return list(_attention(config))


def requirements() -> list[Requirement]:
    """What mlalign needs, as its own metadata says; empty where it runs without being installed."""
    try:
        every = map(Requirement, metadata.requires("mlalign") or [])
    except metadata.PackageNotFoundError:
        return []
    return [one for one in every if one.marker is None or one.marker.evaluate({"extra": ""})]


def versions() -> dict[str, str]:
    """Python's and of every package that mlalign needs; "missing" for what is not installed."""
    found = {"python": platform.python_version()}
    for requirement in requirements():
        try:
            found[requirement.name] = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            found[requirement.name] = "missing"
    return found


def _packages() -> Iterator[Finding]:
    found = versions()
    if len(found) == 1:
        yield Finding(
            "note", "packages", "mlalign is not installed here, so versions are not checked: pip install -e ."
        )
        return
    for one in requirements():
        missing = found[one.name] == "missing"
        if not missing and one.specifier.contains(found[one.name], prereleases=True):
            continue
        level = "problem" if missing else "note"
        yield Finding(
            level, "packages", f"{one.name} is {found[one.name]}, tested is {one.specifier}: pip install '{one}'"
        )
    names = ("python", "torch", "deepspeed", "transformers", "peft")
    yield Finding("ok", "packages", ", ".join(f"{name} {found[name]}" for name in names if name in found))


def _devices() -> Iterator[Finding]:
    if distributed.uses_cuda():
        count = torch.cuda.device_count()
        names = ", ".join(sorted({torch.cuda.get_device_name(i) for i in range(count)}))
        nccl = ".".join(map(str, torch.cuda.nccl.version()))
        yield Finding("ok", "GPUs", f"{count} x {names}, CUDA {torch.version.cuda}, NCCL {nccl}")
        if not torch.cuda.is_bf16_supported(including_emulation=False):
            yield Finding("note", "GPUs", "they have no bf16: set model.precision=fp32, it is faster there")
    elif torch.cuda.is_available():
        yield Finding("note", "GPUs", "DS_ACCELERATOR=cpu leaves them alone: unset it to train on them")
    elif launchers.nvidia_driver() and os.environ.get("DS_ACCELERATOR") != "cpu":
        reason = "this torch is built without CUDA" if torch.version.cuda is None else "torch cannot use it"
        yield Finding(
            "problem", "GPUs", f"there is an NVIDIA driver, but {reason}: see pytorch.org, or DS_ACCELERATOR=cpu"
        )
    else:
        yield Finding("ok", "GPUs", "none: CPU, gloo and fp32")


def _attention(config: Config | None) -> Iterator[Finding]:
    asked = config is not None and config.model.attention == "flash_attention_2"
    if asked and not is_flash_attn_2_available():
        level = "problem" if distributed.uses_cuda() else "note"  # a login node need not have what the job's nodes have
        yield Finding(level, "attention", "model.attention is flash_attention_2, which needs flash-attn and a GPU")
    elif is_flash_attn_2_available():
        yield Finding("ok", "attention", f"flash-attn {metadata.version('flash-attn')}")
    elif distributed.uses_cuda():
        wrong = varlen.wrong_kernel(_LLAMA, torch.bfloat16, distributed.device())
        if wrong:
            yield Finding("note", "attention", f"sdpa of padded rows: torch's flash attention does not serve: {wrong}")
        else:
            yield Finding("ok", "attention", "torch's flash attention, which gives what sdpa gives")
    else:
        yield Finding("ok", "attention", "sdpa")


def _kernels(config: Config | None) -> Iterator[Finding]:
    if not config or not offloads_optimizer(read_deepspeed(config.deepspeed)):
        return
    state = kernels.state("CPUAdamBuilder")
    if state.ready:
        yield Finding("ok", "kernels", f"{state.name} is compiled")
    elif state.missing:
        yield Finding(
            "problem", "kernels", f"{state.name} is to be compiled, but there is no {state.missing}: install it"
        )
    else:
        yield Finding("ok", "kernels", f"{state.name} will be compiled into {state.folder}: a minute, once")


def _threads(config: Config | None) -> Iterator[Finding]:
    cores, threads = launchers.cores(), torch.get_num_threads()
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    text = f"{cores} cores, {threads} threads per rank"
    if ranks * threads > cores:
        yield Finding(
            "note", "threads", f"{text} for {ranks} ranks: they wait for each other, so lower OMP_NUM_THREADS"
        )
    elif threads == 1 and cores // ranks > 1 and config and offloads_optimizer(read_deepspeed(config.deepspeed)):
        yield Finding(
            "note", "threads", f"{text}: the offloaded optimizer takes as many as it gets, so raise OMP_NUM_THREADS"
        )
    else:
        yield Finding("ok", "threads", text)


def _shared_memory() -> Iterator[Finding]:
    if os.path.isdir("/dev/shm"):
        size = shutil.disk_usage("/dev/shm").total
        text = f"{size / GIB:.1f} GiB of /dev/shm"
        if size < _LITTLE_SHARED_MEMORY:
            yield Finding(
                "note", "shared memory", f"{text}, ranks on one host need it: start the container with --ipc=host"
            )
        else:
            yield Finding("ok", "shared memory", text)


def _locale() -> Iterator[Finding]:
    encoding = locale.getencoding() if not sys.flags.utf8_mode else "utf-8"
    if encoding.lower().replace("-", "") == "utf8":
        yield Finding("ok", "locale", "UTF-8")
    else:
        yield Finding("problem", "locale", f"text files are read as {encoding}: set LANG=C.UTF-8 or PYTHONUTF8=1")


def run_folder(config: Config | None) -> Path:
    """Where a run writes, or the nearest directory above it that is there already."""
    folder = Path(config.run_dir if config else ".").absolute()
    return next(each for each in (folder, *folder.parents) if each.is_dir())


def _disk(config: Config | None) -> Iterator[Finding]:
    folder = run_folder(config)
    free = shutil.disk_usage(folder).free
    text = f"{free / GIB:,.0f} GiB free in {folder}"
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        yield Finding("problem", "disk", f"{folder} cannot be written ({error.strerror}): choose another run_dir")
        return
    if free < _LITTLE_DISK:
        yield Finding("note", "disk", f"{text}: checkpoints may not fit, see `mlalign plan`")
    else:
        yield Finding("ok", "disk", text)


def _hub() -> Iterator[Finding]:
    from huggingface_hub import constants

    offline = ", offline" if constants.HF_HUB_OFFLINE else ""
    where = Path(constants.HF_HUB_CACHE)
    nearest = next(each for each in (where, *where.parents) if each.is_dir())
    if not os.access(nearest, os.W_OK) and not offline:
        yield Finding(
            "note", "hub cache", f"{where} cannot be written: set HF_HOME, or HF_HUB_OFFLINE=1 where all is there"
        )
    else:
        yield Finding("ok", "hub cache", f"{where}{offline}")


def _slurm() -> Iterator[Finding]:
    job = os.environ.get("SLURM_JOB_ID")
    if job:
        nodes = os.environ.get("SLURM_JOB_NODELIST", "?")
        yield Finding("ok", "Slurm", f"job {job} on {nodes}, restart {os.environ.get('SLURM_RESTART_COUNT', 0)}")


def _mpi() -> Iterator[Finding]:
    if any(name in os.environ for name in launchers.MPI_SIZES):
        yield Finding(
            "ok", "MPI", f"mpi4py {metadata.version('mpi4py')}, {shutil.which('mpirun') or 'mpirun elsewhere'}"
        )


# ------------------------------------------------------------------------------------------------ what a config needs


def _inputs(config: Config) -> Iterator[Finding]:
    yield _judged("config", "batches fit the ranks", lambda: config.check_ranks(launchers.started_together()))
    if config.model.compile:
        zero = read_deepspeed(config.deepspeed)
        yield _judged("config", "there is a compiler for model.compile", lambda: check_compile(zero))
    yield _judged(
        "model", f"{config.model.path}: config, tokenizer and weights are there", lambda: _check_model(config)
    )
    for section in filter(None, (config.task, config.alignment)):
        for source in (*section.train, *section.dev):
            yield _data(source, section.streaming)


def _data(source: Source, streaming: bool) -> Finding:
    from huggingface_hub import constants

    if is_local(source.path):
        try:
            files = len(local_files(source))
        except UserError as error:
            return Finding("problem", "data", f"{error}: check the path")
        return Finding("ok", "data", f"{source.path}: {files} file{'s' * (files > 1)}")
    if not constants.HF_HUB_OFFLINE:
        kept = "read as it is needed" if streaming else "`mlalign inspect` fetches it"
        return Finding("ok", "data", f"{source.path}: from the hub, {kept}")
    try:
        next(read_rows(source, streaming), None)
    except UserError as error:
        todo = "without streaming, run `mlalign inspect`" if streaming else "run `mlalign inspect`"
        return Finding("problem", "data", f"{error}: {todo} where there is internet")
    return Finding("ok", "data", f"{source.path}: fetched from the hub")


def _judged(subject: str, good: str, check: Callable[[], None]) -> Finding:
    try:
        check()
    except UserError as error:
        return Finding("problem", subject, str(error))
    return Finding("ok", subject, good)


def _check_model(config: Config) -> None:
    model.checked_layer(config)
    model.load_tokenizer(config.model)
    _check_weights(config.model.path)


def _check_weights(path: str) -> None:
    """Raises UserError where a file of weights is missing: a shard of a local model, or of a hub's while offline."""
    from huggingface_hub import constants, try_to_load_from_cache

    local = os.path.isdir(path)
    if not local and not constants.HF_HUB_OFFLINE:
        return

    def find(name: str) -> str | None:
        if local:
            return os.path.join(path, name) if os.path.exists(os.path.join(path, name)) else None
        found = try_to_load_from_cache(path, name)
        return found if isinstance(found, str) else None

    if find("model.safetensors"):
        return
    fetch = "copy the model anew" if local else f"run `hf download {path}` where there is internet"
    index = find("model.safetensors.index.json")
    if index is None:
        raise UserError(f"model.path {path} has no weights (model.safetensors, or an index of shards): {fetch}")
    try:
        shards = sorted(set(json.loads(Path(index).read_text())["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"model.path {path}: {Path(index).name} is damaged: {fetch}") from error
    missing = [shard for shard in shards if find(shard) is None]
    if missing:
        raise UserError(
            f"model.path {path} lacks {len(missing)} of {len(shards)} shards, such as {missing[0]}: {fetch}"
        )
