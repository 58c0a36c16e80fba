"""Bitext: pairs of sentences that translate each other, from whatever layout they come in.

A directory, a file, a glob or a hub id: Moses pairs as OPUS and Tatoeba ship them (`X.de-en.de` beside `X.de-en.en`,
perhaps .gz, or in OPUS's `.txt.zip`); `.tmx`, perhaps .gz; rows of `src`, `tgt`, `src_lang`, `tgt_lang` or of the
hub's `translation`; or a file per language, as FLORES and NTREX, where line n, or `id` x, is the same sentence in all
of them and every language is paired with a pivot. All are streams; of a file per language with ids, the pivot's
sentences are held. A hub dataset has one configuration per pair, as Helsinki-NLP/opus-100.

Rows that share an id count as the same sentence in training. Ids are those of the rows, of the hub's with their
configuration and split, else file and line: running numbers of two corpora are not the same.
"""

from collections import Counter
from collections.abc import Collection, Iterator
from itertools import zip_longest
from os.path import commonpath
from pathlib import Path, PurePosixPath
from typing import IO
from xml.etree import ElementTree
from zipfile import ZipFile

from langcodes import tag_is_valid

from mlalign.corpora.item import (
    DAMAGE,
    PLAIN,
    Item,
    by_language,
    check_language,
    holds_pairs,
    hub_configurations,
    hub_rows,
    input_files,
    open_plain,
    refuse_unknown,
    sentences,
    undamaged,
)
from mlalign.data import bitext_fields
from mlalign.errors import UserError
from mlalign.languages import language_of
from mlalign.rows import SUFFIXES, is_local, read_file, row_id

_CODE = ("bpt", "ept", "it", "ph", "ut")
_LANGUAGE = "{http://www.w3.org/XML/1998/namespace}lang"

_Pair = tuple[str, str]


def read(
    source: str, splits: Collection[str], languages: Collection[str] | None, pivot: str | None, notes: Counter[str]
) -> Iterator[Item]:
    """Yield pairs of `languages`, of which both sides must be. Files are all `train`; a hub dataset has its own splits.

    Args: pivot: of a file per language, and of TMX units in more than two; the English one by default; notes: what
    could not be paired.
    Raises UserError where nothing is there to read, or something is not what it seems to be.
    """
    wanted = _Wanted(languages)
    if not is_local(source):
        if pivot is not None:
            raise UserError(f"pivot {pivot} is for files of one language each, and {source} is a hub dataset of pairs")
        yield from _read_hub(source, splits, wanted)
    elif "train" in splits:
        yield from _read_files(source, wanted, pivot, notes)
    if "train" in splits:  # not every language need be in dev and test
        wanted.check(source)


class _Wanted:
    """Says whether a language pair is to be read, and remembers which languages were there."""

    def __init__(self, languages: Collection[str] | None) -> None:
        self._languages = languages
        self._pairs: dict[_Pair, bool] = {}

    def __call__(self, pair: _Pair, where: object) -> bool:
        """Raises UserError for what are not two languages. `where` is where a pair stands."""
        if pair not in self._pairs:
            if check_language(pair[0], str(where)) == check_language(pair[1], str(where)):
                raise UserError(f"{where}: both sides are in {pair[0]}")
            self._pairs[pair] = self._languages is None or set(pair) <= set(self._languages)
        return self._pairs[pair]

    def check(self, source: str) -> None:
        """Raise UserError where what was asked for was not there."""
        refuse_unknown(self._languages, (code for pair in self._pairs for code in pair), source)
        if self._pairs and not any(self._pairs.values()):
            raise UserError(
                f"{source} has no pair of the languages {', '.join(self._languages or ())}: name both sides of a pair, "
                f"such as {','.join(next(iter(self._pairs)))}"
            )


# --------------------------------------------------------------------------------------------------------------- files


