"""Save, resume, rotate, export. A run directory's `checkpoints/` and its `adapter/` or `model/`.

    checkpoints/step-000200/   trained-N-M.safetensors (see `resharding`), rank-N.safetensors with what is a rank's own,
                               and state.json with the hashes of all, and its own
    checkpoints/latest         the name of the newest
    adapter/ or model/         the result, in peft's or transformers' own format

Everything is written aside, synced and renamed, and `latest` moves last: what is there under its name is whole. Should
the disk fail it later, the hashes say so before it is loaded, and the checkpoint before it is taken.
"""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from threading import Event, Thread
from typing import Any, NamedTuple

import numpy
import safetensors.torch
import torch
from deepspeed.utils import safe_get_full_fp32_param
from peft import PeftModel
from safetensors import SafetensorError
from torch import nn

from mlalign import distributed, jobs, resharding
from mlalign.durable import Hashed, fault, settle, sync_folder, write_hashed, write_whole
from mlalign.errors import UserError, one_line
from mlalign.rundir import digest
from mlalign.tracker import say

_STATE = "state.json"
_ABOUT = "mlalign.json"  # beside what is exported
_DTYPES = {torch.float32: "F32", torch.uint8: "U8", torch.int64: "I64"}  # in safetensors' words
_FORMAT = 4  #: of a checkpoint; 1 held DeepSpeed's own files, 2 no rows of the bitext, 3 no digests of the rows

Files = Iterable[tuple[str, dict[str, torch.Tensor]]]  # names, and what goes into them


class _Written(NamedTuple):
    """What became of this rank's files."""

    sha256: dict[str, str]  #: by name
    failure: str | None


class _Pending(NamedTuple):
    """A checkpoint on its way."""

    step: int
    name: str
    state: dict[str, Any]
    keep: set[int]
    written: Future[_Written]


