"""Save, resume, rotate, export. A run directory's `checkpoints/` and its `adapter/` or `model/`.

    checkpoints/step-000200/   DeepSpeed's files, state.json, rank-N.pt
    checkpoints/latest         the name of the newest whole checkpoint
    adapter/ or model/         the result, in peft's or transformers' own format

Everything is written aside and renamed, and `latest` moves last: what is there under its name is whole.
"""

import io
import json
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
from deepspeed.utils import safe_get_full_fp32_param
from peft import PeftModel
from safetensors import SafetensorError
from torch import nn

from mlalign import distributed, jobs
from mlalign.errors import UserError
from mlalign.rundir import write_whole


class _Pending(NamedTuple):
    """A checkpoint on its way."""

    step: int
    name: str
    state: dict[str, Any]
    keep: set[int]
    written: Future[None] | None  #: None: already


class Saver:
    """Saves the checkpoints of a run, one at a time; in the background if asked to.

    There what is saved is copied to host memory, a thread writes it while training goes on, and a later `poll` gives it
    its name. Until then it does not exist: a run that is killed meanwhile goes on from the one before.
    """

    def __init__(self, engine, run_dir: Path, in_background: bool) -> None:
        self._engine, self._run_dir = engine, run_dir
        self._folder, self._partial = run_dir / "checkpoints", run_dir / "checkpoints" / "partial"
        self._thread = ThreadPoolExecutor(1) if in_background else None
        self._pending: _Pending | None = None

    def save(self, step: int, state: dict[str, Any], own: dict[str, Any], keep: set[int]) -> None:
        """Write a checkpoint of the engine, `state` (JSON) and every rank's `own` (tensors). Called by all ranks.

        Then those of all steps but this and `keep` are deleted.
        """
        self.finish()
        name = f"step-{step:06d}"
        if distributed.is_main():
            shutil.rmtree(self._partial, ignore_errors=True)
            self._partial.mkdir(parents=True)
        distributed.barrier()
        with _said_in_one_sentence(self._partial):
            written = self._write_engine(name)
            torch.save(own, self._partial / name / f"rank-{distributed.rank()}.pt")
        self._pending = _Pending(step, name, state, keep, written)
        if written is None:
            self.finish()

    def poll(self) -> None:
        """Give a checkpoint its name as soon as every rank has written its part. Called by all ranks."""
        if self._pending and not distributed.any_rank(not self._pending.written.done()):
            self.finish()

    def finish(self) -> None:
        """Wait for what is being written. Called by all ranks. Raises UserError, on all, where one could not write."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        if pending.written is not None:
            failure = None
            try:
                with _said_in_one_sentence(self._partial):
                    pending.written.result()
            except UserError as error:
                failure = str(error)
            failures = [each for each in distributed.gather_objects(failure) if each]
            if failures:
                raise UserError(failures[0])
        distributed.barrier()
        if distributed.is_main():
            self._give_name(pending)
        distributed.barrier()

    def _write_engine(self, name: str) -> Future[None] | None:
        frozen = any(not p.requires_grad for p in self._engine.module.parameters())
        arguments = {"tag": name, "save_latest": False, "exclude_frozen_parameters": frozen}
        if self._thread is None:
            self._engine.save_checkpoint(str(self._partial), **arguments)
            return None
        writer, copies = self._engine.checkpoint_engine, _Copies()
        self._engine.checkpoint_engine = copies
        try:
            self._engine.save_checkpoint(str(self._partial), **arguments)
        finally:
            self._engine.checkpoint_engine = writer
        return self._thread.submit(copies.write)

    def _give_name(self, pending: _Pending) -> None:
        folder, name = self._folder, pending.name
        layout = {"world_size": distributed.world_size(), "zero_stage": self._engine.zero_optimization_stage()}
        state = {"step": pending.step, **layout, **pending.state}
        (self._partial / name / "state.json").write_text(json.dumps(state, indent=2))
        old = folder / f"{name}.old"  # an evaluation after a resume saves the same step again
        if (folder / name).exists():
            (folder / name).rename(old)
        (self._partial / name).rename(folder / name)
        shutil.rmtree(old, ignore_errors=True)
        shutil.rmtree(self._partial)  # DeepSpeed leaves a script beside the checkpoint
        write_whole(folder / "latest", name)
        jobs.say_progress(f"{self._run_dir}: step {pending.step}")
        _rotate(folder, {f"step-{step:06d}" for step in pending.keep} | {name})


class _Copies(TorchCheckpointEngine):
    """What DeepSpeed would write now, kept in host memory until `write`."""

    def __init__(self) -> None:
        super().__init__()
        self._files: dict[Path, io.BytesIO] = {}

    def save(self, state_dict: dict[str, Any], path: str) -> None:
        torch.save(state_dict, self._files.setdefault(Path(path), io.BytesIO()))

    def write(self) -> None:
        """Write the files, and let go of them."""
        while self._files:
            path, content = self._files.popitem()
            path.write_bytes(content.getbuffer())


@contextmanager
def _said_in_one_sentence(partial: Path) -> Iterator[None]:
    """A full disk reaches us as many kinds of exception: name the place, and leave nothing half-written there.

    A rank that died meanwhile is no mistake of the user's, and passes as it is.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if distributed.lost_a_rank(error):
            raise
        shutil.rmtree(partial, ignore_errors=True)
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{partial.parent} cannot be written (is the disk full?), what was saved before is intact: {reason}"
        ) from error


