"""What a run tells the world: a console line, `metrics.jsonl`, TensorBoard. Rank 0 speaks, the others are silent."""

import json
import resource
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mlalign import distributed
from mlalign.durable import write_whole
from mlalign.errors import UserError

console = Console(stderr=False, highlight=False)

_FORMATS = {
    "lr": ".2e",
    "retrieval_accuracy": ".3f",
    "padding": ".0%",
    "tokens_per_second": ",.0f",
    "pairs_per_second": ",.1f",
    "memory_gib": ".2f",
    "grad_norm": ".3f",
    "skipped_steps": ",",
    "epoch": ".2f",
}


def say(text: str, style: str | None = None) -> None:
    """One line on the console of rank 0."""
    if distributed.is_main():
        console.print(text, style=style, markup=False, soft_wrap=True)


class Meter:
    """Losses and throughput since the last log step. Losses stay on the device until they are read."""

    def __init__(self) -> None:
        self._losses: dict[str, list[torch.Tensor]] = {}
        self._sums: dict[str, int] = {}
        self._since = time.monotonic()

    def add(self, objective: str, loss: torch.Tensor, **counts: int) -> None:
        """Take in one batch on this rank: its share of the loss (they add up to the loss over ranks), and counts."""
        self._losses.setdefault(objective, []).append(loss)
        for name, count in counts.items():
            self._sums[name] = self._sums.get(name, 0) + count

    def losses(self) -> dict[str, torch.Tensor]:
        """What a checkpoint between two log steps must hold: objective -> losses [batches], on the CPU."""
        return {name: torch.stack(losses).cpu() for name, losses in self._losses.items()}

    def restore(self, losses: dict[str, torch.Tensor], device: torch.device) -> None:
        """Go on from `losses()` of a checkpoint."""
        self._losses = {name: list(each.to(device)) for name, each in losses.items()}

    def mark(self) -> dict[str, int]:
        """For `back_to`."""
        return {name: len(losses) for name, losses in self._losses.items()}

    def back_to(self, mark: dict[str, int]) -> dict[str, list[float]]:
        """Forget the losses taken in since `mark()`, of a step that was skipped, and return them."""
        forgotten = {name: losses[mark.get(name, 0) :] for name, losses in self._losses.items()}
        kept = {name: losses[: mark.get(name, 0)] for name, losses in self._losses.items()}
        self._losses = {name: losses for name, losses in kept.items() if losses}
        return {name: [loss.item() for loss in losses] for name, losses in forgotten.items() if losses}

    def restart_clock(self) -> None:
        """Leave out what came since the last log step, such as an evaluation, from the throughput."""
        self._sums = dict.fromkeys(self._sums, 0)
        self._since = time.monotonic()

    def read(self) -> dict[str, float]:
        """Means and rates since the last call, over all ranks, reduced in one collective."""
        means = {f"train/{name}_loss": torch.stack(losses).mean() for name, losses in self._losses.items()}
        device = distributed.device()
        counts = [torch.tensor(float(count), device=device) for count in self._sums.values()]
        reduced = distributed.all_sum(torch.stack([*means.values(), *counts])).tolist()
        values = dict(zip(means, reduced))
        sums = dict(zip(self._sums, reduced[len(means) :]))
        seconds = time.monotonic() - self._since
        if sums.get("positions"):
            values["train/tokens_per_second"] = sums["tokens"] / seconds
            values["train/padding"] = 1 - sums["tokens"] / sums["positions"]
        if sums.get("pairs"):
            values["train/pairs_per_second"] = sums["pairs"] / seconds
        values["train/memory_gib"] = _peak_memory() / 2**30
        self._losses, self._sums, self._since = {}, {}, time.monotonic()
        return values


def _peak_memory() -> int:
    """Bytes: of this rank's GPU, or of this process."""
    if distributed.uses_cuda():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Tracker:
    """Metrics of one run. `log` names are `train/...`, `dev/...` and `gradients/...`, the same in all three places."""

    def __init__(self, run_dir: Path, resumed_at: int, steps: int) -> None:
        """resumed_at: the step of the checkpoint; later points of an interrupted run are taken back."""
        self._start = time.monotonic()
        self._writer = self._file = self._progress = None
        self._steps = steps
        if not distributed.is_main():
            return
        from torch.utils.tensorboard import SummaryWriter  # here: it takes a second, on rank 0 only

        path = run_dir / "metrics.jsonl"
        _cut_after(path, resumed_at)
        self._file = path.open("a")
        self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=resumed_at + 1)
        if console.is_terminal:
            columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(), TimeRemainingColumn())
            self._progress = Progress(*columns, console=console, transient=True)
            self._task = self._progress.add_task("", total=steps, completed=resumed_at)
            self._progress.start()

    def advance(self, step: int) -> None:
        if self._progress:
            self._progress.update(self._task, completed=step)

    def log(self, step: int, values: dict[str, float]) -> None:
        """Record metrics after `step` optimizer steps; `gradients/...`, which are many, not on the console.

        Raises UserError where the disk does not take them.
        """
        if self._file is None:
            return
        seconds = round(time.monotonic() - self._start, 2)
        try:
            self._file.write(json.dumps({"step": step, "seconds": seconds, **values}) + "\n")
            self._file.flush()
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)
            self._writer.flush()  # what is on disk is not lost with the process, however it ends
        except OSError as error:
            raise UserError(
                f"{self._file.name} or tensorboard/ beside it cannot be written ({error.strerror}): make room, and the "
                "same command goes on from the last checkpoint"
            ) from error
        groups: dict[str, list[str]] = {}
        for name, value in values.items():
            group, _, short = name.partition("/")
            groups.setdefault(group, []).append(f"{short} {value:{_FORMATS.get(short, '.4f')}}")
        groups.pop("gradients", None)
        for group, parts in groups.items():
            say(f"step {step}/{self._steps}  {group}  {'  '.join(parts)}")

    def text(self, name: str, text: str) -> None:
        """A text page in TensorBoard, shown as preformatted."""
        if self._writer:
            self._writer.add_text(name, "\n".join("    " + line for line in text.splitlines()), 0)

    def close(self) -> None:
        if self._progress:
            self._progress.stop()
        if self._file:
            self._file.close()
            self._writer.close()


def _cut_after(path: Path, step: int) -> None:
    """Drop lines of later steps, and a last line that was not written whole."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except json.JSONDecodeError:
            break
    write_whole(path, "".join(kept))