def _read_files(source: str, wanted: _Wanted, pivot: str | None, notes: Counter[str]) -> Iterator[Item]:
    moses: dict[tuple[Path, str], _Pair] = {}  # (folder, name without language) -> languages
    tmx, archives, rows, texts, others = [], [], [], [], []
    paths = input_files(source, "train.*.jsonl")
    root = commonpath(path.parent for path in paths)

    def prefix(path: Path) -> str:
        """Of ids: the same name in another folder is another corpus."""
        return path.relative_to(root).as_posix()

    for path in paths:
        stem, pair = _moses_name(path.name)
        if pair is not None:
            moses[path.parent, stem] = pair
        elif path.name.endswith((".tmx", ".tmx.gz")):
            tmx.append(path)
        elif path.suffix == ".zip":
            archives.append(path)
        elif path.suffix in SUFFIXES:
            (rows if holds_pairs(path) else texts).append(path)
        elif path.suffix in PLAIN:
            texts.append(path)
        else:
            others.append(path)
    if others:
        notes[f"files that were not read, such as {others[0].name}"] += len(others)
    pairs = [*(folder / stem for folder, stem in moses), *tmx, *archives, *rows]
    if not pairs and not texts:
        raise UserError(
            f"{source} holds nothing that is read as bitext: X.de-en.de beside X.de-en.en, .tmx, .zip of OPUS, rows "
            "with src, tgt, src_lang and tgt_lang, or a file per language such as eng_Latn.txt"
        )
    if pairs and texts:
        raise UserError(f"{pairs[0]} holds bitext, but {texts[0]} does not: give one kind at a time")
    if pivot is not None and not texts and not tmx:
        raise UserError(f"pivot {pivot} is for files of one language each, and {source} holds pairs")
    if moses and not tmx and not archives and not rows:  # all is known before the first line is read
        for (folder, stem), pair in moses.items():
            wanted(pair, folder / stem)
        wanted.check(source)
    for (folder, stem), pair in moses.items():
        if wanted(pair, folder / stem):
            yield from _read_moses(folder, stem, pair, prefix(folder / stem))
    for path in archives:
        yield from _read_archive(path, prefix(path.parent), wanted)
    for path in tmx:
        yield from _read_tmx(path, prefix(path.with_suffix("")), wanted, pivot, notes)
    for path in rows:
        yield from _read_rows(path, prefix(path.with_suffix("")), wanted)
    if texts:
        yield from _read_by_language(texts, source, wanted, pivot, notes)


def _moses_name(name: str) -> tuple[str, _Pair | None]:
    """`X.de-en.de.gz` -> ("X.de-en", ("de", "en")); no pair for the name of anything else."""
    stem, _, code = name.removesuffix(".gz").rpartition(".")
    pair = stem.rpartition(".")[2]
    if code and pair.startswith(f"{code}-"):
        return stem, (code, pair.removeprefix(f"{code}-"))
    if code and pair.endswith(f"-{code}"):
        return stem, (pair.removesuffix(f"-{code}"), code)
    return stem, None


def _read_moses(folder: Path, stem: str, pair: _Pair, prefix: str) -> Iterator[Item]:
    paths = []
    for code in pair:
        there = [path for suffix in ("", ".gz") if (path := folder / f"{stem}.{code}{suffix}").is_file()]
        if not there:
            raise UserError(f"{folder / stem}.{code} is missing, with the other side of {stem}.{'|'.join(pair)}")
        paths.append(there[0])
    with open_plain(paths[0]) as src, open_plain(paths[1]) as tgt:
        yield from _line_pairs((src, tgt), (str(paths[0]), str(paths[1])), pair, prefix)


def _read_archive(path: Path, folder: str, wanted: _Wanted) -> Iterator[Item]:
    """OPUS's zip of a Moses pair with a README and a licence."""
    with undamaged(path), ZipFile(path) as archive:
        names = archive.namelist()
        stems = {stem: pair for stem, pair in map(_moses_name, names) if pair is not None}
        if not stems:
            raise UserError(f"{path} holds no pair of files such as X.de-en.de and X.de-en.en")
        for stem, pair in stems.items():
            sides = (f"{stem}.{pair[0]}", f"{stem}.{pair[1]}")
            lacking = [side for side in sides if side not in names]
            if lacking:
                raise UserError(f"{path} lacks {lacking[0]}, the other side of a pair")
            if wanted(pair, path):
                with archive.open(sides[0]) as src, archive.open(sides[1]) as tgt:
                    places = (f"{path}, {sides[0]}", f"{path}, {sides[1]}")
                    yield from _line_pairs((src, tgt), places, pair, (PurePosixPath(folder) / stem).as_posix())


