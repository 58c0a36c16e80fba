"""Translation by people, such as ALMA's data (Xu et al. 2024), as task rows: a file for each direction.

Read from a directory, or from the directories in it, of `<split>.<xx>-<yy>.json` or `.jsonl`: ALMA's own layout
(`csen/train.cs-en.json`, rows `{"translation": {"cs": ..., "en": ...}}`), or rows of `src`, `tgt`, `src_lang`,
`tgt_lang`; or from the hub, one configuration per pair, as haoranxu/ALMA-Human-Parallel (column `translation`) and
haoranxu/WMT22-Test (a column named as the configuration).

Train and dev pairs serve both directions, unless there is a file for each. A test file keeps its direction, which is
that of its name: what was written in one language first is another test than what was translated into it.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from mlalign.corpora.item import (
    SPLITS,
    Item,
    check_language,
    hub_configurations,
    hub_rows,
    refuse_twice,
    refuse_unknown,
)
from mlalign.data import bitext_fields
from mlalign.errors import UserError
from mlalign.languages import language_of
from mlalign.rows import Row, is_local, read_file, row_id
from mlalign.tasks.translation import row as task_row

DIRECTIONS = ("both", "from-english", "to-english")

_CODE = r"[A-Za-z]{2,3}(?:_[A-Za-z]+)?"
_PAIR = re.compile(rf"({_CODE})-({_CODE})")
_FILE = re.compile(rf"({'|'.join(SPLITS)})\.({_CODE})-({_CODE})\.jsonl?")


@dataclass(frozen=True)
class _Table:
    """A file, or a configuration of a hub dataset with those of its splits that are wanted."""

    place: str
    pair: tuple[str, str]  #: in the order of the name
    split: str | None  #: of ours; None on the hub


def read(
    source: str,
    splits: Collection[str],
    languages: Collection[str] | None,
    form: str,
    directions: str,
    notes: Counter[str],
) -> Iterator[Item]:
    """Yield the rows of `splits`, one for each direction. Args: languages: both of a pair must be among them;
    directions: of train and dev, one of `DIRECTIONS`; form: of prompts.

    Raises UserError where there is no such direction or file, or a row is not in the languages of its file.
    """
    if directions not in DIRECTIONS:
        raise UserError(f"directions {directions} is not one of {', '.join(DIRECTIONS)}")
    on_hub = not is_local(source)
    tables = _hub_tables(source) if on_hub else _files(source)
    refuse_unknown(languages, (code for table in tables for code in table.pair), source)
    chosen = [table for table in tables if languages is None or set(table.pair) <= set(languages)]
    if not chosen:
        raise UserError(
            f"{source} has no pair of the languages {', '.join(languages or ())}: name both sides of a pair, such as "
            f"{','.join(tables[0].pair)}"
        )
    there = {(table.split, table.pair) for table in tables}
    for table in chosen:
        if on_hub:
            rows = hub_rows(source, table.place, splits)
        elif table.split in splits:
            plain = read_file(table.place)
            rows = ((table.split, where, row) for where, row in plain)
        else:
            continue
        reverse = (table.split, table.pair[::-1]) in there
        yield from _items(rows, table, reverse, form, directions)


def _items(
    rows: Iterator[tuple[str, str, Row]], table: _Table, reverse: bool, form: str, directions: str
) -> Iterator[Item]:
    """Args: reverse: whether there is another table of the same split for the other direction."""
    counts: Counter[str] = Counter()
    for split, where, row in rows:
        name = "-".join(table.pair)
        src, tgt, sides = bitext_fields({"translation": row[name]} if name in row else row, where)
        if set(sides) != set(table.pair):
            raise UserError(f"{where}: the languages are {' and '.join(sides)}, but the name says {name}")
        texts = {sides[0]: src.strip(), sides[1]: tgt.strip()}
        counts[split] += 1
        own_id = row_id(row) or f"{name}-{split}-{counts[split]}"
        for direction in _directions(split, table.pair, reverse, directions, where):
            src_lang, tgt_lang = direction
            written = {
                "id": own_id,
                "lang": f"{src_lang}-{tgt_lang}",
                **task_row(texts[src_lang], texts[tgt_lang], src_lang, tgt_lang, form),
                "src": texts[src_lang],
                "tgt": texts[tgt_lang],
                "src_lang": src_lang,
                "tgt_lang": tgt_lang,
            }
            yield Item(split, direction, written, (texts[src_lang], texts[tgt_lang]), where)


def _directions(split: str, pair: tuple[str, str], reverse: bool, directions: str, where: str) -> list[tuple[str, str]]:
    """The directions that a row of this table serves."""
    if split == "test":
        return [pair]
    both = [pair] if reverse else [pair, pair[::-1]]
    if directions == "both":
        return both
    english = [language_of(code) == "en" for code in pair]
    if not any(english):
        raise UserError(f"{where}: neither {pair[0]} nor {pair[1]} is English, which --directions {directions} needs")
    side = 0 if directions == "from-english" else 1
    return [each for each in both if language_of(each[side]) == "en"]


def _files(source: str) -> list[_Table]:
    folder = Path(source)
    if not folder.is_dir():
        raise UserError(f"{source} is not a directory: give one with files such as train.cs-en.jsonl")
    inside = sorted(path for path in folder.iterdir() if path.is_dir())
    tables = []
    for path in [*sorted(folder.iterdir()), *(path for each in inside for path in sorted(each.iterdir()))]:
        match = _FILE.fullmatch(path.name)
        if match and path.is_file():
            pair = tuple(check_language(code, str(path)) for code in match.groups()[1:])
            tables.append(_Table(str(path), pair, SPLITS[match[1]]))
    if not tables:
        raise UserError(f"{source} holds no files such as train.cs-en.jsonl or csen/train.cs-en.json")
    evaluated = (table for table in tables if table.split != "train")  # duplicates leave train, and stay elsewhere
    refuse_twice((f"{table.split} of {'-'.join(table.pair)}", table.place) for table in evaluated)
    return tables


def _hub_tables(source: str) -> list[_Table]:
    configurations = hub_configurations(source)
    matches = {name: _PAIR.fullmatch(name) for name in configurations}
    tables = [
        _Table(name, tuple(check_language(code, f"{source} {name}") for code in match.groups()), None)
        for name, match in matches.items()
        if match
    ]
    if not tables:
        raise UserError(f"{source} has no configuration for a pair such as cs-en, but {', '.join(configurations)}")
    return tables
