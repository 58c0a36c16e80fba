"""Sentences of evaluation sets that training data must not hold: any text field of rows, or the lines of plain text.

What `mlalign prepare` wrote has such fields too; other rows of `messages` count with what users say in them.
"""

from collections.abc import Iterator
from pathlib import Path

from mlalign.corpora.item import lines, open_plain, undamaged
from mlalign.errors import UserError
from mlalign.rows import SUFFIXES, Row, matching, read_file

#: Of files that hold sentences among other things: as plain text, not one of them would be found in training data.
_NO_TEXT = (".tsv", ".iob2", ".conll", ".conllu", ".tmx", ".xml", ".sgm", ".zip", ".tar", ".tgz", ".bz2", ".xz")
_FIELDS = ("text", "utt", "src", "tgt", "sentence")


def files(patterns: tuple[str, ...]) -> list[str]:
    """The files that the globs name, sorted. Raises UserError for one that names none."""
    found = set()
    for pattern in patterns:
        paths = [path for path in matching(pattern) if Path(path).is_file()]
        if not paths:
            hint = f": it is a directory, give {pattern}/*" if Path(pattern).is_dir() else ""
            raise UserError(f"against {pattern} matches no file{hint}")
        found.update(paths)
    return sorted(found)


def sentences(paths: list[str]) -> Iterator[str]:
    """Every sentence of the files. Raises UserError for a row that has none, and for what is neither rows nor text."""
    for path in paths:
        if Path(path).suffix not in SUFFIXES:
            yield from _plain(path)
            continue
        for where, row in read_file(path):
            texts = [value.strip() for value in _values(row) if isinstance(value, str)]
            if not texts:
                raise UserError(f"{where}: no sentence in any of {', '.join(_FIELDS)}, translation, messages")
            yield from texts


def _plain(path: str) -> Iterator[str]:
    kind = Path(path.removesuffix(".gz")).suffix.lower()
    with undamaged(path), open_plain(Path(path)) as file:
        for where, text in lines(file, path):
            if kind in SUFFIXES + _NO_TEXT or text.startswith('{"'):
                raise UserError(
                    f"against {where} is no line of plain text: give one sentence a line, or rows in "
                    f"{', '.join(SUFFIXES)}, such as `mlalign prepare` writes"
                )
            if text:
                yield text


def _values(row: Row) -> list:
    values = [row[name] for name in _FIELDS if name in row]
    if isinstance(row.get("translation"), dict):
        values += row["translation"].values()
    if not values and isinstance(row.get("messages"), list):
        turns = [turn for turn in row["messages"] if isinstance(turn, dict)]
        values += [turn.get("content") for turn in turns if turn.get("role") == "user"]
    return values
