"""Base models made from scratch: an interrupted training goes on as if it had not been."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mlalign import base_model
from mlalign.base_model import Shape, train_base

SHAPE = Shape(hidden=16, intermediate=32, layers=2, heads=2, vocabulary=300, max_tokens=32)
SENTENCES = [f"{verb} the {thing}" for verb in ("open", "close", "see") for thing in ("door", "window", "book", "shop")]


def weights(folder):
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def test_it_learns(tmp_path):
    losses = []
    train_base(
        SENTENCES, tmp_path / "base", 0, SHAPE, steps=60, batch_size=8, progress=lambda _, loss: losses.append(loss)
    )
    assert losses[-1] < losses[0] - 2
    assert AutoTokenizer.from_pretrained(tmp_path / "base")("open")["input_ids"][0] == 0  # BOS
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]


def test_long_sentences_are_cut(tmp_path, monkeypatch, caplog):
    widths = []
    whole = base_model._batches

    def watched(encoded, *arguments):
        widths.extend(map(len, encoded))
        return whole(encoded, *arguments)

    monkeypatch.setattr(base_model, "_batches", watched)
    train_base([*SENTENCES, "the book " * 100], tmp_path / "base", 0, SHAPE, steps=12, batch_size=8)
    assert max(widths) == SHAPE.max_tokens and min(widths) < 10
    assert "longer than" not in caplog.text
    assert len(AutoTokenizer.from_pretrained(tmp_path / "base")("the book " * 100)["input_ids"]) > SHAPE.max_tokens


def test_an_interrupted_training_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(base_model, "_STATE_EVERY", 4)
    settings = {"steps": 12, "batch_size": 4}
    train_base(SENTENCES, tmp_path / "straight", 1, SHAPE, **settings)

    def stop(step, loss):
        if step == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_base(SENTENCES, tmp_path / "stopped", 1, SHAPE, **settings, progress=stop)
    assert not (tmp_path / "stopped").exists()
    seen = []
    train_base(SENTENCES, tmp_path / "stopped", 1, SHAPE, **settings, progress=lambda step, _: seen.append(step))
    assert seen == [9, 10, 11, 12]
    found, wanted = weights(tmp_path / "stopped"), weights(tmp_path / "straight")
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_the_state_of_other_settings_is_not_taken_up(tmp_path, monkeypatch):
    monkeypatch.setattr(base_model, "_STATE_EVERY", 2)

    def stop(step, loss):
        if step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_base(SENTENCES, tmp_path / "base", 1, SHAPE, steps=8, batch_size=4, progress=stop)
    seen = []
    train_base(
        SENTENCES, tmp_path / "base", 2, SHAPE, steps=8, batch_size=4, progress=lambda step, _: seen.append(step)
    )
    assert seen[0] == 1
