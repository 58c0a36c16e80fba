"""Readers of tasks: every published layout, by hand and on real rows, and one sentence for what is wrong."""

import io
import json
import random
import re
import tarfile
from collections import Counter
from pathlib import Path

import pytest
from conftest import write_jsonl
from test_parallel import hub_dataset, write_lines

from mlalign.corpora import bitext, massive, translation, uner
from mlalign.errors import UserError

DATA = Path(__file__).parent.parent.parent / "shared" / "data"
ALL = ("train", "dev", "test")
real = pytest.mark.skipif(not DATA.is_dir(), reason=f"no data pack at {DATA}")


def read(reader, source, languages=None, splits=ALL, **options):
    """(items, notes) of a reader with its usual options."""
    notes = Counter()
    usual = {
        massive: {"form": "plain"},
        uner: {"form": "plain"},
        translation: {"form": "plain", "directions": "both"},
        bitext: {"pivot": None},
    }[reader]
    found = reader.read(str(source), splits=splits, languages=languages, notes=notes, **(usual | options))
    return list(found), notes


def refused(reader, source, sentence, **options):
    with pytest.raises(UserError, match=sentence) as error:
        read(reader, source, **options)
    assert "\n" not in str(error.value)


@pytest.fixture(name="hub")
def local_hub(tmp_path, monkeypatch):
    """`datasets` reads a repository's directory as it reads the hub; it only must not be taken for local files."""
    monkeypatch.chdir(tmp_path)
    for module in ("rows", "corpora.massive", "corpora.uner", "corpora.translation", "corpora.bitext"):
        monkeypatch.setattr(f"mlalign.{module}.is_local", lambda path: path.startswith("/"))
    return lambda name, configurations: hub_dataset(tmp_path / name, configurations)


# ------------------------------------------------------------------------------------------------------------- massive


def utterance(number, locale="en-US", partition="train", **fields):
    row = {"id": str(number), "locale": locale, "partition": partition}
    row |= {"utt": f"wake me at {number} am", "annot_utt": f"wake me at [time : {number} am]"}
    return row | fields


def test_massive_in_every_layout(tmp_path, hub):
    rows = [utterance(n, partition=p) for n, p in enumerate(["train", "dev", "test", "train", "heldout"])]
    marked = "[date : 星期五] 早上 [time : 九点] 叫醒我", "play [artist_name : the beatles] 的 歌"
    chinese = [
        utterance(1, "zh-TW", utt="星期五早上九点叫醒我", annot_utt=marked[0]),
        utterance(2, "zh-TW", "test", utt="play the beatles 的歌", annot_utt=marked[1]),
    ]
    write_jsonl(tmp_path / "en-US.jsonl", rows)
    write_jsonl(tmp_path / "zh-TW.jsonl", chinese)
    folder = tmp_path / "files"
    folder.mkdir()
    for split in ALL:
        write_jsonl(folder / f"en-US.{split}.jsonl", [row for row in rows if row["partition"] == split])
        write_jsonl(folder / f"zh-TW.{split}.jsonl", [row for row in chinese if row["partition"] == split])
    with tarfile.open(tmp_path / "amazon-massive-dataset-1.1.tar.gz", "w:gz") as archive:
        for name in ("1.1/LICENSE", "1.1/data/en-US.jsonl", "1.1/data/zh-TW.jsonl"):
            text = (tmp_path / Path(name).name).read_bytes() if name.endswith("jsonl") else b"CC BY 4.0"
            member = tarfile.TarInfo(name)
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text))
    theirs = {"train": "train", "validation": "dev", "test": "test"}
    hub(
        "hub",
        {
            name: {their: [row for row in each if row["partition"] == ours] for their, ours in theirs.items()}
            for name, each in (("en-US", rows), ("zh-TW", [*chinese, utterance(3, "zh-TW", "dev")]), ("all", rows))
        },
    )
    expected = {
        ("train", "en", "0", "Utterance: wake me at 0 am\nSlots:", " time: 0 am", "wake me at [time : 0 am]"),
        ("dev", "en", "1", "Utterance: wake me at 1 am\nSlots:", " time: 1 am", "wake me at [time : 1 am]"),
        ("test", "en", "2", "Utterance: wake me at 2 am\nSlots:", " time: 2 am", "wake me at [time : 2 am]"),
        ("train", "en", "3", "Utterance: wake me at 3 am\nSlots:", " time: 3 am", "wake me at [time : 3 am]"),
        ("train", "zh-TW", "1", "Utterance: 星期五早上九点叫醒我\nSlots:", " date: 星期五; time: 九点", marked[0]),
        ("test", "zh-TW", "2", "Utterance: play the beatles 的歌\nSlots:", " artist_name: the beatles", marked[1]),
    }
    for source in (tmp_path, folder, tmp_path / "amazon-massive-dataset-1.1.tar.gz", "hub"):
        items, notes = read(massive, source)
        found = {
            (i.split, *i.languages, i.row["id"], i.row["prompt"], i.row["completion"], i.row["annot_utt"])
            for i in items
            if i.row["id"] + i.languages[0] != "3zh-TW"
        }
        assert found == expected, source
        assert all(i.texts == (i.row["text"],) and i.row["lang"] == i.languages[0] for i in items)
        if source == tmp_path or str(source).endswith("gz"):
            assert notes == {"rows of the partition heldout, which has no slots, ignored": 1}
        chosen, _ = read(massive, source, languages=["zh-TW"], splits=("test",))
        assert [(i.split, i.languages, i.row["id"]) for i in chosen] == [("test", ("zh-TW",), "2")]
        refused(massive, source, r"has no language zh, but en, zh-TW", languages=["zh"])
    items, _ = read(massive, folder, form="chat")
    assert [turn["role"] for turn in items[0].row["messages"]] == ["system", "user", "assistant"]


