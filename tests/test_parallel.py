"""Reading parallel text: every published layout, and one sentence for everything that is wrong with it."""

import json

import pytest

from mlalign.errors import UserError
from mlalign.languages import _CLASS_OF, groups, language_of, resource_class, script_of
from mlalign.parallel import Parallel, read_parallel

ENGLISH = [f"sentence {number}" for number in range(6)]
GERMAN = [f"Satz {number}" for number in range(6)]


def write_lines(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(line + "\n" for line in lines))


def write_rows(path, rows):
    write_lines(path, [json.dumps(row, ensure_ascii=False) for row in rows])


def read(data, languages=None, max_sentences=None, split=None) -> Parallel:
    return read_parallel(str(data), languages, max_sentences, split)


def aligned(parallel: Parallel, one: str, other: str) -> list[tuple[str, str]]:
    (table,) = parallel.tables
    return [(parallel.texts[one][i], parallel.texts[other][j]) for i, j in zip(table[one], table[other])]


def texts(sentences, ids=None):
    return [{"text": text} | ({"id": ids[n]} if ids else {}) for n, text in enumerate(sentences)]


@pytest.mark.parametrize(
    "names",
    [
        ("eng_Latn.devtest", "deu_Latn.devtest"),  # FLORES-200 as published
        ("newstest2019-src.eng_Latn.txt", "newstest2019-ref.deu_Latn.txt"),  # NTREX
        ("eng_Latn.jsonl", "deu_Latn.jsonl"),
        ("test.eng_Latn.jsonl", "deu_Latn.txt"),
    ],
)
def test_published_layouts(tmp_path, names):
    for name, sentences in zip(names, (ENGLISH, GERMAN)):
        write_lines(tmp_path / name, sentences) if not name.endswith("l") else write_rows(
            tmp_path / name, texts(sentences)
        )
    (tmp_path / "README.md").write_text("not a language")
    parallel = read(tmp_path)
    assert parallel.languages == ["deu_Latn", "eng_Latn"]
    assert aligned(parallel, "eng_Latn", "deu_Latn") == list(zip(ENGLISH, GERMAN))
    assert parallel.directions == 2
    assert aligned(read(tmp_path, max_sentences=5), "eng_Latn", "deu_Latn") == list(zip(ENGLISH, GERMAN))[:5]


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_tables_of_other_formats(tmp_path, suffix):
    import datasets

    for name, sentences in (("eng", ENGLISH), ("deu", GERMAN)):
        getattr(datasets.Dataset.from_list(texts(sentences)), f"to_{suffix}")(str(tmp_path / f"{name}.{suffix}"))
    assert aligned(read(tmp_path), "eng", "deu") == list(zip(ENGLISH, GERMAN))


def test_ids_align_whatever_the_order(tmp_path):
    write_rows(tmp_path / "en.jsonl", texts(ENGLISH, ids=list("abcdef")))
    write_rows(tmp_path / "de.jsonl", texts(GERMAN, ids=list("abcdef"))[::-1])
    assert sorted(aligned(read(tmp_path), "en", "de")) == list(zip(ENGLISH, GERMAN))


def test_a_repeated_sentence_is_held_once(tmp_path):
    write_lines(tmp_path / "en.txt", [*ENGLISH, ENGLISH[2]])
    write_lines(tmp_path / "de.txt", [*GERMAN, "noch ein Satz"])
    parallel = read(tmp_path)
    assert parallel.texts["en"] == ENGLISH
    assert parallel.tables[0]["en"] == [0, 1, 2, 3, 4, 5, 2]
    assert parallel.places["en"][2] == f"{tmp_path / 'en.txt'}:3"


def test_lines_end_at_line_feeds_only(tmp_path):
    (tmp_path / "en.txt").write_bytes("\ufeff".encode() + "a\u2028b\r\nc\r\nd\r\ne\r\nf".encode())
    write_lines(tmp_path / "de.txt", list("vwxyz"))
    assert read(tmp_path).texts["en"] == ["a\u2028b", "c", "d", "e", "f"]


