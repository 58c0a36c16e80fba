"""Tasks: how answers are written, and how they are scored. One module each, all with the same few names:

MAIN                                        the metric that reports lead with and merge weights are tuned by
LOWER_IS_BETTER                             metrics that are shares of something bad
row(..., form) -> dict                      prompt and answer of a task row; `items` has none
gold(row, answer, where) -> dict            what scoring needs of a test row, checked
statistics(predictions, golds, language)    counts of each row: name -> [rows] or [rows, counts]
metrics(totals, rows)                       name -> score, from sums of such counts, one sum or an array of them
describe(language, golds)                   metric -> signature

Scores follow from sums over rows, so that a bootstrap resamples rows and never generates or scores a text again.
"""

from importlib import import_module
from types import ModuleType

from mlalign.errors import UserError

NAMES = ("slot_filling", "translation", "json_extraction", "items")


def load_task(name: str) -> ModuleType:
    """The module of a task; only that one is imported. Raises UserError for an unknown name."""
    if name not in NAMES:
        raise UserError(f"task {name} is not one of {', '.join(NAMES)}")
    return import_module(f"mlalign.tasks.{name}")
