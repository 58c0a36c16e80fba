"""How far a run is: counted step by step, saved with every checkpoint, and gone back to."""

import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from mlalign import checkpoint, distributed
from mlalign.config import Config
from mlalign.dataset import Dataset
from mlalign.errors import UserError
from mlalign.loader import Loader
from mlalign.objectives import random_state, set_random_state
from mlalign.tracker import Meter, say


@dataclass
class Progress:
    """How far the run is, and how well it does on dev. Saved with every checkpoint."""

    step: int = 0
    best: float | None = None  #: the smallest dev loss so far (task loss; alignment loss where there is no task dev)
    best_step: int = 0
    evaluations_since_best: int = 0
    evaluated_step: int = 0  #: a run stopped by a signal where an evaluation is due begins again with it
    stopped_early: bool = False
    skipped: int = 0  #: steps, for a gradient that was not finite
    skipped_in_a_row: int = 0  #: of them, the last ones

    def evaluation_due(self, config: Config, steps: int) -> bool:
        """Whether to evaluate now: every so many steps and after the last, once each."""
        at_step = self.step % config.evaluation.every == 0 or self.step == steps
        return at_step and self.step > self.evaluated_step

    def count(self, taken: bool) -> None:
        """Take in a step."""
        self.step += 1
        self.skipped += not taken
        self.skipped_in_a_row = 0 if taken else self.skipped_in_a_row + 1

    def judge(self, values: dict[str, float], patience: int) -> bool:
        """Take in an evaluation; returns whether it is the best so far."""
        loss = values.get("dev/task_loss", values.get("dev/alignment_loss"))
        improved = not math.isnan(loss) and (self.best is None or loss < self.best)
        if improved:
            self.best, self.best_step, self.evaluations_since_best = loss, self.step, 0
        else:
            self.evaluations_since_best += 1
        self.evaluated_step = self.step
        self.stopped_early = 0 < patience <= self.evaluations_since_best
        return improved


def save(
    saver: checkpoint.Saver, dataset: Dataset, loader: Loader, meter: Meter, progress: Progress, steps: int
) -> None:
    """Save a checkpoint of the step that `progress` is at. Called by all ranks."""
    state = {"progress": asdict(progress), "orders": loader.state()}
    state |= {"sizes": _sizes(dataset, steps), "digests": dataset.digests}
    own = {f"random_state.{number}": each for number, each in enumerate(random_state())}
    own |= {f"losses.{objective}": losses for objective, losses in meter.losses().items()}
    saver.save(progress.step, state, own, keep={progress.best_step})


def _sizes(dataset: Dataset, steps: int) -> dict[str, int]:
    """What must be as it was when a run goes on, or the saved places in the orders mean other rows."""
    return {f"rows of {name}.train": count for name, count in dataset.rows.items()} | {"steps": steps}


def resume(engine, dataset: Dataset, meter: Meter, run_dir: Path, seed: int, steps: int) -> Progress:
    """Go back to the latest checkpoint, or start. Raises UserError where the data is not what it was."""
    name = checkpoint.newest_whole(run_dir)
    if name is None:
        _seed(seed, step=0)
        return Progress()
    state = checkpoint.load(engine, run_dir, name)
    began, sizes = state["sizes"], _sizes(dataset, steps)
    changed = [what for what in began if began[what] != sizes.get(what, 0)]
    if changed:
        then = ", ".join(f"{began[what]} {what}" for what in changed)
        now = ", ".join(f"{sizes.get(what, 0)}" for what in changed)
        raise UserError(
            f"{run_dir} was started with {then}, now the data gives {now}: put the data back, or choose another run_dir"
        )
    edited = [name for name, digest in state["digests"].items() if digest != dataset.digests.get(name, digest)]
    if edited:
        raise UserError(
            f"the rows of {edited[0]}.train are not those that {run_dir} was started with, though as many: put the "
            "data back (and the tokenizer), or choose another run_dir"
        )
    for objective, order in dataset.orders.items():
        order.restore(state["orders"][objective])
    before = state["world_size"]
    if before == distributed.world_size():
        own = checkpoint.load_own(run_dir, name, distributed.rank())
        set_random_state([own[key] for key in sorted(own) if key.startswith("random_state.")])
        losses = _losses(own)
    else:  # ranks that there were not, or are not: other dropout, and all losses since the last log step are rank 0's
        _seed(seed, state["step"])
        every = [_losses(checkpoint.load_own(run_dir, name, rank)) for rank in range(before)]
        losses = {key: sum(each[key] for each in every) * distributed.is_main() for key in every[0]}
    meter.restore(losses, engine.device)
    saved = f"saved by {before} ranks with ZeRO-{state['zero_stage']}"
    say(f"resumed from {run_dir / 'checkpoints' / name}, {saved}")
    return Progress(**state["progress"])


def _losses(own: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key.removeprefix("losses."): value for key, value in own.items() if key.startswith("losses.")}


def _seed(seed: int, step: int) -> None:
    """Dropout differs between ranks."""
    torch.manual_seed(seed * 1_000_003 + step * 1_009 + distributed.rank())
