"""Sentences that translate each other, for `mlalign probe`: from files or a hub dataset to tables of rows.

Either one file (or hub configuration) per language, line n or `id` x being the same sentence in all of them, as in
FLORES and NTREX: one table of all languages. Or bitext rows against one pivot language: one table per language pair.
Each distinct sentence of a language is held once, so that it passes the model once.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from mlalign.corpora.item import (
    PLAIN,
    Sentence,
    by_language,
    holds_pairs,
    hub_configurations,
    hub_splits,
    input_files,
    refuse_unknown,
    sentence,
    sentences,
)
from mlalign.data import bitext_fields
from mlalign.errors import UserError
from mlalign.hostile import checked_name
from mlalign.rows import SUFFIXES, Row, is_local, read_file

MIN_SENTENCES = 5  #: a margin looks at four neighbours besides the sentence itself
MAX_SENTENCES = 20_000  #: every sentence is compared with every other: 1.6 GB at once


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
    bitext = [path for path in files if path.suffix in SUFFIXES and holds_pairs(path)]
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
    folder, there = Path(data), input_files(data, "dev.*.jsonl")
    if not folder.is_dir():
        return there
    files = [path for path in there if path.suffix in PLAIN + SUFFIXES]
    if not files:
        inside = sorted(path.name for path in folder.iterdir() if path.is_dir())
        hint = f" (it has the directories {', '.join(inside)})" if inside else ""
        raise UserError(f"{data} holds no file that ends in {', '.join(PLAIN + SUFFIXES)}{hint}")
    return files


def _read_files(files: list[Path], data: str, languages: list[str] | None) -> dict[str, list[Sentence]]:
    found = by_language(files)
    refuse_unknown(languages, found, data)
    return {name: [_full(one) for one in sentences(found[name])] for name in languages or sorted(found)}


def _full(one: Sentence) -> Sentence:
    if not one.text:
        raise UserError(f"{one.where} is empty: every line must be a sentence")
    return one


# ------------------------------------------------------------------------------------------------------ from the hub


def _read_hub(name: str, languages: list[str] | None, split: str | None) -> dict[str, list[Sentence]]:
    """One configuration per language, as FLORES+ has them; else one table with the language in its columns."""
    configurations = hub_configurations(name)
    named = [each for each in configurations if each not in ("default", "all")]
    splits = hub_splits(name, (named or configurations)[0])
    if split is None and len(splits) > 1:
        raise UserError(f"{name} has the splits {', '.join(splits)}: choose one with --split")
    split = split or splits[0]
    if split not in splits:
        raise UserError(f"{name} has no split {split}, but {', '.join(splits)}")
    if not named:
        corpora: dict[str, list[Sentence]] = {}
        for where, row in _hub_rows(name, configurations[0], split):
            corpora.setdefault(_language_column(row, where), []).append(_full(sentence(row, where)))
        refuse_unknown(languages, corpora, name)
        return {language: corpora[language] for language in languages or sorted(corpora)}
    refuse_unknown(languages, named, name)
    return {
        language: [_full(sentence(row, where)) for where, row in _hub_rows(name, language, split)]
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


def _one_table(corpora: dict[str, list[Sentence]], max_sentences: int | None) -> Parallel:
    if len(corpora) < 2:
        raise UserError(f"only {', '.join(corpora) or 'nothing'} is there: a probe needs two languages at least")
    parallel = Parallel()
    table: dict[str, list[int]] = {}
    for language, entries in _aligned(corpora).items():
        _refuse_size(len(entries[:max_sentences]), entries[0].where.rpartition(":")[0] or language)
        table[language] = [parallel.add(language, one.text, one.where) for one in entries[:max_sentences]]
    parallel.tables.append(table)
    return parallel


def _aligned(corpora: dict[str, list[Sentence]]) -> dict[str, list[Sentence]]:
    """Entry n of every language is the same sentence: by id where there are ids, else by line."""
    empty = next((language for language, entries in corpora.items() if not entries), None)
    if empty is not None:
        raise UserError(f"language {empty} has no sentences")
    every = [one for entries in corpora.values() for one in entries]
    without = next((one.where for one in every if one.id is None), None)
    having = next((one.where for one in every if one.id is not None), None)
    if having is None:
        _refuse_unequal(corpora)
        return corpora
    if without is not None:
        raise UserError(f"{without} has no id, but {having} has one: give ids to all sentences or to none")
    (first, leading), *_ = corpora.items()
    by_id = {language: {one.id: one for one in entries} for language, entries in corpora.items()}
    for language, entries in corpora.items():
        if len(by_id[language]) < len(entries):
            repeated = _first_repeated([one.id for one in entries])
            second = [one.where for one in entries if one.id == repeated][1]
            raise UserError(f"{second}: id {repeated!r} appears a second time")
        for this, other in ((first, language), (language, first)):
            lacking = next((one for own_id, one in by_id[this].items() if own_id not in by_id[other]), None)
            if lacking is not None:
                file = corpora[other][0].where.rpartition(":")[0] or other
                raise UserError(f"{lacking.where}: id {lacking.id!r} is missing in {file}")
    return {language: [by_id[language][one.id] for one in leading] for language in corpora}


def _refuse_unequal(corpora: dict[str, list[Sentence]]) -> None:
    longest = max(corpora.values(), key=len)
    for entries in corpora.values():
        if len(entries) < len(longest):
            raise UserError(
                f"{longest[len(entries)].where} has no counterpart: {entries[-1].where} is the last sentence there, "
                "and line n must be the same sentence in every file"
            )


def _pivot_tables(files: list[Path], languages: list[str] | None, max_sentences: int | None) -> Parallel:
    """Bitext: a table per language pair, all of which share the pivot."""
    pairs: dict[frozenset[str], list[tuple[str, dict[str, str]]]] = {}
    for path in files:
        for where, row in read_file(path):
            src, tgt, sides = bitext_fields(row, where)
            texts = {sides[0]: src.strip(), sides[1]: tgt.strip()}
            if len(texts) < 2:
                raise UserError(f"{where}: both sides are in {sides[0]}")
            if not all(texts.values()):
                raise UserError(f"{where}: an empty side")
            pairs.setdefault(frozenset(texts), []).append((where, texts))
    refuse_unknown(languages, set().union(*pairs), str(files[0].parent))
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
