"""Every shipped recipe is read, and trained for two steps on a tiny model, with both objectives and with each alone."""

import json
from pathlib import Path

import pytest
from conftest import TEXT, write_jsonl

import mlalign
from mlalign.commands.train import train
from mlalign.config import load
from mlalign.tasks import json_extraction, slot_filling, translation

RECIPES = sorted((Path(mlalign.__file__).parent / "recipes").glob("*.yaml"))
VARIANTS = {"both": [], "sft_only": ["alignment=null", "interleave.ratio=1:0"]}
VARIANTS["alignment_only"] = ["task=null", "interleave.ratio=0:1"]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A directory with `data/` as the commands at the head of the recipes make it."""
    folder = tmp_path_factory.mktemp("recipes")
    for name in ("massive", "translation", "uner", "bitext"):
        (folder / "data" / name).mkdir(parents=True)
    for split in ("train", "dev"):
        for language in ("ar", "en", "es", "ru", "zh"):
            rows = [slot_filling.row(text, [("time", "nine")], "plain") | {"lang": language} for text in TEXT]
            write_jsonl(folder / f"data/massive/{split}.{language}.jsonl", rows)
            rows = [json_extraction.row(text, [("PER", "adele")], "plain") | {"lang": language} for text in TEXT]
            write_jsonl(folder / f"data/uner/{split}.{language}.jsonl", rows)
        for src, tgt in (("en", "de"), ("de", "en")):
            rows = [translation.row(text, TEXT[0], src, tgt, "plain") | {"lang": f"{src}-{tgt}"} for text in TEXT]
            write_jsonl(folder / f"data/translation/{split}.{src}-{tgt}.jsonl", rows)
        pairs = [
            {"src": f"{TEXT[3 + i % 3]} {i}", "tgt": f"{TEXT[i % 3]} {i}", "src_lang": "de", "tgt_lang": "en"}
            for i in range(40)
        ]
        write_jsonl(folder / f"data/bitext/{split}.de-en.jsonl", pairs)
    return folder


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipes_train(recipe, variant, data, tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(data)
    config = load(recipe, VARIANTS[variant])
    assert config.run_dir == f"runs/{recipe.stem}"
    paper = recipe.stem.startswith("paper_")
    overrides = [f"run_dir={tmp_path}/run", f"model.path={tiny_model}", "optimizer.epochs=null", "optimizer.steps=2"]
    for name in ("task", "alignment"):
        if getattr(config, name):
            overrides += [f"{name}.batch_size=4", f"{name}.micro_batch_size=4", f"{name}.max_length=256"]
    if config.alignment:
        assert config.alignment.layer == (16 if paper else "auto")
        overrides += ["alignment.layer=2"]
    train(load(recipe, [*VARIANTS[variant], *overrides, "evaluation.every=2", "log_every=1"]))
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    logged = set().union(*lines)
    assert lines[-1]["step"] == 2
    assert ("train/task_loss" in logged) == (variant != "alignment_only")
    assert ("train/alignment_loss" in logged) == (variant != "sft_only")
    assert (tmp_path / "run/adapter/adapter_model.safetensors").exists()
    assert list((tmp_path / "run/tensorboard").glob("events.*"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipes_are_headed_by_their_commands(recipe):
    head = recipe.read_text().partition("run_dir:")[0]
    for command in (
        "prepare",
        "probe",
        "train" if "paper" in recipe.stem else "launch/",
        "evaluate",
        "compare",
        "merge",
    ):
        assert command in head, command
    for variant in ("sft_only", "alignment_only"):
        assert " ".join(VARIANTS[variant]) in head