class Saver:
    """Saves the checkpoints of a run, one at a time; in the background if asked to.

    There what is saved is copied to host memory, a thread writes it while training goes on, and a later `poll` gives it
    its name. Until then it does not exist: a run that is killed meanwhile goes on from the one before.
    """

    def __init__(self, engine, run_dir: Path, in_background: bool, touch: Callable[[], None] = lambda: None) -> None:
        """touch: called after each file, to show that there is progress."""
        self._engine, self._run_dir = engine, run_dir
        self._touch = touch
        self._folder, self._partial = run_dir / "checkpoints", run_dir / "checkpoints" / "partial"
        self._in_background = in_background
        self._thread = ThreadPoolExecutor(1)
        self._pending: _Pending | None = None

    def save(self, step: int, state: dict[str, Any], own: dict[str, torch.Tensor], keep: set[int]) -> None:
        """Write a checkpoint of the engine, `state` (JSON) and every rank's `own`. Called by all ranks.

        Those of all steps but this, the one before it and `keep` are deleted. Raises UserError, on all ranks, where one
        could not write.
        """
        self.finish()
        name = f"step-{step:06d}"
        with distributed.on_main(), _said_in_one_sentence(self._partial):
            if distributed.is_main():
                shutil.rmtree(self._partial, ignore_errors=True)
                (self._partial / name).mkdir(parents=True)
        files = list(self._files(own)) if self._in_background else self._files(own)
        layout = {"world_size": distributed.world_size(), "zero_stage": self._engine.zero_optimization_stage()}
        state = {"step": step, "adam_steps": resharding.adam_steps(self._engine), **layout, **state}
        written = self._thread.submit(_write_files, self._partial / name, files, self._touch)
        self._pending = _Pending(step, name, state, keep, written)
        if not self._in_background:
            self.finish()

    def _files(self, own: dict[str, torch.Tensor]) -> Files:
        rank = distributed.rank()
        yield f"rank-{rank}.safetensors", own
        for number, tensors in enumerate(resharding.parts(self._engine, copy=self._in_background)):
            self._touch()
            yield f"trained-{rank}-{number}.safetensors", tensors

    @property
    def pending(self) -> bool:
        """Whether a checkpoint is on its way. The same on all ranks."""
        return self._pending is not None

    def poll(self) -> None:
        """Give a checkpoint its name as soon as every rank has written its part. Called by all ranks."""
        if self._pending and not distributed.any_rank(not self._pending.written.done()):
            self.finish()

    def finish(self) -> None:
        """Wait for what is being written. Called by all ranks. Raises UserError, on all, where one could not write."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        every: list[_Written] = distributed.gather_objects(pending.written.result())
        with _said_in_one_sentence(self._partial):
            if failure := next((each.failure for each in every if each.failure), None):
                raise OSError(failure)
        with distributed.on_main(), _said_in_one_sentence(self._partial):
            if distributed.is_main():
                self._give_name(pending, {name: sha256 for each in every for name, sha256 in each.sha256.items()})

    def _give_name(self, pending: _Pending, files: dict[str, str]) -> None:
        folder, name = self._folder, pending.name
        unseen = [file for file in files if not (self._partial / name / file).exists()]
        if unseen:
            raise OSError(
                f"rank 0 does not see {unseen[0]}, which another rank wrote: run_dir must be shared by all hosts"
            )
        state = {"format": _FORMAT, **pending.state, "files": files}
        write_hashed(self._partial / name / _STATE, lambda file: file.write(_sealed(state)))
        sync_folder(self._partial / name)
        old = folder / f"{name}.old"  # an evaluation after a resume saves the same step again
        shutil.rmtree(old, ignore_errors=True)
        if (folder / name).exists():
            (folder / name).rename(old)
        (self._partial / name).rename(folder / name)
        sync_folder(folder)
        shutil.rmtree(old, ignore_errors=True)
        shutil.rmtree(self._partial, ignore_errors=True)
        write_whole(folder / "latest", name)
        jobs.say_progress(f"{self._run_dir}: step {pending.step}")
        names = _names(folder)
        before = next((each for each in names if _step(each) < pending.step), name)
        for gone in set(names) - {name, before} - {f"step-{step:06d}" for step in pending.keep}:
            shutil.rmtree(folder / gone, ignore_errors=True)


def _write_files(folder: Path, files: Files, touch: Callable[[], None]) -> _Written:
    """Write this rank's files. A failure is told and not raised: the other ranks are to hear of it too."""
    sha256: dict[str, str] = {}
    try:
        folder.mkdir(parents=True, exist_ok=True)  # it is there; a network file system may not have shown it yet
        for name, tensors in files:
            sha256[name] = write_hashed(folder / name, partial(_write_tensors, tensors))
            touch()
    except Exception as error:
        return _Written(sha256, str(error))
    return _Written(sha256, None)


def _write_tensors(tensors: dict[str, torch.Tensor], file: Hashed) -> None:
    """What `safetensors.torch.save` gives, but without a second copy of it all in memory."""
    header, end = {}, 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little"))
    file.write(text)
    for tensor in tensors.values():
        file.write(tensor.contiguous().view(-1).numpy().view(numpy.uint8))


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
        reason = one_line(error)
        raise UserError(
            f"{partial.parent} cannot be written (is the disk full?), what was saved before is intact: {reason}"
        ) from error


def _sealed(state: dict[str, Any]) -> bytes:
    """JSON with a hash of itself."""
    state = json.loads(json.dumps(state))
    return json.dumps({"digest": digest(state), **state}, indent=2).encode()


def _unsealed(path: Path) -> dict[str, Any] | None:
    """What `_sealed` made, None where it is not that any more."""
    try:
        state = json.loads(path.read_bytes())
        return state if state.pop("digest") == digest(state) else None
    except (OSError, ValueError, KeyError, AttributeError, TypeError):  # JSON of any kind, or none
        return None


