"""Batches made ahead are those of the step that takes them, and a checkpoint says nothing of what was made ahead."""

import threading
from collections.abc import Iterator

import pytest
import torch

from mlalign.config import Config
from mlalign.errors import UserError
from mlalign.examples import TaskExample
from mlalign.loader import Loader
from mlalign.sampler import GlobalOrder

SIZE = 4


@pytest.fixture
def config() -> Config:
    return Config.model_validate(
        {
            "run_dir": "",
            "model": {"path": ""},
            "task": {"train": "rows", "batch_size": SIZE, "micro_batch_size": 2},
            "interleave": {"ratio": "1:0"},
            "optimizer": {"steps": 5},
        }
    )


class Rows:
    """An endless order of rows that notes who reads it; from `bad` on, rows are no good."""

    def __init__(self, bad: int = 10**9) -> None:
        self.bad, self.read, self.readers = bad, 0, set()
        self.order = GlobalOrder(self._epoch)

    def _epoch(self, number: int, start: int) -> Iterator[TaskExample]:
        for index in range(start, 100):
            self.readers.add(threading.current_thread().name)
            self.read += 1
            if index >= self.bad:
                raise UserError(f"row {index} is no good")
            yield TaskExample([1, 10 + index], [1, 10 + index], 1, "en")


def taken(loader: Loader) -> list[int]:
    (batch,) = loader.take()
    assert (batch.objective, batch.size, batch.tokens, batch.positions) == ("task", SIZE, 2 * SIZE, 2 * SIZE)
    return torch.cat([inputs["targets"] for inputs in batch.micro_batches]).tolist()


def test_steps_come_in_order_and_are_made_ahead_by_a_thread(config):
    rows = Rows()
    loader = Loader(config, {"task": rows.order}, pad=0, end=3)
    for step in range(3):
        assert taken(loader) == [10 + SIZE * step + i for i in range(SIZE)]
        assert loader.state() == {"task": {"epoch": 0, "position": SIZE * (step + 1)}}
    loader.close()
    assert rows.read == 3 * SIZE, "more was read than the run takes"
    assert threading.current_thread().name not in rows.readers


def test_a_loader_goes_on_from_the_state_of_another(config):
    first, second = Rows(), Rows()
    loader = Loader(config, {"task": first.order}, pad=0)
    taken(loader)
    taken(loader)
    loader._ahead.result()
    assert first.order.state()["position"] == 3 * SIZE, "nothing was made ahead"
    second.order.restore(loader.state()["task"])
    assert taken(Loader(config, {"task": second.order}, pad=0, first=2, end=3)) == [18, 19, 20, 21]


def test_a_token_that_the_model_has_no_embedding_for_is_said(config):
    loader = Loader(config, {"task": Rows().order}, pad=0, end=3, vocabulary=12)
    with pytest.raises(UserError, match=r"a row of task holds token 12, but the model has 12 tokens, from 0"):
        loader.take()
    loader.close()


def test_a_bad_row_is_said_by_the_step_that_needs_it(config):
    loader = Loader(config, {"task": Rows(bad=SIZE + 1).order}, pad=0)
    taken(loader)
    with pytest.raises(UserError, match="row 5 is no good"):
        loader.take()
    loader.close()
