"""Save, resume, rotate, export. A run directory's `checkpoints/` and its `adapter/` or `model/`.

    checkpoints/step-000200/   DeepSpeed's files, state.json, rank-N.pt
    checkpoints/latest         the name of the newest whole checkpoint
    adapter/ or model/         the result, in peft's or transformers' own format

Everything is written aside and renamed, and `latest` moves last: what is there under its name is whole.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from deepspeed.utils import safe_get_full_fp32_param
from peft import PeftModel
from safetensors import SafetensorError
from torch import nn

from mlalign import distributed
from mlalign.errors import UserError
from mlalign.rundir import write_whole


def save(engine, run_dir: Path, step: int, state: dict[str, Any], own: dict[str, Any]) -> None:
    """Write a checkpoint of the engine, `state` (JSON) and every rank's `own` (tensors). Called by all ranks."""
    folder, name = run_dir / "checkpoints", f"step-{step:06d}"
    partial = folder / "partial"
    if distributed.is_main():
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    distributed.barrier()
    frozen = any(not p.requires_grad for p in engine.module.parameters())
    with _said_in_one_sentence(partial):
        engine.save_checkpoint(str(partial), tag=name, save_latest=False, exclude_frozen_parameters=frozen)
        torch.save(own, partial / name / f"rank-{distributed.rank()}.pt")
    distributed.barrier()
    if distributed.is_main():
        layout = {"world_size": distributed.world_size(), "zero_stage": engine.zero_optimization_stage()}
        (partial / name / "state.json").write_text(json.dumps({"step": step, **layout, **state}, indent=2))
        old = folder / f"{name}.old"  # an evaluation after a resume saves the same step again
        if (folder / name).exists():
            (folder / name).rename(old)
        (partial / name).rename(folder / name)
        shutil.rmtree(old, ignore_errors=True)
        shutil.rmtree(partial)  # DeepSpeed leaves a script beside the checkpoint
        write_whole(folder / "latest", name)
    distributed.barrier()


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


def rotate(run_dir: Path, keep: set[int]) -> None:
    """Delete the checkpoints of all steps but `keep` and the latest. On rank 0."""
    if not distributed.is_main():
        return
    names = {f"step-{step:06d}" for step in keep} | {latest(run_dir)}
    for path in (run_dir / "checkpoints").glob("step-*"):
        if path.name not in names:
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
