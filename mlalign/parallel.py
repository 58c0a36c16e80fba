"""Sentences that translate each other, for `mlalign probe`: from files or a hub dataset to tables of rows.

Either one file (or hub configuration) per language, line n or `id` x being the same sentence in all of them, as in
FLORES and NTREX: one table of all languages. Or bitext rows against one pivot language: one table per language pair.
Each distinct sentence of a language is held once, so that it passes the model once.
"""

import glob
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from mlalign.config import Source
from mlalign.corpora.item import refuse_twice
from mlalign.data import bitext_fields
from mlalign.errors import UserError
from mlalign.hostile import checked_name
from mlalign.rows import REPORT, Row, is_local, matching, read_rows

MIN_SENTENCES = 5  #: a margin looks at four neighbours beside the sentence itself
MAX_SENTENCES = 20_000  #: every sentence is compared with every other: 1.6 GB at once

_PLAIN = (".txt", ".dev", ".devtest", ".test")  # one sentence a line: FLORES-200 and NTREX as they are published
_ROWS = (".jsonl", ".json", ".csv", ".parquet")
_TEXT_FIELDS = ("text", "sentence")  # FLORES+ and the data of most others; FLORES-200 on the hub

Entry = tuple[str, str | None, str]  # where, id, text


@dataclass
class Parallel:
    """Sentences and how they belong together."""

    texts: dict[str, list[str]] = field(default_factory=dict)  #: language -> its distinct sentences
    places: dict[str, list[str]] = field(default_factory=dict)  #: "file:line" of each of them, for messages
    tables: list[dict[str, list[int]]] = field(default_factory=list)
    """Language -> rows of `texts`; the n-th rows of all languages of a table are the same sentence."""
    _rows: dict[tuple[str, str], int] = field(default_factory=dict, repr=False)  #: (language, text) -> row

    @property
    def languages(self) -> list[str]:
        return sorted(self.texts)

    @property
    def directions(self) -> int:
        return sum(len(table) * (len(table) - 1) for table in self.tables)

    def add(self, language: str, text: str, where: str) -> int:
        """The row of a sentence among its language's distinct ones; a new one is taken in."""
        texts, places = self.texts.setdefault(language, []), self.places.setdefault(language, [])
        if (language, text) not in self._rows:
            self._rows[language, text] = len(texts)
            texts.append(text)
            places.append(where)
        return self._rows[language, text]


def read_parallel(data: str, languages: list[str] | None, max_sentences: int | None, split: str | None) -> Parallel:
    """Read and check `data`: a directory, a file or glob of bitext, or a hub id.

    Args: languages: those to keep, all by default; max_sentences: the first n of each table; split: of a hub dataset.
    Raises UserError, naming file and line, for sentences that do not belong together one to one.
    """
    if languages is not None and len(set(languages)) < len(languages):
        raise UserError(f"languages {','.join(languages)}: {_first_repeated(languages)} is named twice")
    if not is_local(data):
        corpora = _read_hub(data, languages, split)
        return _one_table(corpora, max_sentences)
    if split is not None:
        raise UserError(f"{data} is local: a split belongs to a hub dataset, name its directory instead")
    files = _files(data)
    first_rows = {path: next(iter(read_rows(Source(path=glob.escape(str(path))))), None) for path in _of(files, _ROWS)}
    bitext = [path for path, first in first_rows.items() if first and not {"src", "translation"}.isdisjoint(first[1])]
    if bitext:
        others = [path for path in files if path not in bitext]
        if others:
            raise UserError(f"{bitext[0]} holds bitext, but {others[0]} does not: a probe reads one kind at a time")
        return _pivot_tables(bitext, languages, max_sentences)
    if not Path(data).is_dir():
        raise UserError(
            f"{data} holds no bitext rows (src, tgt, src_lang, tgt_lang): give them, or a directory of files"
        )
    return _one_table(_read_files(files, data, languages), max_sentences)


# ------------------------------------------------------------------------------------------------ one file a language


def _files(data: str) -> list[Path]:
    folder = Path(data)
    if not folder.is_dir():
        files = [Path(path) for path in matching(data) if Path(path).is_file()]
        if not files:
            raise UserError(f"{data} {'matches no file' if glob.has_magic(data) else 'does not exist'}")
        return files
    if (folder / REPORT).exists():
        raise UserError(f"{data} is what `mlalign prepare` wrote: name files of it, such as {data}/dev.*.jsonl")
    files = _of(sorted(folder.iterdir()), _PLAIN + _ROWS)
    if not files:
        inside = sorted(path.name for path in folder.iterdir() if path.is_dir())
        hint = f" (it has the directories {', '.join(inside)})" if inside else ""
        raise UserError(f"{data} holds no file that ends in {', '.join(_PLAIN + _ROWS)}{hint}")
    return files


