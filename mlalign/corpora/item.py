"""What readers share: the item, files that are streams, datasets on the hub, and checks that all of them make."""

import glob
import gzip
import zlib
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tarfile import TarError
from typing import IO, NamedTuple
from zipfile import BadZipFile

from langcodes import tag_is_valid

from mlalign.config import Source
from mlalign.errors import UserError, one_line
from mlalign.rows import REPORT, Row, checked_row, matching, parse_json, read_file, read_rows, row_id

#: What splits are called where data is published -> what they are called here.
SPLITS = {"train": "train", "dev": "dev", "valid": "dev", "validation": "dev", "test": "test"}


class Item(NamedTuple):
    """One row of a dataset on its way to an output file. A named tuple: millions of them are made."""

    split: str  #: train, dev or test
    languages: tuple[str, ...]  #: codes as in the data; a task row has one, a pair has source and target
    row: Row  #: what is written
    texts: tuple[str, ...]  #: the sentences that make a duplicate or a leak, one for each of `languages`
    where: str  #: "file:line", for messages


def refuse_unknown(languages: Collection[str] | None, there: Iterable[str], source: str) -> None:
    """Raise UserError where a language was asked for that the data does not have."""
    there = set(there)
    unknown = [language for language in languages or () if language not in there]
    if unknown:
        raise UserError(f"{source} has no language {unknown[0]}, but {', '.join(sorted(there)) or 'none at all'}")


def check_language(code: str, where: str) -> str:
    """The code itself. Raises UserError for what is not a language code."""
    if not tag_is_valid(code):
        raise UserError(f"{where}: {code!r} is not the code of a language")
    return code


def text_field(row: Row, name: str, where: str, expected: str) -> str:
    """A field that must hold text. Args: expected: what rows should be, for the message."""
    if not isinstance(row.get(name), str):
        raise UserError(f"{where}: no text in field {name!r}: expected {expected} (found {', '.join(map(repr, row))})")
    return row[name]


# --------------------------------------------------------------------------------------------------------------- files


def refuse_twice(files: Iterable[tuple[str, object]]) -> None:
    """Raise UserError where two files are the same, such as `test of cs-en`: their rows would count twice."""
    first: dict[str, object] = {}
    for what, path in files:
        if first.setdefault(what, path) != path:
            raise UserError(f"{first[what]} and {path} are both {what}: keep one of them")


def input_files(source: str, example: str) -> list[Path]:
    """The files of a directory, or those that a name or glob stands for.

    Args: example: of files to name in a directory that `mlalign prepare` wrote, which holds several kinds.
    Raises UserError where there are none.
    """
    folder = Path(source)
    if (folder / REPORT).exists():
        raise UserError(f"{source} is what `mlalign prepare` wrote: name files of it, such as {source}/{example}")
    if folder.is_dir():
        return sorted(path for path in folder.iterdir() if path.is_file())
    paths = [Path(path) for path in matching(source) if Path(path).is_file()]
    if not paths:
        raise UserError(f"{source} {'matches no file' if glob.has_magic(source) else 'does not exist'}")
    return paths


#: What compressed files raise when they are cut or damaged.
DAMAGE = (EOFError, zlib.error, gzip.BadGzipFile, BadZipFile, TarError)


@contextmanager
def undamaged(name: object) -> Iterator[None]:
    """Turn `DAMAGE` into a UserError."""
    try:
        yield
    except DAMAGE as error:
        raise UserError(f"{name} is cut or damaged: {error}") from error


def open_plain(path: Path) -> IO[bytes]:
    """A file as bytes, unpacked on the way if its name ends in .gz. Raises UserError where it does not exist."""
    if not path.is_file():
        raise UserError(f"{path} does not exist or is not a file")
    return gzip.open(path) if path.suffix == ".gz" else path.open("rb")


def lines(file: IO[bytes], name: object) -> Iterator[tuple[str, str]]:
    """(where, text without white space at its ends) of every line, empty ones too; only a line feed ends a line."""
    for number, line in enumerate(file, 1):
        where = f"{name}:{number}"
        try:
            text = line.decode()
        except UnicodeDecodeError as error:
            raise UserError(f"{where}: not valid UTF-8 (byte {error.start})") from error
        yield where, (text.removeprefix("\ufeff") if number == 1 else text).strip()


