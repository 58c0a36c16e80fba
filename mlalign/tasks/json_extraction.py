"""JSON extraction: `{"Results": [{"TypeName": "LOC", "Text": "tampa bay"}]}`. Validity, schema, micro F1 of entities.

The form is that of Universal NER's instruction data, which the paper generates. Entities are compared as (type, text),
repeated ones counted.
"""

import json
from collections import Counter

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mlalign.errors import UserError
from mlalign.scoring import f1
from mlalign.tasks.prompts import task_row

MAIN = "f1"
LOWER_IS_BETTER = ()

_INSTRUCTION = (
    "Find the named entities in the user's text: persons (PER), organizations (ORG) and locations (LOC). Answer with "
    'JSON alone, in this form: {"Results": [{"TypeName": "PER", "Text": "..."}]}, with the entities in order and each '
    'Text in the words of the text, or {"Results": []} if there are none.'
)


class _Entity(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    TypeName: str = Field(min_length=1)
    Text: str = Field(min_length=1)


class _Answer(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    Results: list[_Entity]


def row(text: str, entities: list[tuple[str, str]], form: str) -> dict:
    """A task row's prompt and answer. Args: entities: (type, text) in order; form: `prompts.FORMS`."""
    results = [{"TypeName": kind, "Text": value} for kind, value in entities]
    answer = json.dumps({"Results": results}, ensure_ascii=False)
    return task_row(form, _INSTRUCTION, f"Text: {text}\nEntities:", text, answer)


def gold(row: dict, answer: str, where: str) -> dict:
    """What scoring needs of a test row: its entities. Raises UserError where the answer is not of the form."""
    _, conforms, entities = parse(answer)
    if not conforms:
        raise UserError(
            f"{where}: the answer is {answer[:80]!r}, expected JSON such as "
            '{"Results": [{"TypeName": "LOC", "Text": "Paris"}]}'
        )
    return {"entities": [list(entity) for entity in entities.elements()]}


def parse(answer: str) -> tuple[bool, bool, Counter[tuple[str, str]]]:
    """Whether an answer is JSON, whether it has the form, and its entities; none where it has not.

    A Markdown fence around the JSON is not taken away: a program that reads the answer would fail on it.
    """
    try:
        value = json.loads(answer)
    except (ValueError, RecursionError):
        return False, False, Counter()
    try:
        results = _Answer.model_validate(value).Results
    except ValidationError:
        return True, False, Counter()
    return True, True, Counter((each.TypeName, " ".join(each.Text.split())) for each in results)


def statistics(predictions: list[str], golds: list[dict], language: str) -> dict[str, np.ndarray]:
    """Counts of each row, [rows]: entities right, found, wanted, of all types and each; JSON; schema; all right."""
    pairs = []
    for prediction, each in zip(predictions, golds, strict=True):
        wanted = Counter((kind, text) for kind, text in each["entities"])
        pairs.append((*parse(prediction), wanted))
    counts = {
        "valid": np.array([valid for valid, *_ in pairs], dtype=float),
        "conforms": np.array([conforms for _, conforms, *_ in pairs], dtype=float),
        "exact": np.array([conforms and found == wanted for _, conforms, found, wanted in pairs], dtype=float),
    }
    for kind in ("", *sorted({kind for *_, wanted in pairs for kind, _ in wanted})):
        right, found, wanted = np.zeros((3, len(pairs)))
        for number, (_, _, predicted, expected) in enumerate(pairs):
            found[number] = _of(predicted, kind)
            wanted[number] = _of(expected, kind)
            right[number] = _of(predicted & expected, kind)
        counts |= {f"right {kind}": right, f"found {kind}": found, f"wanted {kind}": wanted}
    return counts


def _of(entities: Counter[tuple[str, str]], kind: str) -> int:
    return sum(count for (each, _), count in entities.items() if each == kind or not kind)


def metrics(totals: dict[str, np.ndarray], rows: int | np.ndarray) -> dict[str, np.ndarray]:
    """Metrics from sums of `statistics` over rows; every value may be an array of many such sums."""
    kinds = [name.removeprefix("wanted ") for name in totals if name.startswith("wanted ")]
    scores = {
        f"f1 {kind}".strip(): f1(totals[f"right {kind}"], totals[f"found {kind}"], totals[f"wanted {kind}"])
        for kind in kinds
    }
    return {
        "f1": scores.pop("f1"),
        "valid_json": totals["valid"] / rows,
        "schema": totals["conforms"] / rows,
        "exact_match": totals["exact"] / rows,
        **scores,
    }


def describe(language: str, golds: list[dict]) -> dict[str, str]:
    """How each metric is computed, for the report."""
    return {"f1": "micro F1 over (type, text) of entities", "schema": "share of answers of the asked form"}
