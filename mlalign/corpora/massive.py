"""MASSIVE 1.1 (FitzGerald et al. 2022): utterances with slots, as task rows for slot filling.

Read from a directory of `<locale>.jsonl` with a `partition` field, as published, or of `<locale>.<split>.jsonl`; from
the published `amazon-massive-dataset-1.1.tar.gz`; or from the hub, one configuration per locale. A row holds `id`,
`utt` and `annot_utt`, the utterance with its slots marked, and perhaps `slots`, where values stand as in `utt`.
"""

import re
import tarfile
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path, PurePosixPath

from mlalign.corpora.item import (
    Item,
    check_language,
    hub_configurations,
    hub_rows,
    json_lines,
    refuse_unknown,
    text_field,
    undamaged,
)
from mlalign.errors import UserError
from mlalign.rows import Row, is_local, read_file
from mlalign.tasks.slot_filling import row as task_row
from mlalign.tasks.slot_filling import words_and_labels

_FILE = re.compile(r"([a-z]{2,3}-[A-Z]{2})(?:\.(train|dev|test))?\.jsonl")
_SLOT = re.compile(r"\[\s*(\w+)\s*:\s*(.*?)\s*\]")
_SPLITS = ("train", "dev", "test")
_HIDDEN = ("MMNLU-22", "heldout")  # of the shared task MMNLU-22, whose rows say nothing of slots
_EXPECTED = "a row of MASSIVE 1.1"


def read(
    source: str, splits: Collection[str], languages: Collection[str] | None, form: str, notes: Counter[str]
) -> Iterator[Item]:
    """Yield the rows of `splits`. Args: languages: such as de and zh-TW; form: of prompts; notes: what was ignored.

    Raises UserError where there is no locale, or a row is not as published.
    """
    if not is_local(source):
        rows = _read_hub(source, splits, languages)
    elif source.endswith((".tar.gz", ".tgz")):
        rows = _read_archive(source, languages)
    else:
        rows = _read_directory(source, splits, languages)
    for locale, split, where, row in rows:
        split = split or text_field(row, "partition", where, _EXPECTED)
        if split in _HIDDEN:
            if "train" in splits:  # a file of all partitions is read once for train, and once for the others
                notes[f"rows of the partition {split}, which has no slots, ignored"] += 1
        elif split not in _SPLITS:
            raise UserError(f"{where}: partition is {split!r}, expected one of {', '.join(_SPLITS)}")
        elif split in splits:
            yield _convert(row, split, _language(locale), form, where)


def _language(locale: str) -> str:
    """`de-DE` -> `de`; but there are two kinds of Chinese: `zh` is zh-CN."""
    return locale if locale == "zh-TW" else locale.split("-")[0]


def _convert(row: Row, split: str, language: str, form: str, where: str) -> Item:
    id_, utterance, annotated = (text_field(row, name, where, _EXPECTED) for name in ("id", "utt", "annot_utt"))
    try:
        words_and_labels(annotated, language)
        slots = _given(row["slots"]) if "slots" in row else _marked(annotated, utterance)
    except ValueError as error:
        raise UserError(f"{where}: annot_utt is {annotated!r} and utt is {utterance!r}: {error}") from error
    except (KeyError, TypeError) as error:
        raise UserError(f"{where}: slots must be a list of objects with type and value") from error
    prompt = task_row(utterance, slots, form)
    written = {"id": id_, "lang": language, **prompt, "text": utterance, "annot_utt": annotated}
    return Item(split, (language,), written, (utterance.strip(),), where)


def _given(slots: list[dict[str, str]]) -> list[tuple[str, str]]:
    return [(slot["type"], slot["value"]) for slot in slots]


