"""Worlds that are not as they should be: files that differ between hosts, few rows, clocks that jump."""

import json
import random
import time
from collections import Counter
from pathlib import Path

import pytest
from conftest import write_jsonl

from mlalign.config import Config
from mlalign.errors import UserError


def train_with_own_files(every: list[dict]) -> str:
    """Each rank with its own config, as where each host has files of its own. Returns what it ends with."""
    from mlalign import distributed
    from mlalign.commands.train import train

    try:
        train(Config.model_validate(every[distributed.rank()]))
    except UserError as error:
        return str(error)
    return "done"


def fewer(rows: dict[str, Path], tmp_path: Path, name: str, count: int) -> str:
    lines = [json.loads(line) for line in rows[name].read_text().splitlines()]
    return str(write_jsonl(tmp_path / f"{name}-{count}.jsonl", lines[:count]))


def test_a_file_with_fewer_rows_on_one_host_is_refused_at_the_start(ranks, settings, rows, tmp_path):
    other = settings | {"task": settings["task"] | {"train": fewer(rows, tmp_path, "task", 40)}}
    for sentence in ranks(2).run(train_with_own_files, [settings, other]):
        assert sentence.startswith("rows of task.train: 40 on rank 1 (host ")
        assert "but 48 on rank 0" in sentence and sentence.endswith("are the files the same on all hosts?")


def test_another_config_on_one_host_is_refused_at_the_start(ranks, settings):
    other = settings | {"seed": 7}
    for sentence in ranks(4).run(train_with_own_files, [settings, settings, other, settings]):
        assert sentence.startswith("hash of the config: ") and "on rank 2" in sentence


@pytest.mark.parametrize("change", ["shorter", "other words"])
def test_a_stream_that_differs_on_one_host_is_found_on_all(ranks, settings, rows, tmp_path, change):
    """The config is the same on all: the file under its name is not."""
    path = tmp_path / "stream.jsonl"
    settings["task"] |= {"train": str(path), "streaming": True}
    settings |= {"log_every": 2}
    settings["optimizer"] |= {"steps": 40}
    for sentence in ranks(2).run(stream_differently, settings, rows["task"].read_text(), change):
        assert sentence.startswith("rank 1 has read other rows than rank 0 by step ")


def stream_differently(values: dict, text: str, change: str) -> str:
    from mlalign import distributed

    lines = text.splitlines()
    if distributed.rank() == 1:
        lines = lines[:-5] if change == "shorter" else [*lines[:-1], lines[-1].replace("nine", "ten")]
    own = Path(values["task"]["train"]).with_suffix(f".{distributed.rank()}.jsonl")
    own.write_text("".join(line + "\n" for line in lines))
    from mlalign import rows

    read = rows.local_files
    rows.local_files = lambda source: [str(own)] if source.path == values["task"]["train"] else read(source)
    try:
        return train_with_own_files([values] * 2)
    finally:
        rows.local_files = read


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_fewer_rows_than_ranks_are_all_used_alike(ranks, settings, rows, tmp_path, size, streaming):
    """3 rows in batches of 8, on 4 ranks: every rank takes part in every step, and every row counts as often."""
    settings["task"] |= {"train": fewer(rows, tmp_path, "task", 3), "streaming": streaming}
    settings["alignment"]["train"] = fewer(rows, tmp_path, "bitext", 5)
    settings |= {"log_every": 1}
    assert set(ranks(size).run(train_with_own_files, [settings] * size)) == {"done"}
    lines = [json.loads(line) for line in (Path(settings["run_dir"]) / "metrics.jsonl").read_text().splitlines()]
    assert [round(line["train/epoch"], 3) for line in lines] == ([2, 5, 7] if streaming else [2.667, 5.333, 8])
    state = json.loads((Path(settings["run_dir"]) / "checkpoints" / "step-000003" / "state.json").read_text())
    used = {
        name: order["epoch"] * count + order["position"]
        for (name, order), count in zip(sorted(state["orders"].items()), (5, 3))
    }
    assert used == {"alignment": 24, "task": 24}


def test_the_rows_of_some_epochs_are_used_equally_often():
    from mlalign.sampler import GlobalOrder, streamed

    order = GlobalOrder(streamed(lambda: iter(["a", "bb", "ccc"]), 8, seed=1))
    assert Counter(row for _ in range(3) for row in order.take(8)) == {"a": 8, "bb": 8, "ccc": 8}


def train_in_other_times(values: dict) -> str:
    """The wall clock jumps by up to a year with every look at it."""
    clock, rng = time.time, random.Random(0)
    time.time = lambda: clock() + rng.uniform(-3e7, 3e7)
    try:
        return train_with_own_files([values] * 2)
    finally:
        time.time = clock


def test_clocks_that_jump_change_nothing(ranks, settings):
    settings |= {"log_every": 1, "checkpoint_every": 1, "stuck_after": 5}
    found = []
    for name, function in (("calm", train_with_own_files), ("jumping", train_in_other_times)):
        values = settings | {"run_dir": f"{settings['run_dir']}-{name}"}
        arguments = [values] * 2 if name == "calm" else values
        assert ranks(2).run(function, arguments) == ["done"] * 2
        lines = [json.loads(line) for line in (Path(values["run_dir"]) / "metrics.jsonl").read_text().splitlines()]
        found.append([{key: value for key, value in line.items() if "loss" in key or key == "step"} for line in lines])
        assert all(0 <= line["seconds"] < 100 and line["train/tokens_per_second"] > 0 for line in lines)
    assert found[0] == found[1]
