"""How answers are scored: hand-worked cases, MASSIVE's own rules written out once more, and sacrebleu's own numbers."""

import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
from sacrebleu.metrics import BLEU, CHRF
from seqeval.metrics import f1_score

from mlalign.errors import UserError
from mlalign.tasks import NAMES, items, json_extraction, load_task, slot_filling, translation

DATA = Path(__file__).parent.parent.parent / "shared" / "data"


def scores(task, predictions, golds, language="en"):
    counts = task.statistics(predictions, golds, language)
    return task.metrics({name: each.sum(0) for name, each in counts.items()}, len(golds))


def slots(predictions, annotated, language="en"):
    golds = [{"annot_utt": text} for text in annotated]
    return {name: float(value) for name, value in scores(slot_filling, predictions, golds, language).items()}


# ----------------------------------------------------------------------------------------------------- slot filling


@pytest.mark.parametrize(
    ("prediction", "annotated", "language", "f1"),
    [
        ("time: nine am", "wake me at [time : nine am]", "en", 1.0),
        ("time: Nine AM;", "wake me at [time : nine am]", "en", 1.0),  # case, and a last semicolon
        ("time: nine", "wake me at [time : nine am]", "en", 0.0),  # half of a value is no slot
        ("date: nine am", "wake me at [time : nine am]", "en", 0.0),
        ("time: nine am; date: friday", "wake me at [time : nine am] on [date : friday]", "en", 1.0),
        ("date: friday; time: nine am", "wake me at [time : nine am] on [date : friday]", "en", 1.0),  # no order
        ("time: nine am", "wake me at [time : nine am] on [date : friday]", "en", 2 / 3),  # 1 of 2 wanted
        ("time: nine am; place: mars", "wake me at [time : nine am]", "en", 2 / 3),  # not in the utterance
        ("time: five; time: five", "[time : five] or [time : five]", "en", 1.0),  # repeated, both there
        ("time: five", "[time : five] or [time : five]", "en", 2 / 3),
        ("time: five; time: five", "at [time : five] oh", "en", 2 / 3),  # said twice, there once
        ("number: one", "the one with [number : one] eye", "en", 1.0),  # an answer does not say which
        ("date: may; date: first", "[date : may] [date : first]", "en", 1.0),  # neighbours of a type are one slot
        ("date: may first", "[date : may] [date : first]", "en", 1.0),
        ("None", "hello there", "en", 1.0),
        ("none.", "hello there", "en", 1.0),
        ("None", "wake me at [time : nine am]", "en", 0.0),
        ("time: hello", "hello there", "en", 0.0),
        ("", "wake me at [time : nine am]", "en", 0.0),
        ("house_place: ベッドルーム", "olly [house_place : ベッドルーム] のライトを消して", "ja", 1.0),
        ("house_place: ベッド", "olly [house_place : ベッドルーム] のライトを消して", "ja", 0.0),
        ("date: 今天", "告诉我 [date : 今天的] 日期", "zh", 0.0),
        ("date: 今天的", "告诉我 [date : 今天的] 日期", "zh", 1.0),
        ("date: 今天的", "告诉我 [date : 今天的] 日期", "zh-TW", 1.0),
        ("device: tv", "打开 [device : tv] 吧", "zh", 1.0),  # ASCII stays a word
        ("date: 今天的", "告诉我 [date : 今天的] 日期", "zho_Hans", 1.0),  # whatever the code
        ("date: 今天", "告诉我 [date : 今天的] 日期", "cmn", 0.0),
    ],
)
def test_slot_f1_by_hand(prediction, annotated, language, f1):
    assert slots([prediction], [annotated], language)["f1"] == pytest.approx(f1)


def test_slot_f1_is_micro_over_rows_and_malformed_answers_are_counted():
    predictions = ["time: nine am", "no idea", "date: friday; what", "None", ""]
    annotated = ["at [time : nine am]", "play [song : x]", "on [date : friday]", "hello", "[a : b]"]
    # right 2; found 1 + 0 + 1 + 0 + 0; wanted 1 + 1 + 1 + 0 + 1
    found = slots(predictions, annotated)
    assert found == {"f1": pytest.approx(4 / 6), "exact_match": 2 / 5, "malformed": 3 / 5}