@real
def test_massive_values_follow_the_utterance_in_every_language():
    """Real rows of 29 locales: from the marks alone, the values that the pack gives with their places."""
    seen = set()
    for path in sorted((DATA / "massive").glob("*.test.jsonl")):
        for line in path.read_text().splitlines()[:300]:
            row = json.loads(line)
            slots = [(slot["type"], slot["value"]) for slot in row["slots"]]
            assert massive._marked(row["annot_utt"], row["utt"]) == slots
            seen.add((row["locale"], _spaces_differ(row)))
    assert len({locale for locale, _ in seen}) == 29
    assert {locale for locale, differ in seen if differ} == {"ja-JP", "zh-CN"}


def _spaces_differ(row):
    return massive._SLOT.sub(r"\2", row["annot_utt"]) != row["utt"]


BAD_UTTERANCES = {
    "no utterance": ({"utt": None}, r"en-US\.jsonl:2: no text in field 'utt': expected a row of MASSIVE 1.1"),
    "a strange partition": ({"partition": "eval"}, r":2: partition is 'eval', expected one of train, dev, test"),
    "an open slot": ({"annot_utt": "wake me at [time : 1 am"}, r":2: annot_utt is .*: the slot time is not closed"),
    "other words": ({"utt": "wake us at 1 am"}, r":2: annot_utt is .* and utt is .*: they are not the same words"),
    "an empty slot": ({"annot_utt": "wake [time : ] me at 1 am"}, r":2: .*: the slot time is empty"),
    "strange slots": ({"slots": ["time"]}, r":2: slots must be a list of objects with type and value"),
}


@pytest.mark.parametrize("name", BAD_UTTERANCES)
def test_bad_massive_is_one_sentence(tmp_path, name):
    fields, sentence = BAD_UTTERANCES[name]
    write_jsonl(tmp_path / "en-US.jsonl", [utterance(0), utterance(1, **fields)])
    refused(massive, tmp_path, sentence)


def test_evaluation_rows_that_would_be_read_twice_are_refused(tmp_path):
    for name in ("en-US.jsonl", "en-US.test.jsonl"):
        (tmp_path / "massive").mkdir(exist_ok=True)
        write_jsonl(tmp_path / "massive" / name, [utterance(0, partition="test")])
    refused(massive, tmp_path / "massive", r"en-US\.jsonl and .*en-US\.test\.jsonl may hold the same rows")
    row = {"translation": {"cs": "a", "en": "b"}}
    for name in ("test.cs-en.jsonl", "csen/test.cs-en.json"):
        (tmp_path / "mt" / name).parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(tmp_path / "mt" / name, [row])
    refused(translation, tmp_path / "mt", r"are both test of cs-en: keep one of them")
    for folder in ("v1", "v2"):
        (tmp_path / "uner" / folder).mkdir(parents=True)
        (tmp_path / "uner" / folder / "en_ewt-ud-test.iob2").write_text("# text = a\n1\ta\tO\n\n")
    refused(uner, tmp_path / "uner", r"are both test of en_ewt: keep one of them")


