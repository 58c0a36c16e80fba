"""`mlalign prepare DATASET INPUT OUTPUT`: a public dataset as files of rows for training and evaluation.

massive, uner, translation become task rows for slot filling, JSON extraction and translation, bitext becomes pairs for
alignment; INPUT is what is published, see the reader of that name in `corpora`. Train loses what is empty, what stands
twice and what stands in dev, test or the files `--against`, exactly or up to case, spaces and punctuation; dev and test
stay as they are. Everything is a stream: memory grows by 12 bytes a row of train, see `sieve`.

OUTPUT/<split>.<language>.jsonl    or <split>.<src>-<tgt>.jsonl; splits are train, dev, test. Rows have `id`, and
    of tasks `lang` and either `messages` or `prompt` and `completion`, with `text` and `annot_utt` (massive), `text`
    (uner) or `src`, `tgt`, `src_lang`, `tgt_lang` (translation); of bitext only the last four
OUTPUT/prepare.json                what was done and counted, see `_report`; written last
"""

import gc
from collections import Counter
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType

from mlalign import __version__
from mlalign.corpora import against
from mlalign.errors import UserError
from mlalign.rundir import locked
from mlalign.sieve import Sieve
from mlalign.tasks.prompts import FORMS
from mlalign.tracker import say

TASKS = ("massive", "translation", "uner")
DATASETS = (*TASKS, "bitext")

_EVERY = 1_000_000  # rows between two signs of life

#: Options that are not for all datasets -> those that they are for.
_OPTIONS = {"form": TASKS, "directions": ("translation",), "dev": ("bitext",), "pivot": ("bitext",)}


@dataclass(frozen=True)
class Settings:
    """What to prepare, and how: the options of the command."""

    dataset: str
    source: str
    output: Path
    form: str | None = None  #: chat by default
    languages: list[str] | None = None
    max_rows: int | None = None
    balance: bool = False
    seed: int = 0
    against: tuple[str, ...] = ()
    dev: int | None = None
    pivot: str | None = None
    directions: str | None = None  #: both by default


def prepare(settings: Settings) -> dict:
    """Read, sift, write and say everything; returns what `prepare.json` holds.

    Raises UserError, and leaves what an earlier run wrote as it was, for settings, input or output that will not do.
    """
    _check(settings)
    kept_out = against.files(settings.against)
    reader = import_module(f"mlalign.corpora.{settings.dataset}")
    with locked(settings.output, "output"):
        return _prepare(settings, reader, kept_out)


def _prepare(settings: Settings, reader: ModuleType, kept_out: list[str]) -> dict:
    choice = settings.max_rows is not None or settings.balance
    origin = {"dataset": settings.dataset, "source": settings.source}
    sieve = Sieve(settings.output, origin, settings.seed, choice or settings.dev is not None)
    notes: Counter[str] = Counter()
    gc.freeze()  # else the garbage collector looks through all of torch again and again: a fifth of the time
    try:
        sentences = sieve.keep_out(against.sentences(kept_out))
        for splits in (("dev", "test"), ("train",)):  # what train must not hold comes first
            items, told = reader.read(settings.source, splits=splits, notes=notes, **_how(settings)), 0
            for count in sieve.take(items):
                if count // _EVERY > told:
                    told = count // _EVERY
                    say(f"{count:,} rows read")
        if not sieve.outputs:
            raise UserError(f"{settings.source} holds no rows")
        sieve.count_overlap()
        if settings.dev is not None:
            sieve.hold_out(settings.dev)
        if settings.max_rows is not None or settings.balance:
            sieve.sample(settings.max_rows, settings.balance)
        report = _report(settings, sieve, kept_out, sentences, notes)
        sieve.publish(report)
    finally:
        gc.unfreeze()
        sieve.discard()
    _show(report, settings.output)
    return report