def _marked(annotated: str, utterance: str) -> list[tuple[str, str]]:
    """`wake me at [time : nine am]` -> [("time", "nine am")], with values as they stand in the utterance.

    In Japanese and Chinese the annotated utterance has spaces that the utterance lacks, so spaces are not compared.
    Raises ValueError where the two differ in more.
    """
    places = [place for place, character in enumerate(utterance) if not character.isspace()]
    slots, plain, end = [], "", 0
    for match in _SLOT.finditer(annotated):
        plain += _squeezed(annotated[end : match.start()])
        value = _squeezed(match[2])
        if not value:
            raise ValueError(f"the slot {match[1]} is empty")
        slots.append((match[1], len(plain), len(plain) + len(value)))
        plain, end = plain + value, match.end()
    if plain + _squeezed(annotated[end:]) != _squeezed(utterance):
        raise ValueError("they are not the same words")
    return [(kind, utterance[places[first] : places[last - 1] + 1]) for kind, first, last in slots]


def _squeezed(text: str) -> str:
    return "".join(text.split())


# ------------------------------------------------------------------------------------------ (locale, split, where, row)

_Rows = Iterator[tuple[str, str | None, str, Row]]


def _read_directory(source: str, splits: Collection[str], languages: Collection[str] | None) -> _Rows:
    folder = Path(source)
    if not folder.is_dir():
        raise UserError(f"{source} is not a directory and no .tar.gz: give the published archive or what is in it")
    files = {path: match for path in sorted(folder.iterdir()) if (match := _FILE.fullmatch(path.name))}
    if not files:
        inside = sorted(path.name for path in folder.iterdir() if path.is_dir())
        hint = f" (it has the directories {', '.join(inside)})" if inside else ""
        raise UserError(
            f"{source} holds no <locale>.jsonl or <locale>.<split>.jsonl files such as en-US.train.jsonl{hint}"
        )
    whole = {match[1]: path for path, match in files.items() if match[2] is None}
    for path, match in files.items():
        if whole.get(match[1], path) != path:
            raise UserError(f"{whole[match[1]]} and {path} may hold the same rows: keep one of them")
    refuse_unknown(languages, {_language(match[1]) for match in files.values()}, source)
    for path, match in files.items():
        locale, split = match.groups()
        if (languages is None or _language(locale) in languages) and (split is None or split in splits):
            check_language(locale, str(path))
            for where, row in read_file(path):
                if split is not None and row.get("partition", split) != split:
                    raise UserError(f"{where}: partition is {row['partition']!r}, but the file is named {split}")
                yield locale, split, where, row


def _read_archive(source: str, languages: Collection[str] | None) -> _Rows:
    """Member after member as they stand, in one pass and without unpacking."""
    if not Path(source).is_file():
        raise UserError(f"{source} does not exist or is not a file")
    there = set()
    with undamaged(source), tarfile.open(source, "r|gz") as archive:
        for member in archive:
            path = PurePosixPath(member.name)
            match = _FILE.fullmatch(path.name)
            if not (member.isfile() and match and not match[2] and path.parent.name == "data"):
                continue
            language = _language(check_language(match[1], f"{source}, {member.name}"))
            there.add(language)
            if languages is None or language in languages:
                for where, row in json_lines(archive.extractfile(member), f"{source}, {member.name}"):
                    yield match[1], None, where, row
    if not there:
        raise UserError(f"{source} holds no data/<locale>.jsonl files: expected the archive of MASSIVE 1.1")
    refuse_unknown(languages, there, source)


def _read_hub(source: str, splits: Collection[str], languages: Collection[str] | None) -> _Rows:
    configurations = hub_configurations(source)
    locales = [name for name in configurations if _FILE.fullmatch(f"{name}.jsonl")]
    if not locales:
        raise UserError(f"{source} has no configuration for a locale such as en-US, but {', '.join(configurations)}")
    refuse_unknown(languages, map(_language, locales), source)
    for locale in locales:
        if languages is None or _language(locale) in languages:
            for split, where, row in hub_rows(source, locale, splits):
                yield locale, split, where, row
