"""benchmarks/transfer: from a little made-up data to tables and pictures, by mlalign's own commands."""

import json
import math
import os
import random
import signal
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import alone_in_the_world
from scipy import stats

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks" / "transfer"))

import cells
import findings
import material
import study
from cells import Cell, OutOfTimeError, Setting
from studies import ALIGNED, MERGED, STUDIES, TASK_ONLY, Arm, Study

from mlalign.base_model import Shape
from mlalign.config import load
from mlalign.durable import write_whole
from mlalign.errors import UserError

WORDS = {  # of one meaning in a place
    "en-US": "wake me at, play music by, nine, ten, noon, anna, peter, abba, please, now, today",
    "de-DE": "weck mich um, spiel musik von, neun, zehn, mittag, anna, peter, abba, bitte, jetzt, heute",
    "es-ES": "despierta a las, pon musica de, nueve, diez, mediodia, ana, pedro, abba, gracias, ahora, hoy",
    "fr-FR": "reveille moi a, joue la musique de, neuf, dix, midi, anne, pierre, abba, merci, vite, lundi",
    "sw-KE": "niamshe saa, cheza muziki wa, tatu, nne, sita, ana, petro, abba, tafadhali, sasa, leo",
    "tr-TR": "beni uyandir, muzik cal, dokuz, on, ogle, ayse, ali, abba, lutfen, simdi, bugun",
    "af-ZA": "maak my wakker om, speel musiek van, nege, tien, middag, anna, piet, abba, asseblief, nou, vandag",
    "az-AZ": "meni oyat, musiqi cal, doqquz, on bir, gunorta, anna, eli, abba, xahis, indi, bu gun",
}
TATOEBA = {
    "de-DE": "deu",
    "es-ES": "spa",
    "fr-FR": "fra",
    "sw-KE": "swh",
    "tr-TR": "tur",
    "af-ZA": "afr",
    "az-AZ": "aze",
}


