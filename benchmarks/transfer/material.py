"""What the study is made of: task rows, bitext and parallel text from public data, and a base model that read them all.

`data` is a directory with massive/<locale>.<train|dev|test>.jsonl and massive_text/<locale>.jsonl (MASSIVE 1.1, its
labelled rows and the utterances of its train partition), tatoeba/<xxx>-eng.jsonl and, for other tasks, uner/ and mt/;
README.md says where they are published. No dev or test row is trained on, by the base model neither.
"""

import json
import random
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from cells import mlalign
from rich.progress import Progress
from studies import JSON, LANGUAGES, PAIRS, TRANSLATION, TYPES, WORDS, Study, Task

from mlalign.base_model import Shape, train_base
from mlalign.errors import UserError
from mlalign.languages import language_of
from mlalign.tracker import console, say

ARROW = " =>"  #: between an utterance and its answer
PROBE_SENTENCES = 200


@dataclass(frozen=True)
class Size:
    """Of a study: the base model and its training, and the languages."""

    shape: Shape
    base_steps: int
    steps: int  #: of fine-tuning
    lr: float  #: of fine-tuning all parameters
    supervised: tuple[str, ...]
    aligned: tuple[str, ...]  #: languages of the bitext
    unseen: tuple[str, ...]  #: in the base model's text alone
    test_rows: int  #: per language
    corpora: tuple[str, ...] = ("massive", "tatoeba")  #: in the base model's text

    @property
    def languages(self) -> tuple[str, ...]:
        """Of all groups."""
        return self.supervised + self.aligned + self.unseen


_PAPER = ("ar", "en", "es", "ru", "zh")
_ALIGNED = ("af", "cy", "de", "el", "fi", "fr", "he", "hi", "ja", "ka", "ko", "pl", "sw", "th", "tr", "vi")
_UNSEEN = ("am", "az", "bn", "is", "jv", "km", "kn", "ta")
_ALL = ("massive", "tatoeba", "uner", "mt")
SIZES = {
    "5m": Size(
        Shape(hidden=192, intermediate=512, layers=8, heads=4, vocabulary=6000, max_tokens=256),
        base_steps=2300,
        steps=250,
        lr=3e-3,
        supervised=("en",),
        aligned=("de", "es", "fr", "sw", "tr"),
        unseen=("af", "az"),
        test_rows=300,
    ),
    "5m-wide": Size(
        Shape(hidden=192, intermediate=512, layers=8, heads=4, vocabulary=8000, max_tokens=512),
        base_steps=2500,
        steps=300,
        lr=3e-3,
        supervised=_PAPER,
        aligned=("de", "fr", "hi", "sw", "tr"),
        unseen=("af", "az"),
        test_rows=300,
        corpora=_ALL,
    ),
    "15m": Size(
        Shape(hidden=320, intermediate=864, layers=10, heads=5, vocabulary=12_000, max_tokens=512),
        base_steps=15_000,
        steps=1500,
        lr=2e-3,
        supervised=_PAPER,
        aligned=_ALIGNED,
        unseen=_UNSEEN,
        test_rows=800,
        corpora=_ALL,
    ),
    "100m": Size(
        Shape(hidden=768, intermediate=2048, layers=12, heads=12, vocabulary=24_000, max_tokens=512),
        base_steps=40_000,
        steps=2000,
        lr=5e-4,
        supervised=_PAPER,
        aligned=_ALIGNED,
        unseen=_UNSEEN,
        test_rows=800,
        corpora=_ALL,
    ),
}


