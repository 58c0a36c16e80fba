"""`mlalign compare`: numbers by hand, verdicts, and evaluations that must not be compared."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from mlalign import comet
from mlalign.commands.compare import Settings, compare
from mlalign.commands.evaluate import Settings as Evaluation
from mlalign.commands.evaluate import evaluate
from mlalign.errors import UserError
from mlalign.generation import Decoding
from mlalign.predictions import Predictions, write_predictions
from mlalign.tracker import console

ROWS = 60


def evaluation(
    folder: Path, right: dict[str, int], supervised: list[str], rows: int = ROWS, task: str = "items"
) -> Path:
    """What `mlalign evaluate` leaves, with so many right answers in each language: the first so many rows."""
    folder.mkdir(parents=True)
    for language, count in right.items():
        golds = [{"answer": f"a {i}"} for i in range(rows)]
        texts = [f"a {i}" if i < count else "b" for i in range(rows)]
        write_predictions(folder, language, Predictions(list(range(rows)), texts, golds))
    how = asdict(Decoding(model="m", adapter=None)) | {
        "task": task,
        "rows": dict.fromkeys(right, rows),
        "training": {"supervised": supervised, "aligned": []},
    }
    (folder / "evaluation.json").write_text(json.dumps(how))
    if task == "items":
        evaluate(Evaluation(output=folder, task=task, score_only=True))
    return folder


@pytest.fixture
def settings(tmp_path) -> Settings:
    a = evaluation(tmp_path / "runs/sft/test", {"en": 50, "sw": 10, "th": 20}, ["en"])
    b = evaluation(tmp_path / "runs/aligned/test", {"en": 50, "sw": 40, "th": 19}, ["en"])
    return Settings(evaluations=(a, b), output=tmp_path / "out")


def test_scores_differences_and_verdicts(settings):
    result = compare(settings)
    assert result["names"] == ["sft", "aligned"]
    assert result["languages"]["sw"]["scores"] == {"sft": 0.166667, "aligned": 0.666667}
    assert result["languages"]["sw"]["differences"]["aligned"]["delta"] == 0.5
    assert result["languages"]["en"]["differences"]["aligned"] == {"delta": 0, "low": 0, "high": 0, "p": 1}
    unseen = result["groups"]["unseen"]
    assert unseen["languages"] == ["sw", "th"]
    assert unseen["differences"]["aligned"]["delta"] == pytest.approx((30 - 1) / ROWS / 2, abs=1e-6)
    assert result["verdicts"]["unseen"][0].startswith("unseen: aligned is better than sft: +0.242 f1 [+0.1")
    assert result["verdicts"]["unseen"][0].endswith("p < 0.002, higher in 1 of 2")
    assert result["verdicts"]["supervised"] == [
        "supervised: aligned and sft do not differ beyond chance: +0.000 f1 [+0.000, +0.000], p 1.000"
    ]
    text = (settings.output / "compare.md").read_text()
    assert "| sw | 0.167 | 0.667 | +0.500 [" in text
    assert json.loads((settings.output / "compare.json").read_text()) == result
    assert (settings.output / "compare.png").stat().st_size > 5000
    assert list((settings.output / "tensorboard").glob("events.*"))


def test_three_systems_and_another_metric(settings, tmp_path):
    third = evaluation(tmp_path / "merged", {"en": 40, "sw": 40, "th": 40}, ["en"])
    with console.capture() as capture:
        result = compare(
            replace(settings, evaluations=(*settings.evaluations, third), names=["a", "b", "c"], metric="exact_match")
        )
    assert list(result["groups"]["all"]["differences"]) == ["b", "c"]
    assert len(result["verdicts"]["all"]) == 2
    assert "supervised: c is worse than a: -0.167 exact_match" in " ".join(capture.get().split())


def test_less_of_something_bad_is_better(tmp_path):
    folders = []
    for name, wrong in (("a", 50), ("b", 10)):
        folder = tmp_path / name
        folder.mkdir()
        golds = [{"annot_utt": f"at [time : {i}]"} for i in range(ROWS)]
        texts = ["nonsense" if i < wrong else f"time: {i}" for i in range(ROWS)]
        write_predictions(folder, "en", Predictions(list(range(ROWS)), texts, golds))
        (folder / "evaluation.json").write_text(json.dumps({"task": "slot_filling", "rows": {"en": ROWS}}))
        evaluate(Evaluation(output=folder, task="slot_filling", score_only=True))
        folders.append(folder)
    result = compare(Settings(evaluations=tuple(folders), output=tmp_path / "out", metric="malformed"))
    assert "b is better than a: -0.667 malformed" in result["verdicts"]["all"][0]


def test_comet_of_different_models_is_not_compared(tmp_path):
    folders = []
    for name, model in (("a", "wmt22"), ("b", "xcomet")):
        folder = tmp_path / name
        (folder / "comet").mkdir(parents=True)
        golds = [{"src": "s", "reference": f"Das ist {i}.", "tgt_lang": "de"} for i in range(9)]
        predictions = Predictions(list(range(9)), [f"Das ist {i}." for i in range(9)], golds)
        write_predictions(folder, "en-de", predictions)
        (folder / "evaluation.json").write_text(json.dumps({"task": "translation", "rows": {"en-de": 9}}))
        kept = {"model": model, "fingerprint": comet._fingerprint(model, predictions), "scores": [0.5] * 9}
        (folder / "comet/en-de.json").write_text(json.dumps(kept))
        evaluate(Evaluation(output=folder, task="translation", score_only=True))
        folders.append(folder)
    settings = Settings(evaluations=tuple(folders), output=tmp_path / "out", metric="comet")
    with pytest.raises(UserError, match="comet is by different models, wmt22 and xcomet"):
        compare(settings)
    compare(replace(settings, metric="bleu"))


@pytest.mark.parametrize("name", ["metrics.jsonl", "evaluation.json", "probe.json"])
def test_another_verbs_directory_is_no_place_for_a_comparison(settings, name):
    """Its curves would go: TensorBoard's files of an earlier comparison are replaced."""
    settings.output.mkdir()
    (settings.output / name).touch()
    with pytest.raises(UserError, match=r"choose a directory of its own"):
        compare(settings)