def test_no_massive_is_one_sentence(tmp_path):
    (tmp_path / "data").mkdir()
    refused(massive, tmp_path, r"holds no <locale>\.jsonl .* \(it has the directories data\)")
    refused(massive, tmp_path / "nothing", r"nothing is not a directory and no \.tar\.gz")
    refused(massive, "no-such-dataset", r"no-such-dataset is neither a local file or directory nor a readable hub")
    refused(massive, tmp_path / "none.tar.gz", r"none\.tar\.gz does not exist")
    with tarfile.open(tmp_path / "other.tar.gz", "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("README"), io.BytesIO())
    refused(massive, tmp_path / "other.tar.gz", r"holds no data/<locale>\.jsonl files")
    text = b"".join(json.dumps(utterance(n, utt=f"{random.random()}")).encode() for n in range(2000))
    with tarfile.open(tmp_path / "whole.tar.gz", "w:gz") as archive:
        member = tarfile.TarInfo("1.1/data/en-US.jsonl")
        member.size = len(text)
        archive.addfile(member, io.BytesIO(text))
    whole = (tmp_path / "whole.tar.gz").read_bytes()
    (tmp_path / "cut.tar.gz").write_bytes(whole[: len(whole) // 2])
    refused(massive, tmp_path / "cut.tar.gz", r"cut\.tar\.gz is cut or damaged")
    (tmp_path / "en-US.jsonl").write_text(json.dumps(utterance(0)) + '\n{"id": "1", "ut')
    refused(massive, tmp_path, r"en-US\.jsonl:2: not valid JSON")


# --------------------------------------------------------------------------------------------------------- translation


def pairs(items):
    return [(i.split, i.row["lang"], i.row["id"], i.texts) for i in items]


def test_translation_of_alma_and_of_the_pack(tmp_path, hub):
    def table(**splits):
        return {
            name: [{"translation": {"cs": f"{name} {n}", "en": f"{name} {n} e"}} for n in range(count)]
            for name, count in splits.items()
        }

    alma = table(train=2, valid=1, test=1)
    (tmp_path / "alma/csen").mkdir(parents=True)
    (tmp_path / "alma/HW-5-shot").mkdir()
    (tmp_path / "alma/HW-5-shot/shots.en-is.json").write_text("not for us")
    for split, rows in alma.items():
        (tmp_path / f"alma/csen/{split}.cs-en.json").write_text(json.dumps(rows))
    swapped = [{"translation": {"en": "what was English", "cs": "angličtina"}}]
    (tmp_path / "alma/csen/test.en-cs.json").write_text(json.dumps(swapped))
    by_hand = [
        ("train", "cs-en", "cs-en-train-1", ("train 0", "train 0 e")),
        ("train", "en-cs", "cs-en-train-1", ("train 0 e", "train 0")),
        ("train", "cs-en", "cs-en-train-2", ("train 1", "train 1 e")),
        ("train", "en-cs", "cs-en-train-2", ("train 1 e", "train 1")),
        ("dev", "cs-en", "cs-en-dev-1", ("valid 0", "valid 0 e")),
        ("dev", "en-cs", "cs-en-dev-1", ("valid 0 e", "valid 0")),
        ("test", "cs-en", "cs-en-test-1", ("test 0", "test 0 e")),
        ("test", "en-cs", "en-cs-test-1", ("what was English", "angličtina")),
    ]
    for source in (tmp_path / "alma", tmp_path / "alma/csen"):
        items, _ = read(translation, source)
        assert sorted(pairs(items)) == sorted(by_hand)
    row = next(i.row for i in items if i.row["id"] == "en-cs-test-1")
    prompt = "Translate the following sentences from English to Czech.\nwhat was English\nTranslation:"
    assert row["prompt"] == prompt and row["completion"] == " angličtina"
    assert (row["src"], row["tgt"], row["src_lang"], row["tgt_lang"]) == ("what was English", "angličtina", "en", "cs")
    for directions, kept in (("from-english", "en-cs"), ("to-english", "cs-en")):
        items, _ = read(translation, tmp_path / "alma", directions=directions)
        assert sorted(pairs(items)) == sorted(each for each in by_hand if each[0] == "test" or each[1] == kept)

    pack = {"src": "a", "tgt": "b", "src_lang": "cs", "tgt_lang": "en", "id": "x"}
    (tmp_path / "pack").mkdir()
    for name in ("train.cs-en", "train.en-cs", "test.cs-en"):
        write_jsonl(tmp_path / f"pack/{name}.jsonl", [pack])
    items, _ = read(translation, tmp_path / "pack")
    assert [each[:3] for each in pairs(items)] == [
        ("test", "cs-en", "x"),
        ("train", "cs-en", "x"),
        ("train", "en-cs", "x"),  # a file for each direction: neither serves both
    ]

    hub("parallel", {"cs-en": {"train": alma["train"], "validation": alma["valid"]}})
    hub("tests", {name: {"test": [{name: r["translation"]} for r in swapped]} for name in ("en-cs", "cs-en")})
    assert pairs(read(translation, "parallel")[0]) == by_hand[:6]
    items, _ = read(translation, "tests")
    assert sorted(pairs(items)) == [
        ("test", "cs-en", "cs-en-test-1", ("angličtina", "what was English")),
        ("test", "en-cs", "en-cs-test-1", ("what was English", "angličtina")),
    ]


def test_bad_translation_is_one_sentence(tmp_path):
    refused(translation, tmp_path, r"holds no files such as train\.cs-en\.jsonl")
    refused(translation, tmp_path / "x", r"x is not a directory")
    row = {"src": "a", "tgt": "b", "src_lang": "cs", "tgt_lang": "en"}
    write_jsonl(tmp_path / "train.cs-en.jsonl", [row, row | {"src_lang": "de"}])
    refused(translation, tmp_path, r"cs-en\.jsonl:2: the languages are de and en, but the name says cs-en")
    refused(translation, tmp_path, r"directions up is not one of both, from-english, to-english", directions="up")
    refused(translation, tmp_path, r"has no language de, but cs, en", languages=["de", "en"])
    refused(translation, tmp_path, r"has no pair of the languages cs: name both sides of a pair", languages=["cs"])
    write_jsonl(tmp_path / "train.cs-en.jsonl", [row, {"src": "a"}])
    refused(translation, tmp_path, r"cs-en\.jsonl:2: no text in field 'tgt'")
    (tmp_path / "train.cs-en.jsonl").rename(tmp_path / "train.cs-xx.jsonl")
    refused(translation, tmp_path, r"train\.cs-xx\.jsonl: 'xx' is not the code of a language")
    (tmp_path / "train.cs-xx.jsonl").unlink()
    write_jsonl(tmp_path / "train.cs-de.jsonl", [row | {"tgt_lang": "de"}])
    refused(translation, tmp_path, r"neither cs nor de is English, which --directions", directions="to-english")


# ---------------------------------------------------------------------------------------------------------------- uner

IOB2 = """\
# newdoc id = d
# sent_id = d-1
# text = Mr. O'Neil's in New York , at IBM.
1\tMr.\tO\t-\tx
2\tO'Neil\tB-PER\t-\tx
3\t's\tO
4\tin\tO
5\tNew\tB-LOC
6\tYork\tI-LOC
7\t,\tB-O
8\tat\tO
9\tIBM\tB-ORG
10\t.\tO

# sent_id = d-2
# text = nel Bronx Israelis
1\tin\tO
2\til\tO
3\tBronx\tI-LOC
4\tIsraelis\tB-OTH"""


def test_uner_in_every_layout(tmp_path, hub):
    write_lines(tmp_path / "UNER_English-EWT/en_ewt-ud-test.iob2", IOB2.splitlines())
    (tmp_path / "UNER_English-EWT/README.md").write_text("no sentences")
    items, notes = read(uner, tmp_path)
    first, second = items
    assert (first.split, first.languages, first.row["id"]) == ("test", ("en",), "uner-en_ewt-test-d-1")
    assert first.texts == ("Mr. O'Neil's in New York , at IBM.",)
    assert json.loads(first.row["completion"]) == {
        "Results": [
            {"TypeName": "PER", "Text": "O'Neil"},
            {"TypeName": "LOC", "Text": "New York"},
            {"TypeName": "ORG", "Text": "IBM"},
        ]
    }
    assert second.texts == ("in il Bronx Israelis",)  # its text has the contraction nel
    assert second.row["completion"] == ' {"Results": [{"TypeName": "LOC", "Text": "Bronx"}]}'
    assert notes == {
        "tags B-O read as O": 1,
        "tags B-OTH read as O": 1,
        "tags I- that follow no entity of their type, read as B-": 1,
        "texts that do not hold their tokens, replaced by the tokens with spaces": 1,
    }

    lacking = ["# text = in the Bronx", "1\tin\tO", "2\tBronx\tB-LOC"]  # "the" is in no token
    write_lines(tmp_path / "lacking/en_x-ud-dev.iob2", lacking)
    items, _ = read(uner, tmp_path / "lacking")
    assert [(i.row["id"], i.texts) for i in items] == [("uner-en_x-dev-1", ("in Bronx",))]

    entities = [{"type": "LOC", "text": "New York", "start": 3, "end": 11}]
    (tmp_path / "pack").mkdir()
    write_jsonl(tmp_path / "pack/da.train.jsonl", [{"id": "a", "text": "in New York", "entities": entities}])
    tokens = {"idx": "s7", "text": "in New York", "tokens": ["in", "New", "York"], "ner_tags": [0, 5, 6]}
    hub("hub", {"da_ddt": {"train": [tokens]}, "en_pud": {"test": [{"text": "in New York", "entities": entities}]}})
    for source, ids in ((tmp_path / "pack", ["a"]), ("hub", ["uner-da_ddt-train-s7", "uner-en_pud-test-1"])):
        items, _ = read(uner, source)
        assert [i.row["id"] for i in items] == ids
        assert {i.row["completion"] for i in items} == {' {"Results": [{"TypeName": "LOC", "Text": "New York"}]}'}
    refused(uner, "hub", r"hub has no language sv, but da, en", languages=["sv"])


@real
def test_uner_from_tokens_gives_the_entities_of_the_pack(tmp_path):
    """Real sentences, written as .iob2 with tokens that break at entities, spaces and punctuation."""
    for language in ("zh", "hr", "en"):
        lines, expected = [], {}
        rows = [json.loads(line) for line in (DATA / f"uner/{language}.test.jsonl").read_text().splitlines()]
        for number, row in enumerate(rows):
            expected[f"uner-{language}_x-test-{number}"] = [[e["type"], e["text"]] for e in row["entities"]]
            lines += [f"# sent_id = {number}", f"# text = {row['text']}"]
            cuts = {edge for e in row["entities"] for edge in (e["start"], e["end"])}
            starts = [m.start() for m in re.finditer(r"\w+|[^\w\s]", row["text"])]
            cuts |= set(starts) | {m.end() for m in re.finditer(r"\S+", row["text"])}
            edges = sorted(cuts)
            tokens = [(a, row["text"][a:b].strip()) for a, b in zip(edges, [*edges[1:], len(row["text"])])]
            for place, (start, token) in enumerate((each for each in tokens if each[1]), 1):
                inside = next((e for e in row["entities"] if e["start"] <= start < e["end"]), None)
                tag = f"{'B' if start == inside['start'] else 'I'}-{inside['type']}" if inside else "O"
                lines.append(f"{place}\t{token}\t{tag}\t-\tx")
            lines.append("")
        write_lines(tmp_path / f"{language}_x-ud-test.iob2", lines)
        items, notes = read(uner, tmp_path, languages=[language])
        found = {}
        for item in items:
            results = json.loads(item.row["completion"])["Results"]
            found[item.row["id"]] = [[each["TypeName"], each["Text"]] for each in results]
        assert found == expected
        assert not notes


BAD_IOB2 = {
    "a wrong tag": ("3\tBronx\tI-LOC", "3\tBronx\tI-PLACE", r"iob2:19: the tag is 'I-PLACE', expected one of O, B-PER"),
    "no tag": ("8\tat\tO", "8\tat", r"iob2:11: expected number, token and tag with tabs between, found '8"),
    "no text": ("# text = nel Bronx Israelis\n", "", r"iob2:15: the sentence has no line `# text = ...`"),
}


@pytest.mark.parametrize("name", BAD_IOB2)
def test_bad_uner_is_one_sentence(tmp_path, name):
    old, new, sentence = BAD_IOB2[name]
    (tmp_path / "en_ewt-ud-test.iob2").write_text(IOB2.replace(old, new))
    refused(uner, tmp_path, sentence)


def test_no_uner_is_one_sentence(tmp_path):
    refused(uner, tmp_path, r"holds no files such as en_ewt-ud-train\.iob2 or en\.train\.jsonl")
    write_jsonl(tmp_path / "en.jsonl", [{}])
    refused(uner, tmp_path, r"en\.jsonl: the name must hold language and split, such as en\.train\.jsonl")
    (tmp_path / "en.jsonl").rename(tmp_path / "en.dev.jsonl")
    refused(uner, tmp_path, r"en\.dev\.jsonl:1: no text in field 'text'")
    write_jsonl(tmp_path / "en.dev.jsonl", [{"text": "a"}])
    refused(uner, tmp_path, r"en\.dev\.jsonl:1: no `entities`, and no lists `tokens` and `ner_tags`")
    write_jsonl(tmp_path / "en.dev.jsonl", [{"text": "a", "entities": [{"type": "PER", "text": "b"}]}])
    refused(uner, tmp_path, r"en\.dev\.jsonl:1: the entity 'b' is not in the text")
    refused(uner, tmp_path, r"has no language sv, but en", languages=["sv"])