def prepare(data: Path, folder: Path, size: Size, studies: list[Study]) -> None:
    """Fill `folder` with tasks, parallel/ and bitext, for `studies`; what `mlalign prepare` has finished there is kept.

    massive/ is bitext of the first task's own domain, without any labelled utterance, tatoeba/ is not. massive-pairs-N
    has N pairs of each language, massive-languages-N the first N languages; tatoeba-X has the languages of task X.
    Raises UserError where `data` lacks a file.
    """
    arms = [arm for study in studies for arm in study.arms]
    _write_types(data, folder / "types", size)
    for language, path in _files(data / "massive", size.languages, "*.dev.jsonl").items():
        rows = [{"id": row["id"], "text": row["utt"]} for row in _rows(path)]
        _write(folder / f"parallel/{language}.jsonl", rows[:PROBE_SENTENCES])
    _write(folder / "held_out.jsonl", ({"text": text} for text in sorted(_held_out(data))))
    options = ["--dev", 50, "--against", folder / "held_out.jsonl", "--languages"]
    for task in {arm.task for arm in arms} - {TYPES}:
        _write_task(data, folder, task, size)
        if task.aligned:
            codes = _bitext_codes(data, task.aligned)
            _prepare(folder, f"tatoeba-{task.name}", "bitext", data / "tatoeba", *options, ",".join(codes))

    labelled = [language for language in size.supervised if language != "en"]
    codes = _bitext_codes(data, [*labelled, *size.aligned])
    _prepare(folder, "tatoeba", "bitext", data / "tatoeba", *options, ",".join(codes))

    files = _files(data / "massive_text", ["en", *labelled, *size.aligned])
    codes = [path.stem for path in files.values()]
    subsets = {"massive": (codes, [])}
    subsets |= {f"massive-pairs-{pairs}": (codes, ["--max-rows", pairs]) for pairs in PAIRS}
    subsets |= {f"massive-languages-{number}": (codes[: 1 + len(labelled) + number], []) for number in LANGUAGES}
    wanted = [change for arm in arms for change in arm.changes]
    for name, (chosen, more) in subsets.items():
        if name == "massive" or any(f"/{name}/" in change for change in wanted):
            more = ["--against", folder / "types/train.*.jsonl", *more]
            _prepare(folder, name, "bitext", data / "massive_text", *options, ",".join(chosen), *more)


def _prepare(folder: Path, name: str, dataset: str, source: Path, *options: object) -> None:
    if not (folder / name / "prepare.json").exists():
        mlalign(folder / "prepare.log", "prepare", dataset, source, folder / name, *options)


def _write_task(data: Path, folder: Path, task: Task, size: Size) -> None:
    """Rows of a task in one of the paper's formats, with labels in its supervised languages alone."""
    name, options = task.name, ["--format", "plain"]
    if task is WORDS:
        _prepare(folder, name, "massive", data / "massive", *options, "--languages", ",".join(size.languages))
    elif task is JSON:
        _prepare(folder, name, "uner", data / "uner", *options)
    else:
        _prepare(folder, name, "translation", data / "mt", *options)
    for path in (folder / name).glob("train.*.jsonl"):
        if path.name.split(".")[1] not in (task.supervised or size.supervised):
            path.unlink()