def test_what_cannot_be_compared_is_one_sentence(settings, tmp_path):
    first, second = settings.evaluations

    def against(other: Path, **changes):
        compare(replace(settings, evaluations=(first, other), **changes))

    with pytest.raises(UserError, match=r"different test sets: only one of them has th"):
        against(evaluation(tmp_path / "fewer", {"en": 1, "sw": 1}, []))
    with pytest.raises(UserError, match=r"different test sets: 60 and 59 rows of en"):
        against(evaluation(tmp_path / "shorter", {"en": 1, "sw": 1, "th": 1}, [], rows=59))
    changed = evaluation(tmp_path / "changed", {"en": 1, "sw": 1, "th": 1}, [])
    path = changed / "predictions/sw.jsonl"
    path.write_text(path.read_text().replace('"a 7"', '"a seven"'))
    with pytest.raises(UserError, match=r"different test sets: row 8 of sw is not the same"):
        against(changed)
    with pytest.raises(UserError, match=r"is an evaluation of items, but .*other of translation"):
        against(evaluation(tmp_path / "other", {"en": 1, "sw": 1, "th": 1}, [], task="translation"))
    with pytest.raises(UserError, match=r"metric bleu is not one of f1, exact_match"):
        against(second, metric="bleu")
    uneven = [evaluation(tmp_path / name, {"en-de": 1, "en-ti": 1}, [], task="translation") for name in ("x", "y")]
    for folder in uneven:  # py3langid does not know Tigrinya
        for language in ("en-de", "en-ti"):
            gold = {"src": "a", "reference": "b", "tgt_lang": language[3:]}
            write_predictions(folder, language, Predictions([1], ["b"], [gold]))
        how = json.loads((folder / "evaluation.json").read_text()) | {"rows": {"en-de": 1, "en-ti": 1}}
        (folder / "evaluation.json").write_text(json.dumps(how))
    with pytest.raises(UserError, match=r"metric off_target is missing in en-ti: choose one of chrf\+\+, bleu"):
        compare(replace(settings, evaluations=tuple(uneven), metric="off_target"))
    with pytest.raises(UserError, match=r"names are 1, but there are 2 evaluations"):
        against(second, names=["a"])
    with pytest.raises(UserError, match=r"two of the evaluations are called a, a"):
        against(second, names=["a", "a"])
    with pytest.raises(UserError, match=r"two of the evaluations are called"):
        against(first)
    with pytest.raises(UserError, match=r"compare needs two evaluations"):
        compare(replace(settings, evaluations=(first,)))
    with pytest.raises(UserError, match=r"nowhere holds no evaluation.json"):
        against(tmp_path / "nowhere")
    (second / "report.json").unlink()
    with pytest.raises(UserError, match=r"holds no report.json: repeat its `mlalign evaluate`"):
        against(second)
    (second / "evaluation.json").write_text("{")
    with pytest.raises(UserError, match=r"evaluation.json cannot be read"):
        against(second)
    assert not (settings.output / "compare.json").exists()
