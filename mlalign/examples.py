"""Tokenised rows: one as an object, many as flat arrays that all processes of a node can share.

`TaskRows.pack(...)` and `PairRows.pack(...)` take in a stream of examples; what they give is a sequence of the same
examples, each built when it is asked for, and holds 5 or 4 bytes a token.
"""

import hashlib
import json
from abc import abstractmethod
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Generic, Self, TypeVar

import numpy as np

from mlalign.loss import IGNORED

Example = TypeVar("Example", "TaskExample", "Pair")


@dataclass(frozen=True, slots=True)
class TaskExample:
    """One tokenised task row."""

    ids: list[int]
    labels: list[int]  #: as `ids`, with `IGNORED` where a token is not learned
    learned: int  #: learned tokens; the first token is never predicted
    language: str

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, slots=True)
class Pair:
    """One tokenised bitext row."""

    src: list[int]
    tgt: list[int]
    languages: tuple[str, str]  #: of src and tgt
    keys: tuple[int, int, int]  #: hashes of src, tgt and id (0 = no id), see `loss.same_text`

    @property
    def language(self) -> str:
        """The language pair, by which bitext is balanced and reported."""
        return "-".join(self.languages)

    def __len__(self) -> int:
        return len(self.src) + len(self.tgt)


@dataclass
class Counts:
    """What happened to the rows of one objective."""

    rows: int = 0  #: kept
    tokens: int = 0  #: kept
    truncated: int = 0  #: kept, but cut at max_length
    dropped: dict[str, int] = field(default_factory=dict)  #: reason -> rows
    masked_turns: int = 0  #: assistant turns that the chat template renders differently in context, not learned
    languages: dict[str, int] = field(default_factory=dict)  #: rows by language, or by language pair
    sides: set[str] = field(default_factory=set)  #: languages of bitext

    def drop(self, reason: str) -> None:
        self.dropped[reason] = self.dropped.get(reason, 0) + 1

    def keep(self, example: TaskExample | Pair, truncated: bool) -> None:
        self.rows += 1
        self.tokens += len(example)
        self.truncated += truncated
        self.languages[example.language] = self.languages.get(example.language, 0) + 1
        if isinstance(example, Pair):
            self.sides.update(example.languages)

    def __str__(self) -> str:
        """One line for the console."""
        if not (self.rows or self.dropped):
            return "nothing read yet (streaming)"
        parts = [f"{self.rows:,} rows, {self.tokens:,} tokens, {len(self.languages)} languages"]
        if self.truncated:
            parts.append(f"{self.truncated:,} truncated")
        parts += [f"{count:,} dropped ({reason})" for reason, count in self.dropped.items()]
        if self.masked_turns:
            parts.append(f"{self.masked_turns:,} earlier assistant turns not learned")
        return ", ".join(parts)


class PackedRows(Sequence[Example], Generic[Example]):
    """Examples as flat arrays, in order.

    arrays: `ids`, int32 [tokens]; `ends`, int64 [rows], of each row's tokens; `languages`, int32 [rows], indices into
    `names`; and what the subclass adds. names: (language,), of bitext (src, tgt), in the order in which they came.
    """

    def __init__(self, arrays: dict[str, np.ndarray], names: Iterable[Sequence[str]]) -> None:
        self.arrays, self.names = arrays, [tuple(name) for name in names]
        self.lengths = np.diff(arrays["ends"], prepend=0)  #: tokens of each row, int64 [rows]

    @classmethod
    @abstractmethod
    def pack(cls, examples: Iterable[Example]) -> Self:
        """Take in a stream of examples."""

    @cached_property
    def digest(self) -> str:
        """Stands for all rows and their order; taken once, for the cache and for checkpoints."""
        found = hashlib.blake2b(json.dumps(self.names).encode(), digest_size=8)
        for name in sorted(self.arrays):
            found.update(np.ascontiguousarray(self.arrays[name]))
        return found.hexdigest()

    def by_language(self) -> dict[str, np.ndarray]:
        """Indices of each language's rows, or language pair's, ascending, int64. No row is built for it."""
        labels = ["-".join(name) for name in self.names]
        codes = np.array([labels.index(label) for label in labels], np.int32)[self.arrays["languages"]]
        return {label: np.flatnonzero(codes == labels.index(label)) for label in labels}

    def __len__(self) -> int:
        return len(self.lengths)

    def _tokens(self, index: int) -> slice:
        """Where in the flat arrays a row is. Raises IndexError."""
        index = range(len(self))[index]
        end = self.arrays["ends"][index]
        return slice(end - self.lengths[index], end)

    def _name(self, index: int) -> tuple[str, ...]:
        return self.names[self.arrays["languages"][index]]


class TaskRows(PackedRows[TaskExample]):
    """Task rows. `arrays` has also `learned`, bool [tokens]."""

    @classmethod
    def pack(cls, examples: Iterable[TaskExample]) -> Self:
        ids, ends, languages, learned = array("i"), array("q"), array("i"), bytearray()
        names: dict[tuple[str], int] = {}
        for example in examples:
            ids.extend(example.ids)
            ends.append(len(ids))
            languages.append(names.setdefault((example.language,), len(names)))
            learned.extend(label != IGNORED for label in example.labels)
        arrays = {
            "ids": np.frombuffer(ids, np.int32),
            "ends": np.frombuffer(ends, np.int64),
            "languages": np.frombuffer(languages, np.int32),
            "learned": np.frombuffer(learned, np.bool),
        }
        return cls(arrays, names)

    def __getitem__(self, index: int) -> TaskExample:
        tokens = self._tokens(index)
        ids, learned = self.arrays["ids"][tokens], self.arrays["learned"][tokens]
        labels = np.where(learned, ids, IGNORED)
        return TaskExample(ids.tolist(), labels.tolist(), int(learned[1:].sum()), *self._name(index))


class PairRows(PackedRows[Pair]):
    """Bitext, the tokens of src before those of tgt.

    `arrays` has also `src_lengths`, int32 [rows], and `keys`, int64 [rows, 3].
    """

    @classmethod
    def pack(cls, examples: Iterable[Pair]) -> Self:
        ids, ends, languages, src_lengths, keys = array("i"), array("q"), array("i"), array("i"), array("q")
        names: dict[tuple[str, str], int] = {}
        for pair in examples:
            ids.extend(pair.src)
            ids.extend(pair.tgt)
            ends.append(len(ids))
            languages.append(names.setdefault(pair.languages, len(names)))
            src_lengths.append(len(pair.src))
            keys.extend(pair.keys)
        arrays = {
            "ids": np.frombuffer(ids, np.int32),
            "ends": np.frombuffer(ends, np.int64),
            "languages": np.frombuffer(languages, np.int32),
            "src_lengths": np.frombuffer(src_lengths, np.int32),
            "keys": np.frombuffer(keys, np.int64).reshape(-1, 3),
        }
        return cls(arrays, names)

    def __getitem__(self, index: int) -> Pair:
        ids = self.arrays["ids"][self._tokens(index)].tolist()
        middle = self.arrays["src_lengths"][index]
        return Pair(ids[:middle], ids[middle:], self._name(index), tuple(self.arrays["keys"][index].tolist()))
