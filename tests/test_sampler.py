"""One global order: complete, balanced, grouped by length, resumable, the same for every number of ranks."""

from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest

from mlalign.errors import UserError
from mlalign.examples import TaskExample, TaskRows
from mlalign.sampler import GlobalOrder, epoch_order, in_memory, language_quotas, slices, streamed


@dataclass(frozen=True)
class Row:
    name: int
    language: str
    size: int

    def __len__(self) -> int:
        return self.size


ROWS = [Row(i, "en" if i % 10 else "sw", 1 + (i * 37) % 50) for i in range(500)]


def order(temperature: float, epoch: int) -> list[int]:
    members = {name: np.array([r.name for r in ROWS if r.language == name]) for name in ("en", "sw")}
    return epoch_order(members, np.array([len(r) for r in ROWS]), 8, temperature, 1, epoch).tolist()


def test_temperature_1_takes_every_row_once_per_epoch_in_another_order():
    assert sorted(order(1, 0)) == sorted(order(1, 1)) == list(range(500))
    assert order(1, 0) != order(1, 1)
    assert order(1, 0) == order(1, 0)


def test_temperature_0_balances_languages_and_repeats_evenly():
    first = Counter(ROWS[i].language for i in order(0, 0))
    assert first == {"en": 250, "sw": 250}
    uses = Counter(i for epoch in range(4) for i in order(0, epoch))
    rare = [uses[r.name] for r in ROWS if r.language == "sw"]
    frequent = [uses[r.name] for r in ROWS if r.language == "en"]
    assert set(rare) == {20}, "1000 draws over 50 rows"
    assert max(frequent) - min(frequent) <= 1


@pytest.mark.parametrize("temperature", [0, 0.3, 0.7, 1])
def test_quotas_add_up(temperature):
    counts = {"a": 7, "b": 1, "c": 1000}
    quotas = language_quotas(counts, temperature)
    assert sum(quotas.values()) == 1008
    if temperature == 1:
        assert quotas == counts
    if temperature == 0:
        assert set(quotas.values()) == {336}


def test_batches_hold_similar_lengths():
    rows = [ROWS[i] for i in order(1, 0)]
    spread = [max(map(len, rows[i : i + 8])) - min(map(len, rows[i : i + 8])) for i in range(0, 392, 8)]
    assert sum(spread) / len(spread) < 5, "random batches of 8 from 1..50 spread about 39"


@pytest.mark.parametrize(
    "make",
    [
        lambda: in_memory(
            TaskRows.pack(TaskExample([r.name] * len(r), [r.name] * len(r), 1, r.language) for r in ROWS), 8, 0.0, 1
        ),
        lambda: streamed(lambda: iter(ROWS), 8, 1),
    ],
    ids=["in memory", "streamed"],
)
def test_a_restored_order_goes_on_where_it_was(make):
    straight, first = GlobalOrder(make()), GlobalOrder(make())
    wanted = [straight.take(64) for _ in range(20)]
    found = [first.take(64) for _ in range(9)]
    second = GlobalOrder(make())
    second.restore(first.state())
    assert found + [second.take(64) for _ in range(11)] == wanted


def test_a_stream_gives_every_row_once_per_epoch():
    stream = GlobalOrder(streamed(lambda: iter(ROWS), 8, 1))
    assert sorted(row.name for row in stream.take(500)) == list(range(500))
    assert stream.state() == {"epoch": 0, "position": 500}


def test_a_stream_without_rows_stops_with_a_sentence():
    with pytest.raises(UserError, match="every row was dropped"):
        GlobalOrder(streamed(lambda: iter([]), 8, 1)).take(4)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_slices_deal_a_batch_out_completely_and_evenly(ranks):
    dealt = slices(ROWS[:24], 3, ranks)
    assert sorted(r.name for shares in dealt for share in shares for r in share) == list(range(24))
    for shares in dealt:
        assert len(shares) == ranks
        assert len({len(share) for share in shares}) == 1
        assert len(shares[0]) <= 3
