"""Which objective when, and the learning rate: pure functions of the optimizer step, so that nothing needs saving."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from transformers import get_scheduler

from mlalign.config import Config, Interleave


class Batch(NamedTuple):
    """One global batch of a step: its objective, how many of the section's batches it holds, and its loss factor."""

    objective: str  #: "task" or "alignment"
    count: int
    weight: float


def batches(interleave: Interleave, alignment_weight: float, step: int) -> list[Batch]:
    """The batches of optimizer step `step` (0-based), task first: under ZeRO-3 the other order corrupts gradients.

    - joint: every step holds the whole ratio. The task batches are one large one (one mean over all its tokens); each
      alignment batch is a contrastive loss of its own, and they are averaged.
    - alternate: one batch a step, in cycles of task steps, then alignment steps.
    - micro_batch: the authors' code. The cycle runs over batches and is never reset; a step takes the next
      `micro_batches` of them, each with its own mean, and averages them all.
    """
    task, align = interleave.parts
    if interleave.mode == "joint":
        alignment = [Batch("alignment", 1, alignment_weight / align) for _ in range(align)]
        return [Batch("task", task, 1.0), *alignment] if task else alignment
    per_step = interleave.micro_batches or 1
    cycle = [Batch("task", 1, 1.0 / per_step)] * task + [Batch("alignment", 1, alignment_weight / per_step)] * align
    taken = [cycle[i % len(cycle)] for i in range(step * per_step, (step + 1) * per_step)]
    return sorted(taken, key=lambda batch: batch.objective != "task")


def total_steps(config: Config, rows: int) -> int:
    """Optimizer steps of the run; `rows` = number of task rows (of pairs if there is no task)."""
    if config.optimizer.steps is not None:
        return config.optimizer.steps
    section, objective = (config.task, "task") if config.task else (config.alignment, "alignment")
    wanted = config.optimizer.epochs * rows
    taken = step = 0
    while taken < wanted:
        counts = (batch.count for batch in batches(config.interleave, 1.0, step) if batch.objective == objective)
        taken += section.batch_size * sum(counts)
        step += 1
    return max(step, 1)


def lr_factor(config: Config, steps: int) -> Callable[[int], float]:
    """The learning rate's factor as a function of the step, from transformers' schedules with linear warmup.

    At step 0 of a warmup it is 0, as in transformers.
    """
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    warmup = round(config.optimizer.warmup_ratio * steps)
    name = config.optimizer.schedule
    if name == "constant":
        name = "constant_with_warmup"
    return get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=steps).lr_lambdas[0]