def test_bitext_against_a_pivot(tmp_path):
    write_rows(
        tmp_path / "deu-eng.jsonl",
        [{"src": de, "tgt": en, "src_lang": "deu", "tgt_lang": "eng"} for de, en in zip(GERMAN, ENGLISH)],
    )
    write_rows(
        tmp_path / "eng-fra.jsonl",
        [{"src": en, "tgt": f"phrase {en}", "src_lang": "eng", "tgt_lang": "fra"} for en in [*ENGLISH[:4], "new one"]],
    )
    for data in (tmp_path, tmp_path / "*.jsonl"):
        parallel = read(data)
        assert parallel.languages == ["deu", "eng", "fra"]
        assert [sorted(table) for table in parallel.tables] == [["deu", "eng"], ["eng", "fra"]]
        assert parallel.texts["eng"] == [*ENGLISH, "new one"]  # each of them passes the model once
        assert parallel.tables[1]["eng"] == [0, 1, 2, 3, 6]
        assert parallel.directions == 4
    assert read(tmp_path, languages=["deu", "eng"]).languages == ["deu", "eng"]
    write_rows(
        tmp_path / "deu-fra.jsonl",
        [{"src": str(n), "tgt": str(n), "src_lang": "deu", "tgt_lang": "fra"} for n in range(6)],
    )
    with pytest.raises(UserError, match=r"jsonl:1: \S+ is without the pivot \S+, which other pairs are with"):
        read(tmp_path)


def hub_dataset(folder, configurations):
    """What a dataset's repository on the hub looks like: a card that names configurations and splits."""
    lines = ["---", "configs:"]
    for name, splits in configurations.items():
        lines += [f"- config_name: {name}", "  data_files:"]
        for split, rows in splits.items():
            write_rows(folder / split / f"{name}.jsonl", rows)
            lines += [f"  - split: {split}", f"    path: {split}/{name}.jsonl"]
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]))


