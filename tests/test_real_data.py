"""The scripted path of each task, and a probe, on real data: a tiny model, a few rows."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import alone_in_the_world, write_jsonl

ROOT = Path(__file__).parent.parent
DATA = ROOT.parent / "shared" / "data"
BIN = Path(sys.executable).parent

pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason=f"no data pack at {DATA}")


#: On two ranks one of the tasks, for what ranks do to each other, and on one another, for what tasks do. The third is
#: trained and scored in test_study: of the script only a line goes by the task, and each takes more than a minute.
RANKS = {"slot_filling": "2", "translation": "1"}


def run(*command: object, **variables: str) -> str:
    environment = alone_in_the_world() | {"NPROC": "2", "PATH": f"{BIN}:{os.environ['PATH']}"} | variables
    done = subprocess.run(
        [str(c) for c in command], env=environment, capture_output=True, text=True, cwd=ROOT, timeout=400
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def some_of(folder: Path) -> Path:
    """The data pack, of each part a few files and of each file a few rows."""
    rows = {
        "massive": ("en-US.train", "zh-CN.train", "en-US.dev", "zh-CN.dev", "en-US.test", "cy-GB.test", "ja-JP.test"),
        "mt": ("train.de-en", "train.zh-en", "dev.de-en", "test.en-de", "test.en-is"),
        "tatoeba": ("cym-eng", "jpn-eng", "cmn-eng"),
    }
    for part, names in rows.items():
        (folder / part).mkdir(parents=True)
        for name in names:
            lines = (DATA / part / f"{name}.jsonl").read_text().splitlines()[:60]
            write_jsonl(folder / part / f"{name}.jsonl", [json.loads(line) for line in lines])
    return folder


@pytest.mark.parametrize("task", RANKS)
def test_a_task_from_published_data_to_a_merged_adapter(task, tmp_path, tiny_model):
    """The script of the README: prepare, train, evaluate, compare and merge, on real rows."""
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    config = json.loads((model / "config.json").read_text()) | {"max_position_embeddings": 4096}
    (model / "config.json").write_text(json.dumps(config))
    data, out = some_of(tmp_path / "data"), tmp_path / "out"
    steps = ["optimizer.epochs=null", "optimizer.steps=3", "evaluation.every=3"]
    sizes = ["task.batch_size=4", "task.micro_batch_size=2", "alignment.batch_size=8", "alignment.micro_batch_size=4"]
    small = {"FORMAT": "plain", "TRAIN_ROWS": "20", "TEST_ROWS": "4", "NPROC": RANKS[task]}
    overrides = [*steps, *sizes, "task.max_length=2048"]
    shown = run(ROOT / "examples" / "task.sh", task, data, model, out, *overrides, **small)
    assert shown.count("done, 3 steps") == 3
    assert f"{RANKS[task]} ranks, ZeRO-2" in shown

    unseen = {"slot_filling": "cy", "translation": "en-is"}[task]
    reports = {
        name: json.loads((out / "test" / name / "report.json").read_text()) for name in ("sft", "aligned", "merged")
    }
    for report in reports.values():
        assert report["rows"][unseen] == 4
        assert report["model"] == str(model)
    assert unseen not in reports["sft"]["groups"]["supervised"]["languages"]
    if task == "slot_filling":
        assert reports["aligned"]["groups"]["aligned"]["languages"] == ["cy", "ja"]
        assert reports["merged"]["groups"]["aligned"]["languages"] == ["cy", "ja"]
    comparison = json.loads((out / "compare_all/compare.json").read_text())
    assert comparison["names"] == ["sft", "aligned", "merged"]
    assert (out / "compare_all/compare.png").stat().st_size > 5000
    merged = json.loads((out / "merged/merge.json").read_text())
    assert 0 <= merged["settings"]["weight"] <= 1
    assert (out / "merged/weights.png").stat().st_size > 5000


def test_prepared_answers_are_the_published_slots(tmp_path):
    """`annot_utt` and the pack's own `slots` say the same, in languages with and without spaces."""
    published = tmp_path / "published"
    published.mkdir()
    for locale in ("en-US", "sw-KE", "th-TH", "el-GR", "ja-JP", "zh-CN"):
        rows = [json.loads(line) for line in (DATA / "massive" / f"{locale}.test.jsonl").read_text().splitlines()]
        write_jsonl(published / f"{locale}.jsonl", [{k: v for k, v in row.items() if k != "slots"} for row in rows])
    run(BIN / "mlalign", "prepare", "massive", published, tmp_path / "from_published")
    run(BIN / "mlalign", "prepare", "massive", DATA / "massive", tmp_path / "from_pack")
    for language in ("en", "sw", "th", "el", "ja", "zh"):
        name = f"test.{language}.jsonl"
        assert (tmp_path / "from_published" / name).read_text() == (tmp_path / "from_pack" / name).read_text()


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