def utterance(locale: str, number: int) -> dict:
    """Number n says the same in every language."""
    rng, words = random.Random(number), WORDS[locale].split(", ")
    kind = rng.randrange(2)
    value, tail = rng.randrange(3), [rng.randrange(3) for _ in range(4)]
    name, text = ("time", words[2 + value]) if kind == 0 else ("artist_name", words[5 + value])
    ending = " ".join(words[8 + each] for each in tail)
    start = f"{words[kind]} "
    return {
        "id": f"massive-{number}",
        "locale": locale,
        "scenario": "alarm",
        "intent": ("alarm_set", "play_music")[kind],
        "utt": f"{start}{text} {ending}",
        "annot_utt": f"{start}[{name} : {text}] {ending}",
        "slots": [{"type": name, "value": text, "start": len(start), "end": len(start) + len(text)}],
    }


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("public")
    numbers = {"dev": range(30), "test": range(100, 130), "train": range(200, 260), "text": range(200, 500)}
    for locale in WORDS:
        for split, ids in numbers.items():
            rows = [utterance(locale, number) | {"partition": split} for number in ids]
            path = folder / f"massive/{locale}.{split}.jsonl"
            if split == "text":
                path, rows = (
                    folder / f"massive_text/{locale}.jsonl",
                    [{k: r[k] for k in ("id", "locale", "utt")} for r in rows],
                )
            elif split == "train" and locale != "en-US":
                continue
            path.parent.mkdir(exist_ok=True)
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "tatoeba").mkdir()
    others = dict.fromkeys("dan hrv por slk swe cmn ces isl rus".split())  # of the other tasks; said in Turkish
    for locale, code in [*TATOEBA.items(), *(("tr-TR", code) for code in others)]:
        rows = [
            {
                "id": f"{code}-{number}",
                "src_lang": code,
                "tgt_lang": "eng",
                "src": utterance(locale, number)["utt"],
                "tgt": utterance("en-US", number)["utt"],
            }
            for number in range(1000, 1200)
        ]
        (folder / f"tatoeba/{code}-eng.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    other_tasks(folder)
    leak = json.loads((folder / "uner/da.dev.jsonl").open().readline())["text"]
    with (folder / "tatoeba/deu-eng.jsonl").open("a") as file:
        row = {"id": "leak", "src_lang": "deu", "tgt_lang": "eng", "src": leak, "tgt": "held out elsewhere"}
        file.write(json.dumps(row) + "\n")
    return folder


def other_tasks(folder: Path) -> None:
    """uner/ and mt/: sentences that are nowhere else, of as many dev and test rows as train rows."""
    for corpus in ("uner", "mt"):
        (folder / corpus).mkdir()
    for place, split in enumerate(("train", "dev", "test")):
        numbers = range(2000 + 100 * place, 2030 + 100 * place)
        for language, locale in (("en", "en-US"), ("da", "de-DE"), ("zh", "tr-TR")):
            rows = [entities(locale, number) | {"id": f"{split}-{number}", "lang": language} for number in numbers]
            (folder / f"uner/{language}.{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        pairs = {"de-en": "de-DE", "cs-en": "tr-TR"} | ({"en-de": "de-DE"} if split == "test" else {})
        for pair, locale in pairs.items():
            source, target = pair.split("-")
            texts = [
                (f"{number} {utterance(locale, number)['utt']}", utterance("en-US", number)["utt"])
                for number in numbers
            ]
            rows = [
                {"id": f"{split}-{n}", "src_lang": source, "tgt_lang": target, "src": src, "tgt": f"{tgt} {n}"}
                for n, (src, tgt) in zip(numbers, texts)
            ]
            (folder / f"mt/{split}.{pair}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def entities(locale: str, number: int) -> dict:
    row = utterance(locale, number)
    slot = row["slots"][0]
    found = {"type": "PER", "text": slot["value"], "start": slot["start"], "end": slot["end"]}
    return {"source": "made_up", "text": f"{row['utt']} {number}", "entities": [found]}


TINY = Shape(hidden=32, intermediate=64, layers=4, heads=2, vocabulary=400, max_tokens=256)


@pytest.fixture
def run_study(monkeypatch, data, tmp_path):
    """Runs the command with a size of its own; returns its output directory."""
    aligned = ("de", "es", "fr", "sw", "tr")
    size = material.Size(TINY, 20, 3, 1e-3, ("en",), aligned, ("af", "az"), 5, ("massive", "tatoeba", "uner", "mt"))
    monkeypatch.setitem(material.SIZES, "tiny", size)
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # of this process
    for name in os.environ.keys() - alone_in_the_world().keys():
        monkeypatch.delenv(name)

    def run(*options: str) -> Path:
        output = tmp_path / "study"
        words = ["study.py", *options, "--size", "tiny", "--data", str(data), "--output", str(output), "--jobs", "2"]
        monkeypatch.setattr(sys, "argv", words)
        study.main()
        return output

    return run


@pytest.mark.timeout(600)
def test_from_data_to_tables_and_pictures(run_study, monkeypatch, capfd):
    """All that a user sees; and a second start does nothing again."""
    small = Study("small", "A small study", (TASK_ONLY, ALIGNED))
    monkeypatch.setitem(STUDIES, "small", small)
    output = run_study("small", "--seeds", "1")
    table = (output / "small.md").read_text()
    assert "| task only | 1 |" in table and "| aligned | 1 |" in table
    assert (output / "small.png").stat().st_size > 5000
    content = json.loads((output / "small.json").read_text())
    arm = content["arms"]["aligned"]
    assert arm["groups"].keys() == {"supervised", "aligned", "unseen"}
    assert len(arm["languages"]) == 8 and len(arm["by_layer"]["aligned"]) == 5
    assert arm["gradients"]["layers"] == [0, 1, 2]
    assert all(-1 <= low <= mean <= high <= 1 for low, mean, high in arm["gradients"]["cosine"])
    assert content["arms"]["task only"]["gradients"] == {"layers": [], "cosine": [], "norm_ratio": []}
    log = (output / "cells/aligned/seed-1/commands.log").read_text()
    assert [line.split()[2] for line in log.splitlines() if line.startswith("$")] == ["train", "evaluate", "probe"]
    assert content["base_retrieval"].keys() == {"aligned", "unseen"}

    before = {path: path.stat().st_mtime_ns for path in output.glob("cells/*/*/*/*")}
    run_study("small", "--seeds", "1")
    assert before == {path: path.stat().st_mtime_ns for path in output.glob("cells/*/*/*/*")}
    assert "0 to do" in capfd.readouterr().out
    with pytest.raises(SystemExit, match=r"holds a study with other settings"):
        run_study("small", "--model", "elsewhere")


def test_no_labelled_or_held_out_utterance_is_in_the_bitext(run_study, data, monkeypatch):
    monkeypatch.setattr(study, "run_all", lambda *_: None)
    monkeypatch.setattr(study, "probe", lambda *_: {"languages": ["en", "de"], "directions": [[[None, 1], [1, None]]]})
    output = run_study("main", "pairs")
    assert len((output / "data/massive-pairs-50/train.de-DE-en-US.jsonl").read_text().splitlines()) == 50
    pairs = [json.loads(line) for path in output.glob("data/*/train.*-*.jsonl") for line in path.open()]
    assert {pair["src_lang"] for pair in pairs} == {
        "de-DE",
        "es-ES",
        "fr-FR",
        "sw-KE",
        "tr-TR",
        *list(TATOEBA.values())[:5],
    }
    english = {pair["tgt"] for pair in pairs}
    labelled = {json.loads(line)["text"] for line in (output / "data/types/train.en.jsonl").open()}
    held_out = {
        json.loads(line)["utt"] for path in (data / "massive").glob("en-US.[dt]e*.jsonl") for line in path.open()
    }
    assert labelled and held_out and english
    assert not english & held_out
    assert not {pair["tgt"] for pair in pairs if pair["tgt_lang"] == "en-US"} & labelled  # MASSIVE's own


@pytest.mark.timeout(300)
def test_json_extraction_and_translation(run_study, data):
    """Labels in the supervised languages alone; scores without retrieval, of which there is no parallel text."""
    output = run_study("json", "translation", "--seeds", "1")
    assert {path.name for path in output.glob("data/json/train.*")} == {"train.en.jsonl"}
    assert {path.name for path in output.glob("data/translation/train.*")} == {"train.de-en.jsonl", "train.en-de.jsonl"}
    bitext = {path.name.split(".")[1] for path in output.glob("data/tatoeba-json/train.*")}
    assert bitext == {f"{code}-eng" for code in ("dan", "hrv", "por", "slk", "swe", "cmn")}
    for name, metric, groups in (
        ("json", "F1", {"supervised", "aligned"}),
        ("translation", "chrF++", {"supervised", "aligned"}),
    ):
        content = json.loads((output / f"{name}.json").read_text())
        assert content["metric"] == metric and content["base_retrieval"] == {}
        assert [set(arm["groups"]) for arm in content["arms"].values()] == [groups, groups]
        assert "retrieval" not in (output / f"{name}.md").read_text().lower()
        assert (output / f"{name}.png").stat().st_size > 5000


def test_the_base_model_reads_no_dev_or_test_sentence(data, run_study):
    found = set(material._texts(data, material.SIZES["tiny"]))
    rows = [(path, json.loads(line)) for path in data.glob("*/*.jsonl") for line in path.open()]
    texts = {
        split: {
            row[key] for path, row in rows if split in path.name for key in ("utt", "text", "src", "tgt") if key in row
        }
        for split in ("train", "dev", "test")
    }
    assert not found & (texts["dev"] | texts["test"])
    assert {text for text in texts["train"] if text[-4:].isdecimal()} <= found  # of UNER, and English of translation


def test_a_study_of_a_corpus_that_the_base_model_has_not_read_is_refused(run_study, monkeypatch):
    monkeypatch.setitem(material.SIZES, "tiny", replace(material.SIZES["tiny"], corpora=("massive", "tatoeba")))
    monkeypatch.setitem(STUDIES, "json", replace(STUDIES["json"], arms=(TASK_ONLY, *STUDIES["json"].arms)))
    with pytest.raises(SystemExit, match=r"study json needs a base model that has read uner: --size 5m-wide"):
        run_study("json")


@pytest.mark.parametrize("options", [["nothing"], ["--seeds", "0"]])
def test_mistakes_are_one_sentence(run_study, options):
    with pytest.raises(SystemExit, match=r"study: error: (study nothing is not one of|--seeds and --jobs must be)"):
        run_study(*options)


def test_missing_data_is_named(tmp_path):
    size = material.SIZES["5m"]
    with pytest.raises(UserError, match=r"massive has no \*\.train\.jsonl of language en"):
        material.prepare(tmp_path, tmp_path / "out", size, [])


# ------------------------------------------------------------------------------------------------------ order, budget


def setting(folder: Path, **more) -> Setting:
    return Setting(folder, folder, "base", 4, False, 4, 1e-3, ("en",), ("de",), 5, **more)


def test_every_cell_comes_once_and_after_its_parts():
    found = study.order([STUDIES["main"], STUDIES["merged"], STUDIES["cost"]], seeds=2)
    assert len(found) == len(set(found)) == 2 * (4 + 5 + 2)
    for cell in found:
        assert all(found.index(part) < found.index(cell) for part in cell.parts())


def test_arms_that_studies_share_are_one_cell():
    assert Cell(Arm("aligned", x=64), 1) == Cell(ALIGNED, 1)


def finish(cell: Cell, where: Setting) -> None:
    cell.folder(where).mkdir(parents=True)
    write_whole(cell.folder(where) / "cell.json", json.dumps({"made_by": cell.made_by()}))  # another thread may look


def test_cells_wait_for_their_parts_and_the_budget_is_kept(tmp_path, monkeypatch):
    done = []

    def run(cell, where):
        assert all(part.result(where) for part in cell.parts())
        time.sleep(0.05)
        done.append(cell)
        finish(cell, where)

    monkeypatch.setattr(cells, "_run", run)
    merged = Cell(MERGED, 1)
    where = setting(tmp_path)
    cells.run_all([merged, *merged.parts()], where, 2)
    assert done[-1] == merged and len(done) == 3
    late = setting(tmp_path, deadline=time.monotonic())
    cells.run_all([Cell(TASK_ONLY, 1)], late, 2)
    assert len(done) == 3


def test_a_failure_lets_the_others_end_and_starts_no_more(tmp_path, monkeypatch):
    done = []

    def run(cell, where):
        if cell.seed == 1:
            raise UserError("broken")
        time.sleep(0.2)
        done.append(cell.seed)
        finish(cell, where)

    monkeypatch.setattr(cells, "_run", run)
    with pytest.raises(UserError, match="broken"):
        cells.run_all([Cell(ALIGNED, seed) for seed in (1, 2, 3)], setting(tmp_path), 2)
    assert done == [2]


def test_ctrl_c_stops_what_runs(tmp_path, monkeypatch):
    """Asked from outside, as by a scheduler; no command stays behind, and none is started after."""
    monkeypatch.setattr(cells, "_run", lambda cell, where: cells.mlalign(tmp_path / "log", "doctor", setting=where))
    where = setting(tmp_path)
    threading.Timer(0.5, signal.raise_signal, [signal.SIGINT]).start()
    with pytest.raises(KeyboardInterrupt):
        cells.run_all([Cell(ALIGNED, seed) for seed in (1, 2, 3)], where, 2)
    assert not where.running
    assert (tmp_path / "log").read_text().count("$ mlalign doctor") == 2


def test_a_cell_of_another_arm_is_not_taken_for_this_one(tmp_path):
    where = setting(tmp_path)
    finish(Cell(ALIGNED, 1), where)
    assert Cell(ALIGNED, 1).result(where)
    with pytest.raises(UserError, match=r"aligned/seed-1/cell.json is of an arm .* made otherwise: remove"):
        Cell(Arm("aligned", ("alignment.weight=2",)), 1).result(where)


def test_the_weight_that_other_studies_share_is_the_recipes():
    weight = load(cells.RECIPE).alignment.weight
    assert next(arm.x for arm in STUDIES["weight"].arms if arm == ALIGNED) == f"{weight:g}"


@pytest.mark.parametrize("pretrained", [True, False])
@pytest.mark.parametrize("study", STUDIES.values(), ids=lambda study: study.name)
def test_every_arm_is_a_config(study, pretrained, tmp_path):
    """And a model that others have pretrained is trained by LoRA alone."""
    where = setting(tmp_path)
    where.pretrained = pretrained
    for cell in study_cells(study):
        config = load(cells.RECIPE, cells._overrides(cell, where, tmp_path / "run"))
        assert (config.lora is not None) == (pretrained or cell.arm.adapter)
        if pretrained:
            assert config.lora.r == 8 and config.optimizer.lr == 5e-4
        else:
            assert config.optimizer.lr == (3e-3 if cell.arm.adapter else where.lr)
        assert config.optimizer.steps == {"twice": 8, "half": 2}.get(cell.arm.name.split()[-3:][0], 4)
        assert config.seed == 3


@pytest.mark.parametrize(
    "depth, layers", [(8, [1, 2, "auto", 6, 8]), (10, [1, 2, "auto", 7, 10]), (2, [1, 1, "auto", 1, 2])]
)
def test_layers_are_shares_of_the_depth(depth, layers, tmp_path):
    where = replace(setting(tmp_path), depth=depth)
    found = [load(cells.RECIPE, cells._overrides(cell, where, tmp_path)) for cell in study_cells(STUDIES["layer"])]
    assert [config.alignment.layer for config in found] == layers


def study_cells(chosen: Study) -> list[Cell]:
    arms = [arm for arm in chosen.arms if not arm.parts] + [part for arm in chosen.arms for part in arm.parts or ()]
    return [Cell(arm, 3) for arm in arms]


def test_seconds_of_stopped_tries_count(tmp_path):
    for seconds in (0.2, 0.1):
        with pytest.raises(OutOfTimeError), cells._counting(tmp_path / "seconds.json"):
            time.sleep(seconds)
            raise OutOfTimeError
    with cells._counting(tmp_path / "seconds.json") as count:
        pass
    assert 0.3 <= count() < 1


def test_a_command_is_stopped_when_the_budget_ends(tmp_path):
    where = setting(tmp_path, deadline=time.monotonic() + 0.5)
    with pytest.raises(OutOfTimeError):
        cells.mlalign(tmp_path / "log", "doctor", setting=where)


def test_a_command_that_fails_is_named(tmp_path):
    with pytest.raises(
        UserError, match=r"`mlalign train .*nowhere.yaml \.\.\.` failed with exit code 2, see .*does not exist"
    ):
        cells.mlalign(tmp_path / "log", "train", tmp_path / "nowhere.yaml")


# ----------------------------------------------------------------------------------------------------------- findings


def test_intervals_are_students():
    values = [0.3, 0.35, 0.31, 0.4]
    mean, half = findings.interval(values)
    low, high = stats.t.interval(0.95, 3, loc=np.mean(values), scale=stats.sem(values))
    assert (mean - half, mean + half) == pytest.approx((low, high))
    assert math.isnan(findings.interval([0.5])[1])


def test_retrieval_is_to_and_from_english(tmp_path):
    languages = ["af", "de", "en"]
    accuracy = [[[None, 0.9, 0.2], [0.8, None, 0.5], [0.4, 0.7, None]]]
    found = findings.retrieval({"languages": languages, "directions": accuracy}, setting(tmp_path))
    assert found == {"aligned": [pytest.approx(0.6)], "unseen": [pytest.approx(0.3)]}


GRADIENTS = {f"{kind}_layer_{layer:02}": [0.5, 2.0] for kind in ("cosine", "norm_ratio") for layer in (1, 2)}


def test_gradients_of_all_log_steps_and_seeds_are_pooled(tmp_path):
    lines = [
        {"step": 1, "gradients/cosine_layer_01": 0.2, "gradients/norm_ratio_layer_01": 0.5},
        {"step": 2, "train/task_loss": 1.0},
        {"step": 3, "gradients/cosine_layer_01": -0.4, "gradients/norm_ratio_layer_01": 8.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    cell = cells._gradients(tmp_path / "metrics.jsonl")
    assert cell == {"cosine_layer_01": [0.2, -0.4], "norm_ratio_layer_01": [0.5, 8.0]}
    other = {"cosine_layer_01": [0.5], "norm_ratio_layer_01": [0.25]}
    found = findings.pooled_gradients([cell, {}, other])
    assert found["layers"] == [1]
    assert found["cosine"] == [[-0.4, pytest.approx(0.1), 0.5]]
    assert found["norm_ratio"] == [[0.25, pytest.approx(1.0), 8.0]]


def test_curves_are_drawn(tmp_path):
    arm = {"seeds": [1, 2], "groups": {"aligned": [0.1, 0.2]}, "retrieval": {"aligned": [0.5, 0.6]}, "seconds": [1, 1]}
    arm |= {"languages": {"de": [0.1, 0.2]}, "by_layer": {"aligned": [0.1] * 5}}
    arm |= {"gradients": findings.pooled_gradients([GRADIENTS, GRADIENTS])}
    found = {f"layer {x}": arm | {"x": str(x)} for x in (1, 2, 4)}
    measured = {"languages": ["de", "en"], "directions": [[[None, 0.1], [0.1, None]]] * 5}
    findings.write(STUDIES["layer"], found, measured, setting(tmp_path), tmp_path)
    assert min((tmp_path / name).stat().st_size for name in ("layer.png", "layer_gradients.png")) > 5000
    assert "| layer 2 | 2 | 0.150 ± 0.635 | 0.550 ± 0.635 | 1 |" in (tmp_path / "layer.md").read_text()