def _check(settings: Settings) -> None:
    if settings.dataset not in DATASETS:
        raise UserError(f"dataset {settings.dataset} is not known: prepare reads {', '.join(DATASETS)}")
    for option, datasets in _OPTIONS.items():
        if getattr(settings, option) is not None and settings.dataset not in datasets:
            name = {"form": "format"}.get(option, option)
            raise UserError(f"{name} is an option of {', '.join(datasets)}, not of {settings.dataset}")
    if settings.form not in (None, *FORMS):
        raise UserError(f"format {settings.form} is not one of {', '.join(FORMS)}")
    languages = settings.languages or []
    repeated = next((code for number, code in enumerate(languages) if code in languages[:number]), None)
    if repeated is not None:
        raise UserError(f"languages {','.join(languages)}: {repeated} is named twice")
    if settings.languages == []:
        raise UserError("languages is empty: name some, such as en,de, or leave it out")


def _how(settings: Settings) -> dict:
    """What the reader of the dataset is told beside what to read."""
    how: dict = {"languages": settings.languages}
    if settings.dataset in TASKS:
        how["form"] = settings.form or "chat"
    if settings.dataset == "translation":
        how["directions"] = settings.directions or "both"
    if settings.dataset == "bitext":
        how["pivot"] = settings.pivot
    return how


# -------------------------------------------------------------------------------------------------------------- report


def _report(settings: Settings, sieve: Sieve, kept_out: list[str], sentences: int, notes: Counter[str]) -> dict:
    """What `prepare.json` holds.

    mlalign, settings    what was run
    against              {files, sentences}: what `--against` named
    files                file -> {rows, read, dropped: {reason: rows}}; rows + all dropped = read; one without rows is
                         not written. A row is dropped for the first of these reasons that holds:
        empty                     of any side
        same on both sides        up to normalising: case, spaces, punctuation (see `sifting`)
        in dev | test | --against, exact | normalised     any side, in dev and test in the same language
        duplicate, exact | normalised                     of an earlier row of the file, as a whole
        held out as dev           is in dev now           shares a side with dev    in the same language, of any pair
        not sampled               by max_rows or balance
    overlap              file of dev -> {exact, normalised}: rows with a sentence of test in the same language; kept
    notes                what a reader left out or read as something else -> how often
    """
    order = {split: number for number, split in enumerate(("train", "dev", "test"))}
    outputs = sorted(sieve.outputs.values(), key=lambda output: (order[output.split], output.name))
    return {
        "mlalign": __version__,
        "settings": asdict(settings)
        | _how(settings)
        | {"output": str(settings.output), "against": list(settings.against)},
        "against": {"files": kept_out, "sentences": sentences},
        "files": {
            output.name: {"rows": output.rows, "read": output.read, "dropped": dict(output.dropped)}
            for output in outputs
        },
        "overlap": {output.name: dict(output.also_in_test) for output in outputs if output.also_in_test},
        "notes": dict(notes),
    }


def _show(report: dict, output: Path) -> None:
    """A line for each split, and what was dropped from it; then what readers noted."""
    unit = "languages" if report["settings"]["dataset"] in ("massive", "uner") else "language pairs"
    for split in ("train", "dev", "test"):
        files = {name: each for name, each in report["files"].items() if name.startswith(f"{split}.")}
        rows = {name.split(".")[1]: each["rows"] for name, each in files.items() if each["rows"]}
        say(
            f"{split}: {sum(rows.values()):,} rows in {len(rows)} {unit} ({', '.join(rows)})"
            if rows
            else f"{split}: none"
        )
        dropped: Counter[str] = Counter()
        for each in files.values():
            dropped.update(each["dropped"])
        if dropped:
            reasons = "; ".join(f"{reason}: {count:,}" for reason, count in dropped.most_common())
            say(f"  of {sum(each['read'] for each in files.values()):,} read, not kept: {reasons}")
        also = Counter()
        for name in files:
            also.update(report["overlap"].get(name, {}))
        if also:
            say(f"  also in test, kept: {'; '.join(f'{kind}: {count:,}' for kind, count in also.items())}")
    for note, count in report["notes"].items():
        say(f"{note}: {count:,}")
    say(f"all counts are in {output / 'prepare.json'}")
