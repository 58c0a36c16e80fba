"""Bitext in every layout it comes in, the sentences it must not hold, and one sentence for what is wrong."""

import gzip
import itertools
import json
import zipfile
from collections import Counter
from pathlib import Path

import pytest
from conftest import write_jsonl
from test_corpora import DATA, local_hub, read, real, refused  # noqa: F401 the fixture hub
from test_parallel import write_lines

from mlalign.corpora import against, bitext
from mlalign.errors import UserError

GERMAN, ENGLISH = ["eins", " zwei\u2028", "drei"], ["one", "two", "three"]


def sentences(items):
    return [(*i.languages, *i.texts) for i in items]


EXPECTED = [("de", "en", de.strip(), en) for de, en in zip(GERMAN, ENGLISH)]


def tmx(path, units):
    body = "".join(
        "<tu>" + "".join(f'<tuv xml:lang="{c}"><seg>{t}</seg></tuv>' for c, t in unit.items()) + "</tu>"
        for unit in units
    )
    head = '<?xml version="1.0" encoding="UTF-8"?>\n<!DOCTYPE tmx SYSTEM "tmx14.dtd">\n<tmx version="1.4"><header/>'
    (gzip.open if path.suffix == ".gz" else open)(path, "wb").write(f"{head}<body>\n{body}</body></tmx>".encode())


@pytest.mark.parametrize("packed", [False, True])
def test_moses_pairs(tmp_path, packed):
    for code, lines in (("de", GERMAN), ("en", ENGLISH)):
        text = ("\ufeff" + "".join(f"{line}\r\n" for line in lines)).encode()
        (tmp_path / f"A.x.de-en.{code}{'.gz' if packed else ''}").write_bytes(gzip.compress(text) if packed else text)
    (tmp_path / "LICENSE").write_text("free")
    for source in (tmp_path, next(tmp_path.glob("A*")), tmp_path / "A*.en*"):
        items, _ = read(bitext, source)
        assert sentences(items) == EXPECTED
    assert [i.row for i in items][1] == {
        "id": "A.x.de-en-2",
        "src_lang": "de",
        "tgt_lang": "en",
        "src": "zwei",
        "tgt": "two",
    }
    with zipfile.ZipFile(tmp_path / "de-en.txt.zip", "w") as archive:
        archive.writestr("README", "nothing")
        for code, lines in (("de", GERMAN), ("en", ENGLISH)):
            archive.writestr(f"OPUS.de-en.{code}", "\n".join(lines) + "\n")
    items, _ = read(bitext, tmp_path / "de-en.txt.zip")
    assert sentences(items) == EXPECTED and items[2].row["id"] == "OPUS.de-en-3"
    assert read(bitext, tmp_path, splits=("dev", "test"))[0] == []


