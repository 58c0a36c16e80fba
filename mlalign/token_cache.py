"""Tokenised rows on disk: made once on a node, mapped by all its processes, found again by the next start.

    $MLALIGN_CACHE/tokens/KEY.safetensors    by default ~/.cache/mlalign, or mlalign in $XDG_CACHE_HOME

KEY is a hash of all that the tokens follow from: the bytes of the files, not their names, how they are read, and the
tokenizer. Sources on the hub and tokenizers with Python code of their own cannot be hashed like that and are tokenised
at every start. An entry is written aside and renamed; one that its checksum does not fit is made anew. Where nothing
can be written, rows are tokenised in memory. Any file in the folder may be deleted at any time; what nothing has used
for 30 days is, when something new is written.
"""

import fcntl
import hashlib
import json
import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import date
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from transformers import PreTrainedTokenizerBase

from mlalign.config import Source
from mlalign.durable import settle
from mlalign.errors import UserError
from mlalign.examples import Counts, PackedRows
from mlalign.rows import is_local, local_files
from mlalign.tracker import say

FORMAT = 4  #: to be raised whenever the same rows come to other tokens, or an entry to another form
_UNUSED_SECONDS = 30 * 24 * 60 * 60
_PACKAGES = ("tokenizers", "transformers", "jinja2", "datasets")

Packed = TypeVar("Packed", bound=PackedRows)


def tokenised(
    kind: type[Packed],
    sources: list[Source],
    tokenizer: str | None,
    max_length: int,
    read: Callable[[Counts], Iterable],
) -> tuple[Packed, Counts]:
    """The rows of `sources` and what was counted, from the cache or, where it has none, from `read`.

    tokenizer: its `tokenizer_key`. Of the processes that come at once, one reads while the others wait. Raises what
    `read` raises.
    """
    name = key(kind, sources, tokenizer, max_length)
    if not name:
        return _fresh(kind, read)
    path = folder() / f"{name}.safetensors"
    if found := _load(kind, path):
        return found
    with _one_at_a_time(path.with_suffix(".lock")):
        if found := _load(kind, path):
            return found
        rows, counts = _fresh(kind, read)
        if key(kind, sources, tokenizer, max_length) == name:  # the files are still what they were
            _save(path, rows, counts)
    return _load(kind, path) or (rows, counts)


def folder() -> Path:
    """Where entries lie."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(os.environ.get("MLALIGN_CACHE") or os.path.join(home, "mlalign")) / "tokens"


def key(kind: type[PackedRows], sources: list[Source], tokenizer: str | None, max_length: int) -> str | None:
    """Stands for the tokens of these rows: equal keys, equal tokens. None where that cannot be told.

    tokenizer: its `tokenizer_key`.
    """
    if not tokenizer or not all(is_local(source.path) for source in sources):
        return None
    try:
        contents = [[_digest_of_file(path) for path in local_files(source)] for source in sources]
    except (UserError, OSError):  # it is told, with what else is wrong, where the rows are read
        return None
    settings = [source.model_dump(exclude={"path"}) for source in sources]
    return _digest_of([FORMAT, kind.__name__, max_length, tokenizer, settings, contents])


def tokenizer_key(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Stands for how a tokenizer renders and encodes, today where its template tells the date. None as `key`."""
    if not tokenizer.is_fast or not type(tokenizer).__module__.startswith("transformers."):
        return None
    template = tokenizer.chat_template
    return _digest_of(
        [
            type(tokenizer).__name__,
            tokenizer.backend_tokenizer.to_str(),
            tokenizer.split_special_tokens,
            tokenizer.special_tokens_map,
            template,
            str(date.today()) if "strftime_now" in str(template) else None,
            platform.python_version(),
            *map(version, _PACKAGES),
        ]
    )


def _fresh(kind: type[Packed], read: Callable[[Counts], Iterable]) -> tuple[Packed, Counts]:
    counts = Counts()
    return kind.pack(read(counts)), counts


@contextmanager
def _one_at_a_time(path: Path) -> Iterator[None]:
    """The first to come goes on at once; who comes meanwhile waits until it is done, or dead.

    They then go on together: if the first has left nothing, waiting for each other would only take longer.
    Where files cannot be locked, nobody waits.
    """
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
    try:
        file = open(path, "w")
    except OSError:
        yield
        return
    with file:
        with suppress(OSError):  # not every shared file system can lock
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                fcntl.flock(file, fcntl.LOCK_SH)
                fcntl.flock(file, fcntl.LOCK_UN)
        yield


def _load(kind: type[Packed], path: Path) -> tuple[Packed, Counts] | None:
    """An entry, its arrays mapped into memory; None where there is none, or a damaged one."""
    try:
        with safe_open(path, framework="pt") as file:  # framework="np" would copy
            about, checksum = file.metadata()["about"], file.metadata()["checksum"]
            arrays = {name: file.get_tensor(name).numpy() for name in file.keys()}
        values = json.loads(about)
        rows = kind(arrays, values["names"])
        if _checksum(rows, about) != checksum:
            return None
    except (SafetensorError, OSError, KeyError, TypeError, ValueError):
        return None
    with suppress(OSError):  # somebody else's
        os.utime(path)
    counts = values["counts"]
    return rows, Counts(**counts | {"sides": set(counts["sides"])})


def _save(path: Path, rows: PackedRows, counts: Counts) -> None:
    """Write an entry aside, then rename it. Says where it cannot."""
    about = json.dumps({"names": rows.names, "counts": asdict(counts) | {"sides": sorted(counts.sides)}})
    aside = path.with_suffix(f".{uuid4().hex}.partial")
    try:
        _delete_unused(path.parent)
        save_file(rows.arrays, aside, {"about": about, "checksum": _checksum(rows, about)})
        settle(aside)
        if not _load(type(rows), path):  # what others map stays: not every shared file system lets it go unharmed
            aside.rename(path)
    except (SafetensorError, OSError) as error:
        reason = getattr(error, "strerror", None) or error
        _say_once(
            f"tokenised rows cannot be kept in {path.parent} ({reason}): set MLALIGN_CACHE to keep them elsewhere"
        )
    finally:
        with suppress(OSError):
            aside.unlink(missing_ok=True)


@cache
def _say_once(text: str) -> None:
    say(text)


def _delete_unused(folder: Path) -> None:
    for path in folder.iterdir():
        with suppress(OSError):  # another process was faster, or it is somebody else's
            if time.time() - path.stat().st_mtime > _UNUSED_SECONDS:
                path.unlink()


def _checksum(rows: PackedRows, about: str) -> str:
    return _digest(about.encode(), rows.digest.encode())


def _digest_of(values: list) -> str:
    return _digest(json.dumps(values, sort_keys=True, default=str).encode())


def _digest(*parts: Any) -> str:
    found = hashlib.blake2b(digest_size=16)
    for part in parts:
        found.update(part)
    return found.hexdigest()


def _digest_of_file(path: str) -> str:
    with open(path, "rb") as file:
        return f"{Path(path).suffix} {hashlib.file_digest(file, 'blake2b').hexdigest()}"