def base_model(data: Path, folder: Path, size: Size, seed: int, deadline: float) -> None:
    """Pretrain the base model on unlabelled text of all languages of `size` and save it, unless it is there.

    Among the sentences are made-up answers in random order, beside no utterance: words that are nowhere else in the
    text would be letters to the model.
    Raises UserError at the deadline (of time.monotonic); the next start goes on.
    """
    if folder.exists():
        say(f"kept from an earlier start: {folder}")
        return
    sentences = list(_texts(data, size))
    intents, types = labels(data)
    rng = random.Random(seed)
    for _ in range(len(sentences) // 20):
        chosen = sorted(rng.sample(types, min(len(types), rng.choice([0, 1, 1, 2, 3]))))
        sentences.append(f"{ARROW.strip()} {'; '.join([rng.choice(intents), *chosen])}")
    say(f"base model: {len(sentences):,} sentences in {len(size.languages)} languages, {size.base_steps:,} steps")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with Progress(console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("base model", total=size.base_steps)

        def progress(step: int, loss: float) -> None:
            bar.update(task, completed=step)
            if step % 250 == 0:
                say(f"step {step:,}/{size.base_steps:,}  loss {loss:.3f}")
            if time.monotonic() > deadline:
                raise UserError(
                    "the budget is used up, and the base model is not done: the same command goes on with it"
                )

        train_base(
            sentences, folder, seed, size.shape, steps=size.base_steps, batch_size=32, device=device, progress=progress
        )


def labels(data: Path) -> tuple[list[str], list[str]]:
    """Intents and slot types of the task, sorted."""
    rows = list(_rows(_files(data / "massive", ["en"], "*.train.jsonl")["en"]))
    return sorted({row["intent"] for row in rows}), sorted({slot["type"] for row in rows for slot in row["slots"]})


def _write_types(data: Path, folder: Path, size: Size) -> None:
    wanted = {"train": size.supervised, "dev": size.languages, "test": size.languages}
    for split, languages in wanted.items():
        for language, path in _files(data / "massive", languages, f"*.{split}.jsonl").items():
            kept_out = _utterances(data, path.name.split(".")[0]) if split == "train" else ()
            rows = (
                {
                    "id": row["id"],
                    "lang": language,
                    "prompt": row["utt"] + ARROW,
                    "completion": " " + "; ".join([row["intent"], *sorted({slot["type"] for slot in row["slots"]})]),
                    "text": row["utt"],
                }
                for row in _rows(path)
                if row["utt"] not in kept_out
            )
            _write(folder / f"{split}.{language}.jsonl", rows)


def _texts(data: Path, size: Size) -> Iterator[str]:
    """Unlabelled sentences of all languages: utterances, both sides of bitext, and train texts of the other tasks.

    Nothing of dev and test. Raises UserError where a corpus is not there.
    """
    tasks = [task for task in (JSON, TRANSLATION) if task.corpus in size.corpora]
    others = _held_out(data) if tasks else set()
    for language in size.languages:
        path = _files(data / "massive_text", [language])[language]
        kept_out = _utterances(data, path.stem) | _utterances(data, "en-*") | others
        yield from (row["utt"] for row in _rows(path) if row["utt"] not in kept_out)
        yield from (text for path in _tatoeba(data, [language]) for text in _sides(path) if text not in kept_out)
    for task in tasks:
        labelled = sorted((data / task.corpus).glob("*train*.jsonl"))
        if not labelled:
            raise UserError(f"{data / task.corpus} has no train files: see benchmarks/transfer/README.md")
        paths = [*_tatoeba(data, {*task.aligned} - {*size.languages}), *labelled]
        yield from (text for path in paths for text in _sides(path) if text not in others)


def _tatoeba(data: Path, languages: Collection[str]) -> list[Path]:
    """Bitext with English of those languages that Tatoeba has."""
    paths = sorted((data / "tatoeba").glob("*-eng.jsonl"))
    return [path for path in paths if language_of(path.stem.removesuffix("-eng")) in languages]


def _bitext_codes(data: Path, languages: Collection[str]) -> list[str]:
    """English's and those languages', as Tatoeba's files have them. Raises UserError where one has no file."""
    files = _files(data / "tatoeba", [*languages], "*-eng.jsonl")
    return ["eng", *(path.stem.removesuffix("-eng") for path in files.values())]


def _sides(path: Path) -> Iterator[str]:
    """Texts of rows of bitext or of UNER."""
    yield from (row[side] for row in _rows(path) for side in ("src", "tgt", "text") if side in row)


def _held_out(data: Path) -> set[str]:
    """All dev and test sentences."""
    paths = [
        path for corpus in ("uner", "mt") for split in ("dev", "test") for path in (data / corpus).glob(f"*{split}*")
    ]
    return _utterances(data, "*") | {text for path in paths for text in _sides(path)}


def _utterances(data: Path, locales: str) -> set[str]:
    """Dev and test utterances of the locales of a glob."""
    paths = [path for split in ("dev", "test") for path in (data / "massive").glob(f"{locales}.{split}.jsonl")]
    return {row["utt"] for path in paths for row in _rows(path)}


def _files(folder: Path, languages: list[str] | tuple[str, ...], pattern: str = "*.jsonl") -> dict[str, Path]:
    """Language -> its file in `folder`. Raises UserError where there is none."""
    found = {language_of(path.name.split(".")[0].removesuffix("-eng")): path for path in folder.glob(pattern)}
    for language in languages:
        if language not in found:
            raise UserError(f"{folder} has no {pattern} of language {language}: see benchmarks/transfer/README.md")
    return {language: found[language] for language in languages}


def _rows(path: Path) -> Iterator[dict]:
    with path.open(encoding="utf-8") as file:
        yield from map(json.loads, file)


def _write(path: Path, rows: "Iterator[dict] | list[dict]") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
