"""Predictions on disk: `DIR/predictions/<language>.jsonl`, one line per test row, written whole or not at all.

A line is {"id", "lang", "prediction", "gold"}: with `gold` beside the answer, nothing else is needed to score it.
`DIR/evaluation.json` says what they were made with, and how many rows each file must have. To score the answers of
another system, write such files and `{"task": "translation", "rows": {"en-de": 500}}`, and use --score-only.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np

from mlalign.durable import write_whole
from mlalign.errors import UserError
from mlalign.hostile import checked_name
from mlalign.rows import read_file, row_id


@dataclass(frozen=True)
class Predictions:
    """Answers of one language and what they are scored against, in the order of the test rows."""

    ids: list[str | None]  #: see `rows.row_id`
    texts: list[str]
    golds: list[dict]


def prediction_file(folder: Path, language: str) -> Path:
    return folder / "predictions" / f"{language}.jsonl"


def write_predictions(folder: Path, language: str, predictions: Predictions) -> None:
    """Write one language's file. Raises OSError where the disk does not take it."""
    path = prediction_file(folder, language)
    path.parent.mkdir(exist_ok=True)
    lines = [
        {"id": own_id, "lang": language, "prediction": text, "gold": gold}
        for own_id, text, gold in zip(predictions.ids, predictions.texts, predictions.golds, strict=True)
    ]
    write_whole(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def read_predictions(folder: Path, language: str, rows: int) -> Predictions:
    """Read one language's file. Raises UserError for one that is missing, cut short, or lacks a field."""
    path = prediction_file(folder, language)
    if not path.is_file():
        raise UserError(f"{path} is missing: run the same `mlalign evaluate` again, it makes what is not there")
    found = Predictions([], [], [])
    for where, line in read_file(path):
        if not isinstance(line.get("prediction"), str) or not isinstance(line.get("gold"), dict):
            raise UserError(f"{where}: expected text in 'prediction' and an object in 'gold', found {', '.join(line)}")
        found.ids.append(row_id(line))
        found.texts.append(line["prediction"])
        found.golds.append(line["gold"])
    if len(found.texts) != rows:
        raise UserError(
            f"{path} holds {len(found.texts)} of {rows} predictions: delete it and repeat `mlalign evaluate`, which "
            "makes what is not there"
        )
    if not rows:
        raise UserError(f"{path} holds no predictions")
    return found


def statistics(task: ModuleType, predictions: Predictions, language: str, folder: Path) -> dict[str, np.ndarray]:
    """`tasks.X.statistics` of one language. Raises UserError for golds that are not the task's."""
    try:
        return task.statistics(predictions.texts, predictions.golds, language)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        name = task.__name__.rpartition(".")[2]
        raise UserError(
            f"{prediction_file(folder, language)}: a 'gold' is not of task {name}: {error or type(error).__name__}"
        ) from error


def read_evaluation(folder: Path) -> dict:
    """What `evaluation.json` holds. Raises UserError where `folder` is no evaluation."""
    path = folder / "evaluation.json"
    try:
        evaluation = json.loads(path.read_text())
        if not (isinstance(evaluation["task"], str) and isinstance(evaluation["rows"], dict)):
            raise KeyError("task, rows")
        for language in evaluation["rows"]:
            checked_name(language, str(path))
    except FileNotFoundError as error:
        raise UserError(f"{folder} holds no evaluation.json: name a directory that `mlalign evaluate` wrote") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read as the settings of an evaluation: {error}") from error
    return evaluation
