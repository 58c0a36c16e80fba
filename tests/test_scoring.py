"""Bootstrap, groups and differences, each against a plain loop or worked out by hand."""

import numpy as np
import pytest
from sacrebleu.metrics import BLEU

from mlalign import scoring
from mlalign.predictions import Predictions, read_predictions, write_predictions
from mlalign.scoring import difference, language_groups, mean, sides
from mlalign.tasks import items, translation

RNG = np.random.default_rng(0)


def rows_of(quality, rows=200, seed=0):
    """Counts of `rows` answers of which a share is right."""
    right = (np.random.default_rng(seed).random(rows) < quality).astype(float)
    return {"right": right, "found": np.ones(rows), "wanted": np.ones(rows), "exact": right}


def score(task, counts, language, seed, samples=1000, ids=None):
    """Of rows with ids of their own in each language, unless they are given."""
    rows = len(next(iter(counts.values())))
    return scoring.score(task, counts, ids or [f"{language}-{i}" for i in range(rows)], language, seed, samples)


def test_the_interval_is_that_of_resampling_rows_one_by_one():
    counts = rows_of(0.6)
    scores = score(items, counts, "de", seed=0, samples=4000)
    assert scores.point["f1"] == counts["right"].mean()
    rng, loop = np.random.default_rng(1), []
    for _ in range(4000):
        drawn = rng.integers(0, 200, 200)
        right, both = counts["right"][drawn].sum(), counts["found"][drawn].sum() + counts["wanted"][drawn].sum()
        loop.append(2 * right / both)
    assert scores.interval("f1") == pytest.approx(np.percentile(loop, [2.5, 97.5]), abs=0.01)


def test_the_interval_covers_the_truth_as_often_as_it_says():
    covered = 0
    for seed in range(200):
        low, high = score(items, rows_of(0.6, seed=seed), "de", seed=seed, samples=400).interval("f1")
        covered += low <= 0.6 <= high
    assert 0.90 <= covered / 200 <= 0.99


def test_the_same_seed_takes_the_same_rows_for_every_system():
    one, other = score(items, rows_of(0.6), "de", 0), score(items, rows_of(0.6), "de", 0)
    assert (one.samples["f1"] == other.samples["f1"]).all()
    assert (one.samples["f1"] != score(items, rows_of(0.6), "fr", 0).samples["f1"]).any()
    assert (one.samples["f1"] != score(items, rows_of(0.6), "de", 1).samples["f1"]).any()


def test_bootstrap_of_bleu_is_sacrebleu_on_the_rows_that_are_taken():
    texts = ["the cat sat on the mat", "a dog is asleep on the sofa", "who knows what they said", "it was late"]
    answers = ["the cat sat on a mat", "the dog is asleep on a sofa", "who knows what he said", "it was very late"]
    golds = [{"src": "s", "reference": text, "tgt_lang": "en"} for text in texts]
    counts = translation.statistics(answers, golds, "de-en")
    ids = ["a", "b", "c", "d"]
    scores = scoring.score(translation, counts, ids, "de-en", seed=3, samples=20)
    for sample in range(20):
        times = [int(scoring._times(f"3 {row_id}", 20)[sample]) for row_id in ids]
        times = times if any(times) else [1] * 4
        taken = [i for i, count in enumerate(times) for _ in range(count)]
        wanted = BLEU().corpus_score([answers[i] for i in taken], [[texts[i] for i in taken]]).score
        assert scores.samples["bleu"][sample] == pytest.approx(wanted)
    assert len(set(scores.samples["bleu"])) > 3


def test_rows_of_one_id_are_taken_together_in_all_languages():
    """Translations are hard or easy together: an interval that takes languages for independent is far too narrow."""
    rng, covered, narrow, found = np.random.default_rng(5), 0, 0, 0
    languages, rows = [f"l{number}" for number in range(10)], 100
    for seed in range(150):
        difficulty = rng.normal(size=rows)  # of a sentence, in every language
        truth = 0.5
        together, apart = [], []
        for language in languages:
            right = (difficulty + 0.3 * rng.normal(size=rows) > 0).astype(float)
            counts = {"right": right, "found": np.ones(rows), "wanted": np.ones(rows), "exact": right}
            together.append(score(items, counts, language, seed, 300, ids=list(range(rows))))
            apart.append(score(items, counts, language, seed, 300))
        low, high = mean(together).interval("f1")
        covered += low <= truth <= high
        low, high = mean(apart).interval("f1")
        narrow += low <= truth <= high
        found += 1
    assert 0.89 <= covered / found <= 0.99
    assert narrow / found < 0.75


def test_a_row_without_id_is_on_its_own():
    counts = rows_of(0.5, rows=30)
    of = [scoring.score(items, counts, [None] * 30, language, 0).samples["f1"] for language in ("de", "fr")]
    assert (of[0] != of[1]).any()


