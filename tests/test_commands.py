"""evaluate, probe, prepare, inspect and the demo's data, each against a naive loop or numbers worked out by hand."""

import json
from collections import Counter

import pytest
import torch
from conftest import write_jsonl
from omegaconf import OmegaConf
from transformers import AutoModelForCausalLM

from mlalign import demo_data
from mlalign.commands.evaluate import evaluate
from mlalign.commands.inspect import inspect
from mlalign.commands.prepare import prepare_massive
from mlalign.config import load
from mlalign.errors import UserError
from mlalign.tasks import slot_filling
from mlalign.tracker import console


def test_slot_filling_counts_items_once_each_up_to_case_and_spacing():
    assert slot_filling.items("Time:  nine am; date: friday; ; time: nine am") == Counter(
        {"time: nine am": 2, "date: friday": 1}
    )
    assert slot_filling.items("None") == slot_filling.items("") == Counter()


def test_slot_filling_f1_by_hand():
    predictions = ["a: 1; b: 2", "None", "a: 1; a: 1", "c: 3"]
    references = ["a: 1; b: 3", "None", "a: 1", "None"]
    # right: a, a = 2; predicted 2 + 0 + 2 + 1 = 5; wanted 2 + 0 + 1 + 0 = 3
    assert slot_filling.score(predictions, references) == {"f1": 2 * 2 / 8, "exact_match": 1 / 4}
    assert slot_filling.score(["None"], ["None"]) == {"f1": 1.0, "exact_match": 1.0}


def test_evaluate_in_batches_writes_what_greedy_search_gives_one_by_one(tmp_path, tiny_model, tokenizer):
    prompts = ["play", "what is the weather in paris tomorrow =>", "разбуди меня", "wake me up at nine", "a b"]
    rows = [
        {"prompt": prompt, "completion": " x", "lang": "de" if i % 2 else "en", "id": str(i)}
        for i, prompt in enumerate(prompts)
    ]
    path = write_jsonl(tmp_path / "test.jsonl", rows)
    report = evaluate(str(tiny_model), [str(path)], tmp_path / "out", None, "slot_filling", 4, 6, None)
    lm = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    wanted = {}
    for i, prompt in enumerate(prompts):
        ids, start = [1, *tokenizer.encode(prompt, add_special_tokens=False)], None
        start = len(ids)
        while len(ids) < start + 6 and ids[-1] != tokenizer.eos_token_id:
            ids.append(int(lm(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        wanted[str(i)] = tokenizer.decode(ids[start:], skip_special_tokens=True).strip()
    lines = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    assert {line["id"]: line["prediction"] for line in lines} == wanted
    assert {line["reference"] for line in lines} == {"x"}
    assert report == json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["rows"] == {"de": 2, "en": 3}


def test_evaluate_says_what_is_wrong(tmp_path, tiny_model):
    path = write_jsonl(tmp_path / "test.jsonl", [{"prompt": "a", "completion": "b"}])
    with pytest.raises(UserError, match=r"test.jsonl:1: no text in field 'lang'"):
        evaluate(str(tiny_model), [str(path)], tmp_path / "out", None, "slot_filling", 4, 6, None)
    with pytest.raises(UserError, match=r"task poetry is none of slot_filling"):
        evaluate(str(tiny_model), [str(path)], tmp_path / "out", None, "poetry", 4, 6, None)
    with pytest.raises(UserError, match=r"adapter .* cannot be loaded"):
        rows = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": "b", "lang": "en"}])
        evaluate(str(tiny_model), [str(rows)], tmp_path / "out", str(tmp_path), "slot_filling", 4, 6, None)


def test_prepare_reads_the_published_form_of_massive(tmp_path):
    base = {"partition": "train", "id": "1"}
    write_jsonl(
        tmp_path / "en-US.jsonl",
        [
            base | {"locale": "en-US", "utt": "wake me at nine am", "annot_utt": "wake me at [time : nine am]"},
            base | {"locale": "en-US", "utt": "hello", "annot_utt": "hello", "partition": "dev", "id": "2"},
        ],
    )
    write_jsonl(tmp_path / "zh-TW.jsonl", [base | {"locale": "zh-TW", "utt": "x", "annot_utt": "[a : b] [c_d : e f]"}])
    prepare_massive(tmp_path, tmp_path / "out")
    rows = {
        path.name: [json.loads(line) for line in path.read_text().splitlines()] for path in (tmp_path / "out").iterdir()
    }
    assert rows == {
        "train.en.jsonl": [
            {"id": "1", "lang": "en", "prompt": "Utterance: wake me at nine am\nSlots:", "completion": " time: nine am"}
        ],
        "dev.en.jsonl": [{"id": "2", "lang": "en", "prompt": "Utterance: hello\nSlots:", "completion": " None"}],
        "train.zh-TW.jsonl": [
            {"id": "1", "lang": "zh-TW", "prompt": "Utterance: x\nSlots:", "completion": " a: b; c_d: e f"}
        ],
    }
    write_jsonl(tmp_path / "de-DE.jsonl", [base | {"locale": "de-DE"}])
    with pytest.raises(UserError, match=r"de-DE.jsonl:1: no text in field 'utt'"):
        prepare_massive(tmp_path, tmp_path / "out")


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
