"""The shipped recipe on real data: MASSIVE slot filling with Tatoeba bitext, 2 ranks, a tiny model, a few rows."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import write_jsonl

ROOT = Path(__file__).parent.parent
DATA = ROOT.parent / "shared" / "data"
BIN = Path(sys.executable).parent

pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason=f"no data pack at {DATA}")


def run(*command: object) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "NPROC": "2", "PATH": f"{BIN}:{os.environ['PATH']}"}
    done = subprocess.run(
        [str(c) for c in command], env=environment, capture_output=True, text=True, cwd=ROOT, timeout=400
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_massive_recipe_trains_and_reports_unlabelled_languages(tmp_path, tiny_model):
    some = tmp_path / "source"
    some.mkdir()
    for name in ("en-US.train", "zh-CN.train", "en-US.dev", "sw-KE.test", "cy-GB.test", "th-TH.test"):
        lines = (DATA / "massive" / f"{name}.jsonl").read_text().splitlines()[:40]
        write_jsonl(some / f"{name}.jsonl", [json.loads(line) for line in lines])
    assert "80 rows in 2 languages (en, zh)" in run(BIN / "mlalign", "prepare", "massive", some, tmp_path / "massive")

    run_dir = tmp_path / "run"
    out = run(
        ROOT / "launch" / "deepspeed.sh",
        ROOT / "mlalign" / "recipes" / "massive.yaml",
        f"run_dir={run_dir}",
        f"model.path={tiny_model}",
        f"task.train={tmp_path}/massive/train.*.jsonl",
        f"task.dev={tmp_path}/massive/dev.en.jsonl",
        f"alignment.train=[{DATA}/tatoeba/swh-eng.jsonl, {DATA}/tatoeba/cym-eng.jsonl, {DATA}/tatoeba/tha-eng.jsonl]",
        f"alignment.dev={DATA}/tatoeba/amh-eng.jsonl",
        "alignment.batch_size=32",
        "alignment.micro_batch_size=8",
        "task.batch_size=16",
        "task.micro_batch_size=4",
        "optimizer.epochs=null",
        "optimizer.steps=4",
        "log_every=2",
    )
    assert "2 ranks, ZeRO-2" in out
    assert "done, 4 steps" in out

    run(
        BIN / "mlalign",
        "evaluate",
        tiny_model,
        "--adapter",
        run_dir / "adapter",
        "--test",
        tmp_path / "massive/test.*.jsonl",
        "--output",
        tmp_path / "eval",
        "--max-new-tokens",
        4,
        "--max-rows",
        8,
    )
    report = json.loads((tmp_path / "eval" / "report.json").read_text())
    assert report["rows"] == {"cy": 8, "sw": 8, "th": 8}
    assert report["f1"].keys() == {"cy", "sw", "th"}


def test_prepared_answers_are_the_published_slots():
    """`annot_utt` and the pack's own `slots` say the same, in languages without and with spaces of its own."""
    from mlalign.commands.prepare import _convert

    for locale in ("en-US", "sw-KE", "th-TH", "el-GR"):
        for number, line in enumerate((DATA / "massive" / f"{locale}.test.jsonl").read_text().splitlines()):
            row = json.loads(line)
            with_slots = _convert(row, f"{locale}:{number}")[2]
            row.pop("slots")
            assert _convert(row, f"{locale}:{number}")[2] == with_slots


def test_a_probe_of_flores_is_nearly_chance_for_a_random_model_and_exact_for_copies(tmp_path, tiny_model):
    folder = tmp_path / "flores"
    folder.mkdir()
    for language in ("deu_Latn", "eng_Latn"):
        lines = (DATA / "flores200_devtest" / f"{language}.jsonl").read_text().splitlines()[:20]
        write_jsonl(folder / f"{language}.jsonl", [json.loads(line) for line in lines])
    write_jsonl(folder / "copy.jsonl", [json.loads(line) for line in lines])
    run(BIN / "mlalign", "probe", tiny_model, "--data", folder, "--output", tmp_path / "probe", "--batch-size", 7)
    probe = json.loads((tmp_path / "probe" / "probe.json").read_text())
    assert probe["languages"] == ["copy", "deu_Latn", "eng_Latn"]
    assert len(probe["accuracy"]) == 5
    for layer in probe["directions"]:
        assert layer["copy"]["eng_Latn"] == layer["eng_Latn"]["copy"] == 1
        assert layer["deu_Latn"]["eng_Latn"] < 1
    assert (tmp_path / "probe" / "layers.png").stat().st_size > 1000