def _step(name: str) -> int:
    return int(name.removeprefix("step-"))


def _names(folder: Path) -> list[str]:
    """Of checkpoints, newest first; what else a user keeps here is left alone."""
    names = [path.name for path in folder.glob("step-*") if path.name.removeprefix("step-").isdecimal()]
    return sorted(names, key=_step, reverse=True)


def _named_latest(folder: Path) -> str | None:
    try:
        return (folder / "latest").read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None


def newest_whole(run_dir: Path) -> str | None:
    """The name of the checkpoint to go on from: the latest, or where that is damaged, which is said, the newest that is
    not. None where there is none. Called by all ranks, which share the reading.

    Raises UserError where there are checkpoints and none is whole.
    """
    folder = run_dir / "checkpoints"
    with distributed.on_main():
        names = _newest_first(folder) if distributed.is_main() else []
    names = distributed.broadcast_object(names)
    for name in names:
        faults = [found for each in distributed.gather_objects(_faults(folder / name)) for found in each]
        if not faults:
            if distributed.is_main():
                write_whole(folder / "latest", name)
            return name
        say(f"WARNING: checkpoint {folder / name} is damaged: {faults[0]}; going on from an older one", "bold red")
    if names:
        raise UserError(f"no checkpoint in {folder} is whole: choose another run_dir, or delete {folder} to start anew")
    return None


def _newest_first(folder: Path) -> list[str]:
    """Names of what may be checkpoints, the one that `latest` names first."""
    for old in folder.glob("step-*.old"):
        if not old.with_suffix("").exists():  # killed between the two renames of `_give_name`
            old.rename(old.with_suffix(""))
    latest = _named_latest(folder)
    return sorted(_names(folder), key=lambda name: name != latest)


def _faults(checkpoint: Path) -> list[str]:
    """What is wrong with this rank's share of the files."""
    state = _unsealed(checkpoint / _STATE)
    if state is None:
        return [f"{checkpoint / _STATE} is missing or not what was written"]
    own = sorted(state["files"].items())[distributed.rank() :: distributed.world_size()]
    return [found for name, sha256 in own if (found := fault(checkpoint / name, sha256))]


def load(engine, run_dir: Path, name: str) -> dict[str, Any]:
    """Put the engine back to where it was saved, by whatever ranks and ZeRO stage. Returns the saved `state`.

    Called by all ranks. Raises UserError where the checkpoint is an older mlalign's, or of another model.
    """
    folder = run_dir / "checkpoints" / name
    state = _unsealed(folder / _STATE)
    if state.get("format") != _FORMAT:
        raise UserError(
            f"{folder} was written by another version of mlalign: go on with that, or choose another run_dir"
        )
    names = [each for each in state["files"] if each.startswith("trained-")]
    resharding.restore(engine, folder, names, state["adam_steps"])
    return state


def load_own(run_dir: Path, name: str, rank: int) -> dict[str, torch.Tensor]:
    """What the rank of this number saved as its own."""
    return safetensors.torch.load_file(run_dir / "checkpoints" / name / f"rank-{rank}.safetensors")


def export(engine, tokenizer, run_dir: Path, about: dict[str, Any], touch: Callable[[], None] = lambda: None) -> None:
    """Write the adapter (peft's format) or the whole model (transformers' format), and the tokenizer. All ranks.

    It has no name yet: `publish` gives it one, when the checkpoint that knows of it has its own. `about` goes beside it
    as mlalign.json: its `step`, and for reports the languages that were `supervised` and `aligned`.

    Adapters are written from the fp32 master weights (under ZeRO-0 with bf16 from the bf16 weights), whole models in
    the precision of training. `touch` is called while there is progress.
    """
    lm = engine.module.lm
    adapter = isinstance(lm, PeftModel)
    weights = _gathered(lm, trainable_only=adapter, dtype=torch.float32 if adapter else lm.dtype, touch=touch)
    aside = _target(engine, run_dir).with_suffix(".partial")
    with distributed.on_main():
        if distributed.is_main():
            shutil.rmtree(aside, ignore_errors=True)
            with _said_in_one_sentence(aside):
                with _touching_while_it_grows(aside, touch):
                    lm.save_pretrained(str(aside), state_dict=weights)
                    tokenizer.save_pretrained(str(aside))
                with _meanwhile(touch):  # a large file may take long, and nothing tells a slow disk from one that hangs
                    for path in aside.rglob("*"):
                        sync_folder(path) if path.is_dir() else settle(path)
                    write_whole(aside / _ABOUT, json.dumps(about) + "\n")  # last: then all is whole
                    sync_folder(aside)