def _line_pairs(files: tuple[IO[bytes], IO[bytes]], names: _Pair, pair: _Pair, prefix: str) -> Iterator[Item]:
    """Line n of one file translates line n of the other."""
    src_lang, tgt_lang = pair
    number = 0
    try:
        for one, other in zip_longest(*files):
            number += 1
            if one is None or other is None:
                short, long = names if one is None else names[::-1]
                raise UserError(f"{long}:{number} has no counterpart: {short} ends at line {number - 1}")
            src, tgt = one.decode(), other.decode()
            if number == 1:
                src, tgt = src.removeprefix("\ufeff"), tgt.removeprefix("\ufeff")
            src, tgt = src.strip(), tgt.strip()
            row = {"id": f"{prefix}-{number}", "src_lang": src_lang, "tgt_lang": tgt_lang, "src": src, "tgt": tgt}
            yield Item("train", pair, row, (src, tgt), f"{names[0]}:{number}")
    except UnicodeDecodeError as error:
        broken = names[0] if error.object == one else names[1]
        raise UserError(f"{broken}:{number}: not valid UTF-8 (byte {error.start})") from error
    except DAMAGE as error:
        raise UserError(f"{names[0]} or {names[1]} is cut or damaged after line {number}: {error}") from error


def _item(split: str, pair: _Pair, src: str, tgt: str, own_id: str, where: str) -> Item:
    src, tgt = src.strip(), tgt.strip()
    row = {"id": own_id, "src_lang": pair[0], "tgt_lang": pair[1], "src": src, "tgt": tgt}
    return Item(split, pair, row, (src, tgt), where)


# ------------------------------------------------------------------------------------------------------------ TMX, rows


def _read_tmx(path: Path, prefix: str, wanted: _Wanted, pivot: str | None, notes: Counter[str]) -> Iterator[Item]:
    """Unit after unit, and no more of the document in memory than that."""
    number, orders = 0, {}
    try:
        with undamaged(path), open_plain(path) as file:
            parents = []
            for event, element in ElementTree.iterparse(file, events=("start", "end")):
                if event == "start":
                    parents.append(element)
                    continue
                parents.pop()
                if element.tag != "tu":
                    continue
                number += 1
                where = f"{path}, unit {number}"
                sides = _unit(element, where, notes)
                parents[-1].clear()
                if len(sides) < 2:
                    notes["units in one language"] += 1
                for pair in _unit_pairs(sides, pivot, where):
                    pair = orders.setdefault(frozenset(pair), pair)  # one file for both orders of a document
                    if wanted(pair, where):
                        yield _item("train", pair, sides[pair[0]], sides[pair[1]], f"{prefix}-{number}", where)
    except ElementTree.ParseError as error:
        raise UserError(f"{path}:{error.position[0]}: not valid XML after unit {number}: {error}") from error
    if not number:
        raise UserError(f"{path} holds no translation units")


def _unit(element: ElementTree.Element, where: str, notes: Counter[str]) -> dict[str, str]:
    sides: dict[str, str] = {}
    for variant in element.iter("tuv"):
        code, segment = variant.get(_LANGUAGE) or variant.get("lang"), variant.find("seg")
        if code is None or segment is None:
            raise UserError(f"{where}: a tuv without {'xml:lang' if code is None else 'seg'}")
        if code in sides:
            notes["further sentences of a unit in the same language"] += 1
        sides.setdefault(code, _text(segment))
    return sides


def _text(segment: ElementTree.Element) -> str:
    """Without what TMX says of formatting, whose content is code."""
    inner = ("" if child.tag in _CODE else _text(child) for child in segment)
    tails = (child.tail or "" for child in segment)
    return (segment.text or "") + "".join(f"{text}{tail}" for text, tail in zip(inner, tails))


