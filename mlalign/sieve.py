"""From items to output files: what train loses, what is held out as dev, what is sampled; every row of it counted.

Rows of dev and test are written as they come and remembered, so they are to come first. Rows of train are written as
they come but for those that are empty, the same on both sides, in dev, test or the sentences kept out, or duplicates.
Dev pairs and samples are chosen by random numbers that depend on seed and id alone, in a second pass over the file.
Files are called `X.partial` until all are whole. Memory grows by 12 bytes a row of train, 60 where rows are chosen.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from itertools import islice
from pathlib import Path

import numpy as np

from mlalign.corpora.item import Item
from mlalign.durable import write_whole
from mlalign.errors import UserError
from mlalign.languages import language_of
from mlalign.rows import REPORT
from mlalign.sifting import EXACT, NORMALISED, NOT, Seen, Sentences, hashes, normalise, ranks, smallest, tags, together

_SPLITS = ("train", "dev", "test")
_BATCH = 16_384  # rows at a time, of all files together
_KINDS = {EXACT: "exact", NORMALISED: "normalised"}
_OF_SAMPLE, _OF_DEV = 0, 1  # columns of ranks

_encode = json.JSONEncoder(ensure_ascii=False).encode
_language = cache(language_of)


@dataclass
class Output:
    """One file on its way, and what is counted of it."""

    split: str
    languages: tuple[str, ...]  #: one, or source and target
    read: int = 0
    rows: int = 0
    dropped: Counter[str] = field(default_factory=Counter)  #: reason -> rows
    also_in_test: Counter[str] = field(default_factory=Counter)  #: of dev: "exact" or "normalised" -> rows
    seen: Seen = field(default_factory=Seen, repr=False)  #: of train
    ranks: list[np.ndarray] = field(default_factory=list, repr=False)  #: of train where rows are chosen, [rows, 2]
    sides: list[list["Side"]] = field(default_factory=list, repr=False)  #: of dev, batch by batch

    @property
    def pair(self) -> str:
        """The language, or the two with a hyphen between."""
        return "-".join(self.languages)

    @property
    def name(self) -> str:
        """Of the file."""
        return f"{self.split}.{self.pair}.jsonl"


@dataclass(frozen=True)
class Side:
    """The sentences of a batch in one language: [rows] each."""

    language: str  #: whatever code the data has for it: `eng`, `en` and `en-US` are one
    texts: list[str]
    forms: list[str]  #: their normal forms
    keys: np.ndarray  #: hashes of those


def _sides(languages: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[Side]:
    sides = []
    for code, texts in zip(languages, map(list, zip(*rows))):
        forms = normalise(texts)
        sides.append(Side(_language(code), texts, forms, hashes(forms)))
    return sides


def _found(known: Sentences, sides: list[Side], in_language: bool = True) -> np.ndarray:
    """[rows], int: the most that `known` says of any side."""
    return np.max([known.find(s.language if in_language else None, s.keys, s.texts) for s in sides], axis=0)


class Sieve:
    """The output files of one `mlalign prepare`."""

    def __init__(self, folder: Path, origin: dict[str, str], seed: int, chooses: bool) -> None:
        """folder: a directory that can be written; origin: `dataset` and `source`, as in the report's settings;
        chooses: whether `hold_out` or `sample` will be called.

        Raises UserError where the directory holds files of these names that no earlier run wrote.
        """
        self.outputs: dict[tuple[str, tuple[str, ...]], Output] = {}
        self._folder, self._seed, self._chooses = folder, seed, chooses
        self._earlier = _earlier(folder, origin)
        self._evaluated = {"dev": Sentences(), "test": Sentences()}
        self._against = Sentences()
        self.discard()  # what a run left that was killed

    # ---------------------------------------------------------------------------------------------------------- rows

    def keep_out(self, texts: Iterable[str]) -> int:
        """Remember sentences that train must not hold, whatever their language; returns how many there are."""
        count = 0
        for batch in _batches(texts):
            count += len(batch)
            self._against.add(None, hashes(normalise(batch)), hashes(batch))
        return count

    def take(self, items: Iterable[Item]) -> Iterator[int]:
        """Write what is kept of the items; yields now and then how many there were.

        Raises UserError for an empty sentence in dev or test, and where files cannot be written.
        """
        count = 0
        for batch in _batches(items):
            parts: dict[tuple[str, tuple[str, ...]], list[Item]] = {}
            for item in batch:
                parts.setdefault((item.split, item.languages), []).append(item)
            for key, part in parts.items():
                output = self.outputs.setdefault(key, Output(*key))
                output.read += len(part)
                sides = _sides(output.languages, (item.texts for item in part))
                if output.split == "train":
                    part = self._sifted(output, part, sides)
                else:
                    self._remember(output, part, sides)
                if part:
                    self._write(output, part)
            count += len(batch)
            yield count

    def _remember(self, output: Output, items: list[Item], sides: list[Side]) -> None:
        for side in sides:
            if not all(side.forms):
                where = items[side.forms.index("")].where
                raise UserError(
                    f"{where}: a sentence of {output.split} is empty, and evaluation sets are kept whole: mend it"
                )
            self._evaluated[output.split].add(side.language, side.keys, hashes(side.texts))
        if output.split == "dev":
            output.sides.append(sides)

    def _sifted(self, output: Output, items: list[Item], sides: list[Side]) -> list[Item]:
        """The rows of train that stay; each that does not is counted under the first reason that holds."""
        kept = np.ones(len(items), dtype=bool)

        def drop(reason: str, which: np.ndarray) -> None:
            which = kept & which
            if which.any():
                output.dropped[reason] += int(which.sum())
                kept[which] = False

        for side in sides:
            if not all(side.forms):
                drop("empty", np.array([not form for form in side.forms]))
        if len(sides) == 2:
            drop("same on both sides", sides[0].keys == sides[1].keys)
        for place, found in (
            *((split, _found(known, sides)) for split, known in self._evaluated.items()),
            ("--against", _found(self._against, sides, in_language=False)),
        ):
            for kind, name in _KINDS.items():
                drop(f"in {place}, {name}", found == kind)
        at = np.flatnonzero(kept)
        keys = together([side.keys[at] for side in sides])
        new, repeated = output.seen.add(keys, tags(item.texts for item, keep in zip(items, kept.tolist()) if keep))
        for reason, which in (("duplicate, exact", repeated), ("duplicate, normalised", ~new & ~repeated)):
            mask = np.zeros(len(items), dtype=bool)
            mask[at] = which
            drop(reason, mask)
        return [item for item, keep in zip(items, kept.tolist()) if keep]

    def _write(self, output: Output, items: list[Item]) -> None:
        output.rows += len(items)
        if self._chooses and output.split == "train":
            output.ranks.append(ranks([item.row["id"] for item in items], self._seed))
        with self._writing(), self._partial(output).open("ab") as file:
            file.write("".join(f"{_encode(item.row)}\n" for item in items).encode())

    # ------------------------------------------------------------------------------------------------------- choices

    def train(self) -> list[Output]:
        """The outputs of train that have rows."""
        return [output for output in self.outputs.values() if output.split == "train" and output.rows]

    def hold_out(self, count: int) -> None:
        """Move `count` pairs of each language pair to dev, and drop those of train that share a sentence with any.

        Raises UserError where there are too few, or a dev split is there already.
        """
        held, chosen = Sentences(), {}
        for output in self.train():
            dev = Output("dev", output.languages, read=count, rows=count)
            if ("dev", output.languages) in self.outputs:
                raise UserError(f"{output.pair} has a dev split of its own: leave out --dev")
            if output.rows <= count:
                raise UserError(f"{output.pair} has {output.rows} pairs, too few to hold out {count}: lower --dev")
            chosen[output.pair] = smallest(np.concatenate(output.ranks)[:, _OF_DEV], count)
            with self._writing(), self._partial(output).open("rb") as file, self._partial(dev).open("wb") as other:
                lines = [line for line, mine in zip(file, chosen[output.pair].tobytes()) if mine]
                other.writelines(lines)
            for side in _sides(output.languages, map(_texts, lines)):
                held.add(side.language, side.keys, hashes(side.texts))
            self.outputs["dev", output.languages] = dev
        for output in self.train():
            shared = []
            with self._writing(), self._partial(output).open("rb") as file:
                for batch in _batches(file):
                    shared.append(_found(held, _sides(output.languages, map(_texts, batch))) != NOT)
            mine = chosen[output.pair]
            shares = np.concatenate(shared) & ~mine
            output.dropped += Counter({"held out as dev": int(mine.sum()), "shares a side with dev": int(shares.sum())})
            self._cut(output, ~mine & ~shares)

    def sample(self, max_rows: int | None, balance: bool) -> None:
        """Keep at most `max_rows` rows of each train file, and as many of each as the smallest has if `balance`.

        Raises UserError where the smallest has none.
        """
        sizes = {output.pair: output.rows for output in self.outputs.values() if output.split == "train"}
        limits = [*([] if max_rows is None else [max_rows]), *(sizes.values() if balance else [])]
        if not sizes or not min(limits):
            what = f"{min(sizes, key=sizes.get)} has no rows left" if sizes else "there are no rows"
            raise UserError(f"{what} in train, so there is nothing to sample: leave out --balance and --max-rows")
        limit = min(limits)
        for output in self.train():
            if output.rows > limit:
                output.dropped["not sampled"] += output.rows - limit
                self._cut(output, smallest(np.concatenate(output.ranks)[:, _OF_SAMPLE], limit))

    def _cut(self, output: Output, kept: np.ndarray) -> None:
        """Leave those rows of a file. Args: kept: [rows], bool."""
        path = self._partial(output)
        shorter = path.with_name(f"{output.name}.shorter.partial")
        with self._writing(), path.open("rb") as file, shorter.open("wb") as other:
            other.writelines(line for line, keep in zip(file, kept.tobytes()) if keep)
        with self._writing():
            shorter.rename(path)
        output.ranks = [np.concatenate(output.ranks)[kept]]
        output.rows = int(kept.sum())

    def count_overlap(self) -> None:
        """Count the rows of dev that have a sentence of test, in the same language; they stay."""
        for output in self.outputs.values():
            for sides in output.sides:
                found = _found(self._evaluated["test"], sides)
                output.also_in_test += Counter({name: int((found == kind).sum()) for kind, name in _KINDS.items()})

    # --------------------------------------------------------------------------------------------------------- files

    def publish(self, report: dict) -> None:
        """Give the files their names in place of those of an earlier run, and write `prepare.json` last.

        Raises UserError where that cannot be; then none of the files is there.
        """
        written = [output for output in self.outputs.values() if output.rows]
        all_names = report["files"] | dict.fromkeys(self._earlier)
        note = (self._folder / REPORT).with_suffix(".partial")
        with self._writing():
            try:  # should this be killed in the middle, the next run knows whose files they are
                note.write_text(json.dumps(report | {"files": all_names}))
            except OSError:
                note.unlink(missing_ok=True)
                raise
            (self._folder / REPORT).unlink(missing_ok=True)
            for name in self._earlier:
                (self._folder / name).unlink(missing_ok=True)
            try:
                for output in written:
                    self._partial(output).rename(self._folder / output.name)
                write_whole(self._folder / REPORT, json.dumps(report, ensure_ascii=False, indent=1) + "\n")
            except BaseException:  # Ctrl-C too
                for output in written:
                    (self._folder / output.name).unlink(missing_ok=True)
                note.unlink(missing_ok=True)
                raise

    def discard(self) -> None:
        """Remove what is not published."""
        if (self._folder / REPORT).exists():  # else it says whose the files are that were given names
            (self._folder / REPORT).with_suffix(".partial").unlink(missing_ok=True)
        for split in _SPLITS:
            for path in self._folder.glob(f"{split}.*.jsonl*.partial"):
                path.unlink(missing_ok=True)

    def _partial(self, output: Output) -> Path:
        return self._folder / f"{output.name}.partial"

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(f"output {self._folder} cannot be written: {error.strerror or error}") from error


def _earlier(folder: Path, origin: dict[str, str]) -> set[str]:
    """Files that an earlier run wrote into the directory, which this one will replace."""
    known = folder / REPORT
    try:
        report = json.loads((known if known.exists() else known.with_suffix(".partial")).read_text())
        listed = set(report["files"])
        before = {name: report["settings"][name] for name in origin}
    except (OSError, ValueError, KeyError, TypeError):
        listed, before = set(), origin
    if before != origin:
        raise UserError(
            f"output {folder} holds what was made of {' '.join(before.values())}, and would lose it: choose another "
            f"directory for {' '.join(origin.values())}"
        )
    there = {path.name for split in _SPLITS for path in folder.glob(f"{split}.*.jsonl")}
    strange = sorted(there - listed)
    if strange:
        raise UserError(
            f"output {folder} holds {strange[0]}, which no `mlalign prepare` wrote: choose another directory"
        )
    return there


def _batches(rows: Iterable) -> Iterator[list]:
    rows = iter(rows)
    while batch := list(islice(rows, _BATCH)):
        yield batch


def _texts(line: bytes) -> tuple[str, str]:
    row = json.loads(line)
    return row["src"], row["tgt"]
