"""From the global orders to this rank's passes, a step ahead: the next step's are made while the GPU runs this one's.

Reading a stream, tokenising and collating happen in a thread of their own. A checkpoint records where the orders stand
after the last step taken, whatever was made ahead.
"""

import math
import zlib
from array import array
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import torch

from mlalign import distributed, schedule
from mlalign.collate import collate_bitext, collate_task, pair_keys, pass_sizes
from mlalign.config import Config
from mlalign.errors import UserError
from mlalign.examples import Pair, TaskExample
from mlalign.objectives import BitextChunk
from mlalign.sampler import GlobalOrder, slices
from mlalign.zero import read_deepspeed, stage


class Batch(NamedTuple):
    """This rank's share of one global batch, on the CPU."""

    objective: str  #: "task" or "alignment"
    weight: float  #: of its loss
    micro_batches: list[dict[str, torch.Tensor]] | list[BitextChunk]
    size: int  #: of the global batch: learned tokens of the task, or pairs
    tokens: int  #: of this rank
    positions: int  #: of this rank: tokens and padding
    dealt: list[list[list]]  #: micro-batches -> ranks -> the rows that went in


class _Made(NamedTuple):
    """The batches of one step, and where the orders stand after it."""

    batches: list[Batch]
    orders: dict[str, dict[str, int]]
    digest: int  #: of all rows so far


class Loader:
    """The batches of one step after another, for this rank. Close it, or a thread may keep reading."""

    def __init__(
        self,
        config: Config,
        orders: dict[str, GlobalOrder],
        pad: int | None,
        first: int = 0,
        end: float = math.inf,
        vocabulary: float = math.inf,
    ) -> None:
        """Args: pad: see `collate.collate_ids`; first: the step to begin with; end: the step before which to stop;
        vocabulary: the number of tokens that the model has embeddings for."""
        self._config, self._orders, self._pad, self._vocabulary = config, orders, pad, vocabulary
        self._next, self._end = first, end
        self._zero3 = stage(read_deepspeed(config.deepspeed)) == 3
        self._state = {objective: order.state() for objective, order in orders.items()}
        self.digest = self._made = 0  #: of the rows in the batches taken, the same on all ranks; and in those made
        self._thread = ThreadPoolExecutor(1)
        self._ahead: Future[_Made] | None = None

    def take(self) -> list[Batch]:
        """The batches of the next step, task first. Raises UserError for unusable rows."""
        made = (self._ahead or self._thread.submit(self._make, self._next)).result()
        self._state, self.digest = made.orders, made.digest
        self._next += 1
        self._ahead = self._thread.submit(self._make, self._next) if self._next < self._end else None
        return made.batches

    def state(self) -> dict[str, dict[str, int]]:
        """Where the orders stand after the last step taken: for `GlobalOrder.restore`."""
        return self._state

    def close(self) -> None:
        """Wait for what is being made ahead, and discard it."""
        self._thread.shutdown(cancel_futures=True)

    def _make(self, step: int) -> _Made:
        weight = self._config.alignment.weight if self._config.alignment else 0.0
        make = {"task": self._task_batch, "alignment": self._alignment_batch}
        batches = [make[batch.objective](batch) for batch in schedule.batches(self._config.interleave, weight, step)]
        return _Made(batches, {objective: order.state() for objective, order in self._orders.items()}, self._made)

    def _take(self, objective: str, count: int) -> list:
        rows = self._orders[objective].take(count)
        for row in rows:
            for ids in (row.ids,) if objective == "task" else (row.src, row.tgt):
                if max(ids, default=0) >= self._vocabulary:
                    raise UserError(
                        f"a row of {objective} holds token {max(ids)}, but the model has {self._vocabulary} tokens, "
                        "from 0: use its own tokenizer, or resize its embeddings"
                    )
                self._made = zlib.crc32(array("q", ids), self._made)
        return rows

    def _task_batch(self, batch: schedule.Batch) -> Batch:
        settings = self._config.task
        rows: list[TaskExample] = self._take("task", batch.count * settings.batch_size)
        micro_batches = slices(rows, settings.micro_batch_size, distributed.world_size())
        passes = [collate_task(shares[distributed.rank()], self._pad) for shares in micro_batches]
        return Batch("task", batch.weight, passes, sum(row.learned for row in rows), *_count(passes), micro_batches)

    def _alignment_batch(self, batch: schedule.Batch) -> Batch:
        settings = self._config.alignment
        pairs: list[Pair] = self._take("alignment", settings.batch_size)
        chunks, micro_batches = [], slices(pairs, settings.micro_batch_size, distributed.world_size())
        for shares in micro_batches:
            own = shares[distributed.rank()]
            passes = collate_bitext(own, self._pad, pass_sizes(shares, self._pad, self._zero3))
            chunks.append(BitextChunk(passes, pair_keys(own)))
        counts = _count([inputs for chunk in chunks for inputs in chunk.passes])
        return Batch("alignment", batch.weight, chunks, len(pairs), *counts, micro_batches)


def _count(passes: list[dict[str, torch.Tensor]]) -> tuple[int, int]:
    tokens = sum(int(inputs["attention_mask"].sum()) for inputs in passes)
    return tokens, sum(inputs["input_ids"].numel() for inputs in passes)
