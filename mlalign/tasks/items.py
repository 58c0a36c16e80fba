"""Answers that are items between semicolons, such as `alarm_set; date; time`, or `None`: F1 over items.

For answers that are not words of the input, which `slot_filling` is for.
"""

from collections import Counter

import numpy as np

from mlalign.scoring import f1

MAIN = "f1"
LOWER_IS_BETTER = ()


def gold(row: dict, answer: str, where: str) -> dict:
    """What scoring needs of a test row: its answer."""
    return {"answer": answer}


def items(answer: str) -> Counter[str]:
    """The items of an answer, up to case and spacing; `None` and an empty answer have none."""
    parts = (" ".join(part.casefold().split()) for part in answer.split(";"))
    return Counter(part for part in parts if part and part != "none")


def statistics(predictions: list[str], golds: list[dict], language: str) -> dict[str, np.ndarray]:
    """Counts of each row, [rows]: items right, found and wanted, and whether the answer is right."""
    counts = {name: np.zeros(len(golds)) for name in ("right", "found", "wanted", "exact")}
    for number, (prediction, each) in enumerate(zip(predictions, golds, strict=True)):
        found, wanted = items(prediction), items(each["answer"])
        counts["right"][number] = (found & wanted).total()
        counts["found"][number] = found.total()
        counts["wanted"][number] = wanted.total()
        counts["exact"][number] = found == wanted
    return counts


def metrics(totals: dict[str, np.ndarray], rows: int | np.ndarray) -> dict[str, np.ndarray]:
    """Metrics from sums of `statistics` over rows; every value may be an array of many such sums."""
    return {
        "f1": f1(totals["right"], totals["found"], totals["wanted"]),
        "exact_match": totals["exact"] / rows,
    }


def describe(language: str, golds: list[dict]) -> dict[str, str]:
    """How each metric is computed, for the report."""
    return {"f1": "micro F1 over items between semicolons, up to case and spacing"}