def test_a_dataset_with_a_configuration_per_language(tmp_path, monkeypatch):
    """As FLORES+ is laid out; `datasets` reads a repository's directory as it reads the hub."""
    hub_dataset(
        tmp_path / "plus",
        {
            "eng_Latn": {"dev": texts(ENGLISH, range(6)), "devtest": texts(ENGLISH[::-1], range(6))},
            "deu_Latn": {"dev": texts(GERMAN, range(6)), "devtest": texts(GERMAN[::-1], range(6))},
        },
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mlalign.parallel.is_local", lambda path: False)
    assert aligned(read("plus", split="devtest"), "eng_Latn", "deu_Latn") == list(zip(ENGLISH[::-1], GERMAN[::-1]))
    with pytest.raises(UserError, match=r"plus has the splits dev, devtest: choose one with --split"):
        read("plus")
    with pytest.raises(UserError, match=r"plus has no split test, but dev, devtest"):
        read("plus", split="test")
    with pytest.raises(UserError, match=r"plus has no language fra_Latn, but deu_Latn, eng_Latn"):
        read("plus", split="dev", languages=["eng_Latn", "fra_Latn"])


def test_a_dataset_with_the_language_in_a_column(tmp_path, monkeypatch):
    code = {"iso_639_3": "eng", "iso_15924": "Latn"}
    rows = [row | code for row in texts(ENGLISH, range(6))]
    rows += [row | code | {"iso_639_3": "deu"} for row in texts(GERMAN, range(6))]
    hub_dataset(tmp_path / "one", {"default": {"test": rows}})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mlalign.parallel.is_local", lambda path: False)
    assert aligned(read("one"), "eng_Latn", "deu_Latn") == list(zip(ENGLISH, GERMAN))


def test_what_is_no_dataset_is_said():
    with pytest.raises(UserError, match=r"no-such-dataset is neither a local file or directory nor a readable hub"):
        read("no-such-dataset")


BAD = {
    "files of different length": (
        {"en.txt": ENGLISH, "de.txt": GERMAN[:5]},
        r"en\.txt:6 has no counterpart: \S+de\.txt:5 is the last sentence there",
    ),
    "a repeated language": ({"en.txt": ENGLISH, "x.en.txt": GERMAN}, r"en\.txt and \S+x\.en\.txt are both language en"),
    "an id missing": (
        {"en.jsonl": texts(ENGLISH, list("abcdef")), "de.jsonl": texts(GERMAN[:5], list("abcde"))},
        r"en\.jsonl:6: id 'f' is missing in \S+de\.jsonl",
    ),
    "an id more": (
        {"a.jsonl": texts(ENGLISH[:5], list("abcde")), "b.jsonl": texts(GERMAN, list("abcdef"))},
        r"b\.jsonl:6: id 'f' is missing in \S+a\.jsonl",
    ),
    "an id twice": (
        {"en.jsonl": texts(ENGLISH, list("abcdef")), "de.jsonl": texts(GERMAN, list("abcdea"))},
        r"de\.jsonl:6: id 'a' appears a second time",
    ),
    "ids in one file only": (
        {"en.jsonl": texts(ENGLISH, list("abcdef")), "de.jsonl": texts(GERMAN)},
        r"de\.jsonl:1 has no id, but \S+en\.jsonl:1 has one",
    ),
    "an empty line": ({"en.txt": ENGLISH, "de.txt": [*GERMAN[:3], " ", *GERMAN[4:]]}, r"de\.txt:4 is empty"),
    "an empty line of JSONL": ({"en.txt": ENGLISH, "de.jsonl": [*texts(GERMAN)[:2], None]}, r"de\.jsonl:3 is empty"),
    "an empty text": ({"en.jsonl": texts(["a", "b", " "]), "de.txt": GERMAN}, r"en\.jsonl:3 is empty"),
    "another field": ({"en.jsonl": [{"b": "a"}], "de.txt": GERMAN}, r"en\.jsonl:1: no text in .* \(found 'b'\)"),
    "two sentences": ({"en.txt": ENGLISH[:2], "de.txt": GERMAN[:2]}, r"\S+\.txt has 2 sentences: a probe needs 5"),
    "an empty file": ({"en.txt": ENGLISH, "de.txt": []}, r"language de has no sentences"),
    "one language": ({"en.txt": ENGLISH}, r"only en is there: a probe needs two languages"),
    "no language": ({"README.md": ENGLISH}, r"holds no file that ends in \.txt"),
    "bitext among others": (
        {"en.txt": ENGLISH, "a.jsonl": [{"src": "a", "tgt": "b", "src_lang": "de", "tgt_lang": "en"}]},
        r"a\.jsonl holds bitext, but \S+en\.txt does not",
    ),
    "one language on both sides": (
        {"a.jsonl": [{"src": "a", "tgt": "b", "src_lang": "en", "tgt_lang": "en"}]},
        r"a\.jsonl:1: both sides are in en",
    ),
    "an empty side": (
        {"a.jsonl": [{"src": "a", "tgt": " ", "src_lang": "de", "tgt_lang": "en"}]},
        r"a\.jsonl:1: an empty side",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_sentence(tmp_path, name):
    files, sentence = BAD[name]
    for file, rows in files.items():
        lines = [row if isinstance(row, str) else json.dumps(row) if row else "" for row in rows]
        lines += ['{"text": "last"}'] if rows and rows[-1] is None else []
        write_lines(tmp_path / file, lines)
    with pytest.raises(UserError, match=sentence) as error:
        read(tmp_path)
    assert "\n" not in str(error.value)


def test_bad_requests_are_one_sentence(tmp_path):
    write_lines(tmp_path / "en.txt", ENGLISH)
    (tmp_path / "de.txt").write_bytes(b"ok\nnot \xff utf-8\n")
    with pytest.raises(UserError, match=r"de\.txt:2: not valid UTF-8 \(byte 4\)"):
        read(tmp_path)
    with pytest.raises(UserError, match=r"has no language fr, but de, en"):
        read(tmp_path, languages=["en", "fr"])
    with pytest.raises(UserError, match=r"languages en,de,en: en is named twice"):
        read(tmp_path, languages=["en", "de", "en"])
    with pytest.raises(UserError, match=r"is local: a split belongs to a hub dataset"):
        read(tmp_path, split="devtest")
    write_rows(tmp_path / "one.jsonl", texts(ENGLISH))
    with pytest.raises(UserError, match=r"one\.jsonl holds no bitext rows"):
        read(tmp_path / "one.jsonl")
    write_lines(tmp_path / "parts" / "dev" / "en.txt", ENGLISH)
    with pytest.raises(UserError, match=r"holds no file that ends in .* \(it has the directories dev\)"):
        read(tmp_path / "parts")


def test_languages_are_known_by_any_of_their_codes():
    for codes in (("deu_Latn", "de-DE", "deu", "de"), ("zho_Hans", "zh-CN", "cmn", "zh"), ("swh_Latn", "sw-KE", "swh")):
        assert len({(language_of(code), script_of(code), resource_class(code)) for code in codes}) == 1
    assert language_of("newstest2019") == "newstest2019"
    assert script_of("zho_Hant") == "Hant"
    assert script_of("copy") is script_of("newstest2019") is resource_class("copy") is None
    assert all(language_of(code) == code and script_of(code) for code in _CLASS_OF)
    assert groups(["eng_Latn", "swh_Latn", "arb_Arab", "amh_Ethi", "copy"]) == {
        "high-resource": ["eng_Latn", "arb_Arab"],
        "low-resource": ["swh_Latn", "amh_Ethi"],
        "Latin": ["eng_Latn", "swh_Latn"],
        "non-Latin": ["arb_Arab", "amh_Ethi"],
    }
