"""inspect and the demo's data."""

import pytest
from omegaconf import OmegaConf

from mlalign import demo_data
from mlalign.commands.inspect import inspect
from mlalign.config import load
from mlalign.tracker import console


@pytest.mark.parametrize("streaming", [False, True])
def test_inspect_shows_what_is_learned(tmp_path, settings, streaming):
    settings["task"]["streaming"] = settings["alignment"]["streaming"] = streaming
    OmegaConf.save(OmegaConf.create(settings), tmp_path / "c.yaml")
    with console.capture() as capture:
        inspect(load(tmp_path / "c.yaml"))
    shown = capture.get()
    assert "task: 2 rows of the first micro-batch of 2" in shown
    assert "time: nine am;" in shown
    assert "48 rows" in shown
    assert "</s>" in shown


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_no_held_out_sentence_of_the_demo_is_anywhere_else(seed):
    data = demo_data.build(seed)
    assert len(demo_data.LANGUAGES) >= 6
    held_out = {row["prompt"].removesuffix(demo_data.SEPARATOR) for rows in data.test.values() for row in rows}
    held_out |= {text for texts in data.parallel.values() for text in texts}
    seen = set(data.text) | {row["prompt"].removesuffix(demo_data.SEPARATOR) for row in (*data.train, *data.dev)}
    seen |= {row[side] for row in (*data.bitext, *data.bitext_dev) for side in ("src", "tgt")}
    assert not held_out & seen
    assert {row["lang"] for row in (*data.train, *data.dev)} == {"en"}
    ids = {row["id"] for row in data.test["en"]}
    assert ids.isdisjoint(row["id"] for row in (*data.train, *data.dev, *data.bitext, *data.bitext_dev))
    for rows in data.test.values():
        assert [row["id"] for row in rows] == [row["id"] for row in data.test["en"]]
        assert [row["completion"] for row in rows] == [row["completion"] for row in data.test["en"]]
    assert data == demo_data.build(seed)