def publish(engine, run_dir: Path, step: int) -> None:
    """Give what `export` wrote at `step` its name, in the place of an earlier result. All ranks.

    What is of another step, or not whole, is deleted: a run that was killed left it, without a checkpoint of that step.
    """
    with distributed.on_main():
        if distributed.is_main():
            target = _target(engine, run_dir)
            aside, old = target.with_suffix(".partial"), target.with_suffix(".old")
            if old.exists() and not target.exists():  # killed between the two renames below
                old.rename(target)
            shutil.rmtree(old, ignore_errors=True)
            if _exported_at(aside) == step:
                if target.exists():
                    target.rename(old)
                aside.rename(target)
                sync_folder(run_dir)
                shutil.rmtree(old, ignore_errors=True)
            shutil.rmtree(aside, ignore_errors=True)


def _exported_at(aside: Path) -> int | None:
    """The step of an export; None where there is none, or a part of one."""
    try:
        return json.loads((aside / _ABOUT).read_text())["step"]
    except (OSError, ValueError, KeyError):
        return None


def exported(engine, run_dir: Path) -> bool:
    """Whether there is what `export` writes. All ranks: rank 0 looks."""
    return distributed.broadcast_object(_target(engine, run_dir).exists())


def _target(engine, run_dir: Path) -> Path:
    return run_dir / ("adapter" if isinstance(engine.module.lm, PeftModel) else "model")


@contextmanager
def _touching_while_it_grows(folder: Path, touch: Callable[[], None]) -> Iterator[None]:
    """Look at a folder while the body fills it."""
    before = 0

    def look() -> None:
        nonlocal before
        size = sum(path.stat().st_size for path in folder.glob("*"))
        if size > before:
            touch()
        before = size

    with _meanwhile(look):
        yield


@contextmanager
def _meanwhile(act: Callable[[], None]) -> Iterator[None]:
    """Act every two seconds, in a thread, while the body runs."""
    over = Event()

    def run() -> None:
        while not over.wait(2):
            act()

    Thread(target=run, daemon=True).start()
    try:
        yield
    finally:
        over.set()


def _gathered(
    lm: nn.Module,
    trainable_only: bool,
    dtype: torch.dtype = torch.float32,
    touch: Callable[[], None] = lambda: None,
) -> dict[str, torch.Tensor]:
    """Whole weights on the CPU of rank 0 (empty elsewhere), one parameter at a time. Called by all ranks."""
    from deepspeed.runtime.zero import GatheredParameters

    weights = {}
    for name, parameter in lm.named_parameters():
        if trainable_only and not parameter.requires_grad:
            continue
        touch()
        whole = safe_get_full_fp32_param(parameter) if parameter.requires_grad else None
        if whole is None:  # ZeRO-0 gives no access to its masters, and frozen weights have none
            with GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
                whole = parameter.detach().clone() if distributed.is_main() else None
        if distributed.is_main():
            weights[name] = whole.to(dtype).cpu()
    if distributed.is_main() and not trainable_only:
        persistent = lm.state_dict().keys()
        weights |= {name: buffer.cpu() for name, buffer in lm.named_buffers() if name in persistent}
    return weights
