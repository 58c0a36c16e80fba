"""mlalign prepare on the data pack, against plain Python that holds all texts, and ready to be scored."""

from pathlib import Path

import pytest
from test_prepare import rows_of, run
from test_sifting import naive

from mlalign.tasks import json_extraction, slot_filling, translation

DATA = Path(__file__).parent.parent.parent / "shared" / "data"

pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason=f"no data pack at {DATA}")


def test_tatoeba_without_flores_against_sets_of_texts(tmp_path):
    """All 46 languages with English, against 34 languages of FLORES and every test utterance of MASSIVE."""
    sets = (f"{DATA}/flores200_devtest/*.jsonl", f"{DATA}/massive/*.test.jsonl")
    report = run("bitext", DATA / "tatoeba", tmp_path / "out", against=sets)
    kept_out = set()
    for path in [*(DATA / "flores200_devtest").glob("*.jsonl"), *(DATA / "massive").glob("*.test.jsonl")]:
        kept_out |= {naive(row.get("text") or row["utt"]) for row in rows_of(path)}
    for path in sorted((DATA / "tatoeba").glob("*.jsonl")):
        seen, expected = set(), []
        for row in rows_of(path):
            forms = naive(row["src"]), naive(row["tgt"])
            if forms[0] != forms[1] and not kept_out & set(forms) and forms not in seen:
                seen.add(forms)
                expected.append(row)
        assert rows_of(tmp_path / f"out/train.{path.stem}.jsonl") == expected
        assert report["files"][f"train.{path.stem}.jsonl"]["rows"] == len(expected)


@pytest.mark.parametrize(("dataset", "folder"), [("massive", "massive"), ("translation", "mt"), ("uner", "uner")])
def test_tasks_of_the_pack_are_whole_and_can_be_scored(tmp_path, dataset, folder):
    """dev and test row by row; every row of train once; what evaluate needs of a test row is there."""
    report = run(dataset, DATA / folder, tmp_path / "out", form="plain")
    task = {"massive": slot_filling, "translation": translation, "uner": json_extraction}[dataset]
    for path in sorted((DATA / folder).glob("*.jsonl")):
        first, second = path.stem.split(".")
        split, language = (second, first.split("-")[0]) if dataset != "translation" else (first, second)
        written = rows_of(tmp_path / f"out/{split}.{language}.jsonl")
        source = [row["id"] for row in rows_of(path)]
        if split != "train":
            assert [row["id"] for row in written] == source
            for number, row in enumerate(written):
                task.gold(row, row["completion"].strip(), f"{path}:{number}")
        assert set(row["id"] for row in written) <= set(source)
        assert (
            len(written) == len({naive(row.get("text") or row["src"] + row["tgt"]) for row in written})
            or split != "train"
        )
        assert {row["lang"] for row in written} == {language}
    assert sum(file["rows"] + sum(file["dropped"].values()) - file["read"] for file in report["files"].values()) == 0