def test_an_archive_of_several_pairs(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for pair, code in itertools.product(("de-en", "fr-en"), ("de", "fr", "en")):
            if code in pair:
                archive.writestr(f"X.{pair}.{code}", f"{code} of {pair}\n")
    items, _ = read(bitext, tmp_path / "x.zip")
    assert [item.texts for item in items] == [("de of de-en", "en of de-en"), ("fr of fr-en", "en of fr-en")]


def test_formatting_in_tmx_is_no_text(tmp_path):
    marked = '<bpt i="1">&lt;b&gt;</bpt>fett<ept i="1">&lt;/b&gt;</ept> und <hi>mehr</hi><ph x="1">{0}</ph>.'
    unit = f'<tu><tuv xml:lang="de"><seg>{marked}</seg></tuv><tuv xml:lang="en"><seg>bold and more.</seg></tuv></tu>'
    (tmp_path / "a.tmx").write_text(f'<tmx version="1.4"><header/><body>{unit}</body></tmx>')
    (item,), _ = read(bitext, tmp_path)
    assert item.row["src"] == "fett und mehr."


def test_ids_of_one_name_in_two_folders_differ(tmp_path):
    for folder, word in (("books", "eins"), ("films", "Haus")):
        (tmp_path / folder).mkdir()
        tmx(tmp_path / folder / "de-en.tmx", [{"de": word, "en": "x"}])
    items, _ = read(bitext, tmp_path / "*/de-en.tmx")
    assert [item.row["id"] for item in items] == ["books/de-en-1", "films/de-en-1"]


def test_files_that_are_not_read_are_named(tmp_path):
    for name, lines in (("deu.txt", GERMAN), ("eng.txt", ENGLISH), ("fra.txt.gz", ENGLISH)):
        (tmp_path / name).write_text("\n".join(lines) + "\n")
    _, notes = read(bitext, tmp_path)
    assert notes["files that were not read, such as fra.txt.gz"] == 1


def test_what_prepare_wrote_is_named_file_by_file(tmp_path):
    (tmp_path / "prepare.json").write_text("{}")
    refused(bitext, tmp_path, r"is what `mlalign prepare` wrote: name files of it, such as .*/train\.\*\.jsonl")


@pytest.mark.parametrize("name", ["a.tmx", "a.tmx.gz"])
def test_tmx(tmp_path, name):
    units = [{"de": de, "en": en} for de, en in zip(GERMAN, ENGLISH)]
    units[1] = {"en": "two", "de": " <bpt i='1'/>zwei"}  # the other order, and marks inside
    tmx(tmp_path / name, [*units, {"de": "vier"}])
    items, notes = read(bitext, tmp_path / name)
    assert sentences(items) == EXPECTED
    assert notes == {"units in one language": 1}
    tmx(tmp_path / name, [{"de": "eins", "en-GB": "one", "fr": "un"}])
    items, _ = read(bitext, tmp_path)
    assert sentences(items) == [("de", "en-GB", "eins", "one"), ("fr", "en-GB", "un", "one")]
    items, _ = read(bitext, tmp_path, pivot="fr")
    assert sentences(items) == [("de", "fr", "eins", "un"), ("en-GB", "fr", "one", "un")]
    assert len(read(bitext, tmp_path, languages=["fr", "en-GB"])[0]) == 1


def test_rows_and_the_hub(tmp_path, hub):
    rows = [{"translation": {"de": de, "en": en}} for de, en in zip(GERMAN, ENGLISH)]
    write_jsonl(tmp_path / "a.jsonl", [{"src": "x", "tgt": "y", "src_lang": "fr", "tgt_lang": "en", "id": 7}, *rows])
    items, _ = read(bitext, tmp_path / "a.jsonl")
    assert sentences(items) == [("fr", "en", "x", "y"), *EXPECTED]
    assert [i.row["id"] for i in items[:2]] == ["7", "a-2"]
    assert sentences(read(bitext, tmp_path / "a.jsonl", languages=["de", "en"])[0]) == EXPECTED
    french = [{"translation": {"en": "x", "fr": "y"}}]
    hub("opus", {"de-en": {"train": rows[:2], "test": rows[2:]}, "en-fr": {"train": french, "validation": french}})
    items, _ = read(bitext, "opus")
    assert sentences(items) == [*EXPECTED, ("en", "fr", "x", "y"), ("en", "fr", "x", "y")]
    assert [i.split for i in items] == ["train", "train", "test", "train", "dev"]
    assert items[0].row["id"] == "opus-de-en-train-1"
    assert len(read(bitext, "opus", splits=("train",), languages=["en", "fr"])[0]) == 1
    refused(bitext, "opus", r"opus has no language cs, but de, en, fr", languages=["cs", "en"])


def test_a_file_per_language(tmp_path):
    plain = tmp_path / "devtest"
    for name, lines in (("deu_Latn", GERMAN), ("eng_Latn", ENGLISH), ("fra_Latn", ["un", "", "trois"])):
        write_lines(plain / f"{name}.devtest", [line.replace("\u2028", "") for line in lines])
    items, _ = read(bitext, plain)
    expected = [("deu_Latn", "eng_Latn", *each[2:]) for each in EXPECTED]
    assert sentences(items) == [
        *expected,
        *(("fra_Latn", "eng_Latn", fr, en) for fr, en in zip(["un", "", "trois"], ENGLISH)),
    ]
    assert [i.row["id"] for i in items] == [f"devtest-{n}" for n in (1, 2, 3)] * 2
    items, _ = read(bitext, plain, languages=["deu_Latn", "fra_Latn"], pivot="deu_Latn")
    assert [each[:2] for each in sentences(items)] == [("fra_Latn", "deu_Latn")] * 3

    by_id = tmp_path / "by_id"
    by_id.mkdir()
    for code, ids in (("en-US", "abc"), ("de-DE", "cxa")):
        write_jsonl(by_id / f"{code}.jsonl", [{"id": i, "utt": f"{code} {i}"} for i in ids])
    items, notes = read(bitext, by_id)
    assert [(i.row["id"], *i.texts) for i in items] == [("c", "de-DE c", "en-US c"), ("a", "de-DE a", "en-US a")]
    assert notes == {
        "sentences that en-US does not have": 1,
        "sentences of en-US that another language does not have": 1,
    }


@real
def test_bitext_of_the_pack():
    items, _ = read(bitext, DATA / "tatoeba", languages=["cym", "eng"])
    assert len(items) == 571 and items[0].row["id"].startswith("tatoeba-cym-eng-")
    items, _ = read(bitext, DATA / "flores200_devtest", languages=["cym_Latn", "kan_Knda", "eng_Latn"])
    assert Counter(i.languages for i in items) == {("cym_Latn", "eng_Latn"): 1012, ("kan_Knda", "eng_Latn"): 1012}
    english = [i.texts[1] for i in items]
    assert english[:1012] == english[1012:]


BAD_BITEXT = {
    "one line less": (
        {"A.de-en.de": "a\nb\n", "A.de-en.en": "a\n"},
        r"de-en\.de:2 has no counterpart: \S+\.en ends at line 1",
    ),
    "one side": ({"A.de-en.de": "a\n"}, r"A\.de-en\.en is missing, with the other side of A\.de-en\.de\|en"),
    "no language": ({"A.ze-en.ze": "a", "A.ze-en.en": "a"}, r"A\.ze-en: 'ze' is not the code of a language"),
    "no UTF-8": ({"A.de-en.de": "a\n", "A.de-en.en": b"\xff\n"}, r"A\.de-en\.en:1: not valid UTF-8 \(byte 0\)"),
    "no gzip": ({"A.de-en.de.gz": "a\n", "A.de-en.en": "a\n"}, r"is cut or damaged after line 0"),
    "damaged gzip": (
        {"A.de-en.de.gz": gzip.compress(b"abc\n" * 9)[:12] + b"\xff" * 9, "A.de-en.en": "a\n"},
        r"is cut or damaged after line 0",
    ),
    "no zip": ({"A.zip": "a\n"}, r"A\.zip is cut or damaged"),
    "broken XML": ({"a.tmx": "<tmx><body>\n<tu><tuv"}, r"a\.tmx:2: not valid XML after unit 0"),
    "no units": ({"a.tmx": "<tmx><body></body></tmx>"}, r"a\.tmx holds no translation units"),
    "no language of a unit": (
        {"a.tmx": "<tmx><tu><tuv><seg>a</seg></tuv></tu></tmx>"},
        r"unit 1: a tuv without xml:lang",
    ),
    "cut JSON": (
        {"a.jsonl": '{"src": "a", "tgt": "b", "src_lang": "de", "tgt_lang": "en"}\n{"src"'},
        r"a\.jsonl:2: not",
    ),
    "no target": ({"a.jsonl": '{"src": "a"}\n'}, r"a\.jsonl:1: no text in field 'tgt'"),
    "one language": ({"a.jsonl": '{"src":"a","tgt":"b","src_lang":"de","tgt_lang":"de"}'}, r":1: both sides are in de"),
    "a code unknown": (
        {"a.jsonl": '{"src":"a","tgt":"b","src_lang":"de","tgt_lang":"xx"}'},
        r":1: 'xx' is not the code",
    ),
    "two kinds": (
        {"A.de-en.de": "a", "A.de-en.en": "a", "de.txt": "a"},
        r"A\.de-en holds bitext, but \S+de\.txt does not",
    ),
    "nothing": ({"README": "a"}, r"holds nothing that is read as bitext"),
    "one file": ({"de.txt": "a"}, r"holds one language, de: bitext needs two"),
    "no English": ({"de.txt": "a", "fr.txt": "a"}, r"has no English: give --pivot, one of de, fr"),
    "two English": ({"en-US.txt": "a", "en-GB.txt": "a"}, r"has not one English: give --pivot, one of en-GB, en-US"),
    "a language twice": ({"x.de.txt": "a", "y.de.txt": "a"}, r"x\.de\.txt and \S+y\.de\.txt are both language de"),
    "lines that differ": (
        {"de.txt": "a\n", "en.txt": "a\nb\n"},
        r"en\.txt:2 has no counterpart: \S+de\.txt ends at line 1",
    ),
    "a blank line of one file": (
        {"en.jsonl": '{"text":"a"}\n\n{"text":"b"}', "de.jsonl": '{"text":"a"}\n{"text":"b"}'},
        r"en\.jsonl:2 is empty: every line must be a sentence",
    ),
    "an id twice": (
        {"en.jsonl": '{"id":1,"text":"a"}\n{"id":1,"text":"b"}', "de.jsonl": '{"id":1,"text":"a"}'},
        r"en\.jsonl:2: id '1' appears a second time",
    ),
    "ids in one file": (
        {"en.jsonl": '{"id":1,"text":"a"}', "de.jsonl": '{"text":"a"}'},
        r"de\.jsonl:1 has no id, but \S+en\.jsonl has ids",
    ),
}


@pytest.mark.parametrize("name", BAD_BITEXT)
def test_bad_bitext_is_one_sentence(tmp_path, name):
    files, sentence = BAD_BITEXT[name]
    for file, text in files.items():
        (tmp_path / file).write_bytes(text if isinstance(text, bytes) else text.encode())
    refused(bitext, tmp_path, sentence)


def test_an_array_is_rows_too_whatever_its_file_is_called(tmp_path):
    for code in ("de", "en"):
        (tmp_path / f"{code}.jsonl").write_text('[{"text": "a"},\n\n {"text": "b"}]')
    items, _ = read(bitext, tmp_path)
    assert [item.texts for item in items] == [("a", "a"), ("b", "b")]


def test_blank_ids_are_none(tmp_path):
    for code in ("de", "en"):
        (tmp_path / f"{code}.csv").write_text("id,text\n,a\n ,b\n")
    items, _ = read(bitext, tmp_path)
    assert [item.row["id"] for item in items] == [f"{tmp_path.name}-1", f"{tmp_path.name}-2"]


def test_bad_requests_of_bitext_are_one_sentence(tmp_path):
    for code in ("de", "en"):
        (tmp_path / f"A.de-en.{code}").write_text(code)
    refused(bitext, tmp_path, r"has no language fr, but de, en", languages=["de", "fr"])
    refused(
        bitext, tmp_path, r"has no pair of the languages de: name both sides of a pair, such as de,en", languages=["de"]
    )
    refused(bitext, tmp_path, r"pivot de is for files of one language each", pivot="de")
    refused(bitext, tmp_path / "*.tmx", r"\*\.tmx matches no file")
    refused(bitext, tmp_path / "gone", r"gone does not exist")
    (tmp_path / "A.de-en.de.gz").write_bytes(gzip.compress(b"a\n" * 1000)[:30])
    (tmp_path / "A.de-en.de").unlink()
    (tmp_path / "A.de-en.en").write_text("b\n" * 1000)
    refused(bitext, tmp_path, r"A\.de-en\.de\.gz or \S+ is cut or damaged")


# ------------------------------------------------------------------------------------------------------------- against


def test_sentences_to_keep_out(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"text": " a ", "lang": "x"}, {"utt": "b", "src": "c", "tgt": "d"}])
    (tmp_path / "b.json").write_text(json.dumps([{"translation": {"de": "e", "en": "f"}}, {"sentence": "g"}]))
    turns = [
        {"role": "system", "content": "no"},
        {"role": "user", "content": "h"},
        {"role": "assistant", "content": "no"},
    ]
    write_jsonl(tmp_path / "c.jsonl", [{"messages": turns}])
    (tmp_path / "eng.devtest").write_text("\ufeffi\n\n j\n")
    (tmp_path / "d.csv").write_text("text,other\nk,no\n")
    files = against.files((f"{tmp_path}/*", f"{tmp_path}/a.jsonl"))
    assert [Path(file).name for file in files] == ["a.jsonl", "b.json", "c.jsonl", "d.csv", "eng.devtest"]
    assert sorted(against.sentences(files)) == list("abcdefghijk")
    write_jsonl(tmp_path / "c.jsonl", [{"prompt": "x"}])
    with pytest.raises(UserError, match=r"c\.jsonl:1: no sentence in any of text, utt, src"):
        list(against.sentences(files))
    lines = {"d.jsonl.gz": '{"text": "a"}', "e.iob2": "# text = a\n1\ta\tO", "f.tsv": "a\tb", "g.rows": '{"text": "a"}'}
    for name, text in lines.items():  # of which no sentence would be found in training data
        write = gzip.open if name.endswith(".gz") else open
        with write(tmp_path / name, "wt") as file:
            file.write(text + "\n")
        with pytest.raises(UserError, match=rf"against \S+{name}:1 is no line of plain text: give one sentence a line"):
            list(against.sentences([str(tmp_path / name)]))
    (tmp_path / "cut.gz").write_bytes(gzip.compress(b"a\n" * 1000)[:-20])
    with pytest.raises(UserError, match=r"cut\.gz is cut or damaged"):
        list(against.sentences([str(tmp_path / "cut.gz")]))
    with pytest.raises(UserError, match=r"against \S+/none\* matches no file$"):
        against.files((f"{tmp_path}/none*",))
    with pytest.raises(UserError, match=r"matches no file: it is a directory, give "):
        against.files((str(tmp_path),))
