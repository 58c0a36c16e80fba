"""Slot filling: answers are items between semicolons, such as `time: nine am; date: friday`, or `None`."""

from collections import Counter


def items(answer: str) -> Counter[str]:
    """The items of an answer, up to case and spacing; `None` and an empty answer have none."""
    parts = (" ".join(part.casefold().split()) for part in answer.split(";"))
    return Counter(part for part in parts if part and part != "none")


def score(predictions: list[str], references: list[str]) -> dict[str, float]:
    """Micro F1 over items, and the share of answers that are right as a whole. Both lists are in the same order."""
    found = wanted = right = exact = 0
    for prediction, reference in zip(predictions, references, strict=True):
        predicted, expected = items(prediction), items(reference)
        found += predicted.total()
        wanted += expected.total()
        right += (predicted & expected).total()
        exact += predicted == expected
    f1 = 2 * right / (found + wanted) if found + wanted else 1.0
    return {"f1": f1, "exact_match": exact / len(references)}