def _unit_pairs(sides: dict[str, str], pivot: str | None, where: str) -> list[_Pair]:
    """The pairs of a unit: its two languages as they stand, or every language with the pivot."""
    if len(sides) < 2:
        return []
    if len(sides) == 2 and pivot is None:
        return [tuple(sides)]
    pivot = _pivot(list(sides), pivot, where)
    return [(code, pivot) for code in sides if code != pivot]


def _pivot(codes: list[str], pivot: str | None, where: str) -> str:
    english = [code for code in codes if language_of(code) == "en"]
    if pivot is None and len(english) == 1:
        return english[0]
    if pivot not in codes:
        what = f"no language {pivot}" if pivot else "not one English" if english else "no English"
        raise UserError(f"{where} has {what}: give --pivot, one of {', '.join(sorted(codes))}")
    return pivot


def _read_rows(path: Path, prefix: str, wanted: _Wanted) -> Iterator[Item]:
    for number, (where, row) in enumerate(read_file(path), 1):
        src, tgt, pair = bitext_fields(row, where)
        if wanted(pair, where):
            yield _item("train", pair, src, tgt, row_id(row) or f"{prefix}-{number}", where)


def _read_hub(source: str, splits: Collection[str], wanted: _Wanted) -> Iterator[Item]:
    name = source.rpartition("/")[2]
    for configuration in hub_configurations(source):
        codes = tuple(configuration.split("-"))
        if len(codes) == 2 and all(map(tag_is_valid, codes)) and not wanted(codes, f"{source} {configuration}"):
            continue
        counts: Counter[str] = Counter()
        for split, where, row in hub_rows(source, configuration, splits):
            counts[split] += 1
            src, tgt, pair = bitext_fields(row, where)
            if wanted(pair, where):
                number = row_id(row) or counts[split]
                yield _item(split, pair, src, tgt, f"{name}-{configuration}-{split}-{number}", where)


# ---------------------------------------------------------------------------------------------------- a file a language


def _read_by_language(
    paths: list[Path], source: str, wanted: _Wanted, pivot: str | None, notes: Counter[str]
) -> Iterator[Item]:
    files = by_language(paths)
    for code, path in files.items():
        check_language(code, str(path))
    if len(files) < 2:
        raise UserError(f"{source} holds one language, {', '.join(files)}: bitext needs two")
    pivot = _pivot(list(files), pivot, source)
    others = [code for code in files if code != pivot]
    for code in others:
        wanted((code, pivot), files[code])
    wanted.check(source)
    prefix = Path(source).name if Path(source).is_dir() else Path(source).parent.name
    by_id = next((one.id is not None for one in sentences(files[pivot])), False)
    held = _held(files[pivot]) if by_id else {}
    for code in others:
        pair = (code, pivot)
        if not wanted(pair, files[code]):
            continue
        if not by_id:
            yield from _by_line(files[code], files[pivot], pair, prefix)
            continue
        found = 0
        for where, own_id, text in sentences(files[code]):
            if own_id is None:
                raise UserError(f"{where} has no id, but {files[pivot]} has ids: give them to all or to none")
            if own_id in held:
                found += 1
                yield _item("train", pair, text, held[own_id], own_id, where)
            else:
                notes[f"sentences that {pivot} does not have"] += 1
        if found < len(held):
            notes[f"sentences of {pivot} that another language does not have"] += len(held) - found


def _held(path: Path) -> dict[str, str]:
    """Id -> sentence."""
    held: dict[str, str] = {}
    for where, own_id, text in sentences(path):
        if own_id is None or own_id in held:
            raise UserError(f"{where}: {'no id' if own_id is None else f'id {own_id!r} appears a second time'}")
        held[own_id] = text
    return held


def _by_line(path: Path, pivot: Path, pair: _Pair, prefix: str) -> Iterator[Item]:
    for number, (one, other) in enumerate(zip_longest(sentences(path), sentences(pivot)), 1):
        if one is None or other is None:
            short, long = (path, pivot) if one is None else (pivot, path)
            raise UserError(f"{long}:{number} has no counterpart: {short} ends at line {number - 1}")
        if one.id is not None:
            raise UserError(f"{one.where} has an id, but {pivot} has none: give them to all or to none")
        yield _item("train", pair, one.text, other.text, f"{prefix}-{number}", one.where)
