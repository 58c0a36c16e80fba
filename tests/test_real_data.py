"""The shipped recipe on real data: MASSIVE slot filling with Tatoeba bitext, 2 ranks, a tiny model, a few rows."""

import json
import os
import shutil
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


def test_a_probe_of_flores_under_a_launcher(tmp_path, tiny_model):
    """All 34 languages, 1,122 directions; copies of a language find each other, a random model finds little else."""
    folder = tmp_path / "flores"
    folder.mkdir()
    for path in (DATA / "flores200_devtest").glob("*.jsonl"):
        rows = [json.loads(line) | {"text": json.loads(line)["text"][:80]} for line in path.read_text().splitlines()]
        write_jsonl(folder / path.name, rows[:20])
    shutil.copy(folder / "eng_Latn.jsonl", folder / "copy.jsonl")
    out = run(ROOT / "launch/torchrun.sh", "probe", tiny_model, "--data", folder, "--output", tmp_path / "probe")
    assert "35 languages, 1,190 directions, 700 sentences, 5 layers, 2 ranks" in out
    probe = json.loads((tmp_path / "probe" / "probe.json").read_text())
    assert len(probe["groups"]["low-resource"]) == 9
    assert len(probe["groups"]["high-resource"]) == 25
    copy, english, german = (probe["languages"].index(code) for code in ("copy", "eng_Latn", "deu_Latn"))
    for layer in range(5):
        accuracy = probe["models"]["model"]["mean"]["directions"]["margin_ratio"][layer]
        assert accuracy[copy][english] == accuracy[english][copy] == 1
        assert accuracy[german][english] < 1
    assert (tmp_path / "probe" / "directions.png").stat().st_size > 1000
