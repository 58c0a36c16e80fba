"""Which sentences are the same, of any number: normal forms, 64-bit hashes, and sets of hashes that stay small.

Two texts are the same up to normalising if NFKC and case folding make them equal without white space, punctuation and
control characters; a text that holds nothing else is compared as it stands. Among ten million different sentences, the
chance that any two have the same hash is three in a million. Pure functions and sets of numpy arrays.
"""

import hashlib
import sys
import unicodedata
import zlib
from collections.abc import Iterable, Sequence
from functools import cache

import numpy as np

NOT, NORMALISED, EXACT = 0, 1, 2  #: what `Sentences.find` says

_MIX = np.uint64(0x9E3779B97F4A7C15)  # odd, so that multiplying loses nothing


@cache
def _kept() -> np.ndarray:
    """[code points], bool: what a normal form keeps, and the line feed that stands between texts."""
    categories = [unicodedata.category(chr(point)) for point in range(sys.maxunicode + 1)]
    kept = np.array([not each.startswith(("P", "Z", "Cc", "Cf")) for each in categories])
    kept[ord("\n")] = True
    return kept


def normalise(texts: list[str]) -> list[str]:
    """The normal form of each text, empty only where the text is. All at once: a tenth of the time of one by one."""
    joined = unicodedata.normalize("NFKC", "\n".join(texts)).casefold()  # neither looks across a line feed
    if joined.count("\n") != len(texts) - 1:
        return normalise([text.replace("\n", " ") for text in texts]) if texts else []
    points = np.frombuffer(joined.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    forms = points[_kept()[points]].tobytes().decode("utf-32-le", "surrogatepass").split("\n")
    return [form or text.strip() for form, text in zip(forms, texts)]


def hashes(texts: list[str]) -> np.ndarray:
    """[texts], uint64: 64 bits of BLAKE2b of each."""
    blake2b = hashlib.blake2b
    digests = [blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest() for text in texts]
    return np.frombuffer(b"".join(digests), dtype="<u8")


def tags(rows: Iterable[Sequence[str]]) -> np.ndarray:
    """[rows], uint32: a checksum of all texts of a row as they stand."""
    return np.array([zlib.crc32("\n".join(texts).encode("utf-8", "surrogatepass")) for texts in rows], dtype=np.uint32)


def together(sides: list[np.ndarray]) -> np.ndarray:
    """[rows], uint64: one hash of what every row has in all of `sides`, arrays of hashes [rows]; their order counts."""
    key = sides[0]
    for side in sides[1:]:
        key = key * _MIX + side
    return key


def ranks(ids: list[str], seed: int) -> np.ndarray:
    """[ids, 2], uint64: two random numbers for each id, the same wherever and whenever the id comes."""
    digests = [hashlib.blake2b(f"{seed}:{each}".encode(), digest_size=16).digest() for each in ids]
    return np.frombuffer(b"".join(digests), dtype="<u8").reshape(-1, 2)


def smallest(values: np.ndarray, count: int) -> np.ndarray:
    """[values], bool: the `count` smallest of them, or all; the first of equal ones."""
    if count >= len(values):
        return np.ones(len(values), dtype=bool)
    if count == 0:
        return np.zeros(len(values), dtype=bool)
    limit = np.partition(values, count - 1)[count - 1]
    chosen = values < limit
    chosen[np.flatnonzero(values == limit)[: count - chosen.sum()]] = True
    return chosen


def contains(array: np.ndarray, values: np.ndarray) -> np.ndarray:
    """[values], bool: which of them are in `array`, which is sorted."""
    if not len(array):
        return np.zeros(len(values), dtype=bool)
    return array[np.minimum(np.searchsorted(array, values), len(array) - 1)] == values


class Seen:
    """Rows that have been there, by the hash of their normal form: 12 bytes each, and twice that while runs are merged.

    Hashes are kept in sorted runs, each at least twice as long as the next, with 32 bits of the texts themselves, which
    tell whether a row equals the first one of its form exactly.
    """

    def __init__(self) -> None:
        self._runs: list[tuple[np.ndarray, np.ndarray]] = []

    def add(self, keys: np.ndarray, tags: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Take in rows in order. Args: keys: [rows], uint64, hashes of normal forms; tags: [rows], uint32, of texts.

        Returns: [rows], bool, which are new; [rows], bool, which others equal the new one of their form exactly.
        """
        unique, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
        first_tags = tags[first]
        known = np.zeros(len(unique), dtype=bool)
        for run_keys, run_tags in self._runs:
            at = np.minimum(np.searchsorted(run_keys, unique), len(run_keys) - 1)
            here = run_keys[at] == unique
            first_tags[here] = run_tags[at[here]]
            known |= here
        new = np.zeros(len(keys), dtype=bool)
        new[first[~known]] = True
        self._append(unique[~known], first_tags[~known])
        return new, ~new & (tags == first_tags[inverse])

    def _append(self, keys: np.ndarray, tags: np.ndarray) -> None:
        if len(keys):
            self._runs.append((keys, tags))
        while len(self._runs) > 1 and len(self._runs[-2][0]) < 2 * len(self._runs[-1][0]):
            later = self._runs.pop()
            self._runs.append(_merged(self._runs.pop(), later))


def _merged(one: tuple[np.ndarray, np.ndarray], other: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """One sorted run of two, without sorting: where the hashes of `other` go is all that is searched."""
    size = len(one[0]) + len(other[0])
    from_other = np.zeros(size, dtype=bool)
    from_other[np.searchsorted(one[0], other[0]) + np.arange(len(other[0]))] = True
    merged = []
    for ours, theirs in zip(one, other):
        both = np.empty(size, dtype=ours.dtype)
        both[from_other] = theirs
        both[~from_other] = ours
        merged.append(both)
    return merged[0], merged[1]


class Sentences:
    """Sentences that must not be trained on, by language or for all; 16 bytes each."""

    def __init__(self) -> None:
        self._parts: dict[str | None, list[tuple[np.ndarray, np.ndarray]]] = {}
        self._sorted: dict[str | None, tuple[np.ndarray, np.ndarray]] = {}

    def add(self, language: str | None, normal: np.ndarray, exact: np.ndarray) -> None:
        """Take in hashes of normal forms and of texts as they stand, [sentences] each."""
        self._parts.setdefault(language, []).append((normal, exact))
        self._sorted.pop(language, None)

    def find(self, language: str | None, normal: np.ndarray, texts: Sequence[str]) -> np.ndarray:
        """[sentences], int: `EXACT` or `NORMALISED` for those that are here in this language, else `NOT`.

        Args: normal: [sentences], hashes of normal forms; texts: as they stand.
        """
        if language not in self._parts:
            return np.full(len(normal), NOT)
        if language not in self._sorted:
            normals, exacts = (np.unique(np.concatenate(arrays)) for arrays in zip(*self._parts[language]))
            self._sorted[language] = normals, exacts
            self._parts[language] = [(normals, exacts)]
        normals, exacts = self._sorted[language]
        at = np.flatnonzero(contains(normals, normal))
        found = np.full(len(normal), NOT)
        found[at] = np.where(contains(exacts, hashes([texts[i] for i in at])), EXACT, NORMALISED)
        return found