def test_a_value_may_hold_a_colon():
    assert slot_filling.parse("time: 9:30; date: x") == ([("time", "9:30"), ("date", "x")], False)
    assert slot_filling.parse("Other: x; date: y") == ([("date", "y")], True)


def massive_tokens(annotated, char_split):
    """What MASSIVE's `create_hf_dataset.py` makes of an annotated utterance, in its two branches."""
    tokens, labels, label, skip = [], [], "Other", False
    for chunk in annotated.split():
        if chunk.startswith("["):
            label, skip = chunk.lstrip("["), True
        elif chunk == ":" and skip:
            skip = False
        elif not char_split:
            tokens.append(chunk.rstrip("]"))
            labels.append(label)
            label = "Other" if chunk.endswith("]") else label
        elif chunk.isascii():
            tokens.append(chunk.rstrip("]"))
            labels.append(label)  # and stays, even behind a bracket
        else:
            for char in chunk:
                if char == "]":
                    label = "Other"
                else:
                    tokens.append(char)
                    labels.append(label)
    return tokens, labels


@pytest.mark.skipif(not DATA.is_dir(), reason=f"no data pack at {DATA}")
@pytest.mark.parametrize("locale", ["en-US", "ja-JP", "zh-CN", "th-TH", "sw-KE", "de-DE"])
def test_real_utterances_are_labelled_as_massive_does_and_right_answers_score_one(locale):
    language = locale.split("-")[0]
    lines = (DATA / "massive" / f"{locale}.test.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    golds = [slot_filling.gold(row | {"lang": language}, "", "x") for row in rows]
    different = []
    for row, gold in zip(rows, golds):
        words = massive_tokens(row["annot_utt"], language in ("ja", "zh"))
        if slot_filling.words_and_labels(gold["annot_utt"], language) != words:
            different.append(row["annot_utt"])
    # Where a slot ends in ASCII, MASSIVE's script for Japanese and Chinese does not close it.
    assert len(different) == {"ja": 21, "zh": 2}.get(language, 0)
    assert all(re.search(r"[!-~]\]", text) for text in different)
    answers = [
        slot_filling.row(row["utt"], [(slot["type"], slot["value"]) for slot in row["slots"]], "plain")["completion"]
        for row in rows
    ]
    found = scores(slot_filling, answers, golds, language)
    assert {name: float(value) for name, value in found.items()} == {"f1": 1.0, "exact_match": 1.0, "malformed": 0.0}

    # wrong answers too: seqeval's own score of the two tag sequences, answers that are beside the utterance left out
    randomly = random.Random(0)
    wrong = [answers[randomly.randrange(len(answers))] if randomly.random() < 0.3 else each for each in answers]
    tags, wanted, kept = [], [], []
    for answer, gold in zip(wrong, golds):
        words, labels = slot_filling.words_and_labels(gold["annot_utt"], language)
        found, beside = slot_filling.place(slot_filling.parse(answer)[0], words, labels, language)
        if not beside:
            tags.append(found)
            wanted.append(slot_filling.bio(labels))
            kept.append((answer, gold))
    ours = scores(slot_filling, [answer for answer, _ in kept], [gold for _, gold in kept], language)["f1"]
    assert ours == pytest.approx(f1_score(wanted, tags), abs=1e-12)
    assert ours < 1


@pytest.mark.parametrize("annotated", ["[time : nine", "a ] b]", "[time nine]", "[a : [b : c] ]", "[ : x]"])
def test_a_broken_annotation_is_named(annotated):
    with pytest.raises(UserError, match=r"f:1: annot_utt is"):
        slot_filling.gold({"annot_utt": annotated, "lang": "en"}, "", "f:1")


def test_a_row_without_gold_is_named():
    with pytest.raises(UserError, match=r"f:1: no text in field 'annot_utt'"):
        slot_filling.gold({"lang": "en"}, "", "f:1")
    with pytest.raises(UserError, match=r"f:1: no text in field 'src'"):
        translation.gold({}, "x", "f:1")
    with pytest.raises(UserError, match=r"f:1: the reference translation is empty"):
        translation.gold({"src": "x", "tgt_lang": "de"}, "", "f:1")
    with pytest.raises(UserError, match=r"f:1: the answer is 'PER: x'"):
        json_extraction.gold({}, "PER: x", "f:1")


# ------------------------------------------------------------------------------------------------------------ items


def test_items_are_counted_once_each_up_to_case_and_spacing():
    assert items.items("Time:  nine am; date: friday; ; time: nine am") == {"time: nine am": 2, "date: friday": 1}
    assert items.items("None") == items.items("") == {}
    predictions = ["a: 1; b: 2", "None", "a: 1; a: 1", "c: 3"]
    golds = [{"answer": answer} for answer in ("a: 1; b: 3", "None", "a: 1", "None")]
    # right: a, a = 2; predicted 2 + 0 + 2 + 1 = 5; wanted 2 + 0 + 1 + 0 = 3
    assert scores(items, predictions, golds) == {"f1": 2 * 2 / 8, "exact_match": 1 / 4}
    assert scores(items, ["None"], [{"answer": "None"}]) == {"f1": 1.0, "exact_match": 1.0}


# ------------------------------------------------------------------------------------------------------------- JSON


def test_json_by_hand():
    ann, bob, rome = ["PER", "Ann"], ["PER", "Bob"], ["LOC", "Rome"]
    cases = [
        ([ann, rome], '{"Results": [{"TypeName": "LOC", "Text": "Rome"}, {"TypeName": "PER", "Text": "Ann"}]}'),  # all
        ([ann, ann], '{"Results": [{"TypeName": "PER", "Text": "Ann"}]}'),  # one of two
        ([bob], '{"Results": [{"TypeName": "LOC", "Text": "Bob"}]}'),  # wrong type
        ([], '{"Results": []}'),
        ([rome], '{"Results": [{"TypeName": "LOC"}]}'),  # valid JSON, not the form
        ([rome], '{"Results": [{"TypeName": "LOC", "Text": "Rome"}'),  # cut short
        ([rome], '{"Results": [{"TypeName": "LOC", "Text": "Rome", "Start": 3}]}'),  # a key too many
        ([rome], ""),
    ]
    golds = [{"entities": wanted} for wanted, _ in cases]
    found = scores(json_extraction, [answer for _, answer in cases], golds)
    # right: 2 + 1 = 3; found: 2 + 1 + 1 = 4; wanted: 2 + 2 + 1 + 0 + 1 * 4 = 9
    assert found["f1"] == pytest.approx(2 * 3 / 13)
    assert found["f1 PER"] == pytest.approx(2 * 2 / (2 + 4))  # found Ann, Ann; wanted Ann, Ann, Ann, Bob
    assert found["f1 LOC"] == pytest.approx(2 * 1 / (2 + 5))
    assert found["valid_json"] == 6 / 8
    assert found["schema"] == 4 / 8
    assert found["exact_match"] == 2 / 8


def test_json_answers_are_read_back():
    row = json_extraction.row("Ann is in “Rome”.", [("PER", "Ann"), ("LOC", "“Rome”")], "chat")
    answer = row["messages"][-1]["content"]
    assert json_extraction.gold(row, answer, "x") == {"entities": [["PER", "Ann"], ["LOC", "“Rome”"]]}


# ------------------------------------------------------------------------------------------------------ translation


@pytest.mark.parametrize(
    ("target", "texts", "tokenize"),
    [
        ("de", ["Der Hund schläft auf dem Sofa.", "Ich weiß es nicht, sagte sie.", "Das war gestern!"], "13a"),
        ("zh", ["狗在沙发上睡觉。", "她说她不知道。", "那是昨天的事!"], "zh"),
        ("yue", ["隻狗喺梳化瞓覺。", "佢話佢唔知。", "嗰個係尋日嘅事!"], "zh"),
        ("ja", ["犬がソファで寝ている。", "知らないと彼女は言った。", "昨日のことだ。"], "char"),
    ],
)
def test_bleu_and_chrf_are_sacrebleus_own(target, texts, tokenize):
    predictions = [texts[0][:-3], texts[1] + " x", texts[1]]
    golds = [{"src": "s", "reference": text, "tgt_lang": target} for text in texts]
    found = scores(translation, predictions, golds, f"en-{target}")
    assert found["bleu"] == BLEU(tokenize=tokenize).corpus_score(predictions, [texts]).score
    assert found["chrf++"] == CHRF(word_order=2).corpus_score(predictions, [texts]).score
    described = translation.describe("en", [{"tgt_lang": target}])  # what the rows say counts, not their `lang`
    assert f"tok:{tokenize}" in described["bleu"]
    assert "nw:2" in described["chrf++"]


def test_several_target_languages_are_not_scored_as_one():
    golds = [{"src": "a", "reference": "b", "tgt_lang": code} for code in ("zh", "de", "zh")]
    with pytest.raises(ValueError, match=r"en has rows of several target languages, de, zh"):
        translation.statistics(["b"] * 3, golds, "en")


def test_answers_in_another_language_and_empty_ones_are_off_target():
    golds = [{"src": "s", "reference": "Ich bin gestern nach Hause gegangen.", "tgt_lang": "deu_Latn"}] * 3
    answers = ["Ich bin gestern spät nach Hause gekommen.", "Yesterday I came home late at night.", ""]
    assert scores(translation, answers, golds)["off_target"] == 2 / 3


def test_a_language_that_is_labelled_by_another_code_is_on_target():
    tagalog = [{"src": "s", "reference": "x", "tgt_lang": "tgl"}]
    assert scores(translation, ["Maganda ang panahon ngayon dito sa amin."], tagalog)["off_target"] == 0
    norwegian = [{"src": "s", "reference": "x", "tgt_lang": "nob_Latn"}]
    assert scores(translation, ["Jeg vet ikke hva du mener med det, sa hun."], norwegian)["off_target"] == 0
    unknown = [{"src": "s", "reference": "x", "tgt_lang": "ceb"}]
    assert "off_target" not in scores(translation, ["Tua sa Cebu ang ako."], unknown)


def test_a_prompt_names_the_languages():
    row = translation.row("Hallo", "Hello", "deu", "zho_Hans", "chat")
    assert row["messages"][0]["content"] == "Translate the following sentences from German to Chinese (Simplified)."
    plain = translation.row("Hallo", "Hello", "sw", "en", "plain")
    assert plain == {
        "prompt": "Translate the following sentences from Swahili to English.\nHallo\nTranslation:",
        "completion": " Hello",
    }
    with pytest.raises(ValueError, match="'qq' is not the code of a language"):
        translation.row("a", "b", "qq", "en", "chat")


def test_tasks_have_one_interface():
    for name in NAMES:
        task = load_task(name)
        for function in ("gold", "statistics", "metrics", "describe"):
            assert callable(getattr(task, function)), (name, function)
        assert isinstance(task.MAIN, str)
    with pytest.raises(UserError, match="task poetry is not one of slot_filling, translation"):
        load_task("poetry")


def test_metrics_take_many_sums_at_once():
    """One row of an array of sums scores as the sum alone: what a bootstrap relies on."""
    predictions, golds = ["time: five", "date: x"], [{"annot_utt": "at [time : five]"}, {"annot_utt": "on [date : y]"}]
    counts = slot_filling.statistics(predictions, golds, "en")
    weights = np.array([[1.0, 1.0], [2.0, 0.0], [0.0, 2.0]])
    many = slot_filling.metrics({name: weights @ each for name, each in counts.items()}, 2)
    for number, weight in enumerate(weights):
        one = slot_filling.metrics({name: weight @ each for name, each in counts.items()}, 2)
        assert {name: float(value) for name, value in one.items()} == {name: many[name][number] for name in many}