def test_a_group_is_the_mean_of_its_languages_with_an_interval_of_its_own():
    scores = [score(items, rows_of(quality, seed=number), f"{number}", 0) for number, quality in enumerate((0.2, 0.8))]
    group = mean(scores)
    assert group.point["f1"] == pytest.approx((scores[0].point["f1"] + scores[1].point["f1"]) / 2)
    width = [np.subtract(*reversed(each.interval("f1"))) for each in (*scores, group)]
    assert width[2] == pytest.approx(np.hypot(width[0], width[1]) / 2, rel=0.15)  # of independent languages
    scores[0].point.pop("exact_match")
    assert "exact_match" not in mean(scores).point


def test_differences_are_paired():
    """Two systems that differ in 10 of 200 rows: paired, that is beyond chance; unpaired it would not be."""
    first = rows_of(0.5)
    wrong = np.flatnonzero(first["right"] == 0)[:10]
    second = {name: each.copy() for name, each in first.items()}
    second["right"][wrong] = second["exact"][wrong] = 1
    a, b = (score(items, counts, "de", 0) for counts in (first, second))
    found = difference(b, a, "f1")
    assert found.delta == pytest.approx(10 / 200)
    assert 0 < found.low < found.delta < found.high
    assert found.p == pytest.approx(2 / 1001)  # none of 1000 samples is on the other side, but what was observed counts
    assert a.interval("f1")[1] > b.interval("f1")[0]  # the intervals themselves overlap
    assert difference(a, b, "f1").delta == -found.delta


@pytest.mark.parametrize("blank", ["", " ", None])
def test_rows_with_blank_ids_are_independent(tmp_path, blank):
    """An empty column of a CSV file: taken for one id, all rows would be drawn together, and no interval be left."""
    write_predictions(tmp_path, "de", Predictions([blank] * 200, ["x"] * 200, [{}] * 200))
    ids = read_predictions(tmp_path, "de", 200).ids
    found = score(items, rows_of(0.5), "de", 0, ids=ids)
    assert ids == [None] * 200
    assert np.subtract(*reversed(found.interval("f1"))) > 0.05


def test_equal_systems_do_not_differ():
    a = score(items, rows_of(0.5), "de", 0)
    found = difference(a, a, "f1")
    assert (found.delta, found.low, found.high, found.p) == (0, 0, 0, 1)


def test_p_is_uniform_where_there_is_no_difference():
    values = []
    for seed in range(200):
        a, b = rows_of(0.5, 100, seed), rows_of(0.5, 100, seed + 1000)
        values.append(difference(score(items, b, "de", seed, 400), score(items, a, "de", seed, 400), "f1").p)
    assert 0.01 <= np.mean(np.array(values) < 0.05) <= 0.11
    assert 0.35 <= np.median(values) <= 0.65


def test_groups_by_hand():
    found = language_groups(["en", "de", "sw-KE", "zh-TW", "hin_Deva", "cy"], ["en", "zh-CN"], ["deu", "eng", "swh"])
    assert found == {
        "all": ["en", "de", "sw-KE", "zh-TW", "hin_Deva", "cy"],
        "supervised": ["en"],
        "aligned": ["de", "sw-KE"],
        "unseen": ["zh-TW", "hin_Deva", "cy"],
        "high-resource": ["en", "de", "zh-TW", "hin_Deva"],
        "low-resource": ["sw-KE", "cy"],
        "Latin": ["en", "de", "sw-KE", "cy"],
        "non-Latin": ["zh-TW", "hin_Deva"],
    }
    assert language_groups(["de", "ru"], [], []) == {
        "all": ["de", "ru"],
        "high-resource": ["de", "ru"],
        "Latin": ["de"],
        "non-Latin": ["ru"],
    }


@pytest.mark.parametrize("code", ["zh-TW", "zho_Hant", "cmn_Hant", "zh-tw"])
def test_chinese_in_traditional_letters_is_a_language_of_its_own(code):
    def group(supervised: str, aligned: str) -> str:
        return next(name for name in language_groups([code], [supervised], [aligned]) if name != "all")

    assert group("zh-TW", "sw") == "supervised"
    assert group("zh-CN", "zho_Hant") == "aligned"
    assert group("zh-CN", "zho_Hans") == "unseen"


def test_groups_of_directions_go_by_the_side_that_is_not_english():
    assert sides("en-cs", True) == ["cs"]
    assert sides("isl_Latn-eng_Latn", True) == ["isl_Latn"]
    assert sides("de-fr", True) == ["de", "fr"]
    assert sides("zh-TW", True) == ["zh-TW"]
    assert sides("pt-br", False) == ["pt-br"]  # a locale in small letters
    directions = ["en-cs", "cs-en", "en-is", "de-fr", "en-ru"]
    found = language_groups(directions, ["en-cs", "cs-en"], ["is", "en", "de"], directions=True)
    assert found["supervised"] == ["en-cs", "cs-en"]
    assert found["aligned"] == ["en-is"]
    assert found["unseen"] == ["de-fr", "en-ru"]  # French is in no bitext
    assert found["low-resource"] == ["en-is"]
    assert found["non-Latin"] == ["en-ru"]


def test_an_empty_interval_where_every_row_is_the_same():
    scores = score(items, rows_of(1.0), "de", 0)
    assert scores.interval("f1") == (1, 1)