def _of(paths: Iterable[Path], suffixes: tuple[str, ...]) -> list[Path]:
    return [path for path in paths if path.suffix in suffixes]


def _read_files(files: list[Path], data: str, languages: list[str] | None) -> dict[str, list[Entry]]:
    codes = [
        path.stem.rpartition(".")[2] for path in files
    ]  # eng_Latn.jsonl, eng_Latn.devtest, newstest2019-ref.deu.txt
    refuse_twice((f"language {code}", path) for code, path in zip(codes, files))
    by_language = dict(zip(codes, files))
    _refuse_unknown(languages, by_language, data)
    return {name: list(_entries(by_language[name])) for name in languages or sorted(by_language)}


def _entries(path: Path) -> Iterator[Entry]:
    if path.suffix in _PLAIN:
        yield from _lines(path)
        return
    for number, (where, row) in enumerate(read_rows(Source(path=glob.escape(str(path)))), 1):
        if path.suffix == ".jsonl" and where != f"{path}:{number}":
            raise UserError(f"{path}:{number} is empty: every line must be a sentence")
        yield _entry(row, where)


def _lines(path: Path) -> Iterator[Entry]:
    lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")  # no other mark ends a line
    if lines[-1] == b"":
        lines.pop()
    for number, line in enumerate(lines, 1):
        where = f"{path}:{number}"
        try:
            text = line.decode().strip()
        except UnicodeDecodeError as error:
            raise UserError(f"{where}: not valid UTF-8 (byte {error.start})") from error
        if not text:
            raise UserError(f"{where} is empty: every line must be a sentence")
        yield where, None, text


def _entry(row: Row, where: str) -> Entry:
    name = next((name for name in _TEXT_FIELDS if name in row), _TEXT_FIELDS[0])
    if not isinstance(row.get(name), str) or not row[name].strip():
        raise UserError(f"{where}: no text in field {name!r} (found {', '.join(map(repr, row)) or 'nothing'})")
    return where, None if row.get("id") is None else str(row["id"]), row[name].strip()


# ------------------------------------------------------------------------------------------------------ from the hub


def _read_hub(name: str, languages: list[str] | None, split: str | None) -> dict[str, list[Entry]]:
    """One configuration per language, as FLORES+ has them; else one table with the language in its columns."""
    import datasets  # here: it takes seconds, and files need it not

    try:
        configurations = datasets.get_dataset_config_names(name)
        named = [each for each in configurations if each not in ("default", "all")]
        splits = datasets.get_dataset_split_names(name, (named or configurations)[0])
    except Exception as error:  # datasets raises many kinds
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{name} is neither a local directory nor a readable hub dataset: {reason}") from error
    if split is None and len(splits) > 1:
        raise UserError(f"{name} has the splits {', '.join(splits)}: choose one with --split")
    split = split or splits[0]
    if split not in splits:
        raise UserError(f"{name} has no split {split}, but {', '.join(splits)}")
    if not named:
        corpora: dict[str, list[Entry]] = {}
        for where, row in _hub_rows(name, configurations[0], split):
            corpora.setdefault(_language_column(row, where), []).append(_entry(row, where))
        _refuse_unknown(languages, corpora, name)
        return {language: corpora[language] for language in languages or sorted(corpora)}
    _refuse_unknown(languages, named, name)
    return {
        language: [_entry(row, where) for where, row in _hub_rows(name, language, split)]
        for language in languages or sorted(named)
    }


def _hub_rows(name: str, configuration: str, split: str) -> Iterator[tuple[str, Row]]:
    import datasets

    for number, row in enumerate(datasets.load_dataset(name, configuration, split=split, streaming=True), 1):
        yield f"{name} {configuration}, row {number}", row


def _language_column(row: Row, where: str) -> str:
    if "iso_639_3" in row and "iso_15924" in row:
        return checked_name(f"{row['iso_639_3']}_{row['iso_15924']}", where)
    for name in ("lang", "language"):
        if isinstance(row.get(name), str):
            return checked_name(row[name], where)
    raise UserError(
        f"{where}: no column lang, language, or iso_639_3 and iso_15924 (found {', '.join(map(repr, row))})"
    )


# ------------------------------------------------------------------------------------------------------------ tables


def _one_table(corpora: dict[str, list[Entry]], max_sentences: int | None) -> Parallel:
    if len(corpora) < 2:
        raise UserError(f"only {', '.join(corpora) or 'nothing'} is there: a probe needs two languages at least")
    parallel = Parallel()
    table: dict[str, list[int]] = {}
    for language, entries in _aligned(corpora).items():
        _refuse_size(len(entries[:max_sentences]), entries[0][0].rpartition(":")[0] or language)
        table[language] = [parallel.add(language, text, where) for where, _, text in entries[:max_sentences]]
    parallel.tables.append(table)
    return parallel


