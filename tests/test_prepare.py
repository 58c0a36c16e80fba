"""mlalign prepare: what is dropped, held out and sampled, by hand and against plain Python; and what is written."""

import json
import random
import resource
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from conftest import write_jsonl
from test_sifting import naive

from mlalign.commands.prepare import Settings, prepare
from mlalign.errors import UserError
from mlalign.rundir import locked
from mlalign.tracker import console


def run(dataset, source, output, **options) -> dict:
    return prepare(Settings(dataset, str(source), output, **options))


def rows_of(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def ids(path) -> list[str]:
    return [row["id"] for row in rows_of(path)]


def names(folder) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.exists() else set()


def pair(src, tgt, id_=None, languages=("de", "en")) -> dict:
    row = {"src": src, "tgt": tgt, "src_lang": languages[0], "tgt_lang": languages[1]}
    return row if id_ is None else row | {"id": id_}


def massive(folder, utterances: dict[str, list[str]]) -> Path:
    """Utterances by "locale.split"; `id` is the place in the list."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, texts in utterances.items():
        rows = [{"id": str(n), "utt": text, "annot_utt": text} for n, text in enumerate(texts)]
        write_jsonl(folder / f"{name}.jsonl", rows)
    return folder


# ---------------------------------------------------------------------------------------------------- what is dropped


def test_duplicates_leaks_and_what_is_empty(tmp_path):
    source = massive(
        tmp_path / "in",
        {
            "en-US.test": ["play jazz", "Stop!"],
            "en-US.dev": ["stop", "stop", "louder", "Stop!"],  # never changed
            "de-DE.dev": ["lauter"],
            "en-US.train": [
                "play jazz",  # 0 in test
                "Play Jazz.",  # 1 in test, normalised
                "louder",  # 2 in dev
                "lauter",  # 3 in dev of another language only
                " ",  # 4 empty
                "wake me up",  # 5
                "wake me up",  # 6 duplicate
                "Wake me up!",  # 7 duplicate, normalised
                "Wake me up!",  # 8 of the first as well
                "quiet",  # 9 against
                "QUIET",  # 10 against, normalised
                "leise",  # 11 against, in another language
                "next song",  # 12
            ],
        },
    )
    (tmp_path / "flores.deu").write_text("quiet\nleise\n")
    report = run("massive", source, tmp_path / "out", against=(f"{tmp_path}/flores.*",))
    assert ids(tmp_path / "out/train.en.jsonl") == ["3", "5", "12"]
    assert ids(tmp_path / "out/dev.en.jsonl") == ["0", "1", "2", "3"]
    assert [row["text"] for row in rows_of(tmp_path / "out/dev.en.jsonl")] == ["stop", "stop", "louder", "Stop!"]
    train = report["files"]["train.en.jsonl"]
    assert train["rows"] + sum(train["dropped"].values()) == train["read"] == 13
    assert train["dropped"] == {
        "empty": 1,
        "in test, exact": 1,
        "in test, normalised": 1,
        "in dev, exact": 1,
        "in --against, exact": 2,
        "in --against, normalised": 1,
        "duplicate, exact": 1,
        "duplicate, normalised": 2,
    }
    assert report["overlap"] == {"dev.en.jsonl": {"exact": 1, "normalised": 2}}
    assert report["against"] == {"files": [f"{tmp_path}/flores.deu"], "sentences": 2}
    assert json.loads((tmp_path / "out/prepare.json").read_text()) == report
    assert names(tmp_path / "out") == {*report["files"], "prepare.json"}


def test_bitext_leaks_by_either_side_and_drops_copies(tmp_path):
    rows = [
        pair("eins", "one", "a"),
        pair("EINS", "One.", "b"),  # duplicate as a pair
        pair("eins", "a one", "c"),  # one side alone makes no duplicate
        pair("Test?", "test", "d"),  # the same on both sides
        pair("", "nothing", "e"),
        pair("zwei", "two", "f"),  # its English is kept out
        pair("Drei", "three", "g"),  # its German is kept out
        pair("vier", "four", "h", ("de", "fr")),  # another pair has its own duplicates
        pair("vier", "four", "i"),
    ]
    write_jsonl(tmp_path / "a.jsonl", rows)
    write_jsonl(tmp_path / "test.jsonl", [{"text": "Two"}, {"src": "drei", "tgt": "trois"}])
    report = run("bitext", tmp_path / "a.jsonl", tmp_path / "out", against=(str(tmp_path / "test.jsonl"),))
    assert ids(tmp_path / "out/train.de-en.jsonl") == ["a", "c", "i"]
    assert rows_of(tmp_path / "out/train.de-en.jsonl")[0] == rows[0]
    assert ids(tmp_path / "out/train.de-fr.jsonl") == ["h"]
    assert report["files"]["train.de-en.jsonl"]["dropped"] == {
        "duplicate, normalised": 1,
        "same on both sides": 1,
        "empty": 1,
        "in --against, normalised": 2,
    }


def test_translation_leaks_by_either_side_in_its_language(tmp_path):
    source = tmp_path / "in"
    source.mkdir()
    write_jsonl(source / "test.en-cs.jsonl", [pair("the end", "konec", languages=("en", "cs"))])
    train = [("Konec.", "over", "1"), ("the end", "done", "2"), ("dobře", "good", "3"), ("dobře", "good", "4")]
    write_jsonl(source / "train.cs-en.jsonl", [pair(*each, languages=("cs", "en")) for each in train])
    train = [("fertig", "The End", "5"), ("gut", "good", "6")]
    write_jsonl(source / "train.de-en.jsonl", [pair(*each) for each in train])
    report = run("translation", source, tmp_path / "out", form="plain")
    for direction in ("cs-en", "en-cs"):
        assert ids(tmp_path / f"out/train.{direction}.jsonl") == ["2", "3"]  # "the end" as Czech is no leak
        assert report["files"][f"train.{direction}.jsonl"]["dropped"] == {
            "in test, normalised": 1,
            "duplicate, exact": 1,
        }
    assert ids(tmp_path / "out/train.en-de.jsonl") == ["6"]
    assert names(tmp_path / "out") == {*report["files"], "prepare.json"}


def test_many_batches_against_sets_of_texts(tmp_path):
    """40,000 pairs of few sentences, more than two batches, interleaved languages: the rows that plain Python keeps."""
    chance = random.Random(0)
    words = ["eins", "Zwei", "drei!", "VIER", "fünf", "ÉTÉ", "e\u0301te\u0301", "七", "?", " "]
    rows = []
    for number in range(40_000):
        src, tgt = (" ".join(chance.choices(words, k=chance.randint(1, 5))).strip() for _ in range(2))
        rows.append(pair(src, tgt, str(number), ("de", chance.choice(["en", "fr"]))))
    write_jsonl(tmp_path / "a.jsonl", rows)
    kept_out = ["drei vier fünf", "zwei eins"]
    (tmp_path / "against.txt").write_text("\n".join(kept_out))
    report = run("bitext", tmp_path / "a.jsonl", tmp_path / "out", against=(f"{tmp_path}/against.txt",))
    first, leaks, expected, counts = {}, {naive(text) for text in kept_out}, {}, {}
    for row in rows:
        texts = row["src"].strip(), row["tgt"].strip()
        forms, target = tuple(map(naive, texts)), row["tgt_lang"]
        count = counts.setdefault(target, Counter())
        if not all(forms):
            count["empty"] += 1
        elif forms[0] == forms[1]:
            count["same on both sides"] += 1
        elif leaks & set(forms):
            count[f"in --against, {'exact' if set(kept_out) & set(texts) else 'normalised'}"] += 1
        elif (target, forms) in first:
            count[f"duplicate, {'exact' if first[target, forms] == texts else 'normalised'}"] += 1
        else:
            first[target, forms] = texts
            expected.setdefault(target, []).append(row["id"])
    for target in ("en", "fr"):
        assert ids(tmp_path / f"out/train.de-{target}.jsonl") == expected[target]
        assert report["files"][f"train.de-{target}.jsonl"]["dropped"] == counts[target]


def test_evaluation_sets_with_an_empty_sentence_are_refused(tmp_path):
    source = massive(tmp_path / "in", {"en-US.test": ["play", "\t"], "en-US.train": ["stop"]})
    with pytest.raises(UserError, match=r"en-US\.test\.jsonl:2: a sentence of test is empty, and evaluation sets are"):
        run("massive", source, tmp_path / "out")
    assert names(tmp_path / "out") == set()


# ------------------------------------------------------------------------------------------------- what is chosen


def test_samples_depend_on_seed_and_ids_alone(tmp_path):
    texts = {code: [f"{code} {n}" for n in range(500)] for code in ("en-US", "de-DE")}
    source = massive(tmp_path / "in", {f"{code}.train": each for code, each in texts.items()})
    report = run("massive", source, tmp_path / "a", max_rows=50)
    chosen = ids(tmp_path / "a/train.en.jsonl")
    assert len(chosen) == 50 and chosen == sorted(chosen, key=int)
    assert ids(tmp_path / "a/train.de.jsonl") == chosen
    assert report["files"]["train.en.jsonl"] == {"rows": 50, "read": 500, "dropped": {"not sampled": 450}}
    for code in texts:
        lines = (source / f"{code}.train.jsonl").read_text().splitlines()
        random.Random(1).shuffle(lines)
        (source / f"{code}.train.jsonl").write_text("\n".join(lines))
    run("massive", source, tmp_path / "b", max_rows=50)
    assert sorted(ids(tmp_path / "b/train.en.jsonl")) == sorted(chosen)
    run("massive", source, tmp_path / "c", max_rows=50, seed=1)
    assert sorted(ids(tmp_path / "c/train.en.jsonl")) != sorted(chosen)
    run("massive", source, tmp_path / "d", max_rows=40)
    assert set(ids(tmp_path / "d/train.de.jsonl")) < set(chosen)
    run("massive", source, tmp_path / "e", max_rows=1000)
    assert len(ids(tmp_path / "e/train.de.jsonl")) == 500


def test_balance_takes_as_much_of_each_as_there_is_of_the_smallest(tmp_path):
    source = massive(
        tmp_path / "in",
        {"en-US.train": list("abcdefgh"), "de-DE.train": ["a", "a", "b", "c"], "fr-FR.test": ["un"]},
    )
    run("massive", source, tmp_path / "a", balance=True)
    assert len(ids(tmp_path / "a/train.en.jsonl")) == len(ids(tmp_path / "a/train.de.jsonl")) == 3
    assert ids(tmp_path / "a/test.fr.jsonl") == ["0"]
    run("massive", source, tmp_path / "b", balance=True, max_rows=2)
    assert len(ids(tmp_path / "b/train.en.jsonl")) == len(ids(tmp_path / "b/train.de.jsonl")) == 2
    massive(source, {"fr-FR.train": ["un"]})
    with pytest.raises(UserError, match=r"fr has no rows left in train, so there is nothing to sample"):
        run("massive", source, tmp_path / "c", balance=True)
    assert names(tmp_path / "c") == set()
    (tmp_path / "tests").mkdir()
    massive(tmp_path / "tests", {"en-US.test": ["a"]})
    with pytest.raises(UserError, match=r"there are no rows in train, so there is nothing to sample"):
        run("massive", tmp_path / "tests", tmp_path / "c", max_rows=1)
    with console.capture() as capture:
        run("massive", tmp_path / "tests", tmp_path / "c")
    assert "train: none\ndev: none\ntest: 1 rows in 1 languages (en)" in capture.get()


def test_held_out_pairs_share_no_sentence_with_train(tmp_path):
    """Two language pairs with ids in common: the same ids are held out, and no side of theirs stays in any train."""
    chance = random.Random(3)
    for language in ("de", "fr"):
        rows = [pair(f"{language} {n}", f"en {n // 2}", str(n), (language, "en")) for n in range(300)]
        rows += [pair("Jа", f"en {n} too", f"{language}{n}", (language, "en")) for n in range(3)]  # noqa: RUF001
        chance.shuffle(rows)
        write_jsonl(tmp_path / f"{language}.jsonl", rows)
    report = run("bitext", tmp_path / "*.jsonl", tmp_path / "a", dev=20)
    dev = {code: rows_of(tmp_path / f"a/dev.{code}-en.jsonl") for code in ("de", "fr")}
    train = {code: rows_of(tmp_path / f"a/train.{code}-en.jsonl") for code in ("de", "fr")}
    english = {row["tgt"] for each in dev.values() for row in each}
    for code in ("de", "fr"):
        assert len(dev[code]) == 20
        own = {row["src"] for row in dev[code]}
        left = [
            row for row in rows_of(tmp_path / f"{code}.jsonl") if row["src"] not in own and row["tgt"] not in english
        ]
        assert train[code] == left
        dropped = {"held out as dev": 20, "shares a side with dev": 303 - 20 - len(left)}
        assert report["files"][f"train.{code}-en.jsonl"]["dropped"] == dropped
    assert len({row["id"] for row in dev["de"]} ^ {row["id"] for row in dev["fr"]}) <= 3 * 2

    run("bitext", tmp_path / "*.jsonl", tmp_path / "b", dev=20, max_rows=100)
    assert rows_of(tmp_path / "b/dev.de-en.jsonl") == dev["de"]
    sampled = rows_of(tmp_path / "b/train.de-en.jsonl")
    assert len(sampled) == 100 and all(row in train["de"] for row in sampled)

    run("bitext", tmp_path / "*.jsonl", tmp_path / "sample", max_rows=100)  # by other random numbers
    assert not {row["id"] for row in dev["de"]} <= set(ids(tmp_path / "sample/train.de-en.jsonl"))
    with pytest.raises(UserError, match=r"de-en has 303 pairs, too few to hold out 303: lower --dev"):
        run("bitext", tmp_path / "*.jsonl", tmp_path / "c", dev=303)
    assert names(tmp_path / "c") == set()


def test_a_hub_dataset_with_its_own_dev_split(tmp_path, monkeypatch):
    from test_parallel import hub_dataset

    rows = [{"translation": {"de": f"de {n}", "en": f"en {n}"}} for n in range(6)]
    hub_dataset(tmp_path / "opus", {"de-en": {"train": rows, "validation": rows[:1], "test": rows[:2]}})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mlalign.corpora.bitext.is_local", lambda path: False)
    monkeypatch.setattr("mlalign.rows.is_local", lambda path: False)
    report = run("bitext", "opus", tmp_path / "out")
    assert ids(tmp_path / "out/train.de-en.jsonl") == [f"opus-de-en-train-{n}" for n in (3, 4, 5, 6)]
    assert report["files"]["train.de-en.jsonl"]["dropped"] == {"in dev, exact": 1, "in test, exact": 1}
    assert report["overlap"] == {"dev.de-en.jsonl": {"exact": 1}}
    with pytest.raises(UserError, match=r"de-en has a dev split of its own: leave out --dev"):
        run("bitext", "opus", tmp_path / "out", dev=1)


# ------------------------------------------------------------------------------------------------- what is written


def test_a_second_run_replaces_what_the_first_wrote_and_nothing_else(tmp_path):
    source = massive(tmp_path / "in", {"en-US.train": ["a", "b"], "de-DE.train": ["c"]})
    out = tmp_path / "out"
    run("massive", source, out)
    (out / "notes.txt").write_text("mine")
    (out / "train.fr.jsonl.partial").write_text("left by a run that was killed")
    first = names(out) - {"train.fr.jsonl.partial"}
    with pytest.raises(UserError, match=r"in has no language fr, but de, en"):
        run("massive", source, out, languages=["fr"])
    assert names(out) == first
    (out / "train.de.jsonl.partial").write_text("left again")
    run("massive", source, out, languages=["de"])
    assert names(out) == {"train.de.jsonl", "prepare.json", "notes.txt"}
    assert ids(out / "train.de.jsonl") == ["0"]
    (out / "dev.de.jsonl").write_text("mine")
    with pytest.raises(UserError, match=r"holds dev\.de\.jsonl, which no `mlalign prepare` wrote"):
        run("massive", source, out)
    assert (out / "dev.de.jsonl").read_text() == "mine"
    translation = tmp_path / "pairs"
    translation.mkdir()
    write_jsonl(translation / "train.de-en.jsonl", [pair("a", "b")])
    with pytest.raises(UserError, match=r"holds train\.de-en\.jsonl, which no"):
        run("translation", translation, translation)  # the output may not be the input
    assert rows_of(translation / "train.de-en.jsonl") == [pair("a", "b")]


@pytest.mark.parametrize("limit", [20_000, 400])
def test_a_full_disk_leaves_no_file(tmp_path, limit):
    """Files may not grow past `limit` bytes: that of the rows, and that of prepare.json, which comes last."""
    texts = [f"sentence {n}" for n in range(2000 if limit > 10_000 else 2)]
    source = massive(tmp_path / "in", {"en-US.train": texts})
    done = subprocess.run(
        [sys.executable, "-m", "mlalign", "prepare", "massive", source, tmp_path / "out", "--format", "plain"],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.endswith(f"mlalign: error: output {tmp_path / 'out'} cannot be written: File too large\n")
    assert "Traceback" not in done.stderr
    assert names(tmp_path / "out") == set()


BAD = {
    "a dataset": (("flores",), {}, r"dataset flores is not known: prepare reads massive, translation, uner, bitext"),
    "a format": (("massive",), {"form": "xml"}, r"format xml is not one of chat, plain"),
    "a format of bitext": (("bitext",), {"form": "chat"}, r"format is an option of massive, translation, uner, not of"),
    "dev of a task": (("uner",), {"dev": 5}, r"dev is an option of bitext, not of uner"),
    "directions": (("massive",), {"directions": "both"}, r"directions is an option of translation, not of massive"),
    "a pivot": (("massive",), {"pivot": "en"}, r"pivot is an option of bitext, not of massive"),
    "a language twice": (("massive",), {"languages": ["en", "en"]}, r"languages en,en: en is named twice"),
    "no language": (("massive",), {"languages": []}, r"languages is empty"),
    "an unknown language": (("massive",), {"languages": ["en", "xx"]}, r"has no language xx, but en"),
    "nothing against": (("massive",), {"against": ("/nowhere/*",)}, r"against /nowhere/\* matches no file"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_requests_are_one_sentence(tmp_path, name):
    (dataset,), options, sentence = BAD[name]
    source = massive(tmp_path / "in", {"en-US.train": ["a"]})
    with pytest.raises(UserError, match=sentence) as error:
        run(dataset, source, tmp_path / "out", **options)
    assert "\n" not in str(error.value)
    assert names(tmp_path / "out") == set()


def test_bad_places_are_one_sentence(tmp_path):
    source = massive(tmp_path / "in", {"en-US.train": []})
    with pytest.raises(UserError, match=r"in holds no rows"):
        run("massive", source, tmp_path / "out")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"output \S+file cannot be written: (File exists|Not a directory)"):
        run("massive", source, tmp_path / "file")
    with pytest.raises(UserError, match=r"gone is not a directory"):
        run("uner", tmp_path / "gone", tmp_path / "out")


def test_the_command_line(tmp_path):
    source = tmp_path / "in"
    source.mkdir()
    (source / "A.de-en.de").write_text("eins\nzwei\nEins\ndrei\n")
    (source / "A.de-en.en").write_text("one\ntwo\none\nthree\n")
    command = [sys.executable, "-m", "mlalign", "prepare", "bitext", source, tmp_path / "out"]
    options = ["--languages", "de,en", "--dev", "1", "--seed", "4", "--max-rows", "5", "--against", source / "*.md"]
    (source / "x.md").write_text("Drei.\n")
    done = subprocess.run([*command, *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "train: 1 rows in 1 language pairs (de-en)",
        "  of 4 read, not kept: in --against, normalised: 1; duplicate, normalised: 1; held out as dev: 1",
        "dev: 1 rows in 1 language pairs (de-en)",
        "test: none",
        "files that were not read, such as x.md: 1",
        f"all counts are in {tmp_path / 'out/prepare.json'}",
    ]
    assert json.loads((tmp_path / "out/prepare.json").read_text())["settings"]["seed"] == 4
    done = subprocess.run([*command, "--format", "plain"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("mlalign: error: format is an option of massive")
    done = subprocess.run([*command, "--dev", "0"], capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr


def test_a_second_run_at_once_is_refused(tmp_path):
    source = massive(tmp_path / "in", {"en-US.train": ["play jazz"]})
    with (
        locked(tmp_path / "out", "output"),
        pytest.raises(UserError, match=r"output .*out is in use by process \d+ on host .*: wait for its end"),
    ):
        run("massive", source, tmp_path / "out")
    run("massive", source, tmp_path / "out")


def test_a_run_killed_while_it_gives_names_can_be_repeated(tmp_path):
    source = massive(tmp_path / "in", {"en-US.train": ["play jazz"], "de-DE.train": ["spiel jazz"]})
    run("massive", source, tmp_path / "out")
    whole = {name: (tmp_path / "out" / name).read_bytes() for name in names(tmp_path / "out")}
    killed = (
        "import os, signal; from pathlib import Path; from mlalign.commands import prepare; usual = Path.rename\n"
        "def rename(path, to):\n"
        "    usual(path, to)\n"
        "    if to.name.startswith('train.'): os.kill(os.getpid(), signal.SIGKILL)\n"
        "Path.rename = rename\n"
        f"prepare.prepare(prepare.Settings('massive', {str(source)!r}, Path({str(tmp_path / 'out')!r})))"
    )
    assert subprocess.run([sys.executable, "-c", killed], capture_output=True).returncode == -9
    assert "prepare.json" not in names(tmp_path / "out")
    source.rename(tmp_path / "away")
    with pytest.raises(UserError, match="is not a directory"):  # the next one fails too, before it has anything
        run("massive", source, tmp_path / "out")
    (tmp_path / "away").rename(source)
    run("massive", source, tmp_path / "out")
    assert {name: (tmp_path / "out" / name).read_bytes() for name in names(tmp_path / "out")} == whole


def test_what_was_made_of_something_else_is_never_replaced(tmp_path):
    first = massive(tmp_path / "first", {"en-US.train": ["play jazz"]})
    second = massive(tmp_path / "second", {"de-DE.train": ["spiel jazz"]})
    run("massive", first, tmp_path / "out")
    run("massive", first, tmp_path / "out", form="plain")  # of the same, another way
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with pytest.raises(
        UserError, match=r"out holds what was made of massive .*first, and would lose it: choose another"
    ):
        run("massive", second, tmp_path / "out")
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
