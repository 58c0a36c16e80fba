"""What a run works through: rows, tokens and steps of an epoch, and the micro-batch that needs the most memory.

`survey(config, ranks, tokenizer)` reads and tokenises the rows as `train` does and deals one epoch out to the ranks.
If rows are missing it says so and assumes the worst, rows of `max_length`. Used by `mlalign plan`.
"""

import math
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from transformers import PreTrainedTokenizerBase

from mlalign.collate import pass_sizes
from mlalign.config import Alignment, Config, Source, Task
from mlalign.dataset import load_dataset
from mlalign.errors import UserError
from mlalign.examples import Pair, TaskExample
from mlalign.rows import is_local, matching, read_rows
from mlalign.sampler import GlobalOrder, slices
from mlalign.schedule import batches, total_steps
from mlalign.zero import read_deepspeed, stage

_STREAMED = 50  #: batches that are read from a stream, the window in which it groups lengths

Shapes = tuple[tuple[int, int], ...]  #: rows x positions of each pass of a micro-batch


@dataclass(frozen=True)
class Workload:
    """One objective's part of a run. What cannot be known without rows is None."""

    batches_per_step: float  #: mean over the schedule's cycle
    micro_batches: int  #: forward passes of one batch on one rank
    shapes: Shapes  #: of the micro-batch with the most positions
    learned: int = 0  #: tokens of the task that are predicted in that micro-batch
    rows_per_epoch: int | None = None
    tokens_per_epoch: int | None = None  #: of the first epoch as the sampler draws it, without padding
    tokens_per_step: float | None = None  #: over all ranks, without padding
    steps_per_epoch: int | None = None  #: of these rows
    missing: str | None = None  #: why lengths are assumed


def survey(config: Config, ranks: int, tokenizer: PreTrainedTokenizerBase) -> dict[str, Workload]:
    """Each objective's part of the run on this number of ranks. Raises UserError for rows that `train` would refuse."""
    return {
        name: _survey_one(config, name, section, ranks, tokenizer)
        for name, section in (("task", config.task), ("alignment", config.alignment))
        if section
    }


def steps_of_run(config: Config, workloads: dict[str, Workload]) -> int | None:
    """Optimizer steps, as `schedule.total_steps` counts them; None if the number of rows is needed and not known."""
    rows = (workloads.get("task") or workloads["alignment"]).rows_per_epoch
    return None if rows is None and config.optimizer.steps is None else total_steps(config, rows or 0)


def negatives(settings: Alignment, ranks: int) -> tuple[int, int]:
    """Negatives of one anchor, and anchor-negative pairs of one alignment batch over all ranks and directions.

    Both at most: with `positives: id`, pairs that share a sentence are not negatives of each other.
    """
    share, size = settings.batch_size // ranks, settings.micro_batch_size
    contrasted = [settings.batch_size]
    if settings.negatives == "local":
        contrasted = ranks * ([size] * (share // size) + [share % size])
    directions = 2 if settings.infonce == "symmetric" else 1
    return max(contrasted) - 1, directions * sum(pairs * (pairs - 1) for pairs in contrasted)


def _survey_one(
    config: Config, name: str, section: Task | Alignment, ranks: int, tokenizer: PreTrainedTokenizerBase
) -> Workload:
    cycle = range(sum(config.interleave.parts))
    counts = [b.count for step in cycle for b in batches(config.interleave, 1.0, step) if b.objective == name]
    size = max(counts) * section.batch_size  # rows that a step takes at once
    known: dict[str, Any] = {
        "batches_per_step": sum(counts) / len(cycle),
        "micro_batches": math.ceil(size / (section.micro_batch_size * ranks)),
        "missing": _missing(section.train, section.streaming),
    }
    if known["missing"]:
        rows = min(section.micro_batch_size, size // ranks)
        one = ((rows, section.max_length),)
        learned = rows * (section.max_length - 1)
        return Workload(**known, shapes=one, learned=learned) if name == "task" else Workload(**known, shapes=one * 2)
    # one objective at a time, and without dev rows: they need no more memory than these
    alone = config.model_copy(update={"task": None, "alignment": None, name: section.model_copy(update={"dev": []})})
    dataset = load_dataset(alone, tokenizer)
    rows, order = dataset.epoch_rows or None, dataset.orders[name]
    sample = rows or _STREAMED * size
    tokens = sum(map(len, order.take(sample)))
    order.restore({"epoch": 0, "position": 0})
    zero3 = stage(read_deepspeed(config.deepspeed)) == 3
    shapes, learned = _largest(order, math.ceil(sample / size), size, section.micro_batch_size, ranks, zero3)
    one_epoch = config.optimizer.model_copy(update={"steps": None, "epochs": 1.0})
    return Workload(
        **known,
        shapes=shapes,
        learned=learned,
        rows_per_epoch=rows,
        tokens_per_epoch=tokens if rows else None,
        tokens_per_step=tokens / sample * section.batch_size * known["batches_per_step"],
        steps_per_epoch=total_steps(alone.model_copy(update={"optimizer": one_epoch}), rows) if rows else None,
    )


def _largest(
    order: GlobalOrder, count: int, size: int, micro_batch_size: int, ranks: int, zero3: bool
) -> tuple[Shapes, int]:
    """Of `count` batches, the shapes of the share with the most positions, and its learned tokens."""
    largest, learned, most = (), 0, 0
    for _ in range(count):
        for shares in slices(order.take(size), micro_batch_size, ranks):
            bitext = isinstance(shares[0][0], Pair)
            sizes = pass_sizes(shares, 0, zero3) if bitext else [len(shares[0])]
            for share in shares:
                shapes = _shapes(share, sizes)
                positions = sum(rows * width for rows, width in shapes)
                if positions > most:
                    largest, most = shapes, positions
                    learned = sum(row.learned for row in share) if isinstance(share[0], TaskExample) else 0
    return largest, learned


def _shapes(share: list[TaskExample] | list[Pair], sizes: list[int]) -> Shapes:
    """As `collate.collate_task` and `collate.collate_bitext` pad them; packed rows take less."""
    if isinstance(share[0], TaskExample):
        return ((len(share), max(map(len, share))),)
    lengths = sorted((len(side) for pair in share for side in (pair.src, pair.tgt)), reverse=True)
    return tuple((size, lengths[start]) for size, start in zip(sizes, accumulate([0, *sizes])))


def _missing(sources: list[Source], streaming: bool) -> str | None:
    """What is wrong with the first source that is missing. One that is there but broken is an error when it is read."""
    for source in sources:
        if is_local(source.path):
            if not matching(source.path):
                return f"{source.path} is not there"
            continue
        try:
            next(read_rows(source, streaming), None)
        except UserError as error:
            return str(error)
    return None
