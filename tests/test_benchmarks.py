"""The model of communication behind benchmarks/gather.py and scaling.py, against numbers worked out by hand."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import on_paper as paper

NODES_OF_TWO = paper.Network("by hand", 2, (paper.Protocol(1.0, 10.0, 100.0),), bandwidth=4.0, far_bandwidth=2.0)


@pytest.mark.parametrize(
    ("kind", "ranks", "expected"),
    [
        ("all-gather", 1, 0),
        ("all-gather", 2, 1 + 10 + 40 / 4),  # half of 80 bytes inside a node
        ("reduce-scatter", 4, 1 + 2 * 10 + 100 + 60 / 2),  # three quarters of them, and once from node to node
        ("all-reduce", 4, 2 * (1 + 2 * 10 + 100 + 60 / 2)),
    ],
)
def test_time_of_a_ring(kind, ranks, expected):
    assert paper.seconds([paper.Traffic(kind, 80)], ranks, NODES_OF_TWO) == pytest.approx(expected)


def test_calls_pay_latency_each_and_take_the_faster_protocol():
    slow_start = paper.Protocol(100.0, 0.0, 0.0)
    network = NODES_OF_TWO._replace(protocols=(slow_start, paper.Protocol(1.0, 0.0, 0.0, share=0.5)))
    assert paper.seconds([paper.Traffic("all-gather", 80, calls=4)], 2, network) == pytest.approx(4 * (1 + 10 / 2))
    assert paper.seconds([paper.Traffic("all-gather", 8000)], 2, network) == pytest.approx(100 + 4000 / 4)


def test_fit_finds_the_network_that_times_came_from():
    there = paper.gloo("there", step=2e-4, bandwidth=5e8)
    traffic = [t for pairs in (1, 8, 64) for t in paper.embeddings(pairs, 512, 2)]
    found = paper.fit("found", [(each, 2, paper.seconds([each], 2, there)) for each in traffic])
    assert found.protocols[0].far_step == pytest.approx(2e-4)
    assert found.bandwidth == pytest.approx(5e8)


def test_shapes_have_the_parameters_they_are_known_for():
    small = paper.reach(paper.LLAMA_8B, 0, 32, head=True)
    assert small.parameters == small.trainable == pytest.approx(8.03e9, rel=1e-3)
    assert paper.reach(paper.LLAMA_70B, 0, 80, head=True).parameters == pytest.approx(70.55e9, rel=1e-3)
    assert paper.reach(paper.LLAMA_8B, 8, 32, head=True).trainable == 20_971_520


@pytest.mark.parametrize(("stage", "task", "joint"), [(0, 2, 2), (1, 3, 3), (2, 3, 4), (3, 3, 4.5)])
def test_volumes_in_units_of_the_parameters(stage, task, joint):
    """In rings; alignment reaches half of the parameters."""
    all_, half = paper.Reach(1000, 1000, 10), paper.Reach(500, 500, 5)

    def units(*passes):
        traffic = paper.zero_traffic(stage, list(passes), width=1, kept=0)
        return sum(paper.rings(each.kind, paper.WIDE) * each.whole for each in traffic) / 1000

    assert (units(all_), units(all_, half)) == (task, joint)


def test_frozen_parameters_are_gathered_and_not_reduced():
    frozen = paper.Reach(1000, 10, 10)
    gathered, reduced = paper.zero_traffic(3, [frozen], width=2, ahead=100, kept=300)
    assert (gathered.kind, gathered.whole, gathered.calls) == ("all-gather", 3400, 17)
    assert paper.zero_traffic(3, [frozen], ahead=10)[0].calls == 20, "a tensor is gathered in one piece"
    assert (reduced.kind, reduced.whole, reduced.calls) == ("reduce-scatter", 20, 1)
    assert [each.whole for each in paper.zero_traffic(1, [frozen], width=2)] == [20, 20]
    assert len(paper.zero_traffic(3, [frozen, frozen])) == 3, "gradients of adapters are reduced once"


def test_states_are_sharded_as_zero_shards_them():
    full = paper.Reach(1000, 1000, 10)
    assert [paper.states(stage, full, 4) for stage in range(4)] == [16_000, 7000, 5500, 4000]