def json_lines(file: IO[bytes], name: object) -> Iterator[tuple[str, Row]]:
    """(where, row) of a stream of JSON Lines, for files inside archives; others are read by `rows.read_rows`."""
    for number, line in enumerate(file, 1):
        if line.strip():
            where = f"{name}:{number}"
            yield checked_row(parse_json(line, where), where)


# ------------------------------------------------------------------------------------------------ one file a language

PLAIN = (".txt", ".dev", ".devtest", ".test")  #: of files with one sentence a line: FLORES-200 and NTREX as published
_TEXT_FIELDS = ("text", "sentence", "utt")  # FLORES+ and the data of most others; FLORES-200 on the hub; MASSIVE


class Sentence(NamedTuple):
    """One of a file per language."""

    where: str  #: "file:line", for messages
    id: str | None
    text: str


def by_language(paths: Iterable[Path]) -> dict[str, Path]:
    """Language -> its file, by names such as eng_Latn.jsonl, eng_Latn.devtest, newstest2019-ref.deu.txt.

    Raises UserError where a language has two.
    """
    named = [(path.stem.rpartition(".")[2], path) for path in paths]
    refuse_twice((f"language {code}", path) for code, path in named)
    return dict(named)


def sentences(path: Path) -> Iterator[Sentence]:
    """Every sentence of a file, empty ones too, for line n is the same sentence in all languages.

    Raises UserError for a blank line among JSON Lines, which would not count.
    """
    if path.suffix in PLAIN:
        with open_plain(path) as file:
            yield from (Sentence(where, None, text) for where, text in lines(file, path))
        return
    for number, (where, row) in enumerate(read_file(path), 1):
        if where.startswith(f"{path}:") and where != f"{path}:{number}" and path.suffix == ".jsonl":
            raise UserError(f"{path}:{number} is empty: every line must be a sentence")
        yield sentence(row, where)


def sentence(row: Row, where: str) -> Sentence:
    """Raises UserError for a row without text."""
    name = next((name for name in _TEXT_FIELDS if name in row), _TEXT_FIELDS[0])
    if not isinstance(row.get(name), str):
        raise UserError(f"{where}: no text in field {name!r} (found {', '.join(map(repr, row)) or 'nothing'})")
    return Sentence(where, row_id(row), row[name].strip())


def holds_pairs(path: Path) -> bool:
    """Whether the first row of a file is bitext."""
    first = next(read_file(path), None)
    return first is not None and not {"src", "translation"}.isdisjoint(first[1])


# ------------------------------------------------------------------------------------------------------------- the hub


def hub_configurations(name: str) -> list[str]:
    """Configurations of a dataset on the hub. Raises UserError where it cannot be had."""
    import datasets  # here: it takes seconds, and files need it not

    try:
        return datasets.get_dataset_config_names(name)
    except Exception as error:  # datasets raises many kinds
        raise UserError(_unreadable(name, error)) from error


def hub_splits(name: str, configuration: str) -> list[str]:
    """Splits of a configuration, by their own names. Raises UserError where it cannot be had."""
    import datasets

    try:
        return datasets.get_dataset_split_names(name, configuration)
    except Exception as error:
        raise UserError(_unreadable(f"{name} {configuration}", error)) from error


def hub_rows(name: str, configuration: str, splits: Collection[str]) -> Iterator[tuple[str, str, Row]]:
    """(split, where, row) of one configuration, streamed. Args: splits: of ours, those that are wanted."""
    theirs = hub_splits(name, configuration)
    unknown = [split for split in theirs if split not in SPLITS]
    if unknown:
        raise UserError(f"{name} {configuration} has a split {unknown[0]}, expected {', '.join(SPLITS)}")
    for split in theirs:
        if SPLITS[split] in splits:
            source = Source(path=name, subset=configuration, split=split)
            for number, (_, row) in enumerate(read_rows(source), 1):
                yield SPLITS[split], f"{name} {configuration} {split}, row {number}", row


def _unreadable(name: str, error: Exception) -> str:
    return f"{name} is neither a local file or directory nor a readable hub dataset: {one_line(error)}"
