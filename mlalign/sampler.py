"""One global, stateful order of examples: the same for every number of ranks, balanced over languages, resumable.

Every rank walks the whole order and takes its slice of each batch, so the examples of a step depend on (seed, epoch,
position) alone. Order and slicing are pure functions; `GlobalOrder` adds the position.
"""

import zlib
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import TypeVar

import numpy as np

from mlalign.errors import UserError
from mlalign.examples import PackedRows

Example = TypeVar("Example")

_WINDOW = 50  #: batches among which lengths are grouped


def language_quotas(counts: dict[str, int], temperature: float) -> dict[str, int]:
    """Rows per language and epoch: proportional to count ** temperature, adding up to all rows.

    Temperature 1 keeps the proportions, 0 gives every language the same share (Conneau et al. 2020, section 3.1).
    """
    total = sum(counts.values())
    weights = {language: count**temperature for language, count in counts.items()}
    shares = {language: total * weight / sum(weights.values()) for language, weight in weights.items()}
    quotas = {language: int(share) for language, share in shares.items()}
    by_remainder = sorted(shares, key=lambda language: (quotas[language] - shares[language], language))
    for language in by_remainder[: total - sum(quotas.values())]:
        quotas[language] += 1
    return quotas


def epoch_order(
    members: dict[str, np.ndarray], lengths: np.ndarray, batch_size: int, temperature: float, seed: int, epoch: int
) -> np.ndarray:
    """Indices of the examples of one epoch, [examples], in training order.

    members: indices of each language's examples; lengths: of all examples, [examples]. Each language walks through its
    own endless sequence of shuffles, a quota per epoch, so that no example of a language comes up twice before all of
    them have come up once. Batches hold examples of similar length.
    """
    quotas = language_quotas({language: len(indices) for language, indices in members.items()}, temperature)
    chosen = [
        _endless_shuffles(members[language], quota * epoch, quota, [seed, zlib.crc32(language.encode())])
        for language, quota in sorted(quotas.items())
    ]
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(np.concatenate(chosen))
    return _grouped(order, lengths[order], batch_size, rng)


def _endless_shuffles(members: np.ndarray, start: int, count: int, seed: list[int]) -> np.ndarray:
    """Elements start .. start + count of shuffle 0 of `members`, then shuffle 1, and so on."""
    rounds = range(start // len(members), (start + count) // len(members) + 1)
    shuffles = [np.random.default_rng([*seed, number]).permutation(members) for number in rounds]
    offset = start - rounds.start * len(members)
    return np.concatenate(shuffles)[offset : offset + count]


def _grouped(order: np.ndarray, lengths: np.ndarray, batch_size: int, rng: np.random.Generator) -> np.ndarray:
    """`order` with similar lengths in each batch: sorted within windows of batches, the batches shuffled again."""
    result = []
    window = _WINDOW * batch_size
    for start in range(0, len(order), window):
        part = order[start : start + window]
        part = part[np.argsort(lengths[start : start + window], kind="stable")]
        full = len(part) - len(part) % batch_size
        batches = part[:full].reshape(-1, batch_size)
        result += [batches[rng.permutation(len(batches))].ravel(), part[full:]]
    return np.concatenate(result)


def in_memory(
    examples: PackedRows[Example], batch_size: int, temperature: float, seed: int
) -> Callable[[int, int], Iterator[Example]]:
    """Epochs over examples that can be read in any order: a function of (epoch, start) for `GlobalOrder`."""
    members = examples.by_language()

    def epoch(number: int, start: int) -> Iterator[Example]:
        order = epoch_order(members, examples.lengths, batch_size, temperature, seed, number)
        return (examples[index] for index in order[start:])

    return epoch


def streamed(
    read: Callable[[], Iterator[Example]], batch_size: int, seed: int, tick: Callable[[], None] = lambda: None
) -> Callable[[int, int], Iterator[Example]]:
    """Epochs over a stream, shuffled and grouped by length within windows: a function of (epoch, start).

    `tick` is called for each window: to start far into a stream, everything before is read.
    """

    def epoch(number: int, start: int) -> Iterator[Example]:
        rng = np.random.default_rng([seed, number])
        stream = read()

        def walk() -> Iterator[Example]:
            while window := list(islice(stream, _WINDOW * batch_size)):
                tick()
                order = rng.permutation(len(window))
                lengths = np.array([len(window[index]) for index in order])
                yield from (window[index] for index in _grouped(order, lengths, batch_size, rng))

        return islice(walk(), start, None)

    return epoch


class GlobalOrder:
    """Epoch after epoch without end, with a position that can be saved and restored."""

    def __init__(self, epoch: Callable[[int, int], Iterator[Example]]) -> None:
        self._open = epoch
        self.epoch = self.position = 0
        self._stream: Iterator[Example] | None = None

    def take(self, count: int) -> list[Example]:
        """The next `count` examples of the global order; a batch may extend into the next epoch."""
        taken: list[Example] = []
        while len(taken) < count:
            if self._stream is None:
                self._stream = self._open(self.epoch, self.position)
            found = list(islice(self._stream, count - len(taken)))
            self.position += len(found)
            taken += found
            if len(taken) < count:
                if self.position == 0:
                    raise UserError("every row was dropped: there is nothing to train on")
                self.epoch, self.position, self._stream = self.epoch + 1, 0, None
        return taken

    def state(self) -> dict[str, int]:
        return {"epoch": self.epoch, "position": self.position}

    def restore(self, state: dict[str, int]) -> None:
        self.epoch, self.position, self._stream = state["epoch"], state["position"], None


def slices(batch: Sequence[Example], micro_batch_size: int, ranks: int) -> list[list[list[Example]]]:
    """Deal out a global batch: a list of micro-batches, each a list with one share per rank.

    The longest come first and similar lengths together, so that all ranks pad alike. If the batch is a multiple of
    `ranks`, every rank's share of a micro-batch has the same size.
    """
    ordered = sorted(batch, key=len, reverse=True)
    step = micro_batch_size * ranks
    chunks = [ordered[start : start + step] for start in range(0, len(ordered), step)]
    return [[chunk[rank::ranks] for rank in range(ranks)] for chunk in chunks]
