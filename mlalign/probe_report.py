"""From layers of states to what a probe says: measures, means over groups, the layer to align, correlation.

All but the scores to correlate with, which are read here, is plain numbers; `commands/probe.py` reads and writes,
`retrieval.py` holds the measures themselves.
"""

import json
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy import stats

from mlalign import retrieval
from mlalign.errors import UserError
from mlalign.languages import groups, language_of, script_of
from mlalign.parallel import Parallel
from mlalign.scoring import sides

#: Measured for every direction; `separability` is measured for every language.
DIRECTED = ("cosine", "margin_distance", "margin_ratio", "xsim", "mexa", "cka", "anisotropy")
MEASURES = (*DIRECTED, "separability")
DECISIVE = "margin_ratio"  #: what the paper draws and the recommendation goes by
EVERY = "all"  #: the group of all languages


@dataclass(frozen=True)
class Curves:
    """What was measured of one model with one pooling, layer by layer."""

    languages: list[str]
    directions: dict[str, np.ndarray]  #: measure -> [layers, src, tgt]; NaN where nothing was measured
    separability: np.ndarray  #: [layers, languages]

    def by_language(self, measure: str) -> np.ndarray:
        """[layers, languages]: the mean over the directions from and to a language."""
        if measure == "separability":
            return self.separability
        values = _without_diagonal(self.directions[measure])
        return _mean(np.concatenate([values, values.transpose(0, 2, 1)], axis=2), axis=2)

    def mean(self, measure: str, members: list[str] | None = None) -> np.ndarray:
        """[layers]: the mean over all directions, or over the languages of a group."""
        if members is None and measure != "separability":
            return _mean(_without_diagonal(self.directions[measure]), axis=(1, 2))
        index = [self.languages.index(language) for language in members or self.languages]
        return _mean(self.by_language(measure)[:, index], axis=1)


def measure_layer(
    parallel: Parallel, load: Callable[[str], torch.Tensor], device: torch.device
) -> dict[str, np.ndarray]:
    """All measures of one layer: name -> [languages, languages], NaN where `parallel` has no such direction.

    `anisotropy` has a diagonal, the mean within each language; `separability` is [languages].
    Args: load: language -> the layer's states [distinct sentences, hidden].
    """
    languages = parallel.languages
    shape = (len(languages), len(languages))
    sums = {name: np.zeros(shape) for name in DIRECTED}
    counts = {name: np.zeros(shape) for name in DIRECTED}
    for table in parallel.tables:
        ids = torch.tensor([table[language] for language in sorted(table)], device=device)
        rows = None
        for number, language in enumerate(sorted(table)):
            states = load(language).to(device)[ids[number]]
            rows = states.new_empty(len(table), *states.shape) if rows is None else rows
            rows[number] = states
        place = np.ix_(*[[languages.index(language) for language in sorted(table)]] * 2)
        measured = retrieval.retrieval(rows, ids)
        measured |= {"cka": retrieval.linear_cka(rows), "anisotropy": retrieval.anisotropy(rows)}
        del rows
        for name, values in measured.items():
            known = ~np.isnan(values.numpy())
            sums[name][place] += np.where(known, values.numpy(), 0)
            counts[name][place] += known
    with np.errstate(invalid="ignore"):
        means = {name: sums[name] / counts[name] for name in DIRECTED}  # 0 / 0, NaN, where nothing was measured
    return means | {
        "separability": retrieval.separability([load(language).to(device) for language in languages]).numpy()
    }


def language_groups(languages: list[str]) -> dict[str, list[str]]:
    """`all`, then those of `languages.groups` that are not all languages again."""
    parts = groups(languages)
    return {EVERY: languages} | {name: part for name, part in parts.items() if len(part) < len(languages)}


def recommend(curves: Curves, layers: list[int], depth: int, tables: list[int]) -> dict:
    """The layer to align, its accuracy, and why: the lowest one within a standard error of the best.

    That is the one-standard-error rule (Breiman et al. 1984, "Classification and Regression Trees", section 3.4.3): of
    what cannot be told apart, the cheapest. Where nothing is better than chance, it is the layer nearest to half depth.

    Args: tables: per table of parallel sentences, how many it has.
    """
    accuracy, told = curves.mean(DECISIVE), curves.mean("separability")
    usable = [i for i, layer in enumerate(layers) if layer >= 1] or [0]
    best = max(usable, key=lambda i: accuracy[i])
    chance = 1 / min(tables)
    # Directions share their sentences, so a language's sentences count once and not once per direction.
    trials = sum(tables) * len(curves.languages) / len(tables)
    error = math.sqrt(accuracy[best] * (1 - accuracy[best]) / trials)
    if accuracy[best] < chance + 3 * math.sqrt(chance * (1 - chance) / trials):
        chosen = min(usable, key=lambda i: (abs(2 * layers[i] - depth), layers[i]))
        why = (
            f"no layer finds translations better than chance (best {accuracy[best]:.4f} at layer {layers[best]}, "
            f"chance {chance:.4f}), so this is the one nearest to half the depth"
        )
    else:
        chosen = next(i for i in usable if accuracy[i] >= accuracy[best] - error)
        why = f"translations find each other best here, margin-ratio accuracy {accuracy[chosen]:.3f}"
        if chosen != best:
            why = (
                f"the lowest layer whose margin-ratio accuracy, {accuracy[chosen]:.3f}, is within a standard error "
                f"({error:.3f}) of the best, {accuracy[best]:.3f} at layer {layers[best]}: to end lower costs less"
            )
        if chosen != usable[-1]:
            why += (
                f"; at layer {layers[usable[-1]]} it is {accuracy[usable[-1]]:.3f}, and a linear classifier tells the "
                f"language of {told[usable[-1]]:.0%} of the sentences there, of {told[chosen]:.0%} here"
            )
    return {"layer": layers[chosen], "accuracy": float(accuracy[chosen]), "reason": why}


