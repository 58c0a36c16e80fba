"""Files that are what was written: hashed on the way, on the disk before they count, checked before they are read.

What libraries write is settled after them: they wait for no disk, and safetensors lets nobody else read its files.
"""

import hashlib
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO


class Hashed:
    """What goes through it into a file, goes into a hash too."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self.sha256 = file, hashlib.sha256()

    def write(self, data) -> int:
        self.sha256.update(data)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()


def write_whole(path: Path, text: str) -> None:
    """Write a small file so that readers, and a run after a crash, see the old text or the new one, never a part."""
    aside = path.with_suffix(".partial")
    with aside.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    aside.rename(path)


def write_hashed(path: Path, write: Callable[[Hashed], object]) -> str:
    """Have `write` write a file from its beginning to its end, and wait until it is on the disk.

    Returns: the SHA-256 of what was to be written. Raises OSError.
    """
    with path.open("wb") as file:
        hashed = Hashed(file)
        write(hashed)
        file.flush()
        os.fsync(file.fileno())
    return hashed.sha256.hexdigest()


def settle(file: Path) -> None:
    """Wait until a file that a library wrote is on the disk, and let those read it who may read what is opened here."""
    with suppress(OSError):  # not every mount knows modes
        file.chmod(_MODE)
    with file.open("rb") as opened:
        os.fsync(opened.fileno())


def _mode() -> int:
    """Of new files. A process can only learn its mask by setting another."""
    mask = os.umask(0o077)
    os.umask(mask)
    return 0o666 & ~mask


_MODE = _mode()


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk: a file's own sync does not see to its name."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:  # some network file systems sync no folders
        pass
    finally:
        os.close(handle)


def fault(path: Path, sha256: str) -> str | None:
    """What is wrong with a file that had this SHA-256, or None."""
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        return f"{path} cannot be read: {error.strerror}"
    return None if found == sha256 else f"{path} is not what was written"