def _rotate(folder: Path, keep: set[str]) -> None:
    for path in folder.glob("step-*"):
        if path.name not in keep:
            shutil.rmtree(path)


def latest(run_dir: Path) -> str | None:
    """The name of the newest whole checkpoint, None where there is none yet."""
    pointer = run_dir / "checkpoints" / "latest"
    if not pointer.is_file():
        return None
    name = pointer.read_text().strip()
    old = pointer.with_name(f"{name}.old")
    if old.exists() and not pointer.with_name(name).exists():  # killed between the two renames of `save`
        old.rename(pointer.with_name(name))
    return name


def load(engine, run_dir: Path, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Put the engine back to where it was saved. Returns the saved `state` and this rank's `own`.

    Raises UserError where the checkpoint was made by another number of ranks or another ZeRO stage.
    """
    folder = run_dir / "checkpoints"
    state = json.loads((folder / name / "state.json").read_text())
    ranks, stage = distributed.world_size(), engine.zero_optimization_stage()
    if (state["world_size"], state["zero_stage"]) != (ranks, stage):
        saved = f"{state['world_size']} ranks and ZeRO-{state['zero_stage']}"
        raise UserError(
            f"{folder / name} was saved by {saved}, this run has {ranks} and ZeRO-{stage}: resume with {saved}"
        )
    frozen = any(not p.requires_grad for p in engine.module.parameters())
    found, _ = engine.load_checkpoint(str(folder), tag=name, load_module_strict=not frozen)
    if found is None:
        raise UserError(f"{folder / name} cannot be loaded: write the name of an older one into {folder}/latest")
    return state, torch.load(folder / name / f"rank-{distributed.rank()}.pt", weights_only=True)


def export(engine, tokenizer, run_dir: Path, training: dict[str, list[str]]) -> Path:
    """Write the adapter (peft's format) or the whole model (transformers' format), and the tokenizer. All ranks.

    `training` goes beside them as mlalign.json: the languages that were `supervised` and `aligned`, for reports.

    Adapters are written from the fp32 master weights (under ZeRO-0 with bf16 from the bf16 weights), whole models in
    the precision of training.
    """
    lm = engine.module.lm
    adapter = isinstance(lm, PeftModel)
    weights = _gathered(lm, trainable_only=adapter)
    target = run_dir / ("adapter" if adapter else "model")
    if distributed.is_main():
        if not adapter:
            weights = {name: weight.to(lm.dtype) for name, weight in weights.items()}
        aside, old = target.with_suffix(".partial"), target.with_suffix(".old")
        shutil.rmtree(aside, ignore_errors=True)
        with _said_in_one_sentence(aside):
            lm.save_pretrained(str(aside), state_dict=weights)
            tokenizer.save_pretrained(str(aside))
            (aside / "mlalign.json").write_text(json.dumps(training) + "\n")
        shutil.rmtree(old, ignore_errors=True)
        if target.exists():
            target.rename(old)
        aside.rename(target)
        shutil.rmtree(old, ignore_errors=True)
    distributed.barrier()
    return target


def _gathered(lm: nn.Module, trainable_only: bool) -> dict[str, torch.Tensor]:
    """Whole fp32 weights on the CPU of rank 0 (empty elsewhere), one parameter at a time. Called by all ranks."""
    from deepspeed.runtime.zero import GatheredParameters

    weights = {}
    for name, parameter in lm.named_parameters():
        if trainable_only and not parameter.requires_grad:
            continue
        whole = safe_get_full_fp32_param(parameter) if parameter.requires_grad else None
        if whole is None:  # ZeRO-0 gives no access to its masters, and frozen weights have none
            with GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
                whole = parameter.detach().clone() if distributed.is_main() else None
        if distributed.is_main():
            weights[name] = whole.float().cpu()
    if distributed.is_main() and not trainable_only:
        persistent = lm.state_dict().keys()
        weights |= {name: buffer.cpu() for name, buffer in lm.named_buffers() if name in persistent}
    return weights