def read_report(path: Path, metric: str | None) -> tuple[str, dict[str, float]]:
    """(metric, language -> score) of what `mlalign evaluate` wrote, or of any {metric: {language: score}}.

    Of translation, a language's score is the mean over the directions that it is in, beside English's own.
    Raises UserError for a file that is none, a metric that is not there, and a score that is no number.
    """
    path = path if path.suffix == ".json" else path / "report.json"
    try:
        report = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"report {path} cannot be read: {error}") from error
    directions = isinstance(report, dict) and report.get("task") == "translation"
    report = report.get("scores", report) if isinstance(report, dict) else {}
    metrics = {name: scores for name, scores in report.items() if isinstance(scores, dict)}
    if metric is None and metrics:
        metric = next(iter(metrics))
    if metric not in metrics:
        raise UserError(f"report {path} has no metric {metric}, but {', '.join(metrics) or 'none at all'}")
    for language, score in metrics[metric].items():
        if isinstance(score, bool) or not isinstance(score, int | float) or not math.isfinite(score):
            raise UserError(f"report {path}: {metric} of {language} is {score!r}, which is no number")
    if not directions:
        return metric, metrics[metric]
    by_language: dict[str, list[float]] = {}
    for direction, score in metrics[metric].items():
        for language in sides(direction, directions=True):
            by_language.setdefault(language, []).append(score)
    return metric, {language: sum(scores) / len(scores) for language, scores in by_language.items()}


def shared_languages(languages: list[str], scores: dict[str, float]) -> list[tuple[str, str]]:
    """(the probe's code, the scores' code) of languages in both; `de` and `deu_Latn` are the same language."""
    theirs = {_key(code): code for code in scores}
    pairs = [(code, code if code in scores else theirs.get(_key(code))) for code in languages]
    return [(ours, code) for ours, code in pairs if code is not None]


def correlate(curves: Curves, scores: dict[str, float]) -> dict:
    """Correlation over languages between accuracy at each layer and a task's score, with two-sided p-values.

    The p-values are those of a permutation test (all orders up to 8 languages, 99,999 random ones above), for the usual
    approximations need more languages than there are data for.

    Args: scores: language -> score, for three languages of the probe at least, see `shared_languages`.
    Returns: by layer `pearson`, `pearson_p`, `spearman`, `spearman_p`; NaN where all accuracies or scores are the same.
    """
    pairs = shared_languages(curves.languages, scores)
    index = [curves.languages.index(ours) for ours, _ in pairs]
    y = np.array([scores[code] for _, code in pairs])
    result: dict[str, list[float]] = {"pearson": [], "pearson_p": [], "spearman": [], "spearman_p": []}
    for x in curves.by_language(DECISIVE)[:, index]:
        for name, ours, theirs in (("pearson", x, y), ("spearman", stats.rankdata(x), stats.rankdata(y))):
            statistic, p_value = _permutation_test(ours, theirs)
            result[name].append(statistic)
            result[f"{name}_p"].append(p_value)
    return result


def _permutation_test(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return math.nan, math.nan
    y = (y - y.mean()) / np.linalg.norm(y - y.mean())

    def correlation(x: np.ndarray, axis: int) -> np.ndarray:
        x = x - x.mean(axis, keepdims=True)
        return (x * y).sum(axis) / np.linalg.norm(x, axis=axis)

    test = stats.permutation_test(
        (x,), correlation, permutation_type="pairings", vectorized=True, n_resamples=99_999, rng=0
    )
    return float(test.statistic), float(test.pvalue)


def _key(code: str) -> tuple[str, str | None]:
    return language_of(code), script_of(code)


def _without_diagonal(values: np.ndarray) -> np.ndarray:
    kept = values.copy()
    index = np.arange(values.shape[-1])
    kept[:, index, index] = np.nan
    return kept


def _mean(values: np.ndarray, axis: int | tuple[int, ...]) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the mean of nothing is NaN, and means nothing was measured
        return np.nanmean(values, axis=axis)
