"""Reading: files, globs and hub datasets as a lazy stream of rows, each with its place for error messages."""

import codecs
import csv
import glob
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlalign.config import Source
from mlalign.errors import UserError, one_line

Row = dict[str, Any]

REPORT = "prepare.json"  #: what `mlalign prepare` leaves beside the rows, and is none
SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")  #: of files of rows


def row_id(row: Row) -> str | None:
    """What rows share that say the same; None where a row has none, or a blank one, as in an empty column."""
    own = row.get("id")
    return None if own is None or not str(own).strip() else str(own)


def read_file(path: Path | str) -> Iterator[tuple[str, Row]]:
    """`read_rows` of one local file, whatever brackets its name holds."""
    yield from read_rows(Source(path=glob.escape(str(path))))


def read_rows(source: Source, streaming: bool = True) -> Iterator[tuple[str, Row]]:
    """Yield (where, row) lazily, where = "file:line" for error messages. Nothing is checked but that rows are objects.

    Args: streaming: of a hub dataset, whether rows are fetched as they are needed. If not, all are fetched first and
    kept in the hub's cache, where a host without internet finds them.
    Raises UserError for a missing file, broken JSON, or a hub dataset that cannot be had.
    """
    if not is_local(source.path):
        yield from _read_with_datasets(source.path, source.subset, split=source.split, streaming=streaming)
        return
    for path in local_files(source):
        suffix = Path(path).suffix
        if suffix in (".jsonl", ".json"):
            yield from _read_json(path)
        elif suffix == ".csv":
            yield from _read_csv(path)
        elif suffix == ".parquet":
            yield from _read_with_datasets("parquet", data_files=path, split="train", streaming=True)
        else:
            raise UserError(f"{path} must end in {', '.join(SUFFIXES)}")


def local_files(source: Source) -> list[str]:
    """The files of a local source, in the order in which they are read. Raises UserError for one that is missing."""
    if source.subset or source.split != "train":
        raise UserError(f"{source.path} is local: `subset` and `split` are for hub datasets, name the file instead")
    paths = matching(source.path) if glob.has_magic(source.path) else [source.path]
    if not paths:
        raise UserError(f"{source.path} matches no file")
    for path in paths:
        if not os.path.isfile(path):
            raise UserError(f"{path} does not exist or is not a file")
    return paths


def matching(path: str) -> list[str]:
    """What a name or a glob stands for, sorted; a file's own name may hold brackets. Empty where there is nothing."""
    if os.path.isfile(path):
        return [path]
    return sorted(each for each in glob.glob(path, recursive=True) if os.path.basename(each) != REPORT)


def is_local(path: str) -> bool:
    """Whether a source is meant as a file, a glob or a directory, and not as a hub id."""
    return os.path.exists(path) or glob.has_magic(path) or path.startswith(("/", ".")) or Path(path).suffix in SUFFIXES


def _read_json(path: str) -> Iterator[tuple[str, Row]]:
    """JSON Lines, or one JSON array of objects."""
    with open(path, "rb") as file:
        if file.read(64).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
            file.seek(0)
            for number, row in enumerate(parse_json(file.read(), path), 1):
                yield checked_row(row, f"{path}, item {number}")
            return
        file.seek(0)
        for number, line in enumerate(file, 1):
            if line.strip():
                where = f"{path}:{number}"
                yield checked_row(parse_json(line, where), where)


def _read_csv(path: str) -> Iterator[tuple[str, Row]]:
    """Fields are the text that stands there: `7` is no number, and `None` and `NA` are not missing."""
    csv.field_size_limit(sys.maxsize)
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            names = reader.fieldnames or []
            if len(set(names)) < len(names):
                raise UserError(f"{path}:1: two columns have the same name: {', '.join(names)}")
            for row in reader:
                where = f"{path}:{reader.line_num}"
                if None in row or None in row.values():
                    raise UserError(f"{where}: not as many fields as the header has, which are {len(names)}")
                yield where, row
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: not valid UTF-8 after line {reader.line_num}") from error
        except csv.Error as error:
            raise UserError(f"{path}: the row from line {reader.line_num + 1} on is not valid CSV: {error}") from error


def parse_json(text: bytes, where: str) -> Any:
    """What JSON text holds. Raises UserError for what is no JSON, no UTF-8, or half of a character."""
    try:
        value = json.loads(text.decode("utf-8-sig"))  # from bytes, json lets half characters pass
        if rb"\ud" in text.lower():  # half of a character written as two escapes is valid JSON and no text
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: an escape such as \\ud800 stands for half a character") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not valid UTF-8 (byte {error.start})") from error
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits is the former
        raise UserError(f"{where}: not valid JSON: {error}") from error


def checked_row(row: Any, where: str) -> tuple[str, Row]:
    """(where, row). Raises UserError for what is no object."""
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected a JSON object, found {type(row).__name__}")
    return where, row


def _read_with_datasets(name: str, subset: str | None = None, **kwargs) -> Iterator[tuple[str, Row]]:
    import datasets  # here: it takes seconds, and JSON Lines need it not

    datasets.disable_progress_bars()
    label = kwargs.get("data_files", name)
    try:
        for number, row in enumerate(datasets.load_dataset(name, subset, **kwargs), 1):
            yield f"{label}, row {number}", row
    except Exception as error:  # datasets raises many kinds; a user needs the file and the reason
        kind = "cannot be read" if "data_files" in kwargs else "is neither a local file nor a readable hub dataset"
        raise UserError(f"{label} {kind}: {one_line(error)}") from error
