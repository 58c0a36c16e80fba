"""From counts of rows to scores with intervals: means over groups of languages, and paired differences of two systems.

Everything follows from `tasks.X.statistics`: a bootstrap sample takes every row 0, 1, 2, ... times, and its score is
`tasks.X.metrics` of the rows' sums (Efron 1979; for comparing systems, Koehn 2004). How often a row is taken depends on
its id: the same for every system, so that differences are paired, and the same in every language, for rows of one id
translate each other in many test sets, are hard or easy together, and languages are not independent of each other.
"""

import hashlib
import re
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType

import numpy as np

from mlalign.languages import groups, language_of, script_of

SAMPLES = 1000
_DIRECTION = re.compile(r"([a-z]{2,3}(?:_[A-Z][a-z]{3})?)-([a-z]{2,3}(?:_[A-Z][a-z]{3})?)")

Counts = dict[str, np.ndarray]  # name -> [rows] or [rows, counts]


@dataclass(frozen=True)
class Scores:
    """Scores of one language, or means over a group of them."""

    point: dict[str, float]  #: metric -> score of all rows
    samples: dict[str, np.ndarray]  #: metric -> [samples], scores of the bootstrap samples

    def interval(self, metric: str) -> tuple[float, float]:
        """The middle 95% of the bootstrap samples."""
        low, high = np.percentile(self.samples[metric], [2.5, 97.5])
        return float(low), float(high)


def f1(right: np.ndarray, found: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Micro F1; 1 where there was nothing to find and nothing was found."""
    both = np.asarray(found + wanted, dtype=float)
    return np.where(both > 0, 2 * right / np.maximum(both, 1), 1.0)


def score(
    task: ModuleType, counts: Counts, ids: list[str | None], language: str, seed: int, samples: int = SAMPLES
) -> Scores:
    """Score one language. Args: ids: see `rows.row_id`; a row without one is taken independently of all others."""
    rows = len(ids)
    point = {name: float(value) for name, value in task.metrics({n: c.sum(0) for n, c in counts.items()}, rows).items()}
    keys = [f"{language} {number}" if own_id is None else own_id for number, own_id in enumerate(ids)]
    taken = np.stack([_times(f"{seed} {key}", samples) for key in keys], axis=1).astype(float)
    taken[taken.sum(1) == 0] = 1  # of a few rows, none may be taken
    sums = {name: taken @ count for name, count in counts.items()}
    return Scores(point, {name: np.asarray(value) for name, value in task.metrics(sums, taken.sum(1)).items()})


@lru_cache(maxsize=100_000)
def _times(key: str, samples: int) -> np.ndarray:
    """How often each sample takes a row, [samples]: Poisson(1), the bootstrap whose rows need not know of each other.

    Chamandy et al. 2012, "Estimating Uncertainty for Massive Data Streams".
    """
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return np.random.default_rng(int.from_bytes(digest, "big")).poisson(1.0, samples).astype(np.uint8)


def mean(scores: list[Scores]) -> Scores:
    """The mean over languages, each with the same weight; of metrics that all of them have."""
    metrics = [name for name in scores[0].point if all(name in each.point for each in scores)]
    return Scores(
        {name: float(np.mean([each.point[name] for each in scores])) for name in metrics},
        {name: np.mean([each.samples[name] for each in scores], axis=0) for name in metrics},
    )


@dataclass(frozen=True)
class Difference:
    """How much a system scores above another, on the same rows."""

    delta: float
    low: float  #: of the 95% interval
    high: float
    p: float  #: two-sided, by paired bootstrap


def difference(system: Scores, baseline: Scores, metric: str) -> Difference:
    """`system` minus `baseline`. p is twice the share of samples on the other side of 0, the observed one counted.

    So it is never 0 (Davison and Hinkley 1997, section 4.4).
    """
    deltas = system.samples[metric] - baseline.samples[metric]
    low, high = np.percentile(deltas, [2.5, 97.5])
    against = int(min(np.sum(deltas <= 0), np.sum(deltas >= 0)))
    p = min(1.0, 2 * (against + 1) / (len(deltas) + 1))
    return Difference(system.point[metric] - baseline.point[metric], float(low), float(high), p)


def language_groups(
    codes: list[str], supervised: list[str], aligned: list[str], directions: bool = False
) -> dict[str, list[str]]:
    """Group -> languages, or directions such as `en-cs`, in it, without empty groups.

    `all`; `supervised`: with labels in training; `aligned`: in the bitext and not supervised; `unseen`: in neither;
    then the groups of `languages.groups`. A direction is judged by its sides that are not English.
    Args: supervised: languages or directions of the task's training rows; aligned: languages of the bitext.
    """
    labelled, bitext = {_key(code, directions) for code in supervised}, {_written(code) for code in aligned}
    members: dict[str, list[str]] = {"all": list(codes), "supervised": [], "aligned": [], "unseen": []}
    for code in codes:
        if _key(code, directions) in labelled:
            members["supervised"].append(code)
        elif all(_written(side) in bitext for side in sides(code, directions)):
            members["aligned"].append(code)
        else:
            members["unseen"].append(code)
    if not supervised and not aligned:  # nothing is known of the training
        members = {"all": list(codes)}
    by_side = groups(sorted({side for code in codes for side in sides(code, directions)}))
    for name, languages in by_side.items():
        members[name] = [code for code in codes if any(side in languages for side in sides(code, directions))]
    return {name: languages for name, languages in members.items() if languages}


def sides(code: str, directions: bool) -> list[str]:
    """`en-cs` -> [cs]; `de-fr` -> [de, fr]; where codes are no directions, the language itself."""
    found = _DIRECTION.fullmatch(code) if directions else None
    if not found:
        return [code]
    return [side for side in found.groups() if language_of(side) != "en"] or list(found.groups())


def _key(code: str, directions: bool) -> tuple[str, ...]:
    """Equal for codes of the same language or direction, however they are written; zh-TW is not zh."""
    found = _DIRECTION.fullmatch(code) if directions else None
    return tuple(_written(side) for side in found.groups()) if found else (_written(code),)


def _written(code: str) -> str:
    language = language_of(code)
    return "zh-TW" if language == "zh" and script_of(code) == "Hant" else language