def _aligned(corpora: dict[str, list[Entry]]) -> dict[str, list[Entry]]:
    """Entry n of every language is the same sentence: by id where there are ids, else by line."""
    empty = next((language for language, entries in corpora.items() if not entries), None)
    if empty is not None:
        raise UserError(f"language {empty} has no sentences")
    with_id = {where: id_ is not None for entries in corpora.values() for where, id_, _ in entries}
    if not any(with_id.values()):
        _refuse_unequal(corpora)
        return corpora
    if not all(with_id.values()):
        without, has = (next(where for where, one in with_id.items() if one == wanted) for wanted in (False, True))
        raise UserError(f"{without} has no id, but {has} has one: give ids to all sentences or to none")
    (first, leading), *_ = corpora.items()
    by_id = {language: {id_: entry for entry in entries for id_ in [entry[1]]} for language, entries in corpora.items()}
    for language, entries in corpora.items():
        if len(by_id[language]) < len(entries):
            repeated = _first_repeated([id_ for _, id_, _ in entries])
            second = [where for where, id_, _ in entries if id_ == repeated][1]
            raise UserError(f"{second}: id {repeated!r} stands here a second time")
        for one, other in ((first, language), (language, first)):
            lacking = next((entry for id_, entry in by_id[one].items() if id_ not in by_id[other]), None)
            if lacking is not None:
                file = corpora[other][0][0].rpartition(":")[0] or other
                raise UserError(f"{lacking[0]}: id {lacking[1]!r} is missing in {file}")
    return {language: [by_id[language][id_] for _, id_, _ in leading] for language in corpora}


def _refuse_unequal(corpora: dict[str, list[Entry]]) -> None:
    longest = max(corpora.values(), key=len)
    for entries in corpora.values():
        if len(entries) < len(longest):
            raise UserError(
                f"{longest[len(entries)][0]} has no counterpart: {entries[-1][0]} is the last sentence there, and line "
                "n must be the same sentence in every file"
            )


def _pivot_tables(files: list[Path], languages: list[str] | None, max_sentences: int | None) -> Parallel:
    """Bitext: a table per language pair, all of which share the pivot."""
    pairs: dict[frozenset[str], list[tuple[str, dict[str, str]]]] = {}
    for path in files:
        for where, row in read_rows(Source(path=glob.escape(str(path)))):
            src, tgt, sides = bitext_fields(row, where)
            texts = {sides[0]: src.strip(), sides[1]: tgt.strip()}
            if len(texts) < 2:
                raise UserError(f"{where}: both sides are in {sides[0]}")
            if not all(texts.values()):
                raise UserError(f"{where}: an empty side")
            pairs.setdefault(frozenset(texts), []).append((where, texts))
    _refuse_unknown(languages, set().union(*pairs), str(files[0].parent))
    pairs = {pair: rows for pair, rows in pairs.items() if languages is None or pair <= set(languages)}
    if not pairs:
        raise UserError(f"{files[0].parent}: no bitext between {', '.join(languages)}")
    counts = Counter(language for pair in pairs for language in pair)
    pivot = counts.most_common(1)[0][0]
    strange = next((rows[0] for pair, rows in pairs.items() if pivot not in pair), None)
    if strange is not None:
        raise UserError(
            f"{strange[0]}: {'-'.join(strange[1])} is without the pivot {pivot}, which other pairs are with"
        )
    parallel = Parallel()
    for rows in pairs.values():
        _refuse_size(len(rows[:max_sentences]), rows[0][0].rpartition(":")[0])
        table: dict[str, list[int]] = {}
        for where, texts in rows[:max_sentences]:
            for language, text in texts.items():
                table.setdefault(language, []).append(parallel.add(language, text, where))
        parallel.tables.append(table)
    return parallel


def _refuse_unknown(languages: list[str] | None, there: Iterable[str], data: str) -> None:
    unknown = [language for language in languages or [] if language not in there]
    if unknown:
        raise UserError(f"{data} has no language {unknown[0]}, but {', '.join(sorted(there))}")


def _refuse_size(sentences: int, file: str) -> None:
    if sentences < MIN_SENTENCES:
        raise UserError(f"{file} has {sentences} sentences: a probe needs {MIN_SENTENCES} at least")
    if sentences > MAX_SENTENCES:
        raise UserError(
            f"{file} has {sentences:,} sentences, and a probe compares each with all others: give --max-sentences, at "
            f"most {MAX_SENTENCES}"
        )


def _first_repeated(values: list) -> object:
    return next(value for number, value in enumerate(values) if value in values[:number])
